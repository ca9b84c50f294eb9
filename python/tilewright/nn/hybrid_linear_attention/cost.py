# SPDX-License-Identifier: Apache-2.0
"""What a stack of mixers costs: arithmetic for a token, and what it keeps of the past (arXiv 2507.06457, appendix)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tilewright.nn import mixers

if TYPE_CHECKING:
    from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig

Convention = Literal["recurrence", "paper"]

PAPER = {
    "retnet": 5.0,
    "lightning": 5.0,
    "gla": 7.0,
    "hgrn2": 7.0,
    "deltanet": 8.0,
    "gated_deltanet": 8.0,
}
"""The paper's coefficients of D^2 / H for matrix states; softmax has 2 L D, HGRN 5 D."""

KEY_VALUE = ("key", "value")


def layer_mixers(config: HybridConfig) -> list[nn.Module]:
    """The stack's mixers without storage, to be asked about their sizes."""
    place = {"hidden_size": config.hidden_size, "num_heads": config.num_heads, "num_layers": config.num_hidden_layers}
    with torch.device("meta"):
        return [
            mixers.build(name, **{**place, "layer_idx": index, **options})
            for index, (name, options) in enumerate(config.layer_specs)
        ]


def flops_per_token(config: HybridConfig, context_length: int, convention: Convention = "recurrence") -> float:
    """Multiplies and adds of all mixers for one token, forward, projections left out.

    Args:
        config: of the stack.
        context_length: L; softmax layers count the mean over a sequence of this length.
        convention: "recurrence" counts the recurrences as they are written, at the layers' own key and value sizes;
            "paper" takes the paper's coefficients for K = V = D / H, which are larger for GLA, HGRN2 and the delta
            rules than their recurrences need.

    Raises:
        ValueError: context_length < 1, or the paper has no figure for a mixer.
    """
    if context_length < 1:
        raise ValueError(f"flops_per_token: context_length = {context_length}, needed at least 1")
    if convention == "paper":
        return sum(_paper(name, config, context_length) for name in config.layer_names)
    if convention != "recurrence":
        raise ValueError(f"flops_per_token: convention = {convention!r}, needed 'recurrence' or 'paper'")
    return sum(_cost(mixer, "flops_per_token", context_length) for mixer in layer_mixers(config))


def state_bytes(
    config: HybridConfig, context_length: int, *, cache_bytes: int = 2, state_bytes_each: int = 4
) -> dict[str, int]:
    """What one sequence of this length keeps in the cache, in bytes.

    Args:
        config: of the stack.
        context_length: tokens seen.
        cache_bytes: of a number in keys, values and convolution windows (2 for bfloat16).
        state_bytes_each: of a number in a recurrent state (4: they are float32).

    Returns:
        "key_value", "state" (everything else), and their sum "total".
    """
    if context_length < 0:
        raise ValueError(f"state_bytes: context_length = {context_length}, needed at least 0")
    key_value = state = 0
    for mixer in layer_mixers(config):
        for name, count in _cost(mixer, "state_elements", context_length).items():
            if name in KEY_VALUE:
                key_value += cache_bytes * count
            else:
                state += count * (state_bytes_each if name == "recurrent_state" else cache_bytes)
    return {"key_value": key_value, "state": state, "total": key_value + state}


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points (cost, loss) that no other point beats in one and equals in the other, cheapest first."""
    best: list[str] = []
    lowest = float("inf")
    for name, (_, loss) in sorted(points.items(), key=lambda item: item[1]):
        if loss < lowest:
            best.append(name)
            lowest = loss
    return best


def _paper(name: str, config: HybridConfig, context_length: int) -> float:
    width = config.hidden_size
    if name == "softmax":
        return 2.0 * context_length * width
    if name == "hgrn":
        return 5.0 * width
    if name not in PAPER:
        raise ValueError(f"flops_per_token: the paper has no figure for {name!r}; take convention='recurrence'")
    return PAPER[name] * width**2 / config.num_heads


def _cost(mixer: nn.Module, method: str, context_length: int) -> Any:
    if not hasattr(mixer, method):
        raise ValueError(f"{type(mixer).__name__} does not state its cost: it has no method {method}(context_length)")
    return getattr(mixer, method)(context_length)
