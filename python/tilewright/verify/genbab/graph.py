# SPDX-License-Identifier: Apache-2.0
"""The graph that bounds are propagated through: flattened nodes in topological order.

Every node is a vector (a tensor flattened); node 0 is the input. Three kinds make all graphs: affine maps, unary
functions elementwise, products of two nodes elementwise. Everything else is written in these (:mod:`.build`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewright.verify.genbab.affine import DENSE_ENTRIES, Affine, Dense, Shape, compose
from tilewright.verify.genbab.unary import Unary

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Product:
    """x * y, elementwise on two nodes of one size."""

    name: str = "mul"


@dataclass(eq=False)
class Node:
    """op: None for the input. hull: from the intervals of nodes to an interval this node also lies in, with the nodes
    it asks for; the result of a rewriting is often known to be narrower than its parts say."""

    name: str
    op: Affine | Unary | Product | None
    inputs: tuple[int, ...]
    shape: Shape
    hull: Callable[..., Interval] | None = None
    hull_of: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nonlinear(self) -> bool:
        return isinstance(self.op, (Unary, Product))


@dataclass(eq=False)
class Graph:
    """Nodes in topological order; ``output`` is the last one's index."""

    nodes: list[Node]
    dtype: torch.dtype
    consumers: list[list[tuple[int, int]]] = field(init=False)
    """For each node the nonlinear nodes that read it, with the argument's position."""

    def __post_init__(self) -> None:
        self.consumers = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            if node.nonlinear:
                for position, source in enumerate(node.inputs):
                    self.consumers[source].append((index, position))
        self.pre = [i for i, readers in enumerate(self.consumers) if readers]
        """Nodes whose bounds a relaxation needs."""

    @property
    def output(self) -> int:
        return len(self.nodes) - 1

    @property
    def input_shape(self) -> Shape:
        return self.nodes[0].shape

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in] -> [B, n_out], differentiable."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Every node's value [B, n]."""
        found = [x]
        for node in self.nodes[1:]:
            xs = [found[i] for i in node.inputs]
            if isinstance(node.op, Unary):
                found.append(node.op.f(xs[0]))
            elif isinstance(node.op, Product):
                found.append(xs[0] * xs[1])
            else:
                assert node.op is not None
                found.append(node.op.apply(xs))
        return found


def compiled(nodes: list[Node], output: int, dtype: torch.dtype) -> Graph:
    """A graph of the raw nodes that ``output`` needs, with chains of small matrices multiplied out."""
    nodes = [Node(n.name, n.op, n.inputs, n.shape, n.hull, n.hull_of) for n in nodes]
    for node in nodes:
        _fuse(node, nodes)
    wanted = {0, output}
    for index in range(output, 0, -1):
        if index in wanted:
            wanted.update(nodes[index].inputs, nodes[index].hull_of)
    order = sorted(wanted)
    place = {old: new for new, old in enumerate(order)}
    kept = []
    for old in order:
        node = nodes[old]
        node.inputs = tuple(place[i] for i in node.inputs)
        node.hull_of = tuple(place[i] for i in node.hull_of)
        kept.append(node)
    if output == 0:
        size = kept[0].size
        kept.append(
            Node("output", Dense([torch.eye(size, dtype=dtype)], torch.zeros(size, dtype=dtype)), (0,), (size,))
        )
    return Graph(kept, dtype)


def _fuse(node: Node, nodes: list[Node]) -> None:
    """Multiply matrix inputs into a matrix node where that does not make it larger than both, or stays small."""
    changed = isinstance(node.op, Dense)
    while changed:
        changed = False
        for position, source in enumerate(node.inputs):
            inner = nodes[source]
            if not isinstance(inner.op, Dense) or inner.hull is not None:
                continue
            assert isinstance(node.op, Dense)
            m, grown = node.op.bias.numel(), sum(inner.op.sizes)
            now = m * inner.size + inner.size * grown
            if m * grown > max(now, 1 << 14) or m * grown > DENSE_ENTRIES:
                continue
            node.op = compose(node.op, position, inner.op)
            node.inputs = (*node.inputs[:position], *inner.inputs, *node.inputs[position + 1 :])
            _merge_repeated(node)
            changed = True
            break


def _merge_repeated(node: Node) -> None:
    """Add the matrices of inputs that occur twice."""
    assert isinstance(node.op, Dense)
    weights: dict[int, Tensor] = {}
    for source, w in zip(node.inputs, node.op.weights, strict=True):
        weights[source] = weights[source] + w if source in weights else w
    node.inputs = tuple(weights)
    node.op = Dense(list(weights.values()), node.op.bias)
