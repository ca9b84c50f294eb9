# SPDX-License-Identifier: Apache-2.0
"""Certified bounds of a module's outputs, in the spelling of auto_LiRPA so that code ports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.verify.genbab.bounds import Bounds, Trace, backward, bound_nodes, slopes_of
from tilewright.verify.genbab.from_torch import trace as trace_module
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.optimise import ROOT, Schedule, alpha_crown
from tilewright.verify.genbab.region import Region, box_region

METHODS = ("IBP", "CROWN", "CROWN-IBP", "alpha-CROWN")


class UnboundedError(ValueError):
    """No finite bound exists over the input set, for example of a reciprocal whose argument may be 0."""


@dataclass
class PerturbationLpNorm:
    """The set of inputs around a point: a ball of radius eps, or the box [x_L, x_U].

    norm: infinity, 2 or 1. eps: radius. x_L, x_U: ends of a box, shaped like the input; with norm 1 or 2 the ball is
    cut with it.
    """

    norm: float = math.inf
    eps: float | None = None
    x_L: Tensor | None = None
    x_U: Tensor | None = None

    def region(self, x: Tensor, dtype: torch.dtype) -> Region:
        """The set around x [B, ...].

        Raises:
            ValueError: neither eps nor a box, a negative or unknown value, or an empty box.
        """
        x = x.detach().to(dtype)
        if self.norm not in (1, 2, math.inf):
            raise ValueError(f"norm is {self.norm}; 1, 2 or infinity is needed")
        if self.eps is not None and not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps is {self.eps}; a finite number that is not negative is needed")
        if self.eps is None and (self.x_L is None or self.x_U is None):
            raise ValueError("a perturbation needs eps, or both x_L and x_U")
        low, high = (torch.full_like(x, -math.inf), torch.full_like(x, math.inf))
        if self.eps is not None:
            low, high = x - self.eps, x + self.eps
        if self.x_L is not None:
            low = torch.maximum(low, self.x_L.to(dtype)) if self.norm != math.inf else self.x_L.to(dtype).expand_as(x)
        if self.x_U is not None:
            high = torch.minimum(high, self.x_U.to(dtype)) if self.norm != math.inf else self.x_U.to(dtype).expand_as(x)
        box = box_region(low, high, dtype, "perturbation")
        if self.norm == math.inf:
            return box
        if self.eps is None:
            raise ValueError(f"a ball of norm {self.norm} needs eps")
        flat = x.reshape(x.shape[0], -1)
        if not ((flat >= box.x_L) & (flat <= box.x_U)).all():
            raise ValueError("the ball's centre lies outside x_L, x_U; move it inside or widen the box")
        return Region(box.x_L, box.x_U, float(self.norm), flat, torch.full((x.shape[0],), self.eps, dtype=dtype))


class BoundedTensor:
    """An input [B, ...] with its perturbation; None: the point alone."""

    def __init__(self, x: Tensor, ptb: PerturbationLpNorm | None = None) -> None:
        self.data = x
        self.ptb = ptb or PerturbationLpNorm(eps=0.0)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape


class BoundedModule:
    """Bounds of a module over sets of inputs.

    model: any torch module that torch.export can record, with one tensor in and one out. example_input: a tensor whose
    first axis is the batch; its first element fixes the shapes. bound_opts: ``{"optimize_bound_args": {"iteration":
    100, "lr_alpha": 0.1}, "joint": True, "dtype": torch.float64}``, all optional.

    Raises:
        UnsupportedOperator: an operator has no bounds; named with its place.
        ValueError: a weight is NaN or infinite, or the recorded graph computes something else than the module.
    """

    def __init__(
        self, model: nn.Module | Graph, example_input: Tensor | None = None, bound_opts: Mapping[str, Any] | None = None
    ) -> None:
        options = dict(bound_opts or {})
        self.dtype: torch.dtype = options.pop("dtype", torch.float64)
        arguments = dict(options.pop("optimize_bound_args", {}))
        self.schedule = Schedule(
            int(arguments.pop("iteration", ROOT.steps)), float(arguments.pop("lr_alpha", ROOT.lr_alpha))
        )
        self.joint = bool(options.pop("joint", True))
        if options or arguments:
            raise ValueError(f"bound_opts has unknown entries {sorted([*options, *arguments])}")
        if isinstance(model, Graph):
            self.graph, self.dtype = model, model.dtype
        else:
            if example_input is None:
                raise ValueError("example_input is needed to record a module")
            self.graph = trace_module(model, example_input[:1], self.dtype)
            _compare(self.graph, model, example_input[:1])

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [B, n_out] of the recorded graph."""
        return self.graph.forward(x.to(self.dtype).reshape(x.shape[0], -1))

    forward = __call__

    def compute_bounds(
        self,
        x: tuple[BoundedTensor, ...],
        method: str = "CROWN",
        C: Tensor | None = None,
        bound_lower: bool = True,
        bound_upper: bool = True,
        return_A: bool = False,
    ) -> Any:
        """Bounds of C times the flattened outputs: (lower, upper[, A]) with [B, n_spec], None for a side not asked.

        method: "IBP", "CROWN", "CROWN-IBP" (interval arithmetic inside, CROWN for the output) or "alpha-CROWN".
        C: [B, n_spec, n_out]; None takes the outputs themselves, and gives them their shape. return_A: also the linear
        bounds in the input, ``{"lA", "uA", "lbias", "ubias"}`` with [B, n_spec, n_in] and [B, n_spec].

        Raises:
            ValueError: an unknown method, shapes that do not fit, or an empty input set.
            UnboundedError: the bounds are not finite; the message names the node where they stop being so.
        """
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not known; choose from {', '.join(METHODS)}")
        (bounded,) = x if isinstance(x, tuple) else (x,)
        region = bounded.ptb.region(bounded.data, self.dtype)
        if region.x_L.shape[1] != self.graph.nodes[0].size:
            raise ValueError(
                f"x has {region.x_L.shape[1]} elements a sample, the model takes {self.graph.nodes[0].size}"
            )
        c, shape = self._specification(C, region.batch)
        if not c.shape[0] or not c.shape[1]:
            empty = torch.zeros(shape, dtype=self.dtype)
            return (empty, empty.clone(), {}) if return_A else (empty, empty.clone())
        rows = [c] * bound_lower + [-c] * bound_upper
        if not rows:
            raise ValueError("neither bound_lower nor bound_upper is asked for")
        if return_A and method == "IBP":
            raise ValueError("return_A needs a CROWN method; interval arithmetic has no linear bounds")
        trace = Trace() if return_A else None
        value = self.lower_forms(region, torch.cat(rows, 1), method, trace)
        if not value.isfinite().all():
            raise UnboundedError(unbounded_reason(self.graph, self.bounds))
        parts = list(value.split(c.shape[1], 1))
        lower = parts.pop(0).reshape(shape) if bound_lower else None
        upper = -parts.pop(0).reshape(shape) if bound_upper else None
        if trace is None:
            return lower, upper
        return lower, upper, _coefficients(trace, c.shape[1], bound_lower, bound_upper)

    def _specification(self, C: Tensor | None, batch: int) -> tuple[Tensor, tuple[int, ...]]:
        n = self.graph.nodes[-1].size
        if C is None:
            eye = torch.eye(n, dtype=self.dtype).expand(batch, n, n)
            inner = self.graph.nodes[-1].shape
            return eye, (batch, *(inner[1:] if len(inner) > 1 and inner[0] == 1 else (n,)))
        if C.dim() != 3 or C.shape[0] != batch or C.shape[2] != n:
            raise ValueError(f"C has shape {tuple(C.shape)}; [{batch}, n_spec, {n}] is needed")
        if not C.isfinite().all():
            raise ValueError("C must be finite; a coefficient is NaN or infinite")
        return C.to(self.dtype), (batch, C.shape[1])

    def lower_forms(self, region: Region, c: Tensor, method: str, trace: Trace | None = None) -> Tensor:
        """Lower bounds [B, S] of c . outputs over a region; infinite or NaN where there is none."""
        if method == "alpha-CROWN":
            solution = alpha_crown(self.graph, region, c, self.schedule, joint=self.joint)
            empty, value, bounds, alphas = solution.empty, solution.lower, solution.bounds, solution.alphas
        else:
            with torch.no_grad():
                bounds, empty = bound_nodes(self.graph, region, crown=method == "CROWN")
            alphas = None
            if method == "IBP":
                low, high = (t.unsqueeze(1) for t in bounds[self.graph.output])
                value = (torch.where(c > 0, c * low, 0.0) + torch.where(c < 0, c * high, 0.0)).sum(-1)
            else:
                value = self._pass(c, bounds, region, None, None)
        if bool(empty.any()):
            raise ArithmeticError("two sound bounds contradict each other; please report this model")
        if trace is not None:
            self._pass(c, bounds, region, alphas, trace)
        self.bounds = bounds
        return value

    @torch.no_grad()
    def _pass(self, c: Tensor, bounds: Bounds, region: Region, alphas: Any, trace: Trace | None) -> Tensor:
        slopes = slopes_of(self.graph, bounds)
        return backward(self.graph, self.graph.output, c, bounds, region, slopes=slopes, alphas=alphas, trace=trace)


def unbounded_reason(graph: Graph, bounds: Bounds) -> str:
    """The first node whose interval is not finite though its arguments' are, in words."""
    for index, node in enumerate(graph.nodes[1:], 1):
        if index not in bounds:
            continue
        bad = ~(bounds[index][0].isfinite() & bounds[index][1].isfinite())
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            source = bounds[node.inputs[0]]
            inside = ""
            if node.nonlinear and len(where) == 2:
                inside = f"; its argument lies in [{float(source[0][where]):.6g}, {float(source[1][where]):.6g}]"
            name = getattr(node.op, "name", "affine map")
            return f"no finite bounds at node {node.name!r} ({name}){inside}; narrow the input set"
    return "no finite bounds of the output; narrow the input set"


def _coefficients(trace: Trace, n: int, lower: bool, upper: bool) -> dict[str, Tensor]:
    assert trace.row is not None
    assert trace.bias is not None
    found: dict[str, Tensor] = {}
    if lower:
        found |= {"lA": trace.row[:, :n], "lbias": trace.bias[:, :n]}
    if upper:
        found |= {"uA": -trace.row[:, -n:], "ubias": -trace.bias[:, -n:]}
    return found


def _compare(graph: Graph, model: nn.Module, example: Tensor) -> None:
    """The graph must compute what the module computes, at the example and around it.

    Raises:
        ValueError: it does not.
    """
    from tilewright.verify.genbab.from_torch import float_copy

    own = float_copy(model, graph.dtype)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.1):
        noise = torch.randn(example.shape, generator=generator, dtype=torch.float64).to(graph.dtype)
        x = example.to(graph.dtype) + scale * noise
        with torch.no_grad():
            wanted = own(x).reshape(-1).to(graph.dtype)
            got = graph.forward(x.reshape(1, -1))[0]
        if not torch.isfinite(wanted).all():
            continue
        error = float((wanted - got).abs().max()) if len(got) == len(wanted) else math.inf
        limit = 1e3 * torch.finfo(graph.dtype).eps ** 0.75 * (1 + float(wanted.abs().max()))
        if not error <= limit:
            raise ValueError(f"the recorded graph differs from the module by {error:.3g}; please report this model")
