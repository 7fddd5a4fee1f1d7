"""A class of each kind, and DiT-XL/2, on a fake `cuda:0`. `test_fake_cuda.py` runs these in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch

from tests.fake_cuda import guard
from tests.fake_cuda.gpu import FakeGpu
from tests.fake_cuda.planned import Planned, planned
from tests.fake_cuda.runs import run
from tests.fake_cuda.valued import DEVICE
from tests.plain_pool import PlainPool
from tests.zoo.entry import TINY, calls_of, model_of
from tests.zoo.table import REPRESENTATIVES, ZOO

guard.load()

IN_FAMILIES = ("DiTTransformer2DModel", "PixArtTransformer2DModel")  # `on_families.py` runs them
# Why something of a class runs without a graph, where it does.
REFUSED = {"GlmImageTransformer2DModel": {"has a size that depends on values"}}
# Most launches of a full step: 7 operators per block, 6 others, and the copy that puts the patches in their places.
DIT_XL = 28 * 7 + 7


@pytest.mark.parametrize("name", [name for name in REPRESENTATIVES if name not in IN_FAMILIES])
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in version 1.0.0:FutureWarning")
def test_a_class_of_each_kind(name: str) -> None:
    gpu, model = FakeGpu(), model_of(name, ZOO[name].config)
    arguments = calls_of(ZOO[name], model, TINY, 1)[0]
    found = planned(gpu, gpu.move(model), arguments)
    for lowering in ("plain", "fused"):
        reasons = {reason.partition(") ")[2] for reason in found.refusals(lowering)}
        assert reasons == REFUSED.get(name, set())


@pytest.fixture
def autocast() -> Iterator[None]:
    """Autocast to bf16 on CUDA. `torch.autocast` refuses without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_autocast(autocast: None) -> None:
    """Its casts are those of CUDA, in the trace, in single steps and in the prologue of all steps."""
    name = "DiTTransformer2DModel"
    gpu, model = FakeGpu(), model_of(name, ZOO[name].config)
    arguments = calls_of(ZOO[name], model, TINY, 1)[0]
    found = planned(gpu, gpu.move(model), arguments)
    linear = found.plan.captured.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert {node.meta["val"].dtype for node in linear} == {torch.bfloat16}
    full, partial = found.launches("fused")  # norms are part of the sums before them, but for the first of a step
    assert full <= 32
    assert partial <= 6
    for lowering in ("plain", "fused"):
        assert found.refusals(lowering) == []
        pool = PlainPool(device=DEVICE)
        (output,) = run(gpu, found.lowered(lowering), model, arguments, pool.graphs)
        assert (output.device, output.dtype) == (DEVICE, torch.bfloat16)


def dit_xl(layers: int) -> Planned:
    """DiT-XL/2 at 256 x 256 with this number of blocks, in bf16, guided."""
    config = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, sample_size=32)
    kind = dict(patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000)
    gpu = FakeGpu()
    model = gpu.build(lambda: diffusers.DiTTransformer2DModel(num_layers=layers, **config, **kind), torch.bfloat16)
    numbers = torch.zeros(2, dtype=torch.int64)
    latents = torch.zeros(2, 4, 32, 32, dtype=torch.bfloat16)
    return planned(gpu, model, {"hidden_states": latents, "timestep": numbers, "class_labels": numbers})


def test_launches_of_dit_xl() -> None:
    """All blocks are alike, so two sizes tell what 28 blocks launch."""
    (two, partial), (three, same) = (dit_xl(layers).launches("fused") for layers in (2, 3))
    assert two + 26 * (three - two) <= DIT_XL
    assert partial == same <= 5


@pytest.mark.exhaustive
def test_launches_of_all_of_dit_xl() -> None:
    full, partial = dit_xl(28).launches("fused")
    assert full <= DIT_XL
    assert partial <= 8  # of 56 residuals, 16 are added up in one launch
