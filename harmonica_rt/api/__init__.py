"""The public functions: they check what they are given and hand it to the packages that do the work.

In: a model or a diffusers pipeline, a schedule, options. Out: a `CompiledModel`, the same pipeline with its denoiser
replaced, or a `ParityReport`; every refusal is an error of `harmonica_rt.errors` that says what to do.
Hazard: a compiled pipeline looks like a plain one, and torch.compile may wrap either. So each function first finds the
plain model, and refuses one that two compilers hold (`subject`).

Reading order: `subject` (finds the model), `compiled_model` (what a model becomes), `compiling` (`compile`, `load`),
`compiled_pipelines` (`uncompile`, `get_compiled`), `comparing` (`reference`, `verify`), `fitting` (`fit`). Checks of
single arguments are in `harmonica_rt.arguments`, options in `harmonica_rt.options`.
"""

from harmonica_rt.api.comparing import reference, verify
from harmonica_rt.api.compiled_model import CompiledModel
from harmonica_rt.api.compiled_model import _compile_copy as _compiled_again  # noqa: F401  # the name in earlier pickles
from harmonica_rt.api.compiled_pipelines import get_compiled, uncompile
from harmonica_rt.api.compiling import compile, load
from harmonica_rt.api.fitting import fit

__all__ = ["CompiledModel", "compile", "fit", "get_compiled", "load", "reference", "uncompile", "verify"]
