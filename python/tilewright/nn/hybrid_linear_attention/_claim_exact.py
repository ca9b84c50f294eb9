# SPDX-License-Identifier: Apache-2.0
"""The six mixers of the study: exact against loops and independent forms, cached, and laid out as stated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from tilewright.claims import Experiment, Row, at_most
from tilewright.nn.delta_rule._claim_tools import gradients, relative, worst
from tilewright.nn.hybrid_linear_attention.study import MIXERS

HEADS, KEY, VALUE = 3, 16, 24
Inputs = dict[str, Tensor]


def operator(mixer: str) -> Callable[[Inputs], Tensor]:
    """The chunked operator that a mixer rests on, on the inputs of :func:`draw`."""
    from tilewright import ops

    calls: dict[str, Callable[[Inputs], Tensor]] = {
        "hgrn": lambda x: ops.chunk_hgrn(x["x"], x["g"])[0],
        "hgrn2": lambda x: ops.chunk_gla(x["q"], -torch.expm1(x["g"]), x["v"], x["g"])[0],
        "retnet": lambda x: ops.chunk_retention(x["q"], x["k"], x["v"])[0],
        "gla": lambda x: ops.chunk_gla(x["q"], x["k"], x["v"], x["g"])[0],
        "deltanet": lambda x: ops.chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])[0],
        "gated_deltanet": lambda x: ops.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"])[0],
    }
    return calls[mixer]


def loop(mixer: str, x: Inputs) -> Tensor:
    """The update of the study's table 1, token by token: the oracle, whose operations the cost model must count."""
    if mixer == "hgrn":
        h, rows = x["x"].new_zeros(x["x"].shape[0], x["x"].shape[2]), []
        for t in range(x["x"].shape[1]):
            h = x["g"][:, t].exp() * h + x["x"][:, t]
            rows.append(h)
        return torch.stack(rows, 1)
    q = x["q"] * x["q"].shape[-1] ** -0.5
    k = -torch.expm1(x["g"]) if mixer == "hgrn2" else x["k"]
    state, rows = q.new_zeros(q.shape[0], HEADS, q.shape[-1], x["v"].shape[-1]), []
    decay = _decays(mixer, x)
    for t in range(q.shape[1]):
        if decay is not None:
            state = decay[:, t] * state
        value = x["v"][:, t]
        if "delta" in mixer:
            value = x["beta"][:, t, :, None] * (value - (k[:, t, :, None] @ state)[:, :, 0])
        state = state + k[:, t, :, :, None] * value[:, :, None]
        rows.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(rows, 1)


def _decays(mixer: str, x: Inputs) -> Tensor | None:
    """Decay factors [B, T, H, K or 1, 1] of a mixer, or None."""
    if mixer == "deltanet":
        return None
    if mixer == "retnet":
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
        # The operator keeps log gamma in float32.
        return gamma.log().float().to(x["q"].dtype).exp()[:, None, None].expand(*x["q"].shape[:2], -1, -1, -1)
    return x["g"].exp()[..., None, None] if mixer == "gated_deltanet" else x["g"].exp()[..., None]


def draw(mixer: str, tokens: int, dtype: torch.dtype, key: int = KEY, value: int = VALUE) -> Inputs:
    """Random inputs of a mixer's operator: unit keys, gates as sigmoids."""
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(2, tokens, *shape, generator=random, dtype=torch.float64)

    if mixer == "hgrn":
        inputs = {"x": randn(HEADS * value), "g": logsigmoid(randn(HEADS * value) + 2)}
    else:
        inputs = {"q": randn(HEADS, key), "k": normalize(randn(HEADS, key), dim=-1), "v": randn(HEADS, value)}
        if mixer in ("hgrn2", "gla"):
            inputs["g"] = logsigmoid(randn(HEADS, key) + 2)
        if mixer == "gated_deltanet":
            inputs["g"] = logsigmoid(randn(HEADS) + 2)
        if "delta" in mixer:
            inputs["beta"] = torch.sigmoid(randn(HEADS))
    if mixer == "hgrn2":
        del inputs["k"]  # tied: k = 1 - a
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def loop_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: values and gradients of the chunked forms against the loops, in both precisions."""
    experiment.say("six mixers against their loops")
    tokens = 70 if experiment.quick else 150
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        errors = {}
        for mixer in MIXERS:
            inputs = draw(mixer, tokens, dtype)
            wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
            got, want = operator(mixer)(inputs), loop(mixer, wide)
            errors[mixer] = max(relative(got, want), worst(gradients([got], inputs), gradients([want], wide)))
        name = str(dtype).removeprefix("torch.")
        experiment.values[f"loops, {name}"] = errors
        yield at_most(f"six mixers, values and gradients against their loops, {name}", max(errors.values()), bound)


def oracle_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2: transformers' gated delta rule, retention's decay matrix, HGRN as a convolution per channel."""
    import numpy as np
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    experiment.say("independent forms of three mixers")
    with torch.no_grad():
        x = draw("gated_deltanet", 100, torch.float32)
        want, _ = torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])
        gated = relative(operator("gated_deltanet")(x), want)
        x = draw("retnet", 100, torch.float32)
        distance = torch.arange(100)[:, None] - torch.arange(100)
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
        mask = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
        scores = torch.einsum("bihk,bjhk->bhij", x["q"].double(), x["k"].double()) * KEY**-0.5
        want = torch.einsum("bhij,bjhv->bihv", scores * mask, x["v"].double())
        retention = relative(operator("retnet")(x), want)
        x = draw("hgrn", 100, torch.float32)
        frozen = x["g"][:1, :1]
        got = operator("hgrn")({"x": x["x"], "g": frozen.expand_as(x["x"]).contiguous()})
        factors = frozen[0, 0].double().exp().numpy()
        signal = x["x"].double().numpy()
        filtered = np.stack(
            [
                [np.convolve(signal[b, :, c], factors[c] ** np.arange(100))[:100] for c in range(signal.shape[2])]
                for b in range(2)
            ]
        )
        hgrn = relative(got, torch.from_numpy(filtered).transpose(1, 2))
    experiment.values["oracles"] = {"gated_deltanet": gated, "retnet": retention, "hgrn": hgrn}
    yield at_most("Gated DeltaNet against qwen3_next in transformers, float32", gated, 1e-5)
    yield at_most("retention against its decay matrix, float32", retention, 1e-5)
    yield at_most("HGRN with frozen gates against a convolution per channel, float32", hgrn, 1e-5)


def model_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: prefill and decoding of a hybrid stack against one forward pass, and the layouts."""
    from tilewright.nn import MixerCache, build_hybrid
    from tilewright.nn.hybrid_linear_attention.layout import attention_layers

    experiment.say("prefill and decoding of hybrid stacks")
    sizes: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_heads": 2, "vocab_size": 64}
    errors = {}
    for mixer in MIXERS:
        torch.manual_seed(0)
        model = build_hybrid(mixer, "3:1", **sizes, initializer_range=0.1).eval()
        tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            whole = model(tokens, use_cache=False).logits
            cache, parts = MixerCache(), []
            for piece in (tokens[:, :29], *tokens[:, 29:].split(1, 1)):
                parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
        errors[mixer] = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    experiment.values["decoding"] = errors
    yield at_most("hybrid stacks 3:1, prefill and decode against one forward pass", max(errors.values()), 1e-4)
    stated = {
        ("24:1", 24): [23],
        ("6:1", 24): [6, 13, 20],
        ("3:1", 24): [3, 7, 11, 15, 19, 23],
        ("7:1", 8): [7],
        ("1:1", 8): [1, 3, 5, 7],
        ("pure", 24): [],
    }
    found = {key: attention_layers(*key) for key in stated}
    wrong = [
        f"{ratio} of {layers}: {found[ratio, layers]}"
        for ratio, layers in stated
        if found[ratio, layers] != stated[ratio, layers]
    ]
    yield Row("full layers where (i + 1) mod (r + 1) = 0", "", "; ".join(wrong) or "all", "as stated", not wrong)
