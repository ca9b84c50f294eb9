# SPDX-License-Identifier: Apache-2.0
"""What observing costs: a model's forward pass bare, and with reducers on activations of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.records import digest
from bench.timing import summary, time_in_turn

BARE = "bare forward pass"
SITE = "model.layers.*.mlp.down_proj@input"


def methods() -> dict[str, Any]:
    """What is observed at the input of every down projection."""
    from tilewright.reducers import AbsMax, Moments, Reservoir

    return {
        "observe largest magnitudes": AbsMax,
        "observe moments": Moments,
        "observe a sample of rows": lambda: Reservoir(256),
    }


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:  # noqa: ARG001
    """Records of one `[[capture]]` case: the real SmolLM2 over one batch of random tokens."""
    from tilewright import data, models
    from tilewright.capture import observe

    module = models.to_transformers(models.load(data.smollm2_gguf()), dequantize=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (case["batch"], case["length"]))

    def bare(_: int) -> torch.Tensor:
        with torch.no_grad():
            return module.model(ids).last_hidden_state

    def observed(reducer: Any) -> Callable[[int], Any]:
        return lambda _: observe(module.model, [ids], {SITE.removeprefix("model."): reducer}, progress=False)

    works: dict[str, Callable[[int], Any]] = {BARE: bare} | {n: observed(r) for n, r in methods().items()}
    samples = time_in_turn(works, seconds * case.get("patience", 1))
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    return [
        {
            "op": name,
            "problem": {"batch": case["batch"], "length": case["length"]},
            "dtype": "float32",
            "kernel": "" if name == BARE else SITE,
            **summary(times),
            "operations": 0,
            "digest": digest(bare(0)[:, -1]),
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        for name, times in samples.items()
    ]
