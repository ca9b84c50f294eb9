# SPDX-License-Identifier: Apache-2.0
"""A graph that is no plain network: the balance of a small AC power network whose voltages a network predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most, spread

WAYS: dict[str, Any] = {"ReLU only": ("relu",), "all": None}


def rows(experiment: Experiment) -> Iterator[Row]:
    """Item 6: the smallest imbalance tau that each way proves for all loads, beside what samples reach."""
    experiment.say("power flow")
    found = spread(partial(one_network, quick=experiment.quick), range(1 if experiment.quick else 2))
    experiment.values["power"] = found
    for key in ("samples", "alpha-CROWN", *WAYS):
        text = ", ".join(f"{one[key]:.4g}" for one in found)
        yield Row(
            f"AC balance: imbalance {'reached' if key == 'samples' else 'proved'}, {key}", "", text, "reported", True
        )
    for other in ("alpha-CROWN", "ReLU only"):
        ratio = max(one["all"] / one[other] for one in found)
        row = at_most(
            f"AC balance: proved with all branching over {other}, worst network", ratio, 0.999, paper="smaller"
        )
        yield row if other == "alpha-CROWN" else experiment.in_full(row)
    above = min(one["all"] / one["samples"] for one in found)
    yield at_least("AC balance: proved with all branching over what samples reach", above, 1.0)


def one_network(seed: int, quick: bool) -> dict[str, float]:
    """Train a network and bound its imbalance by every way."""
    from tilewright.verify.genbab._claim_models import PowerFlow

    module = PowerFlow(seed)
    module.fit(seed, 300 if quick else 1000)
    return taus(module, 400 if quick else 2000)


def taus(module: Any, domains: int) -> dict[str, float]:
    """Largest absolute imbalance: by 100,000 samples from below; from above by alpha-CROWN and, from the same root, by
    branching with the same number of subdomains. A search keeps the worst of all outputs and signs in front."""
    from tilewright.verify.genbab import BoundedModule
    from tilewright.verify.genbab.bab import Search, Settings
    from tilewright.verify.genbab.branching import Branching
    from tilewright.verify.genbab.optimise import Schedule
    from tilewright.verify.genbab.properties import Property
    from tilewright.verify.genbab.region import Region

    low, high = module.box()
    x = low + torch.rand((100_000, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (high - low)
    with torch.no_grad():
        reached = float(module(x).abs().max())
    graph = BoundedModule(module, low[None]).graph
    eye = torch.eye(4, dtype=torch.float64)
    prop = Property(torch.cat([eye, -eye])[:, None], torch.zeros((8, 1), dtype=torch.float64))
    base = Settings(timeout=600, batch_size=64, max_domains=domains, root=Schedule(25))
    root = Search(graph, Region(low[None], high[None]), prop, base, _nothing, _never)
    root.root()
    found = {"samples": reached, "alpha-CROWN": -root.lower_bound}
    for name, only in WAYS.items():
        how = Branching("bbps", "opt", None if only is None else frozenset(only))
        search = Search(graph, root.region, prop, replace(base, branching=how), _nothing, _never)
        search.adopt(root)
        found[name] = -search.run().lower_bound
    return found


def _nothing(x: Tensor) -> bool:  # noqa: ARG001
    return False


def _never() -> float:
    """No bound is good enough: the search spends its subdomains on the worst."""
    return 1e300
