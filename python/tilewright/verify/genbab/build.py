# SPDX-License-Identifier: Apache-2.0
"""The operators that the importers write graphs in, on values that are constants or nodes.

Each method takes tensors, numbers or :class:`Value`s and returns a tensor when nothing depends on the input, else a
Value. Composite operators are rewritten here into affine maps, unary functions and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.verify.genbab import functions
from tilewright.verify.genbab.affine import Operator, Shape, dense_if_small
from tilewright.verify.genbab.graph import Graph, Interval, Node, Product, compiled
from tilewright.verify.genbab.unary import Unary

PAIRWISE_SOFTMAX = 32
"""Up to this many terms a softmax is 1 / sum_j exp(z_j - z_i), whose bounds are tighter than those of a product."""


class UnsupportedOperator(ValueError):
    """The model contains an operator that no bounds are known for."""


@dataclass(frozen=True, eq=False)
class Value:
    """A node that depends on the input, with its unflattened shape."""

    node: int
    shape: Shape


Any_ = Value | Tensor | float


class Builder:
    """Collects nodes; ``graph(output)`` makes the graph."""

    def __init__(self, input_shape: Shape, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.nodes = [Node("input", None, (), tuple(input_shape))]
        self.input = Value(0, tuple(input_shape))
        self.label = ""

    def graph(self, output: Value) -> Graph:
        """The compiled graph whose last node is ``output`` flattened.

        Raises:
            ValueError: the output does not depend on the input.
        """
        if not isinstance(output, Value):
            raise ValueError("the output does not depend on the input: there is nothing to bound")
        graph = compiled(self.nodes, output.node, self.dtype)
        graph.nodes[-1].shape = output.shape
        return graph

    def _add(self, op: Any, inputs: tuple[int, ...], shape: Shape, **more: Any) -> Value:
        self.nodes.append(Node(self.label or f"node{len(self.nodes)}", op, inputs, shape, **more))
        return Value(len(self.nodes) - 1, shape)

    def constant(self, x: Any) -> Tensor:
        """A number or tensor as a tensor of this graph's dtype (integers stay integers)."""
        t = x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=self.dtype if isinstance(x, float) else None)
        return t.to(self.dtype) if t.is_floating_point() else t

    def weights(self, x: Any) -> Tensor:
        """A constant that enters arithmetic: of the graph's dtype and finite.

        Raises:
            ValueError: it holds NaN or an infinity.
        """
        t = self.constant(x).detach().to(self.dtype)
        if not t.isfinite().all():
            raise ValueError(
                f"{self.label or 'a constant'}: a weight or constant is NaN or infinite; nothing can be proved"
            )
        return t

    def affine(
        self, fn: Callable[..., Tensor], *xs: Any_, magnitude: Callable[..., Tensor] | None = None
    ) -> Value | Tensor:
        """fn applied to values, affine in all of them; magnitude: the same with absolute coefficients and no constant
        term (fn itself when its coefficients are not negative and it has none)."""
        if not any(isinstance(x, Value) for x in xs):
            return fn(*(self.constant(x) for x in xs))
        fixed = [None if isinstance(x, Value) else self.weights(x) for x in xs]
        values = [x for x in xs if isinstance(x, Value)]

        def closed(f: Callable[..., Tensor], constants: Sequence[Tensor | None]) -> Callable[..., Tensor]:
            def call(*free: Tensor) -> Tensor:
                rest = iter(free)
                return f(*(next(rest) if c is None else c for c in constants))

            return call

        zeros = [None if c is None else torch.zeros_like(c) for c in fixed]
        op = Operator(closed(fn, fixed), closed(magnitude or fn, zeros), [v.shape for v in values], self.dtype)
        shape = tuple(op.fn(*(torch.zeros(v.shape, dtype=self.dtype) for v in values)).shape)
        return self._add(dense_if_small(op), tuple(v.node for v in values), shape)

    def reshape(self, x: Any_, shape: Sequence[int]) -> Value | Tensor:
        """The same elements in another shape: no node, nodes are flat."""
        if not isinstance(x, Value):
            return self.constant(x).reshape(tuple(shape))
        return Value(x.node, tuple(torch.empty(x.shape, device="meta").reshape(tuple(shape)).shape))

    def unary(self, fn: Unary, x: Any_) -> Value | Tensor:
        """fn elementwise."""
        if not isinstance(x, Value):
            return fn.f(self.weights(x))
        return self._add(fn, (x.node,), x.shape)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def add(self, x: Any_, y: Any_, alpha: float = 1.0) -> Value | Tensor:
        """x + alpha y, broadcast."""
        return self.affine(lambda a, b: a + alpha * b, x, y, magnitude=lambda a, b: a + abs(alpha) * b)

    def sub(self, x: Any_, y: Any_) -> Value | Tensor:
        """x - y, broadcast."""
        return self.add(x, y, -1.0)

    def neg(self, x: Any_) -> Value | Tensor:
        """-x."""
        return self.scale(x, -1.0)

    def scale(self, x: Any_, factor: Tensor | float) -> Value | Tensor:
        """x times a constant, broadcast."""
        w = self.weights(factor)
        return self.affine(lambda a: a * w, x, magnitude=lambda a: a * w.abs())

    def mul(self, x: Any_, y: Any_) -> Value | Tensor:
        """x y, broadcast; the square when both are one node."""
        if not isinstance(y, Value):
            return self.scale(x, y)
        if not isinstance(x, Value):
            return self.scale(y, x)
        shape = tuple(torch.broadcast_shapes(x.shape, y.shape))
        x, y = self.expand(x, shape), self.expand(y, shape)
        if x.node == y.node:
            return self.unary(functions.square, x)
        return self._add(Product(), (x.node, y.node), shape)

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        """x broadcast to a shape."""
        if tuple(shape) == x.shape:
            return x
        if math.prod(shape) == math.prod(x.shape):
            return Value(x.node, tuple(shape))
        out = self.affine(lambda a: a.expand(tuple(shape)), x)
        assert isinstance(out, Value)
        return out

    def div(self, x: Any_, y: Any_) -> Value | Tensor:
        """x / y."""
        if not isinstance(y, Value):
            return self.scale(x, 1 / self.weights(y))
        return self.mul(x, self.unary(functions.reciprocal, y))

    def power(self, x: Any_, exponent: float) -> Value | Tensor:
        """x to a constant power; negative powers are reciprocals, on x > 0 or x < 0."""
        exponent = float(exponent)
        if not isinstance(x, Value):
            return self.weights(x) ** exponent
        if not math.isfinite(exponent):
            raise ValueError(f"{self.label}: exponent {exponent} is not finite")
        if exponent < 0:
            return self.unary(functions.reciprocal, self.power(x, -exponent))
        simple = {0.5: functions.sqrt, 2.0: functions.square}
        if exponent == 0:
            return torch.ones(x.shape, dtype=self.dtype)
        if exponent == 1:
            return x
        fn = simple.get(exponent) or functions.power(exponent)
        return self.unary(fn, x)

    def matmul(self, x: Any_, y: Any_) -> Value | Tensor:
        """Matrix product as torch.matmul; two varying operands become products and a sum."""
        if not isinstance(y, Value):
            w = self.weights(y)
            return self.affine(lambda a: a @ w, x, magnitude=lambda a: a @ w.abs())
        if not isinstance(x, Value):
            w = self.weights(x)
            return self.affine(lambda a: w @ a, y, magnitude=lambda a: w.abs() @ a)
        if len(x.shape) < 2 or len(y.shape) < 2:
            raise UnsupportedOperator(f"{self.label}: a product of two varying vectors; give both a second axis")
        left = self.reshape(x, (*x.shape, 1))
        right = self.reshape(y, (*y.shape[:-2], 1, *y.shape[-2:]))
        return self.sum(self.mul(left, right), (-2,), False)

    def linear(self, x: Any_, weight: Any, bias: Any = None) -> Value | Tensor:
        """x W^T + b."""
        y = self.matmul(x, self.weights(weight).T)
        return y if bias is None else self.add(y, self.weights(bias))

    def convolution(self, x: Any_, weight: Any, bias: Any, *, transposed: bool = False, **how: Any) -> Value | Tensor:
        """A convolution of any dimension with constant weights; ``how`` as in torch.nn.functional."""
        w = self.weights(weight)
        b = None if bias is None else self.weights(bias)
        kind = ("conv_transpose" if transposed else "conv") + f"{w.dim() - 2}d"
        conv = getattr(torch.nn.functional, kind)
        return self.affine(lambda a: conv(a, w, b, **how), x, magnitude=lambda a: conv(a, w.abs(), None, **how))

    def sum(self, x: Any_, dims: Sequence[int], keepdim: bool) -> Value | Tensor:
        """Sum over axes."""
        return self.affine(lambda a: a.sum(tuple(dims), keepdim=keepdim), x)

    def mean(self, x: Any_, dims: Sequence[int], keepdim: bool) -> Value | Tensor:
        """Mean over axes."""
        return self.affine(lambda a: a.mean(tuple(dims), keepdim=keepdim), x)

    def concat(self, xs: Sequence[Any_], dim: int) -> Value | Tensor:
        """Concatenation."""
        return self.affine(lambda *parts: torch.cat(parts, dim), *xs)

    def normalize_channels(self, x: Any_, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Value | Tensor:
        """Batch normalisation with stored statistics over axis 1: an affine map."""
        rank = len(x.shape) if isinstance(x, Value) else self.constant(x).dim()
        scale = 1 / torch.sqrt(self.weights(var) + eps)
        scale = scale if weight is None else scale * self.weights(weight)
        shift = -self.weights(mean) * scale + (0 if bias is None else self.weights(bias))
        view = (1, -1, *(1,) * (rank - 2))
        return self.add(self.scale(x, scale.reshape(view)), shift.reshape(view))

    # -- rewritten operators -------------------------------------------------------------------------------------

    def within(self, x: Any_, low: float, high: float) -> Value | Tensor:
        """x, known to lie in [low, high] by what it is."""
        if not isinstance(x, Value):
            return x if isinstance(x, Tensor) else self.constant(x)

        def hull() -> Interval:
            return torch.tensor(low, dtype=self.dtype), torch.tensor(high, dtype=self.dtype)

        self.nodes[x.node].hull = hull
        return x

    def softmax(self, x: Any_, dim: int) -> Value | Tensor:
        """Softmax over one axis: pairwise differences for short axes, exp times reciprocal for long ones."""
        if not isinstance(x, Value):
            return torch.softmax(self.weights(x), dim)
        dim = dim % len(x.shape)
        if x.shape[dim] == 1:
            return torch.ones(x.shape, dtype=self.dtype)
        if x.shape[dim] <= PAIRWISE_SOFTMAX:
            differences = self.affine(
                lambda a: a.unsqueeze(dim) - a.unsqueeze(dim + 1),
                x,
                magnitude=lambda a: a.unsqueeze(dim) + a.unsqueeze(dim + 1),
            )
            total = self.sum(self.unary(functions.exp, differences), (dim + 1,), False)
            return self.within(self.unary(functions.reciprocal, total), 0.0, 1.0)
        # A constant shift would change no bound: e and its reciprocal sum scale inversely. Beyond exp's range they are
        # infinite, and nothing is proved.
        e = self.unary(functions.exp, x)
        share = self.unary(functions.reciprocal, self.sum(e, (dim,), True))
        return self.within(self.mul(e, share), 0.0, 1.0)

    def log_softmax(self, x: Any_, dim: int) -> Value | Tensor:
        """x - log sum exp x, the sum taken of differences."""
        if not isinstance(x, Value):
            return torch.log_softmax(self.weights(x), dim)
        dim = dim % len(x.shape)
        differences = self.affine(
            lambda a: a.unsqueeze(dim) - a.unsqueeze(dim + 1),
            x,
            magnitude=lambda a: a.unsqueeze(dim) + a.unsqueeze(dim + 1),
        )
        total = self.sum(self.unary(functions.exp, differences), (dim + 1,), False)
        return self.neg(self.unary(functions.log, total))

    def layer_norm(self, x: Any_, dims: int, weight: Any, bias: Any, eps: float) -> Value | Tensor:
        """Normalisation over the last ``dims`` axes: mean, square, mean, square root, reciprocal, product."""
        axes = tuple(range(-dims, 0))
        centred = self.affine(
            lambda a: a - a.mean(axes, keepdim=True), x, magnitude=lambda a: a + a.mean(axes, keepdim=True)
        )
        spread = self.mean(self.mul(centred, centred), axes, True)
        if isinstance(spread, Value):
            spread = self.within(spread, 0.0, math.inf)
        scale = self.unary(functions.reciprocal, self.unary(functions.sqrt, self.add(spread, float(eps))))
        y = self.mul(centred, scale)
        y = y if weight is None else self.scale(y, weight)
        return y if bias is None else self.add(y, self.weights(bias))

    def maximum(self, x: Any_, y: Any_) -> Value | Tensor:
        """max(x, y) = y + relu(x - y), with the interval of the maximum kept."""
        if not isinstance(x, Value) and not isinstance(y, Value):
            return torch.maximum(self.weights(x), self.weights(y))
        if not isinstance(y, Value):
            x, y = y, x
        assert isinstance(y, Value)
        out = self.add(y, self.unary(functions.relu, self.sub(x, y)))
        assert isinstance(out, Value)
        parts = [v if isinstance(v, Value) else None for v in (x, y)]
        fixed = [None if isinstance(v, Value) else self.weights(v).expand(out.shape).reshape(-1) for v in (x, y)]
        wide = [None if v is None else self.expand(v, out.shape) for v in parts]

        def hull(*found: Interval) -> Interval:
            rest = iter(found)
            (la, ua), (lb, ub) = ((c, c) if c is not None else next(rest) for c in fixed)
            return torch.maximum(la, lb), torch.maximum(ua, ub)

        self.nodes[out.node].hull = hull
        self.nodes[out.node].hull_of = tuple(v.node for v in wide if v is not None)
        return out

    def minimum(self, x: Any_, y: Any_) -> Value | Tensor:
        """min(x, y) = -max(-x, -y)."""
        return self.neg(self.maximum(self.neg(x), self.neg(y)))

    def max_over(self, x: Any_, dim: int, keepdim: bool) -> Value | Tensor:
        """Maximum over one axis, as a tournament."""
        if not isinstance(x, Value):
            return self.weights(x).amax(dim, keepdim=keepdim)
        dim = dim % len(x.shape)
        while (n := x.shape[dim]) > 1:
            half = n // 2
            best = self.maximum(self.narrow(x, dim, 0, half), self.narrow(x, dim, half, half))
            x = best if n % 2 == 0 else self.concat([best, self.narrow(x, dim, 2 * half, 1)], dim)
            assert isinstance(x, Value)
        shape = x.shape if keepdim else (*x.shape[:dim], *x.shape[dim + 1 :])
        return self.reshape(x, shape)

    def narrow(self, x: Any_, dim: int, start: int, length: int) -> Value | Tensor:
        """A slice of one axis."""
        return self.affine(lambda a: a.narrow(dim, start, length), x)

    def max_pool(self, x: Any_, kernel: Sequence[int], **how: Any) -> Value | Tensor:
        """Max pooling over the last axes: each window's elements gathered, then their maximum."""
        if not isinstance(x, Value):
            raise UnsupportedOperator(f"{self.label}: max pooling of a constant")
        windows = _pool_windows(x.shape, kernel, how)
        flat = self.reshape(x, (math.prod(x.shape),))
        taken = self.affine(lambda a: a[windows], flat)
        return self.max_over(taken, -1, False)

    def clamp(self, x: Any_, low: Any, high: Any) -> Value | Tensor:
        """x cut to [low, high]; None is no limit."""
        limits = [default if limit is None else float(limit) for limit, default in ((low, -math.inf), (high, math.inf))]
        if math.isnan(limits[0]) or math.isnan(limits[1]) or limits[0] > limits[1]:
            raise ValueError(f"{self.label}: limits {limits} of clamp are NaN or crossed")
        if limits == [-math.inf, math.inf]:
            return x if isinstance(x, (Value, Tensor)) else self.constant(x)
        if limits == [0.0, math.inf]:
            return self.unary(functions.relu, x)
        return self.unary(functions.clip(*limits), x)


def _pool_windows(shape: Shape, kernel: Sequence[int], how: dict[str, Any]) -> Tensor:
    """Flat indices [*output shape, window]; a padded position repeats an element of its window."""
    count = math.prod(shape)
    indices = torch.arange(count, dtype=torch.float64).reshape(shape)
    dims = len(kernel)

    def pair(value: Any) -> tuple[int, ...]:
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * dims
        return value * dims if len(value) == 1 else value

    stride = pair(how.get("stride") or kernel)
    padding, dilation = pair(how.get("padding", 0)), pair(how.get("dilation", 1))
    if how.get("ceil_mode"):
        raise UnsupportedOperator("max pooling with ceil_mode=True")
    around = [p for axis in reversed(range(dims)) for p in (padding[axis], padding[axis])]
    view = torch.nn.functional.pad(indices, around, value=-1.0)
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        at = len(shape) - dims + axis
        view = view.unfold(at, reach, stride[axis])[..., :: dilation[axis]]
    view = view.reshape(*view.shape[: len(shape)], -1).long()
    any_valid = view.max(-1, keepdim=True).values
    return torch.where(view >= 0, view, any_valid)
