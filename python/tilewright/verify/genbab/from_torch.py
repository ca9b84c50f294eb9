# SPDX-License-Identifier: Apache-2.0
"""Graphs from torch modules: the program that torch.export records, read operator by operator."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.verify.genbab import functions
from tilewright.verify.genbab.build import Builder, UnsupportedOperator, Value
from tilewright.verify.genbab.functions import REGISTERED
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.unary import Unary

UNARY: dict[str, Unary] = {
    "relu": functions.relu,
    "abs": functions.absolute,
    "sign": functions.sign,
    "sigmoid": functions.sigmoid,
    "tanh": functions.tanh,
    "atan": functions.arctan,
    "exp": functions.exp,
    "log": functions.log,
    "sqrt": functions.sqrt,
    "reciprocal": functions.reciprocal,
    "square": functions.square,
    "sin": functions.sin,
    "erf": functions.erf,
}

_SAME_ELEMENTS = """
view _unsafe_view reshape unsqueeze squeeze flatten unflatten clone contiguous alias detach lift_fresh_copy dropout
feature_dropout alpha_dropout _to_copy to type_as view_as
"""
_NON_NEGATIVE = """
permute transpose t numpy_T slice select expand cat stack index_select gather sum mean flip roll repeat index cumsum
diagonal tile avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d
constant_pad_nd pad upsample_nearest2d pixel_shuffle movedim swapaxes narrow take broadcast_to hstack vstack concat
repeat_interleave expand_as
"""
SAME_ELEMENTS = frozenset(_SAME_ELEMENTS.split())
"""Operators that keep the elements in their order: only the shape changes."""

NON_NEGATIVE = frozenset(_NON_NEGATIVE.split())
"""Linear operators with coefficients that are not negative (a padding value is a constant term)."""

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def known(name: str) -> bool:
    """Whether an aten operator is read as it stands."""
    return (
        name in UNARY
        or name in SAME_ELEMENTS
        or name in NON_NEGATIVE
        or name in HANDLERS
        or f"aten.{name}" in REGISTERED
    )


def float_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode with floating-point parameters and buffers in ``dtype``."""
    return copy.deepcopy(module).to(device="cpu", dtype=dtype).eval().requires_grad_(False)


def trace(module: nn.Module, example: Tensor, dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of a module for inputs shaped like ``example``, whose first axis must be 1 if it is a batch.

    Raises:
        UnsupportedOperator: an operator has no bounds; the message names it and its place.
        ValueError: a weight is NaN or infinite.
    """
    module = float_copy(module, dtype)
    program = torch.export.export(module, (example.to(dtype),), strict=False)
    table = torch.export.default_decompositions()
    for op in list(table):
        namespace, _, name = op.name().partition("::")
        if namespace == "aten" and known(name.partition(".")[0]):
            table.pop(op)
    program = program.run_decompositions(table)
    return _read(program, Builder(tuple(example.shape), dtype))


def _read(program: Any, builder: Builder) -> Graph:
    state = {**program.state_dict, **program.constants}
    lifted = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
        **program.graph_signature.inputs_to_lifted_tensor_constants,
    }
    found: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node.name] = state[lifted[node.name]] if node.name in lifted else builder.input
        elif node.op == "call_function":
            args = torch.fx.node.map_arg(node.args, lambda n: found[n.name])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: found[n.name])
            builder.label = _label(node)
            found[node.name] = _call(builder, node.target, args, dict(kwargs))
        elif node.op == "output":
            return builder.graph(_only_output(program, found))
    raise AssertionError("a traced graph ends with its output")


def _only_output(program: Any, found: dict[str, Any]) -> Any:
    wanted = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    if len(wanted) != 1:
        raise ValueError(f"the model returns {len(wanted)} tensors; wrap it in a module that returns the one to bound")
    return found[wanted[0]]


def _label(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    owner = [str(entry[0]) for entry in stack.values() if entry[0]]
    return f"{owner[-1]}.{node.name}" if owner else str(node.name)


def _values(tree: Any) -> list[Value]:
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [v for item in tree for v in _values(item)]
    if isinstance(tree, dict):
        return [v for item in tree.values() for v in _values(item)]
    return []


def _call(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _values((args, kwargs)):
        return target(*args, **kwargs)
    if not isinstance(target, torch._ops.OpOverload):
        if getattr(target, "__name__", "") == "getitem":
            return args[0][args[1]]
        raise UnsupportedOperator(f"{b.label}: {target} has no bounds")
    full = target._schema.name.replace("::", ".")
    name = full.removeprefix("aten.").removesuffix("_") if full.startswith("aten.") else full
    if full in REGISTERED:
        return b.unary(REGISTERED[full], args[0])
    if name in UNARY:
        return b.unary(UNARY[name], args[0])
    if name in SAME_ELEMENTS:
        return _same_elements(b, target, args, kwargs)
    if name in NON_NEGATIVE:
        return _linear(b, target, args, kwargs)
    if name in HANDLERS:
        return HANDLERS[name](b, *args, **kwargs)
    raise UnsupportedOperator(
        f"{b.label}: operator {full} has no bounds; rewrite it, or add them with register_relaxation({full!r}, ...)"
    )


def _same_elements(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def meta(x: Any) -> Any:
        return torch.empty(x.shape, device="meta", dtype=b.dtype) if isinstance(x, Value) else x

    kwargs.pop("device", None)
    out = target(*(meta(a) for a in args), **kwargs)
    if not out.is_floating_point():
        raise UnsupportedOperator(f"{b.label}: a conversion to {out.dtype} has no bounds")
    return b.reshape(args[0], tuple(out.shape))


def _linear(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operator of NON_NEGATIVE: its Values (in lists too) are the map's arguments."""
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    at = [i for i, x in enumerate(flat) if isinstance(x, Value)]
    fixed = [b.constant(x) if isinstance(x, Tensor) else x for x in flat]

    def fn(*xs: Tensor) -> Tensor:
        leaves = list(fixed)
        for i, x in zip(at, xs, strict=True):
            leaves[i] = x
        a, k = torch.utils._pytree.tree_unflatten(leaves, spec)
        return target(*a, **k)

    values = [flat[i] for i in at]
    constant = fn(*(torch.zeros(v.shape, dtype=b.dtype) for v in values))
    b.weights(constant)
    return b.affine(fn, *values, magnitude=lambda *xs: fn(*xs) - constant)


@_handles("full_like")
def _full_like(b: Builder, x: Any, value: float, **how: Any) -> Tensor:
    return torch.full(x.shape, float(value), dtype=b.dtype)


@_handles("zeros_like")
def _zeros_like(b: Builder, x: Any, **how: Any) -> Tensor:
    return _full_like(b, x, 0.0, **how)


@_handles("ones_like")
def _ones_like(b: Builder, x: Any, **how: Any) -> Tensor:
    return _full_like(b, x, 1.0, **how)


@_handles("add")
def _add(b: Builder, x: Any, y: Any, alpha: float = 1.0) -> Any:
    return b.add(x, y, float(alpha))


@_handles("sub", "subtract")
def _sub(b: Builder, x: Any, y: Any, alpha: float = 1.0) -> Any:
    return b.add(x, y, -float(alpha))


@_handles("rsub")
def _rsub(b: Builder, x: Any, y: Any, alpha: float = 1.0) -> Any:
    return b.add(y, x, -float(alpha))


@_handles("mul", "multiply")
def _mul(b: Builder, x: Any, y: Any) -> Any:
    return b.mul(x, y)


@_handles("div", "divide", "true_divide")
def _div(b: Builder, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise UnsupportedOperator(f"{b.label}: division with rounding_mode={rounding_mode!r}")
    return b.div(x, y)


HANDLERS |= {
    "neg": lambda b, x: b.neg(x),
    "rsqrt": lambda b, x: b.unary(functions.reciprocal, b.unary(functions.sqrt, x)),
    "cos": lambda b, x: b.unary(functions.sin, b.add(x, math.pi / 2)),
    "log1p": lambda b, x: b.unary(functions.log, b.add(x, 1.0)),
    "expm1": lambda b, x: b.add(b.unary(functions.exp, x), -1.0),
    "silu": lambda b, x: b.unary(functions.silu(), x),
    "gelu": lambda b, x, approximate="none": b.unary(functions.gelu(approximate), x),
    "leaky_relu": lambda b, x, slope=0.01: b.unary(functions.leaky_relu(float(slope)), x),
    "relu6": lambda b, x: b.clamp(x, 0.0, 6.0),
    "hardtanh": lambda b, x, low=-1.0, high=1.0: b.clamp(x, low, high),
    "hardsigmoid": lambda b, x: b.add(b.scale(b.clamp(x, -3.0, 3.0), 1 / 6), 0.5),
    "hardswish": lambda b, x: b.mul(x, b.add(b.scale(b.clamp(x, -3.0, 3.0), 1 / 6), 0.5)),
    "log_sigmoid": lambda b, x: b.neg(b.unary(functions.softplus, b.neg(x))),
    "clamp": lambda b, x, min=None, max=None: b.clamp(x, min, max),
    "clamp_min": lambda b, x, min: b.clamp(x, min, None),
    "clamp_max": lambda b, x, max: b.clamp(x, None, max),
    "maximum": lambda b, x, y: b.maximum(x, y),
    "minimum": lambda b, x, y: b.minimum(x, y),
    "mm": lambda b, x, y: b.matmul(x, y),
    "bmm": lambda b, x, y: b.matmul(x, y),
    "matmul": lambda b, x, y: b.matmul(x, y),
    "linear": lambda b, x, w, bias=None: b.linear(x, w, bias),
    "softmax": lambda b, x, dim, dtype=None: b.softmax(x, dim),
    "_softmax": lambda b, x, dim, half: b.softmax(x, dim),
    "log_softmax": lambda b, x, dim, dtype=None: b.log_softmax(x, dim),
    "_log_softmax": lambda b, x, dim, half: b.log_softmax(x, dim),
}


@_handles("tan")
def _tan(b: Builder, x: Any) -> Any:
    cosine = b.unary(functions.sin, b.add(x, math.pi / 2))
    return b.mul(b.unary(functions.sin, x), b.unary(functions.reciprocal, cosine))


@_handles("softplus")
def _softplus(b: Builder, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    # Above the threshold torch returns x; log(1 + e^x) - x is below 2.1e-9 there and the difference is left to tol.
    if float(threshold) < 20:
        raise UnsupportedOperator(f"{b.label}: softplus with threshold {threshold}; 20 or more is needed")
    return b.scale(b.unary(functions.softplus, b.scale(x, float(beta))), 1 / float(beta))


@_handles("elu")
def _elu(b: Builder, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if float(input_scale) != 1:
        raise UnsupportedOperator(f"{b.label}: elu with input_scale {input_scale}")
    return b.scale(b.unary(functions.elu(float(alpha)), x), float(scale))


@_handles("pow")
def _pow(b: Builder, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Value):
        raise UnsupportedOperator(f"{b.label}: a power with a varying exponent; write exp(y log x)")
    return b.power(x, float(exponent))


@_handles("addmm")
def _addmm(b: Builder, bias: Any, x: Any, y: Any, beta: float = 1.0, alpha: float = 1.0) -> Any:
    return b.add(b.scale(bias, float(beta)), b.matmul(x, y), float(alpha))


@_handles("baddbmm")
def _baddbmm(b: Builder, bias: Any, x: Any, y: Any, beta: float = 1.0, alpha: float = 1.0) -> Any:
    return b.add(b.scale(bias, float(beta)), b.matmul(x, y), float(alpha))


@_handles("convolution")
def _convolution(
    b: Builder,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    out: Any,
    groups: int,
) -> Any:
    how: dict[str, Any] = {
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }
    if transposed:
        how["output_padding"] = tuple(out)
    return b.convolution(x, w, bias, transposed=transposed, **how)


@_handles("conv1d", "conv2d", "conv3d")
def _conv(
    b: Builder, x: Any, w: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    def plain(v: Any) -> Any:
        return tuple(v) if isinstance(v, (list, tuple)) else v

    return b.convolution(
        x, w, bias, stride=plain(stride), padding=plain(padding), dilation=plain(dilation), groups=groups
    )


@_handles("batch_norm")
def _batch_norm(
    b: Builder,
    x: Any,
    w: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    fast: bool = False,
) -> Any:
    if training or mean is None:
        raise UnsupportedOperator(f"{b.label}: batch normalisation with the batch's own statistics; call eval()")
    return b.normalize_channels(x, mean, var, w, bias, float(eps))


@_handles("_native_batch_norm_legit_no_training")
def _native_batch_norm(b: Builder, x: Any, w: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return (b.normalize_channels(x, mean, var, w, bias, float(eps)), None, None)


@_handles("layer_norm")
def _layer_norm(
    b: Builder, x: Any, shape: Sequence[int], w: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    return b.layer_norm(x, len(shape), w, bias, float(eps))


@_handles("native_layer_norm")
def _native_layer_norm(b: Builder, x: Any, shape: Sequence[int], w: Any, bias: Any, eps: float) -> Any:
    return (b.layer_norm(x, len(shape), w, bias, float(eps)), None, None)


@_handles("scaled_dot_product_attention")
def _attention(
    b: Builder,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Any:
    if mask is not None or is_causal:
        raise UnsupportedOperator(f"{b.label}: attention with a mask")
    width = q.shape[-1]
    turned = b.affine(lambda a: a.transpose(-2, -1), k)
    scores = b.scale(b.matmul(q, turned), scale if scale is not None else 1 / math.sqrt(width))
    return b.matmul(b.softmax(scores, -1), v)


@_handles("amax", "max")
def _amax(b: Builder, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, (Value, Tensor)):
        return b.maximum(x, dim)
    single = isinstance(dim, int)
    dims = range(len(x.shape)) if dim is None or dim == [] else [dim] if single else dim
    out = x
    for d in dims:
        out = b.max_over(out, d % len(x.shape), True)
    drop = {d % len(x.shape) for d in dims}
    shape = out.shape if keepdim else tuple(n for i, n in enumerate(out.shape) if i not in drop)
    return b.reshape(out, shape)


@_handles("amin", "min")
def _amin(b: Builder, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if isinstance(dim, (Value, Tensor)):
        return b.minimum(x, dim)
    return b.neg(_amax(b, b.neg(x), dim, keepdim))


@_handles("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    b: Builder, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    return b.max_pool(x, kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)


@_handles("split", "split_with_sizes", "unsafe_split")
def _split(b: Builder, x: Any, sizes: Any, dim: int = 0) -> Any:
    n = x.shape[dim]
    lengths = [min(sizes, n - at) for at in range(0, n, sizes)] if isinstance(sizes, int) else list(sizes)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [b.narrow(x, dim, at, length) for at, length in zip(starts, lengths, strict=True)]


@_handles("chunk")
def _chunk(b: Builder, x: Any, chunks: int, dim: int = 0) -> Any:
    return _split(b, x, -(-x.shape[dim] // chunks), dim)


@_handles("unbind")
def _unbind(b: Builder, x: Any, dim: int = 0) -> Any:
    dim = dim % len(x.shape)
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    return [b.reshape(b.narrow(x, dim, i, 1), shape) for i in range(x.shape[dim])]


@_handles("where")
def _where(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Value):
        raise UnsupportedOperator(f"{b.label}: where() with a condition that depends on the input")
    mask = condition.to(b.dtype)
    return b.add(b.scale(x, mask), b.scale(y, 1 - mask))
