# SPDX-License-Identifier: Apache-2.0
"""Lightning attention's exactness: against the full decay matrix in float64, MiniMax's layer, and its own relatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tilewright.claims import Experiment, Row, at_most
from tilewright.nn.delta_rule._claim_tools import gradients, relative, worst
from tilewright.nn.lightning_attention.layer import LightningAttention
from tilewright.nn.mixer import Sequences

SLOPES = (0.0, 1e-3, 0.5, 1.0, 20.0)
PACKED = (0, 63, 63, 64, 200)


def full_matrix(q: Tensor, k: Tensor, v: Tensor, s: Tensor, state: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """O = scale ((Q K^T) o M) V + scale Lambda Q S_0 with M_ij = exp(-s (i - j)), i >= j: no blocks, no recurrence.

    q, k [B, T, H, K]; v [B, T, H, V]; s [H]; state [B, H, K, V]. Returns o and the state after the last token.
    """
    tokens = q.shape[1]
    place = torch.arange(tokens, dtype=q.dtype)
    distance = place[:, None] - place
    # Masked before exp: above the diagonal the exponent would be positive.
    decay = (-s[:, None, None] * distance).masked_fill(distance < 0, float("-inf")).exp()
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * decay
    reach = (-s[:, None] * (place + 1)).exp()
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    o = o + torch.einsum("bihk,bhkv,hi->bihv", q, state, reach)
    left = (-s[:, None] * (tokens - 1 - place)).exp()
    last = torch.einsum("hj,bjhk,bjhv->bhkv", left, k, v) + (-s * tokens).exp()[:, None, None] * state
    return scale * o, last


def definition_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: outputs, state and all gradients in float64; the five slopes are five heads."""
    from tilewright.ops import lightning_attn_func

    experiment.say("float64 against the full decay matrix and its autograd")
    values = slopes = 0.0
    lengths: tuple[int | None, ...] = (1, 65, None) if experiment.quick else (1, 63, 64, 65, 500, None)
    for tokens in lengths:
        offsets = (0, tokens) if tokens is not None else PACKED
        inputs = _inputs(offsets[-1], len(offsets) - 1)
        pieces = [_piece(inputs, i, *ends) for i, ends in enumerate(pairwise(offsets))]
        parts = [full_matrix(**piece) for piece in pieces]
        want = {"o": torch.cat([o for o, _ in parts], 1), "state": torch.cat([state for _, state in parts])}
        packed = {"cu_seqlens": torch.tensor(offsets)} if tokens is None else {}
        want_slopes = gradients(want.values(), inputs)
        for mode in ("chunk", "recurrent"):
            call: dict[str, Any] = {n: x for n, x in inputs.items() if n != "state"}
            call |= {"initial_state": inputs["state"], "output_final_state": True, "mode": mode, **packed}
            got = dict(zip(("o", "state"), lightning_attn_func(**call), strict=True))
            values = max(values, worst(got, want))
            slopes = max(slopes, worst(gradients([x for x in got.values() if x is not None], inputs), want_slopes))
    experiment.values["definition"] = {"values": values, "gradients": slopes}
    yield at_most("float64 outputs and state against the full decay matrix", values, 1e-12)
    yield at_most("float64 gradients of q, k, v, state and slope against its autograd", slopes, 1e-12)


def _inputs(tokens: int, sequences: int, key_size: int = 24, value_size: int = 40) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    heads = len(SLOPES)
    q, k, v = (randn(1, tokens, heads, size) for size in (key_size, key_size, value_size))
    slopes = torch.tensor(SLOPES, dtype=torch.float64, requires_grad=True)
    return {"q": q, "k": k, "v": v, "s": slopes, "state": randn(sequences, heads, key_size, value_size)}


def _piece(inputs: Mapping[str, Tensor], index: int, first: int, last: int) -> dict[str, Any]:
    cut = {name: inputs[name][:, first:last] for name in ("q", "k", "v")}
    return {**cut, "s": inputs["s"], "state": inputs["state"][index : index + 1]}


def relative_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 6: retention, a scalar decay per token and a decay per channel agree when they are fed the same decay."""
    from tilewright import ops

    experiment.say("against retention and the gated forms")
    inputs = _inputs(150, 1)
    q, k, v = (inputs[name].detach() for name in ("q", "k", "v"))
    heads, scale = q.shape[2], q.shape[-1] ** -0.5
    # Retention keeps log gamma, gamma = 1 - 2^(-5-h), in float32; the others are fed the same numbers.
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float().double()
    want = ops.lightning_attn_func(q, k, v, -decay, scale=scale)[0]
    g = decay.expand(*q.shape[:3])
    got = {
        "retention": ops.chunk_retention(q, k, v)[0],
        "constant gate": ops.chunk_simple_gla(q, k, v, g_gamma=decay)[0],
        "gate per token": ops.chunk_simple_gla(q, k, v, g=g)[0],
        "gate per channel": ops.chunk_gla(q, k, v, g[..., None].expand(*q.shape))[0],
    }
    errors = {name: relative(out, want) for name, out in got.items()}
    experiment.values["relatives"] = errors
    for name, error in errors.items():
        yield at_most(f"{name} fed the same decay, float64", error, 1e-12)


def minimax_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2: transformers' MiniMax layer with the same weights: 300 tokens at once, then 20 one by one."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    from tilewright.nn import MixerCache

    experiment.say("against MiniMax's layer in transformers")
    width, heads, size, index, layers = 64, 4, 16, 1, 4
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=width,
        num_attention_heads=heads,
        head_dim=size,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        block_size=256,
    )
    theirs = MiniMaxLightningAttention(config, index)
    ours = LightningAttention(width, heads, size, layer_idx=index, num_layers=layers)
    _copy_weights(theirs, ours, heads, size)
    x = torch.randn(2, 320, width)
    their_cache, our_cache = MiniMaxCache(), MixerCache()
    errors = []
    with torch.no_grad():
        for piece in (x[:, :300], *x[:, 300:].split(1, 1)):
            want = theirs(piece, None, None, their_cache)[0]
            got, _, _ = ours(piece, past_key_values=our_cache, use_cache=True)
            errors.append(relative(got, want))
    states = relative(our_cache[index]["recurrent_state"], their_cache.get_linear_cache(index))
    experiment.values["minimax"] = {"prefill": errors[0], "decode": max(errors[1:]), "state": states}
    yield at_most("MiniMax's layer, 300 tokens in blocks of 256: outputs", errors[0], 1e-5)
    yield at_most("then 20 tokens one by one: outputs", max(errors[1:]), 1e-5)
    yield at_most("then: its cache against our state", states, 1e-5)


def _copy_weights(theirs: nn.Module, ours: LightningAttention, heads: int, size: int) -> None:
    """MiniMax keeps one matrix whose rows are q, k, v of head 0, then of head 1, and so on."""
    with torch.no_grad():
        rows = theirs.get_parameter("qkv_proj.weight").view(heads, 3, size, -1)
        for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            projection.weight.copy_(rows[:, i].flatten(0, 1))
        for name in ("norm.weight", "output_gate.weight"):
            noise = torch.randn_like(ours.get_parameter(name)) * 0.1
            theirs.get_parameter(name).add_(noise)
            ours.get_parameter(name).copy_(theirs.get_parameter(name))
        ours.o_proj.weight.copy_(theirs.get_parameter("out_proj.weight"))


class BlockedLightning(LightningAttention):
    """The layer evaluated block by block, the state carried from one call of the operator to the next."""

    def __init__(self, *arguments: Any, block: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.block = block

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from tilewright.ops import lightning_attn_func

        del state, sequences, keep_state
        heads = (self.num_heads, self.head_dim)
        q, k, v = (silu(w(x)).unflatten(-1, heads) for w in (self.q_proj, self.k_proj, self.v_proj))
        slopes, carried, parts = torch.tensor(self.slopes), None, []
        for a, b, c in zip(*(y.split(self.block, 1) for y in (q, k, v)), strict=True):
            part, carried = lightning_attn_func(a, b, c, slopes, initial_state=carried, output_final_state=True)
            parts.append(part)
        o = self.norm(torch.cat(parts, 1).flatten(-2))
        return self.o_proj(torch.sigmoid(self.output_gate(x)) * o), {}  # type: ignore[misc]
