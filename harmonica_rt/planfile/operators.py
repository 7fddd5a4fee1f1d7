"""The operators that a saved graph may hold, and checks of their arguments against their schemas.

Hazard: a plan file names operators and their arguments, and its graph becomes Python source and compiled kernels. An
operator that is not on the list could read files, memory outside its arguments, or uninitialised memory; a keyword that
is not an argument of the schema would be pasted verbatim into the source.

The list is an allow-list. Element-wise operators are on it by torch's own tag: they read and write element by element.
All others were reviewed one by one: each computes tensors from its arguments alone, and checks shapes and indices
itself. So these are not on it:

- `empty`, `new_empty`, ...: their values are whatever was in memory before (a graph that holds one is saved with
  `zeros` and the like instead);
- `as_strided`, `_reinterpret_tensor`, `set_`, `resize_`, ...: they address memory by numbers;
- `_unsafe_index`, `upsample_*` with scales, `embedding_bag`, ...: some implementation trusts the indices it is given;
- `instance_norm`, `native_batch_norm`, ...: they write to running statistics, which their schemas do not declare
  (`batch_norm` is on the list for inference only);
- operators that draw random numbers, have a data-dependent output size, or return something other than tensors.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from harmonica_rt.errors import PlanFileError
from harmonica_rt.model.training_mode import draws_numbers
from harmonica_rt.planfile.json_fields import LARGEST_INTEGER
from harmonica_rt.untrusted.text import quoted

GETITEM = "operator.getitem"

_NAME = re.compile(r"(aten|harmonica)\.(\w+)\.(\w+)", re.ASCII)
_TEXT = re.compile(r"[\w .,>-]{0,100}", re.ASCII)  # `tanh`, `trunc`, the equation of an einsum

_VIEWS = """
_unsafe_view alias broadcast_to chunk contiguous detach diagonal expand expand_as flatten lift_fresh_copy mT moveaxis
movedim narrow numpy_T permute ravel reshape reshape_as select slice split split_with_sizes squeeze swapaxes swapdims
t tensor_split transpose unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view
view_as view_as_complex view_as_real
"""
_COPIES = """
_to_copy block_diag cat clone column_stack concat concatenate constant_pad_nd copy diag_embed dstack flip hstack
lift_fresh masked_fill meshgrid pad pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 select_scatter
slice_scatter stack tile to tril triu type_as vstack where
"""
_MADE = """
arange eye fill full full_like linspace logspace new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
triu_indices zeros zeros_like
"""
_REDUCTIONS = """
all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum linalg_norm
linalg_vector_norm logcumsumexp logsumexp max mean min norm prod sort std std_mean sum topk var var_mean
"""
_PRODUCTS = """
addbmm addmm addmv baddbmm bilinear bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
convolution cross dot einsum inner kron linalg_cross linalg_qr linear matmul mm mv outer scaled_dot_product_attention
tensordot vdot
"""
_LAYERS = """
_fused_rms_norm _log_softmax _safe_softmax _softmax adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
avg_pool1d avg_pool2d avg_pool3d batch_norm cosine_similarity dropout glu group_norm layer_norm
log_sigmoid log_softmax max_pool1d max_pool2d max_pool3d native_group_norm native_layer_norm normalize
pairwise_distance prelu reflection_pad1d reflection_pad2d reflection_pad3d relu6 replication_pad1d replication_pad2d
replication_pad3d rms_norm softmax softmin special_softmax
"""
_INDEXED = """
embedding gather index index_add index_copy index_fill index_put index_select one_hot scatter scatter_add
scatter_reduce take take_along_dim
"""
_ELEMENTWISE = """
__and__ __or__ _conj abs absolute addcdiv addcmul angle bitwise_and bitwise_not bitwise_or bitwise_xor bucketize ceil
clamp clamp_max clamp_min clip complex conj conj_physical deg2rad diff div divide elu eq erf exp exp2 expm1
float_power floor floor_divide fmod ge gelu greater greater_equal gt hardswish hardtanh imag isclose isfinite isinf
isnan le leaky_relu lerp less less_equal log logical_and logical_not logical_or logical_xor lt maximum minimum mul
multiply nan_to_num ne neg negative not_equal polar positive pow rad2deg real reciprocal relu remainder resolve_conj
resolve_neg round rsqrt rsub sigmoid sign silu softplus special_expit sqrt square sub subtract tanh threshold
true_divide trunc
"""
_ATEN = frozenset(" ".join((_VIEWS, _COPIES, _MADE, _REDUCTIONS, _PRODUCTS, _LAYERS, _INDEXED, _ELEMENTWISE)).split())
_ZEROS = {
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}
# With some arguments (a mask, no `num_classes`) the output size of these depends on values; inference refuses those.
_SIZED = (torch.ops.aten.index.Tensor, torch.ops.aten.one_hot.default)
_HARMONICA = frozenset(("forecast", "gated_residual", "norm_rotary", "residual_reuse", "residual_reuse_norm_modulate"))


def name_of(node: fx.Node) -> str:
    """The name of the node's operator in a file; if it leaves memory uninitialised, that of its zeros variant.

    Raises:
        PlanFileError: the node calls something that a plan file may not hold.
    """
    if node.target is operator.getitem:
        return GETITEM
    if not isinstance(node.target, torch._ops.OpOverload):
        raise PlanFileError(f"{node.name}: a graph that calls {node.target} cannot be saved")
    name = _ZEROS.get(str(node.target), str(node.target))
    operator_of(name, node.name)
    return name


def operator_of(name: str, where: str) -> Any:
    """The operator of this name, if a saved graph may hold it.

    Raises:
        PlanFileError: this torch has no such operator, or a saved graph may not hold it.
    """
    if name == GETITEM:
        return operator.getitem
    try:
        return _operator(name)
    except PlanFileError as error:
        raise PlanFileError(f"{where}: {error}") from error


@functools.lru_cache(maxsize=2048)
def _operator(name: str) -> torch._ops.OpOverload:
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise PlanFileError(f"{quoted(name)} is not the name of an operator of aten or harmonica")
    namespace, packet, overload = parts.groups()
    if namespace == "harmonica":
        import harmonica_kernels  # noqa: F401  # registers them
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise PlanFileError(f"this torch ({torch.__version__}) has no operator {quoted(name)}")
    listed = packet in (_HARMONICA if namespace == "harmonica" else _ATEN) or torch.Tag.pointwise in found.tags
    if not listed or not _computes_only(found):
        raise PlanFileError(f"the operator {name} is not among those that a saved plan may hold")
    return found


def _computes_only(target: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to no argument and returns only tensors."""
    schema = target._schema
    if schema.is_mutable or any(argument.is_out for argument in schema.arguments) or not schema.returns:
        return False
    return all(str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns)


def check_arguments(target: Any, args: Sequence[Any], kwargs: dict[str, Any], where: str) -> None:
    """Raise PlanFileError if the arguments do not fit the operator's schema in number, order, name or type.

    They have to be in the form that tracing writes, in which every argument that can be positional is. Nodes among them
    carry their values in `meta["val"]`.
    """
    if target is operator.getitem:
        _check_getitem(args, kwargs, where)
        return
    by_position = [argument for argument in target._schema.arguments if not argument.kwarg_only]
    by_name = {argument.name for argument in target._schema.arguments if argument.kwarg_only}
    if len(args) > len(by_position):
        raise PlanFileError(f"{where}: {target} takes {len(by_position)} arguments by position, got {len(args)}")
    for name in kwargs:
        if name not in by_name:
            raise PlanFileError(f"{where}: {target} takes no argument {quoted(name)} by name")
    given = {**{argument.name: value for argument, value in zip(by_position, args, strict=False)}, **kwargs}
    for argument in target._schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise PlanFileError(f"{where}: {target} needs the argument {argument.name!r}")
        elif not _fits(given[argument.name], argument.real_type, argument.N):
            value = quoted(given[argument.name])
            raise PlanFileError(f"{where}: {target}: {argument.name} must be of type {argument.real_type}, got {value}")
    if by_position and by_position[0].type.kind() == "TensorType" and not isinstance(args[0], fx.Node):
        number_first = torch.Tag.pointwise in target.tags and any(isinstance(value, fx.Node) for value in args)
        if not number_first:  # as in `1 + x`
            raise PlanFileError(f"{where}: {target} takes a tensor first, got {quoted(args[0])}")


def check_node(node: fx.Node, where: str) -> None:
    """Raise PlanFileError if a node draws random numbers, has a data-dependent size, or updates training statistics."""
    tags: Any = getattr(node.target, "tags", ())
    if torch.Tag.dynamic_output_shape in tags and node.target not in _SIZED:
        raise PlanFileError(f"{where}: {node.target} has a data-dependent size; a saved plan may not hold it")
    if node.target is torch.ops.aten.batch_norm.default and node.args[5] is not False:
        raise PlanFileError(f"{where}: {node.target} updates training statistics; a saved plan may not hold it")
    if draws_numbers(node):
        raise PlanFileError(f"{where}: {node.target} draws random numbers; a saved plan may not hold it")


def _check_getitem(args: Sequence[Any], kwargs: dict[str, Any], where: str) -> None:
    values = args[0].meta["val"] if len(args) == 2 and isinstance(args[0], fx.Node) else None
    if kwargs or not isinstance(values, (list, tuple)) or type(args[1]) is not int or not 0 <= args[1] < len(values):
        raise PlanFileError(f"{where}: {GETITEM} takes a node of several values and the index of one of them")


def _fits(value: Any, kind: Any, length: int | None) -> bool:
    """Whether a value has a schema's type; one integer may stand for all items of a list of fixed length."""
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType(), length)
    if name == "ListType":
        if isinstance(value, (list, tuple)):
            return all(_fits(item, kind.getElementType(), None) for item in value)
        return length is not None and type(value) is int and _fits(value, kind.getElementType(), None)
    return name in _KINDS and _KINDS[name](value)


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a number in place of one: `x * 0.5` is traced as an operator on two tensors."""
    return isinstance(value.meta["val"], torch.Tensor) if isinstance(value, fx.Node) else _is_number(value)


def _is_integer(value: Any) -> bool:
    return type(value) is int and -LARGEST_INTEGER <= value <= LARGEST_INTEGER


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, float)) or _is_integer(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "TensorType": _is_tensor,
    "IntType": _is_integer,
    "SymIntType": _is_integer,
    "FloatType": lambda value: isinstance(value, float) or _is_integer(value),
    "NumberType": _is_number,
    "BoolType": lambda value: isinstance(value, bool),
    "StringType": lambda value: isinstance(value, str) and _TEXT.fullmatch(value) is not None,
    "ScalarTypeType": lambda value: isinstance(value, torch.dtype),
    "LayoutType": lambda value: value is torch.strided,
    "DeviceObjType": lambda value: isinstance(value, torch.device),
    "MemoryFormatType": lambda value: isinstance(value, torch.memory_format),
}
