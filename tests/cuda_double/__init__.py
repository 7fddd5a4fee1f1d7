"""A double of `torch.cuda` on a CPU, that behaves as torch does where graphs and CUDA streams go wrong.

Every operator is a launch: it is put behind the launches of its CUDA stream and runs when the host waits for it, in any
order that the waits between streams leave open (`queue`; a seed chooses one). Results are poisoned until then, and so
is memory that is free again (`memory`). So a missing wait, a tensor that was freed too early, or an address that went
stale gives a wrong result here. Whatever could do so in another order is noted as well (`faults`, by `streams`), as are
workspaces that a graph shares with what runs outside (`pools`).

All memory made under the double lies on the device. Memory made outside is taken for a device's too, but is never
freed; of it, single numbers lie on the host, which passes them to kernels by value.
"""

from tests.cuda_double.double import CudaDouble
from tests.cuda_double.replacement import in_place_of_cuda

__all__ = ["CudaDouble", "in_place_of_cuda"]
