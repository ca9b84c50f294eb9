# SPDX-License-Identifier: Apache-2.0
"""The cost model against what is counted and timed: operations of the loops, cache bytes, time of a decoded token."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.claims import Experiment, Row, at_most
from tilewright.nn.delta_rule._claim_tools import medians_in_turn
from tilewright.nn.hybrid_linear_attention._claim_exact import HEADS, draw, loop
from tilewright.nn.hybrid_linear_attention.study import MIXERS

CONTEXT = 4096


class Counted(TorchDispatchMode):
    """Counts multiplications and additions: one for each element of a product or sum, 2 m n k for a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mul", "add", "sub", "rsub"):
            self.operations += out.numel()
        elif name in ("bmm", "mm"):
            self.operations += 2 * args[0].shape[-1] * prod(out.shape)
        return out


def counting_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: what the calculator says of one token against what the loops do."""
    from tilewright.nn.hybrid_linear_attention import flops_per_token, hybrid_config

    experiment.say("counting the operations of the loops")
    size, tokens = 64, 8
    ratios = {}
    for mixer in MIXERS:
        options = {"expand_v": 1.0} if mixer in ("retnet", "gated_deltanet") else {}
        options |= {"expand_k": 1.0} if mixer == "gla" else {}
        config = hybrid_config(
            mixer,
            "pure",
            num_layers=1,
            hidden_size=HEADS * size,
            num_heads=HEADS,
            vocab_size=8,
            mixer_options=options,
        )
        inputs = {name: x.detach() for name, x in draw(mixer, tokens, torch.float32, size, size).items()}
        with Counted() as counted:
            _whole_update(mixer, inputs)
        # The inputs hold two sequences.
        ratios[mixer] = flops_per_token(config, tokens) / (counted.operations / (2 * tokens))
    experiment.values["calculator over count"] = ratios
    off = max(max(r, 1 / r) for r in ratios.values())
    yield at_most("calculator against counted operations of the six loops, largest ratio", off, 1.1)


def _whole_update(mixer: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loop with what belongs to HGRN's recurrence around the scan: (1 - a) i, and the read-out's gate."""
    if mixer != "hgrn":
        return loop(mixer, inputs)
    keep = inputs["g"].exp()
    written = inputs["x"] * (1 - keep)
    return loop(mixer, {"x": written, "g": inputs["g"]}) * inputs["x"]


def memory_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: the key/value cache of 3:1 is a quarter of that of a full stack."""
    from tilewright.nn.hybrid_linear_attention import hybrid_config, state_bytes

    sizes: dict[str, Any] = {"num_layers": 8, "hidden_size": 256, "num_heads": 4, "vocab_size": 8}
    shares = {ratio: state_bytes(hybrid_config("gla", ratio, **sizes), CONTEXT) for ratio in ("3:1", "full")}
    experiment.values["state bytes"] = shares
    share = shares["3:1"]["key_value"] / shares["full"]["key_value"]
    yield Row("key/value cache of 3:1 over full", "1/4", share, "= 0.25", share == 0.25)


def decode_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: time of a decoded token behind a context of 4096, 3:1 over full, taken in turn."""
    from tilewright.nn import MixerCache, build_hybrid

    experiment.say("decoding behind 4096 tokens")
    sizes: dict[str, Any] = {"num_layers": 8, "hidden_size": 256, "num_heads": 4, "vocab_size": 256}
    context = torch.randint(
        256, (1, CONTEXT // 8 if experiment.quick else CONTEXT), generator=torch.Generator().manual_seed(0)
    )
    works = {}
    for ratio in ("3:1", "full"):
        torch.manual_seed(0)
        model = build_hybrid("gated_deltanet", ratio, **sizes).eval()
        cache = MixerCache()
        with torch.no_grad():
            for piece in context.split(1024, 1):
                model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        works[ratio] = _steps(model, cache)
    times = medians_in_turn(works, 3 if experiment.quick else 12)
    experiment.values["seconds per decoded token"] = {ratio: t / STEPS for ratio, t in times.items()}
    title = f"time of a decoded token behind {context.shape[1]}, 3:1 over full"
    yield experiment.in_full(at_most(title, times["3:1"] / times["full"], 0.6))


STEPS = 4


def _steps(model: Any, cache: Any) -> Any:
    """Work: a few decoded tokens; the context grows by them, equally for all."""
    token = torch.zeros(1, 1, dtype=torch.int64)

    def work() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(token, past_key_values=cache, use_cache=True)

    return work
