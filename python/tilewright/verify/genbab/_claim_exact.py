# SPDX-License-Identifier: Apache-2.0
"""The parts of the claim with an exact answer: relaxations, split tables, bounds of small graphs, integer programs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.verify.genbab import functions
from tilewright.verify.genbab.unary import Unary

DOMAINS: dict[str, tuple[Unary, float, float]] = {
    "relu": (functions.relu, -5, 5),
    "leaky_relu": (functions.leaky_relu(0.1), -5, 5),
    "abs": (functions.absolute, -5, 5),
    "sign": (functions.sign, -5, 5),
    "clip": (functions.clip(-1.0, 2.0), -5, 5),
    "elu": (functions.elu(1.0), -5, 5),
    "sigmoid": (functions.sigmoid, -10, 10),
    "tanh": (functions.tanh, -6, 6),
    "softplus": (functions.softplus, -8, 8),
    "arctan": (functions.arctan, -10, 10),
    "erf": (functions.erf, -4, 4),
    "exp": (functions.exp, -5, 3),
    "log": (functions.log, 0.05, 8),
    "sqrt": (functions.sqrt, 0.05, 8),
    "reciprocal": (functions.reciprocal, 0.2, 6),
    "square": (functions.square, -4, 4),
    "x^3": (functions.power(3), -3, 3),
    "x^4": (functions.power(4), -3, 3),
    "x^1.5": (functions.power(1.5), 0.05, 5),
    "sin": (functions.sin, -10, 10),
    "gelu": (functions.gelu(), -6, 6),
    "gelu (tanh)": (functions.gelu("tanh"), -6, 6),
    "silu": (functions.silu(), -9, 9),
}
NO_HULL = ("sign", "exp")
"""exp's lower line is capped so that it stays positive (the reference's choice); sign jumps between grid points."""


def _intervals(low: float, high: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ends = low + (high - low) * torch.rand((2, count), generator=generator, dtype=torch.float64)
    return ends.amin(0), ends.amax(0)


def relaxation_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: default and random slopes on random intervals; the default area beside the hull of a fine grid."""
    experiment.say("relaxations")
    count, grid = (300, 401) if experiment.quick else (2000, 2001)
    worst, largest = {}, {}
    for name, (fn, low, high) in DOMAINS.items():
        l, u = _intervals(low, high, count, 1)
        default = fn.default_slopes(l, u)
        generator = torch.Generator().manual_seed(2)
        random = torch.randn((2, count), generator=generator, dtype=torch.float64)
        sets = [(k, fn.intercepts(k, l, u)) for k in (default, random)]
        worst[name] = max(_violation(fn, k, b, l, u, grid) for k, b in sets)
        if name not in NO_HULL:
            some = slice(0, 100 if experiment.quick else 300)
            largest[name] = _area_ratio(fn, l[some], u[some])
    experiment.values["violation"] = worst
    experiment.values["area over hull"] = largest
    what = f"{len(DOMAINS)} functions x {count} intervals x {grid} points"
    yield at_most(f"lines left by the function, {what}, largest", max(worst.values()), 1e-9)
    yield at_most(
        "area of the default lines over the grid's hull, worst of all functions", max(largest.values()), 1.001
    )


def _violation(fn: Unary, k: Tensor, b: Tensor, l: Tensor, u: Tensor, grid: int) -> float:
    worst = -math.inf
    for part in torch.linspace(0, 1, grid, dtype=torch.float64).split(200):
        x = torch.minimum(l + part[:, None] * (u - l), u)
        y = fn.f(x)
        worst = max(worst, float(torch.maximum(k[0] * x + b[0] - y, y - k[1] * x - b[1]).max()))
    return worst


def _area_ratio(fn: Unary, l: Tensor, u: Tensor, grid: int = 401) -> float:
    """Area of the default lines over that between the envelopes' supports at the midpoint, from a fine grid."""
    from tilewright.verify.genbab.split_table import area

    wide = u - l > 0.1
    l, u = l[wide], u[wide]
    middle = (l + u) / 2
    t = torch.linspace(0, 1, grid, dtype=torch.float64)[:, None]
    # Envelopes touch f in kinks, which no grid need contain.
    kinks = [torch.minimum(torch.maximum(torch.full_like(l, x), l), u) for x in fn.kinks]
    left, right = (
        torch.stack([*(a + t * (b - a)), *(x.clamp(a, b) for x in kinks)]) for a, b in ((l, middle), (middle, u))
    )
    ends = []
    for sign in (1.0, -1.0):
        y_left, y_right, best = sign * fn.f(left), sign * fn.f(right), sign * fn.f(middle)
        # The support at the midpoint: the lowest chord over it.
        for x, y in zip(left, y_left, strict=True):
            before, after = middle - x, right - middle
            width = before + after
            chord = (y * after + y_right * before) / torch.where(width > 0, width, torch.ones_like(width))
            best = torch.minimum(best, torch.where(width > 0, chord, torch.full_like(width, math.inf)).amin(0))
        ends.append(sign * best)
    hull = (ends[1] - ends[0]) * (u - l)
    ours = area(fn, l, u)
    # Straight pieces enclose nothing but the intercepts' rounding allowance.
    return float(((ours - 1e-9) / hull.clamp(min=1e-12))[hull > 1e-6].max()) if (hull > 1e-6).any() else 1.0


def table_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2: area after the table's cut over area after the midpoint cut, 40 random intervals of width >= 0.5."""
    from tilewright.verify.genbab.split_table import area, points

    experiment.say("split tables")
    found: dict[str, list[float]] = {}
    limits = {"sigmoid": 0.93, "tanh": 0.85, "sin": 0.85, "gelu": 0.75}
    paper = {"sigmoid": 0.917, "tanh": 0.831, "sin": 0.825, "gelu": 0.725}
    for name, limit in limits.items():
        fn = DOMAINS[name][0]
        ratios: list[float] = []
        for seed in range(1 if experiment.quick else 5):
            l, u = _intervals(-5, 5, 400, seed)
            l, u = (t[u - l >= 0.5][:40] for t in (l, u))
            p, middle = points((fn,), l, u), (l + u) / 2
            cut, half = (area(fn, l, x) + area(fn, x, u) for x in (p, middle))
            ratios += (cut / half).tolist()
        found[name] = ratios
        yield at_most(
            f"area after the table's cut over the midpoint's, {name}, mean of {len(ratios)} intervals",
            sum(ratios) / len(ratios),
            limit,
            paper=f"{paper[name]} at the exact optimum",
        )
    experiment.values["cut area"] = found


def bound_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 3: random nets of each family and composite graphs, against samples and an attack."""
    from tilewright.verify.genbab import BoundedModule, BoundedTensor, PerturbationLpNorm
    from tilewright.verify.genbab._claim_models import graphs

    experiment.say("bounds of small graphs")
    samples = 10_000 if experiment.quick else 100_000
    worst, narrower, stronger, outputs = -math.inf, 0, 0, 0
    widths: dict[str, list[float]] = {}
    for seed in range(1 if experiment.quick else 2):
        for name, (module, n) in graphs(seed).items():
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn((1, n), generator=generator, dtype=torch.float64)
            bounded = BoundedModule(module, x, {"optimize_bound_args": {"iteration": 10 if experiment.quick else 30}})
            given = BoundedTensor(x, PerturbationLpNorm(eps=0.2))
            found = {m: bounded.compute_bounds(x=(given,), method=m) for m in ("IBP", "CROWN", "alpha-CROWN")}
            near = x + 0.4 * torch.rand((samples, n), generator=generator, dtype=torch.float64) - 0.2
            with torch.no_grad():
                y = module(near).reshape(samples, -1)
            low, high = _attacked(bounded, given, y)
            low, high = torch.minimum(low, y.amin(0)), torch.maximum(high, y.amax(0))
            for lower, upper in found.values():
                worst = max(worst, float((lower.reshape(-1) - low).max()), float((high - upper.reshape(-1)).max()))
            ibp, crown, alpha = ((u - l).reshape(-1) for l, u in found.values())
            outputs += len(ibp)
            narrower += int((crown <= ibp * (1 + 1e-9)).sum())
            lower, upper = found["alpha-CROWN"]
            stronger += int(((lower >= found["CROWN"][0]) & (upper <= found["CROWN"][1])).sum())
            true = (high - low).clamp(min=1e-9)
            widths.setdefault(name, []).append([float((w / true).mean()) for w in (ibp, crown, alpha)])  # type: ignore[arg-type]
    experiment.values["widths"] = {
        name: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for name, rows in widths.items()
    }
    yield at_most(f"outputs outside their bounds, {len(widths)} kinds of graph, largest", worst, 1e-8)
    yield at_least("share of outputs whose CROWN width is at most the interval width", narrower / outputs, 0.95)
    yield at_least("share of outputs where alpha-CROWN is at least as tight as CROWN", stronger / outputs, 1.0)


def _attacked(bounded: object, given: object, y: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes of each output after descending from 20 points each way."""
    from tilewright.verify.genbab import attack
    from tilewright.verify.genbab.bounded_module import BoundedModule, BoundedTensor
    from tilewright.verify.genbab.properties import Property

    assert isinstance(bounded, BoundedModule)
    assert isinstance(given, BoundedTensor)
    n = y.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    prop = Property(torch.cat([eye, -eye])[:, None], torch.zeros((2 * n, 1), dtype=torch.float64))
    region = given.ptb.region(given.data, torch.float64)
    _, margin = attack.pgd(bounded.graph, region, prop, restarts=20, steps=40)
    return margin[:n], -margin[n:]


def milp_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 4: random ReLU nets, the searched minimum beside the integer program's; verdicts just above and below. The
    smaller nets are searched by cutting units, the larger by cutting the input."""
    from tilewright.verify.genbab import BoundedModule, minimum, verify
    from tilewright.verify.genbab._claim_models import Net, relu_milp
    from tilewright.verify.genbab.bounds import bound_nodes
    from tilewright.verify.genbab.region import Region

    experiment.say("exact minima of ReLU nets")
    count = 4 if experiment.quick else 20
    worst, agree, asked = 0.0, 0, 0
    pairs = []
    for seed in range(count):
        sizes = (2, 10, 10, 1) if seed % 2 == 0 else (4, 16, 16, 1)
        net = Net(sizes, torch.relu, 100 + seed)
        high = torch.ones(sizes[0], dtype=torch.float64) * (1.0 if sizes[0] == 2 else 0.7)
        graph = BoundedModule(net, torch.zeros(1, sizes[0])).graph
        bounds, _ = bound_nodes(graph, Region(-high[None], high[None]))
        hidden = [(bounds[i][0][0], bounds[i][1][0]) for i in graph.pre]
        one = torch.ones(1, dtype=torch.float64)
        exact = relu_milp(net, -high, high, one, hidden)
        split = "neuron" if sizes[0] == 2 else "input"
        lower, _, _ = minimum(graph, -high, high, one, gap=1e-4, timeout=60, split=split)
        worst = max(worst, abs(lower - exact))
        pairs.append((exact, lower))
        for shift, wanted in ((-0.01, "verified"), (0.01, "falsified")):
            found = verify(graph, -high, high, one[None], exact + shift, timeout=60, seed=seed, split=split)
            asked, agree = asked + 1, agree + int(found.status == wanted)
    experiment.values["minima"] = pairs
    yield at_most(f"searched minimum away from the integer program's, {count} ReLU nets, largest", worst, 1e-3)
    yield at_least(f"verdicts 0.01 beside the exact minimum that are right, of {asked}", agree / asked, 1.0)


def closed_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: what must never be called a proof."""
    from torch import nn

    from tilewright.verify.genbab import verify
    from tilewright.verify.genbab._claim_models import Net

    experiment.say("what must not be a proof")

    class Function(nn.Module):
        def __init__(self, f: object) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x)  # type: ignore[operator]

    low, high = -torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    broken = Net((1, 4, 1), torch.relu, 0)
    with torch.no_grad():
        broken.layers[0].weight.fill_(math.nan)  # type: ignore[operator]
    cases = {
        "NaN weight": (broken, low, high),
        "infinite bound": (Function(lambda x: torch.exp(1000 * x + 1000)), low, high),
        "reciprocal across 0": (Function(lambda x: 1 / x), low, high),
        "logarithm across 0": (Function(torch.log), low, high),
        "empty box": (Net((1, 4, 1), torch.relu, 0), high, low),
    }
    said = {}
    for name, (module, x_L, x_U) in cases.items():
        try:
            said[name] = verify(module, x_L, x_U, torch.tensor([[-1.0]]), -1e300, max_domains=50, timeout=10).status
        except ValueError:
            said[name] = "error"
    experiment.values["not proofs"] = said
    verified = sum(word == "verified" for word in said.values())
    yield at_most(f"called a proof, of {len(said)} cases without one ({', '.join(said)})", verified, 0)


def file_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 8: three networks and properties written to files, verdicts known by a dense grid, witnesses re-checked."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from tilewright.verify.genbab import verify_files

    experiment.say("ONNX and VNN-LIB files")
    right = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, op in enumerate(("Relu", "Tanh", "Sigmoid")):
            rng = np.random.default_rng(seed)
            w = [rng.standard_normal(s).astype(np.float32) for s in ((6, 2), (6,), (1, 6), (1,))]
            nodes = [
                helper.make_node("Gemm", ["x", "w0", "w1"], ["h"], transB=1),
                helper.make_node(op, ["h"], ["a"]),
                helper.make_node("Gemm", ["a", "w2", "w3"], ["y"], transB=1),
            ]
            value = helper.make_tensor_value_info
            graph = helper.make_graph(
                nodes,
                "g",
                [value("x", TensorProto.FLOAT, [1, 2])],
                [value("y", TensorProto.FLOAT, [1, 1])],
                [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(w)],
            )
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
            model.ir_version = 8
            onnx.save(model, str(Path(folder) / "m.onnx"))

            def plain(x: Tensor, w: list = w, op: str = op) -> Tensor:
                a, b, c, d = (torch.from_numpy(t) for t in w)
                h = torch.nn.functional.linear(x.float(), a, b)
                return torch.nn.functional.linear(getattr(torch, op.lower())(h), c, d)

            axis = torch.linspace(-1, 1, 301)
            y = plain(torch.cartesian_prod(axis, axis))
            span = float(y.max() - y.min())
            for shift, wanted in ((-0.02, "unsat"), (0.02, "sat")):
                threshold = float(y.min()) + shift * span
                text = "".join(f"(declare-const {n} Real)" for n in ("X_0", "X_1", "Y_0"))
                text += "".join(f"(assert (>= X_{i} -1))(assert (<= X_{i} 1))" for i in range(2))
                (Path(folder) / "p.vnnlib").write_text(text + f"(assert (<= Y_0 {threshold}))")
                answer = verify_files(Path(folder) / "m.onnx", Path(folder) / "p.vnnlib", timeout=30)
                checked = answer.x is None or float(plain(answer.x)) <= threshold
                right += int(answer.word == wanted and checked)
    yield at_least("answers on files that are right, of 6, witnesses re-checked by a plain forward pass", right, 6)
