# SPDX-License-Identifier: Apache-2.0
"""Graphs from ONNX files, read with the ``onnx`` package."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.verify.genbab import functions
from tilewright.verify.genbab.build import Builder, UnsupportedOperator, Value
from tilewright.verify.genbab.functions import REGISTERED
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.unary import Unary

UNARY: dict[str, Unary] = {
    "Relu": functions.relu,
    "Abs": functions.absolute,
    "Sign": functions.sign,
    "Sigmoid": functions.sigmoid,
    "Tanh": functions.tanh,
    "Atan": functions.arctan,
    "Exp": functions.exp,
    "Log": functions.log,
    "Sqrt": functions.sqrt,
    "Reciprocal": functions.reciprocal,
    "Sin": functions.sin,
    "Erf": functions.erf,
    "Softplus": functions.softplus,
}

Handler = Callable[[Builder, list[Any], dict[str, Any]], Any]
HANDLERS: dict[str, Handler] = {}


def load(path: str | os.PathLike[str]) -> Any:
    """The checked ModelProto of a file.

    Raises:
        ModuleNotFoundError: onnx is not installed (pip install tilewright[verify]).
        ValueError: the file is no valid ONNX model.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path))
        onnx.checker.check_model(model)
    except OSError:
        raise
    except Exception as wrong:
        raise ValueError(f"{os.fspath(path)}: not a valid ONNX model ({type(wrong).__name__}: {wrong})") from wrong
    return model


def input_shape(model: Any) -> tuple[int, ...]:
    """Shape of the one graph input that is no initializer; unknown axes count as 1."""
    return tuple(int(d.dim_value) if d.HasField("dim_value") else 1 for d in _input(model).type.tensor_type.shape.dim)


def _input(model: Any) -> Any:
    known = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in known]
    if len(free) != 1 or len(model.graph.output) != 1:
        raise ValueError(
            f"the model has {len(free)} inputs and {len(model.graph.output)} outputs; one of each is needed"
        )
    return free[0]


def read(model: Any, dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of a ModelProto.

    Raises:
        UnsupportedOperator: an operator has no bounds; the message names it and its node.
        ValueError: a weight is NaN or infinite, or the model has several inputs or outputs.
    """
    from onnx import helper, numpy_helper

    builder = Builder(input_shape(model), dtype)
    found: dict[str, Any] = {_input(model).name: builder.input, "": None}
    for tensor in model.graph.initializer:
        found[tensor.name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    for number, node in enumerate(model.graph.node):
        builder.label = node.name or f"{node.op_type}_{number}"
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} | {"opset": opset}
        made = _call(builder, node.op_type, [found[name] for name in node.input], attributes)
        for name, value in zip(node.output, made if isinstance(made, list) else [made], strict=False):
            found[name] = value
    return builder.graph(found[model.graph.output[0].name])


def evaluate(model: Any, x: Tensor) -> Tensor:
    """The model's output for one flat input by onnx's own reference evaluator, in the model's precision."""
    import numpy as np
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    value = _input(model)
    kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    fed = x.detach().reshape(input_shape(model)).numpy().astype(kind)
    out: Any = ReferenceEvaluator(model).run(None, {value.name: fed})
    return torch.from_numpy(np.asarray(out[0], dtype=np.float64)).reshape(-1)


def _call(b: Builder, op: str, xs: list[Any], a: dict[str, Any]) -> Any:
    if op in REGISTERED:
        return b.unary(REGISTERED[op], xs[0])
    if op in UNARY:
        return b.unary(UNARY[op], xs[0])
    if op in HANDLERS:
        return HANDLERS[op](b, xs, a)
    raise UnsupportedOperator(
        f"{b.label}: ONNX operator {op} has no bounds; rewrite it, or add them with register_relaxation({op!r}, ...)"
    )


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def _ints(x: Any) -> list[int]:
    return [int(v) for v in (x.reshape(-1).tolist() if isinstance(x, Tensor) else x)]


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _axes(xs: list[Any], a: dict[str, Any], rank: int) -> list[int]:
    """Axes from the second input (newer versions) or the attribute (older); all when neither is there."""
    given = xs[1] if len(xs) > 1 and xs[1] is not None else a.get("axes")
    return [axis % rank for axis in _ints(given)] if given is not None else list(range(rank))


HANDLERS |= {
    "Identity": lambda b, xs, a: xs[0],
    "Dropout": lambda b, xs, a: xs[0],
    "Add": lambda b, xs, a: b.add(*xs),
    "Sub": lambda b, xs, a: b.sub(*xs),
    "Mul": lambda b, xs, a: b.mul(*xs) if any(isinstance(x, Value) for x in xs) else xs[0] * xs[1],
    "Neg": lambda b, xs, a: b.neg(xs[0]),
    "MatMul": lambda b, xs, a: b.matmul(*xs),
    "Cos": lambda b, xs, a: b.unary(functions.sin, b.add(xs[0], math.pi / 2)),
    "LeakyRelu": lambda b, xs, a: b.unary(functions.leaky_relu(float(a.get("alpha", 0.01))), xs[0]),
    "Elu": lambda b, xs, a: b.unary(functions.elu(float(a.get("alpha", 1.0))), xs[0]),
    "Gelu": lambda b, xs, a: b.unary(functions.gelu(a.get("approximate", b"none").decode()), xs[0]),
    "Max": lambda b, xs, a: _fold(b.maximum, xs),
    "Min": lambda b, xs, a: _fold(b.minimum, xs),
    "Concat": lambda b, xs, a: (
        b.concat(xs, a["axis"]) if any(isinstance(x, Value) for x in xs) else torch.cat(xs, a["axis"])
    ),
    "Shape": lambda b, xs, a: torch.tensor(_shape(xs[0])),
}


@_handles("Div")
def _div(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    if any(isinstance(x, Value) for x in xs):
        return b.div(*xs)
    return xs[0] / xs[1] if xs[0].is_floating_point() else torch.div(xs[0], xs[1], rounding_mode="trunc")


@_handles("Cast")
def _cast(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    from onnx import helper

    floating = helper.tensor_dtype_to_np_dtype(a["to"]).kind == "f"
    if isinstance(xs[0], Value) and not floating:
        raise UnsupportedOperator(f"{b.label}: a conversion of a varying tensor to integers")
    return xs[0] if isinstance(xs[0], Value) else xs[0].to(b.dtype if floating else torch.long)


@_handles("Softmax")
def _softmax(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    rank, old = len(_shape(xs[0])), a["opset"] < 13
    axis = a.get("axis", 1 if old else -1) % rank
    if old and axis != rank - 1:
        raise UnsupportedOperator(f"{b.label}: Softmax of opset {a['opset']} over several axes; convert to opset 13")
    return b.softmax(xs[0], axis)


def _fold(fn: Callable[[Any, Any], Any], xs: list[Any]) -> Any:
    out = xs[0]
    for x in xs[1:]:
        out = fn(out, x)
    return out


@_handles("Constant")
def _constant(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    if "value" in a:
        return torch.from_numpy(numpy_helper.to_array(a["value"]).copy())
    return torch.tensor(next(value for name, value in a.items() if name.startswith("value")))


@_handles("ConstantOfShape")
def _constant_of_shape(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    from onnx import numpy_helper

    fill = torch.from_numpy(numpy_helper.to_array(a["value"]).copy()) if "value" in a else torch.zeros(1)
    return fill.expand(_ints(xs[0])) if _ints(xs[0]) else fill.reshape(())


@_handles("Pow")
def _pow(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    if isinstance(xs[1], Value):
        raise UnsupportedOperator(f"{b.label}: a power with a varying exponent")
    exponents = xs[1].reshape(-1)
    if not bool((exponents == exponents[0]).all()):
        raise UnsupportedOperator(f"{b.label}: Pow with several exponents")
    return b.power(xs[0], float(exponents[0]))


@_handles("Gemm")
def _gemm(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    def turned(x: Any, flag: str) -> Any:
        if not a.get(flag, 0):
            return x
        return b.affine(lambda t: t.T, x) if isinstance(x, Value) else x.T

    y = b.scale(b.matmul(turned(xs[0], "transA"), turned(xs[1], "transB")), float(a.get("alpha", 1.0)))
    if len(xs) < 3 or xs[2] is None:
        return y
    return b.add(y, b.scale(xs[2], float(a.get("beta", 1.0))))


def _windowed(b: Builder, a: dict[str, Any], rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations and the padding before and after each axis."""
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnsupportedOperator(f"{b.label}: auto_pad {a['auto_pad'].decode()}; write the padding out")
    pads = list(a.get("pads", [0] * 2 * rank))
    return list(a.get("strides", [1] * rank)), list(a.get("dilations", [1] * rank)), pads[:rank], pads[rank:]


def _padded(b: Builder, x: Any, before: list[int], after: list[int]) -> Any:
    widths = [p for pair in reversed(list(zip(before, after, strict=True))) for p in pair]
    return b.affine(lambda t: torch.nn.functional.pad(t, widths), x) if any(widths) else x


@_handles("Conv")
def _conv(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    rank = xs[1].dim() - 2
    stride, dilation, before, after = _windowed(b, a, rank)
    bias = xs[2] if len(xs) > 2 else None
    how: dict[str, Any] = {"stride": tuple(stride), "dilation": tuple(dilation), "groups": a.get("group", 1)}
    return b.convolution(_padded(b, xs[0], before, after), xs[1], bias, **how)


@_handles("MaxPool")
def _max_pool(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    rank = len(a["kernel_shape"])
    stride, dilation, before, after = _windowed(b, a, rank)
    if before != after:
        raise UnsupportedOperator(f"{b.label}: MaxPool with padding that differs before and after")
    more = {"stride": stride, "padding": before, "dilation": dilation, "ceil_mode": bool(a.get("ceil_mode", 0))}
    return b.max_pool(xs[0], a["kernel_shape"], **more)


@_handles("AveragePool")
def _average_pool(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    kernel = list(a["kernel_shape"])
    stride, dilation, before, after = _windowed(b, a, len(kernel))
    padded = any(before) or any(after)
    if a.get("ceil_mode", 0) or any(d != 1 for d in dilation) or (padded and not a.get("count_include_pad", 0)):
        raise UnsupportedOperator(f"{b.label}: AveragePool with ceil_mode, dilation, or padding outside the count")
    pool = getattr(torch.nn.functional, f"avg_pool{len(kernel)}d")
    return b.affine(lambda t: pool(t, kernel, stride), _padded(b, xs[0], before, after))


@_handles("GlobalAveragePool")
def _global_average_pool(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    return b.mean(xs[0], tuple(range(2, len(_shape(xs[0])))), True)


@_handles("BatchNormalization")
def _batch_norm(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    if a.get("training_mode", 0):
        raise UnsupportedOperator(f"{b.label}: BatchNormalization in training mode")
    x, weight, bias, mean, var = xs
    return b.normalize_channels(x, mean, var, weight, bias, float(a.get("epsilon", 1e-5)))


@_handles("LayerNormalization")
def _layer_norm(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    rank = len(_shape(xs[0]))
    dims = rank - a.get("axis", -1) % rank
    return b.layer_norm(xs[0], dims, xs[1], xs[2] if len(xs) > 2 else None, float(a.get("epsilon", 1e-5)))


@_handles("Clip")
def _clip(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    low = xs[1] if len(xs) > 1 else a.get("min")
    high = xs[2] if len(xs) > 2 else a.get("max")
    return b.clamp(xs[0], low, high)


@_handles("Reshape")
def _reshape(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    wanted = _ints(xs[1])
    if not a.get("allowzero", 0):
        wanted = [_shape(xs[0])[i] if n == 0 else n for i, n in enumerate(wanted)]
    return b.reshape(xs[0], wanted) if isinstance(xs[0], Value) else xs[0].reshape(wanted)


@_handles("Flatten")
def _flatten(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    shape, axis = _shape(xs[0]), a.get("axis", 1)
    axis = axis % len(shape) if axis < 0 else axis
    return b.reshape(xs[0], (math.prod(shape[:axis]), math.prod(shape[axis:])))


@_handles("Squeeze")
def _squeeze(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    shape = _shape(xs[0])
    given = len(xs) > 1 or "axes" in a
    drop = set(_axes(xs, a, len(shape))) if given else {i for i, n in enumerate(shape) if n == 1}
    kept = [n for i, n in enumerate(shape) if i not in drop]
    return b.reshape(xs[0], kept) if isinstance(xs[0], Value) else xs[0].reshape(kept)


@_handles("Unsqueeze")
def _unsqueeze(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    shape = list(_shape(xs[0]))
    given = _ints(xs[1] if len(xs) > 1 else a["axes"])
    for axis in sorted(axis % (len(shape) + len(given)) for axis in given):
        shape.insert(axis, 1)
    return b.reshape(xs[0], shape) if isinstance(xs[0], Value) else xs[0].reshape(shape)


@_handles("Transpose")
def _transpose(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    order = list(a.get("perm", reversed(range(len(_shape(xs[0]))))))
    return b.affine(lambda t: t.permute(order), xs[0])


@_handles("Expand")
def _expand(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    shape = torch.broadcast_shapes(_shape(xs[0]), tuple(_ints(xs[1])))
    return b.affine(lambda t: t.expand(shape), xs[0])


@_handles("Slice")
def _slice(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    starts = _ints(xs[1] if len(xs) > 1 else a["starts"])
    ends = _ints(xs[2] if len(xs) > 2 else a["ends"])
    axes = _ints(xs[3]) if len(xs) > 3 and xs[3] is not None else list(a.get("axes", range(len(starts))))
    steps = _ints(xs[4]) if len(xs) > 4 and xs[4] is not None else [1] * len(starts)
    shape = _shape(xs[0])
    picks = {
        axis % len(shape): torch.tensor(range(shape[axis])[start:end:step], dtype=torch.long)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    }

    def take(t: Tensor) -> Tensor:
        for axis, index in picks.items():
            t = t.index_select(axis, index)
        return t

    return b.affine(take, xs[0]) if isinstance(xs[0], Value) else take(xs[0])


@_handles("Gather")
def _gather(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    if isinstance(xs[1], Value):
        raise UnsupportedOperator(f"{b.label}: Gather with indices that depend on the input")
    axis = a.get("axis", 0)
    shape = _shape(xs[0])
    index = xs[1].long() % shape[axis]
    final = (*shape[: axis % len(shape)], *index.shape, *shape[axis % len(shape) + 1 :])

    def take(t: Tensor) -> Tensor:
        return t.index_select(axis % len(shape), index.reshape(-1)).reshape(final)

    return b.affine(take, xs[0]) if isinstance(xs[0], Value) else take(xs[0])


@_handles("Split")
def _split(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    axis = a.get("axis", 0)
    given = xs[1] if len(xs) > 1 and xs[1] is not None else a.get("split")
    if given is None:
        raise UnsupportedOperator(f"{b.label}: Split without sizes")
    sizes = _ints(given)
    return [b.narrow(xs[0], axis, sum(sizes[:i]), n) for i, n in enumerate(sizes)]


@_handles("ReduceSum")
def _reduce_sum(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    return b.sum(xs[0], _axes(xs, a, len(_shape(xs[0]))), bool(a.get("keepdims", 1)))


@_handles("ReduceMean")
def _reduce_mean(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    return b.mean(xs[0], _axes(xs, a, len(_shape(xs[0]))), bool(a.get("keepdims", 1)))


@_handles("ReduceMax")
def _reduce_max(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    return _reduce(b, b.max_over, xs, a)


@_handles("ReduceMin")
def _reduce_min(b: Builder, xs: list[Any], a: dict[str, Any]) -> Any:
    return b.neg(_reduce(b, b.max_over, [b.neg(xs[0]), *xs[1:]], a))


def _reduce(b: Builder, over: Callable[..., Any], xs: list[Any], a: dict[str, Any]) -> Any:
    axes, out = _axes(xs, a, len(_shape(xs[0]))), xs[0]
    for axis in axes:
        out = over(out, axis, True)
    if a.get("keepdims", 1):
        return out
    return b.reshape(out, [n for i, n in enumerate(_shape(out)) if i not in set(axes)])
