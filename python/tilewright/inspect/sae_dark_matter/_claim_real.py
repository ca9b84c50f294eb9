# SPDX-License-Identifier: Apache-2.0
"""The dark-matter claim on the real model: SAEs of several widths and seeds, and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from tilewright.claims import Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from tilewright.inspect.sae import SAE, Rows
    from tilewright.inspect.sae_dark_matter._claim_model import Bench
    from tilewright.inspect.sae_dark_matter.analysis import SAEErrorAnalysis

SMALL, LARGE = 1152, 4608
OTHERS = (576, 2304)
SEEDS = (0, 1)


class Real:
    """SAEs of two widths and two seeds on the real activations, and what is measured on them."""

    def __init__(self, experiment: Experiment, bench: Bench) -> None:
        self.experiment, self.bench = experiment, bench
        self.seeds = SEEDS[:1] if experiment.quick else SEEDS
        self.saes: dict[tuple[int, int], SAE] = {}
        self.analyses: dict[tuple[int, int], SAEErrorAnalysis] = {}

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the spec's items."""
        self.train()
        self.run_model()
        yield from self.decomposition_rows()
        yield from self.width_rows()
        yield from self.downstream_rows()
        yield from self.pursuit_rows()
        yield from self.simulation_rows()
        if not self.experiment.quick:
            yield from self.scaling_rows()
            yield from self.part_rows()
            yield from self.component_rows()

    def train(self) -> None:
        """All SAEs, two widths with every seed, the largest first."""
        from tilewright.inspect.sae_dark_matter._claim_model import Case

        pairs = [(width, seed) for width in (SMALL, LARGE) for seed in self.seeds]
        pairs += [] if self.experiment.quick else [(width, self.seeds[0]) for width in OTHERS]
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        widths = sorted({width for width, _ in pairs})
        self.experiment.say(f"SAEs of {', '.join(map(str, widths))} latents, {len(self.seeds)} seed(s)")
        made = dict(zip(pairs, self.bench.train([Case(*pair) for pair in pairs]), strict=True))
        self.experiment.say("fitting B")
        for pair in sorted(pairs, key=lambda pair: (pair[0] in OTHERS, *pair)):
            self.saes[pair] = made[pair]
            self.analyses[pair] = self.bench.analysis(made[pair])

    def run_model(self) -> None:
        """The model's losses: on the recorded tokens (for a baseline), and with the activation replaced."""
        from tilewright.inspect.sae_dark_matter._claim_model import Bench

        self.experiment.say("losses of the model, activations replaced")
        widths = [SMALL if seed else LARGE for seed in self.seeds]
        works: list[Any] = [
            partial(
                Bench.downstream,
                sae=self.saes[pair],
                B=self.analyses[pair].B,
                count=4 if self.experiment.quick else None,
            )
            for pair in zip(widths, self.seeds, strict=True)
        ]
        if not self.experiment.quick:
            works += [partial(Bench.losses, part=part) for part in ("fit", "test")]
        done = self.bench.spread(works)
        self.downstream = list(zip(widths, done[: len(widths)], strict=True))
        self.losses = tuple(done[len(widths) :]) or None

    def decomposition_rows(self) -> Iterator[Row]:
        """Item 4 (a) to (c)."""
        self.experiment.say("error analysis")
        found: dict[str, Any] = {}
        for (width, seed), analysis in self.analyses.items():
            fvu = analysis.fvu()
            found[f"{width}, seed {seed}"] = {
                "fvu": asdict(fvu) | {"linear": fvu.linear},
                "r2": asdict(analysis.r2()),
                "norms": analysis.norm_prediction(),
                "norms, intercept": analysis.norm_prediction(intercept=True),
                "baselines": analysis.baselines(self.bench.token_ids, self.losses),
                "robust": {"fvu": asdict(analysis.fvu(robust=True)), "r2": asdict(analysis.r2(robust=True))},
            }
        self.experiment.values["saes"] = found
        every = [found[f"{width}, seed {seed}"] for width in (SMALL, LARGE) for seed in self.seeds]
        shares = [one["r2"]["r2_global"] for one in every]
        yield at_least("(a) linear share of the error, least of widths and seeds", min(shares), 0.15, paper="about 0.5")
        yield at_most("(a) the same, largest", max(shares), 0.7)
        above = min(one["r2"]["r2_global"] - one["r2"]["shuffled"] for one in every)
        yield at_least("(a) linear share above that of shuffled errors, least", above, 0.2)
        norms = min(one["norms"]["error"] for one in every)
        yield at_least("(b) squared norm of the error from x, R^2, least", norms, 0.4, paper="> 0.9")
        gap = min(one["norms"]["error"] - max(one["baselines"].values()) for one in every)
        yield at_least("(b) the same above the best baseline, least", gap, 0.1)
        names = ", ".join(sorted({max(one["baselines"], key=one["baselines"].get) for one in every}))
        best = max(max(one["baselines"].values()) for one in every)
        yield Row(f"(b) best baseline of any SAE ({names})", "", best, "reported", True)
        yield from _order_rows(every)

    def width_rows(self) -> Iterator[Row]:
        """Item 4 (d), the central claim, and (e)."""
        from tilewright.inspect.sae_dark_matter.scaling import per_token_predictability

        falls, ratios, per_token, gains = [], [], [], []
        for seed in self.seeds:
            small, large = self.analyses[SMALL, seed], self.analyses[LARGE, seed]
            total = 1 - large.fvu().sae / small.fvu().sae
            nonlinear = 1 - large.fvu().nonlinear / small.fvu().nonlinear
            falls.append(total)
            ratios.append(nonlinear / total)
            pair = per_token_predictability(
                [small.error_norms, large.error_norms], [small.nonlinear_norms, large.nonlinear_norms]
            )
            per_token.append(pair.r2[0, 1])
            gains.append(pair.gain[0, 1])
        self.experiment.values["widths"] = {
            "total falls": falls,
            "nonlinear over total": ratios,
            "per token": per_token,
        }
        name = f"(d) from {SMALL} to {LARGE} latents"
        full = self.experiment.in_full
        yield full(at_least(f"{name}: relative fall of the error, least of the seeds", min(falls), 0.1))
        title = f"{name}: fall of the nonlinear error over that of all, largest"
        yield full(at_most(title, max(ratios), 0.5, paper="about 0"))
        yield at_least("(e) error norms of the large SAE from those of the small, R^2, least", min(per_token), 0.6)
        yield Row("(e) share of the rest that the nonlinear norm adds", "", max(gains), "reported", True)

    def downstream_rows(self) -> Iterator[Row]:
        """Item 5."""
        found: list[dict[str, Any]] = [
            {"width": width, "loss": cost.loss, "recovered": cost.recovered, "tokens": cost.tokens}
            for width, cost in self.downstream
        ]
        self.experiment.values["downstream"] = found
        for one in found:
            for part in ("linear", "nonlinear"):
                loss, mixed = one["loss"], one["loss"][f"sae+{part}"]
                between = loss["original"] < mixed < loss["sae"]
                bounds = f"in ({loss['original']:.4f}, {loss['sae']:.4f})"
                yield Row(f"loss with {one['width']} latents and the {part} error", "", mixed, bounds, between)
            total = sum(one["recovered"].values())
            name = f"shares recovered by both parts, {one['width']} latents, sum"
            yield Row(name, "", total, "in [0.6, 1.4]", 0.6 <= total <= 1.4)
            shares = ", ".join(f"{part} {value:.3f}" for part, value in one["recovered"].items())
            yield Row(f"recovered shares, {one['width']} latents", "", shares, "reported", True)

    def pursuit_rows(self) -> Iterator[Row]:
        """Item 6, and the speed of training."""
        import torch

        from tilewright.inspect.sae_dark_matter import _claim_exact
        from tilewright.inspect.sae_dark_matter.pursuit import pursue_sae

        tokens = first_rows(self.bench.rows("test"), 512 if self.experiment.quick else 2048)
        changes, ratios = [], []
        for seed in self.seeds:
            self.experiment.say(f"gradient pursuit, seed {seed}")
            sae, analysis = self.saes[LARGE, seed], self.analyses[LARGE, seed]
            better = tokens - pursue_sae(sae, tokens).recon
            with torch.no_grad():
                plain = tokens - sae.reconstruct(tokens)[0]
            squares = [float(v.square().sum()) for v in (plain, better)]
            changes.append(1 - squares[1] / squares[0])
            rest = [float((v - analysis.B(tokens)).square().sum()) for v in (plain, better)]
            ratios.append(1 - rest[1] / rest[0])
        self.experiment.values["pursuit"] = {"error falls": changes, "beyond B": ratios}
        name = f"pursuit at the encoder's L0, {LARGE} latents"
        yield at_least(f"{name}: relative fall of the error, least", min(changes), 0.0, paper="0.03 to 0.05")
        yield _claim_exact.omp_row(self.saes[LARGE, self.seeds[0]], tokens[:48])
        # 9216 atoms are those of both seeds.
        dictionary = torch.cat([self.saes[LARGE, seed].W_dec.detach() for seed in self.seeds])
        center = self.saes[LARGE, self.seeds[0]].b_dec.detach()
        yield from _claim_exact.pursuit_speed_rows(self.experiment, tokens - center, dictionary)
        yield from _claim_exact.speed_rows(self.experiment, self.bench.rows("train"), LARGE)

    def simulation_rows(self) -> Iterator[Row]:
        """Item 3, on the SAEs trained here."""
        from tilewright.inspect.sae_dark_matter.simulation import introduced_error_simulation

        tokens = first_rows(self.bench.rows("train"), 7000)
        right, second, off = [], [], []
        for seed in self.seeds:
            self.experiment.say(f"introduced-error simulation, seed {seed}")
            found = introduced_error_simulation(self.saes[SMALL, seed], tokens, seed=seed)
            (one, other), (another, last) = found.correlations.tolist()
            right.append(one)
            second.append(last)
            off += [abs(other), abs(another)]
        self.experiment.values["simulation"] = {
            "linear": found.linear.tolist(), "nonlinear": found.nonlinear.tolist(), "levels": found.dense,
            "correlations": found.correlations.tolist(), "idempotence": found.idempotence,
        }  # fmt: skip
        yield at_least("simulation: dense error with the linear estimate, correlation", min(right), 0.8)
        yield at_least("simulation: introduced error with the nonlinear estimate", min(second), 0.8)
        yield at_most("simulation: either with the other's estimate, largest", max(off), 0.4)
        yield Row("simulation: FVU of Sae(Sae(x)) for Sae(x)", "small", found.idempotence, "reported", True)

    def scaling_rows(self) -> Iterator[Row]:
        """The law over the widths that were trained, and the error taken apart by it; reported."""
        from tilewright.inspect.sae_dark_matter.scaling import scaling_law

        widths = sorted({width for width, _ in self.analyses})
        fvu = {w: [a.fvu() for (width, _), a in self.analyses.items() if width == w] for w in widths}
        mean = {w: sum(f.sae for f in fvu[w]) / len(fvu[w]) for w in widths}
        nonlinear = {w: sum(f.nonlinear for f in fvu[w]) / len(fvu[w]) for w in widths}
        law = scaling_law(widths, list(mean.values()), list(nonlinear.values()))
        self.experiment.values["law"] = {"c": law.c, "a": law.a, "m": law.m, "stderr": law.stderr}
        shown = f"{law.c:.3g} + {law.a:.3g} W^{law.m:.3g}, c +- {law.stderr[0]:.2g}"
        yield Row(f"law of the error over widths {', '.join(map(str, widths))}", "c + a W^m", shown, "reported", True)
        spread = max(nonlinear.values()) / min(nonlinear.values())
        yield Row("nonlinear error: largest over smallest of the widths", "about 1", spread, "reported", True)

    def part_rows(self) -> Iterator[Row]:
        """SAEs trained on the two parts of an error; reported."""
        from tilewright.inspect.sae_dark_matter._claim_model import Case

        self.experiment.say("SAEs on the linear and the nonlinear error")
        base = self.analyses[SMALL, self.seeds[0]]
        parts = {"linear": base.linear_error, "nonlinear": base.nonlinear_error}
        found = {}
        saes = self.bench.train([Case(SMALL, part=part, steps=300) for part in parts.values()])
        for (name, part), sae in zip(parts.items(), saes, strict=True):
            x = first_rows(self.bench.rows("test").mapped(part), 4096)
            recon, _ = sae.reconstruct(x)
            found[name] = float((x - recon.detach()).square().sum() / (x - x.mean(0)).square().sum())
        self.experiment.values["parts"] = found
        for name, value in found.items():
            paper = "easier" if name == "linear" else "harder"
            yield Row(f"SAE of {SMALL} latents trained on the {name} error: FVU", paper, value, "reported", True)

    def component_rows(self) -> Iterator[Row]:
        """What earlier components' activations and SAEs predict of the error; reported."""
        from tilewright.inspect.sae_dark_matter._claim_model import COMPONENTS, SITE, Case
        from tilewright.inspect.sae_dark_matter.components import component_prediction

        self.experiment.say("SAEs on earlier components")
        saes = self.bench.train([Case(SMALL, site=site, steps=300) for site in COMPONENTS.values()])
        one = {name: self.bench.analysis(sae, site) for (name, site), sae in zip(COMPONENTS.items(), saes, strict=True)}

        def batches(part: str) -> Iterator[dict[str, Any]]:
            names = {"target": SITE, **COMPONENTS}
            sources = {name: self.bench.rows(part, site).blocks() for name, site in names.items()}
            for blocks in zip(*sources.values(), strict=True):
                yield dict(zip(sources, blocks, strict=True))

        self.experiment.say("regressions on earlier components")
        target = self.analyses[SMALL, self.seeds[0]]
        grid = component_prediction(target, one, batches("fit"), batches("test"))
        self.experiment.values["components"] = grid
        for target_name in ("nonlinear", "linear"):
            best = max(((g[p][target_name], n, p) for n, g in grid.items() for p in g), key=lambda item: item[0])
            outputs = max(g["sae"][target_name] for g in grid.values())
            name = f"{target_name} error, R^2 from earlier components"
            yield Row(f"{name}: best ({best[2]} of the {best[1]})", "", best[0], "reported", True)
            paper = "up to 0.5" if target_name == "nonlinear" else ""
            yield Row(f"{name}: best of their SAEs' outputs", paper, outputs, "reported", True)


def first_rows(rows: Rows, count: int) -> Tensor:
    """The first rows of a source: [count, d]."""
    import torch

    found: list[Tensor] = []
    for block in rows.blocks():
        found.append(block)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def _order_rows(every: list[dict[str, Any]]) -> Iterator[Row]:
    """Item 4 (c): of the six vectors x has the highest, the nonlinear error the lowest R^2."""
    gaps = {"x": [], "nonlinear": []}  # type: dict[str, list[float]]
    for one in every:
        rest = [value for name, value in one["norms"].items() if name not in gaps]
        gaps["x"].append(one["norms"]["x"] - max(rest))
        gaps["nonlinear"].append(min(rest) - one["norms"]["nonlinear"])
    yield at_least("(c) squared norms, R^2: x above all other vectors by, least", min(gaps["x"]), 0.0)
    yield at_least("(c) nonlinear error below all other vectors by, least", min(gaps["nonlinear"]), 0.0)
