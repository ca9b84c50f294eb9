# SPDX-License-Identifier: Apache-2.0
"""``verify``: a proof, a counterexample, or neither, for a linear property of outputs over a set of inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.verify.genbab import attack, bab
from tilewright.verify.genbab.bab import Outcome, Search, Settings
from tilewright.verify.genbab.bounded_module import BoundedModule, PerturbationLpNorm, unbounded_reason
from tilewright.verify.genbab.bounds import bound_nodes
from tilewright.verify.genbab.branching import Branching
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.optimise import BRANCH, Schedule
from tilewright.verify.genbab.properties import Property, clauses, conjunction
from tilewright.verify.genbab.region import Region, box_region

METHODS = ("genbab", "alpha-CROWN", "CROWN", "IBP")


@dataclass
class Verification:
    """The answer.

    status: "verified" (proved), "falsified" (``witness`` violates the property, checked by the model's own forward
    pass) or "unknown" (``reason`` says why). lower_bound: of min over clauses of max over rows of c . y - rhs, over the
    whole input set. witness: shaped like the input. domains_visited: subdomains bounded. trace: (seconds, subdomains,
    lower bound) as the search went.
    """

    status: str
    lower_bound: float
    witness: Tensor | None
    domains_visited: int
    time: float
    reason: str = ""
    trace: list[tuple[float, int, float]] = field(default_factory=list)


def verify(
    model: nn.Module | Graph,
    x_L: Tensor,
    x_U: Tensor,
    C: Tensor | Sequence[Tensor],
    rhs: Tensor | float | Sequence[Tensor] = 0.0,
    *,
    method: str = "genbab",
    branching: str = "bbps",
    branching_point: str = "opt",
    branch_on: Sequence[str] | None = None,
    tried: int = 1,
    split: str = "neuron",
    refresh: bool = True,
    timeout: float = 60.0,
    batch_size: int = 64,
    max_domains: int | None = None,
    branch_steps: int = BRANCH.steps,
    tolerance: float = bab.TOLERANCE,
    seed: int = 0,
    perturbation: PerturbationLpNorm | None = None,
    confirm: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Verification:
    """Prove that C f(x) > rhs for every x in the box [x_L, x_U], or find an x where it is not.

    model: a torch module (one tensor in, one out), or a graph from :func:`load_onnx`. x_L, x_U: one input's shape, with
    or without a batch axis of 1. C [rows, n_out], rhs number or [rows]: all rows must hold. A list of C [R_k, n_out]
    with a list of rhs [R_k] is a list of clauses: in each one row must hold.

    method: "genbab" searches; "alpha-CROWN", "CROWN" and "IBP" only bound once (after the attack). branching: "bbps",
    "babsr", "width". branching_point: "opt" or "uniform". branch_on: names of nonlinearities ("relu", "sin", ...)
    to cut and nothing else; everything if None. tried: how many decisions of the highest score have their halves
    bounded before one is taken. split: "neuron" or "input". refresh: intermediate bounds anew in every subdomain.
    timeout in seconds, batch_size and max_domains in subdomains. perturbation: a ball around the box's
    centre to cut the box with.
    confirm: the function that says what the model answers, [n_in] -> [n_out], for checking witnesses; the module itself
    if None.

    Raises:
        ValueError: an empty or infinite box, shapes that do not fit, unknown options, NaN weights.
        UnsupportedOperator: the model has an operator without bounds.
    """
    started = time.monotonic()
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; choose from {', '.join(METHODS)}")
    settings = Settings(
        Branching(branching, branching_point, None if branch_on is None else frozenset(branch_on), tried),
        split,
        timeout,
        batch_size,
        (1 << 62) if max_domains is None else max_domains,
        refresh,
        tolerance,
        branch=Schedule(branch_steps, BRANCH.lr_alpha, BRANCH.lr_beta, BRANCH.decay),
        seed=seed,
    )
    shape = tuple(model.input_shape) if isinstance(model, Graph) else _batched(x_L)
    low, high = x_L.reshape(1, *_inner(shape)), x_U.reshape(1, *_inner(shape))
    region = box_region(low, high, dtype)
    if perturbation is not None:
        region = perturbation.region((low + high) / 2, dtype)
    graph = model if isinstance(model, Graph) else BoundedModule(model, low.reshape(shape), {"dtype": dtype}).graph
    prop = _property(C, rhs, graph.nodes[-1].size, dtype)
    check = _checker(model, graph, prop, region, shape, confirm)
    if method == "genbab":
        outcome = bab.search(graph, region, prop, settings, check)
    else:
        outcome = _bound_once(graph, region, prop, settings, check, method)
    if outcome.status == "verified":
        # A node without a finite interval may give a NaN that a later zero hides from the lines but not from the model.
        with torch.no_grad():
            bounds = bound_nodes(graph, region)[0]
        if not all(bool(end.isfinite().all()) for interval in bounds.values() for end in interval):
            outcome = replace(outcome, status="unknown", lower_bound=-math.inf)
    reason = outcome.reason
    if outcome.status == "unknown" and not math.isfinite(outcome.lower_bound):
        with torch.no_grad():
            reason = f"{reason}; {unbounded_reason(graph, bound_nodes(graph, region)[0])}".removeprefix("; ")
    witness = None if outcome.witness is None else outcome.witness.reshape(x_L.shape)
    return Verification(
        outcome.status,
        outcome.lower_bound,
        witness,
        outcome.domains_visited,
        time.monotonic() - started,
        reason,
        outcome.trace,
    )


def _batched(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape) if x.dim() > 1 and x.shape[0] == 1 else (1, *x.shape)


def _inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if shape and shape[0] == 1 else shape


def _property(C: Any, rhs: Any, n_out: int, dtype: torch.dtype) -> Property:
    if isinstance(C, Tensor):
        return conjunction(C, rhs, n_out, dtype)
    rows = [torch.as_tensor(c, dtype=dtype) for c in C]
    if isinstance(rhs, (int, float)):
        rhs = [torch.full((len(c),), float(rhs), dtype=dtype) for c in rows]
    if len(rows) != len(rhs):
        raise ValueError(f"C has {len(rows)} clauses and rhs {len(rhs)}; give one rhs a clause")
    return clauses([(c, -torch.as_tensor(r, dtype=dtype)) for c, r in zip(rows, rhs, strict=True)], n_out, dtype)


def _checker(
    model: nn.Module | Graph,
    graph: Graph,
    prop: Property,
    region: Region,
    shape: tuple[int, ...],
    confirm: Callable[[Tensor], Tensor] | None,
) -> Callable[[Tensor], bool]:
    """Whether a point of the set violates the property by the model's own arithmetic."""
    if confirm is None and isinstance(model, nn.Module):
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), graph.dtype)

        def confirm(x: Tensor) -> Tensor:
            training = model.training
            model.eval()
            try:
                return model(x.reshape(shape).to(kind)).reshape(-1)
            finally:
                model.train(training)

    def check(x: Tensor) -> bool:
        with torch.no_grad():
            y = graph.forward(x[None])[0] if confirm is None else confirm(x)
            inside = bool(((x >= region.x_L[0]) & (x <= region.x_U[0])).all())
            return inside and bool(prop.violated(y.to(graph.dtype)))

    return check


def _bound_once(
    graph: Graph, region: Region, prop: Property, settings: Settings, check: Callable[[Tensor], bool], method: str
) -> Outcome:
    x, margin = attack.pgd(graph, region, prop, seed=settings.seed)
    for clause in margin.argsort().tolist():
        if margin[clause] <= 0 and check(x[clause]):
            return Outcome("falsified", float(margin[clause]), x[clause])
    if method == "alpha-CROWN":
        search = Search(graph, region, prop, settings, check)
        search.root()
        lower = search.lower_bound
    else:
        k, r, n = prop.c.shape
        module = BoundedModule(graph)
        value = module.lower_forms(region, prop.c.reshape(1, k * r, n), method).reshape(k, r) + prop.d
        lower = float(value.nan_to_num(-math.inf).amax(1).min())
    proved = lower > settings.tolerance
    return Outcome("verified" if proved else "unknown", lower, reason="" if proved else f"{method} does not suffice")


def minimum(
    model: nn.Module | Graph,
    x_L: Tensor,
    x_U: Tensor,
    c: Tensor,
    *,
    gap: float = 1e-4,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[float, float, Outcome]:
    """(lower, upper, outcome) of min c . f(x) over a box, searched until they are ``gap`` apart or a limit is met.

    options: those of :func:`verify` that steer the search (branching, branching_point, branch_on, tried, split,
    refresh, timeout, batch_size, max_domains, branch_steps, seed).
    """
    steps = int(options.pop("branch_steps", BRANCH.steps))
    only = options.pop("branch_on", None)
    how = Branching(
        options.pop("branching", "bbps"),
        options.pop("branching_point", "opt"),
        None if only is None else frozenset(only),
        int(options.pop("tried", 1)),
    )
    settings = Settings(how, branch=Schedule(steps, BRANCH.lr_alpha, BRANCH.lr_beta, BRANCH.decay), **options)
    shape = tuple(model.input_shape) if isinstance(model, Graph) else _batched(x_L)
    region = box_region(x_L.reshape(1, -1), x_U.reshape(1, -1), dtype)
    graph = model if isinstance(model, Graph) else BoundedModule(model, x_L.reshape(shape), {"dtype": dtype}).graph
    return bab.minimum(graph, region, torch.as_tensor(c, dtype=dtype), settings, gap=gap)
