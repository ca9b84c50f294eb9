# SPDX-License-Identifier: Apache-2.0
"""The recurrent branch of Liger: what becomes query, key and gate, and the recurrence, chunked or step by step.

All state is held once per key head: it depends on keys, values and gates only, which the query heads of a group share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tilewright.linearize.liger.config import LigerConfig
from tilewright.ops import chunk_gla, fused_recurrent_gla

SLOT_CHUNK = 16
# A normalizer is a sum of products of probabilities; it is 0 only where no key has been seen.
_EPS = 1e-12


@dataclass(frozen=True)
class Features:
    """What the recurrence reads: q [B, T, H_kv, G, K], k [B, T, H_kv, K], v [B, T, H_kv, V], g [B, T, H_kv, K].

    For gated slot attention k and q have the head size, ``slots`` (what a token writes into each slot) and g [.., m].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    slots: Tensor | None = None


def pooled(f: Tensor, config: LigerConfig) -> Tensor:
    """Gate logits [..., D] by ``config.pool``: [..., D], or [..., m] for the m slots of gated slot attention.

    Raises:
        ValueError: the pool does not divide the head size.
    """
    if isinstance(config.pool, str):
        return f
    if f.shape[-1] % config.pool:
        raise ValueError(f"pool={config.pool} does not divide the head size {f.shape[-1]}")
    means = f.unflatten(-1, (config.pool, -1)).mean(-1)
    return means if config.variant == "gsa" else means.repeat_interleave(f.shape[-1] // config.pool, -1)


def features(q: Tensor, k: Tensor, v: Tensor, f: Tensor, config: LigerConfig, real: Tensor | None) -> Features:
    """Query, key, value and log-decay of a variant, in float32 (float64 for float64 inputs).

    ==========  =====================  ==============  =============================
    variant     log-decay g            key             query
    ==========  =====================  ==============  =============================
    gla         logsigmoid(f) / c      softmax(k)      softmax(q)
    hgrn2       logsigmoid(f)          1 - sigmoid(f)  softmax(q)
    gsa         logsigmoid(f) / c      k               q; slots take 1 - exp(g)
    ==========  =====================  ==============  =============================

    Padding writes nothing and lets nothing decay: v = 0 and g = 0 there, hence also no slot is written.

    Args:
        q: [B, T, H, D]; k, v: [B, T, H_kv, D]; all before rotary embedding.
        f: gate logits [B, T, H_kv, D].
        real: bool [B, T] or None.
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    q, k, v, f = (x.to(kind) for x in (q, k, v, f))
    q = q.unflatten(2, (kv_heads, q.shape[2] // kv_heads))
    f = pooled(f, config)
    divisor = 1.0 if config.variant == "hgrn2" else config.gate_logit_normalizer
    g = torch.zeros_like(f) if config.gate == "none" else functional.logsigmoid(f) / divisor
    if real is not None:
        hidden = ~real[:, :, None, None]
        v, g = v.masked_fill(hidden, 0), g.masked_fill(hidden, 0)
    if config.variant == "gsa":
        return Features(q, k, v, g, -torch.expm1(g))
    key = torch.sigmoid(-f) if config.variant == "hgrn2" else k.softmax(-1)
    if real is not None and config.normalize:
        key = key.masked_fill(hidden, 0)
    return Features(q.softmax(-1), key, v, g)


def recurrent_branch(
    x: Features, config: LigerConfig, initial: dict[str, Tensor], *, mode: str = "chunk", final: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """S <- diag(exp g) S + k v^T, y = S^T q; for "gsa" the two-pass form with softmax over slots between.

    Args:
        initial: states by name, empty at the beginning of a text: ``recurrent_state`` [B, H_kv, K, V], and for "gsa"
            also ``slot_keys`` [B, H_kv, m, D].
        mode: "chunk" or "recurrent": the same function, chunked or token by token.
        final: give the states after the last token.

    Returns:
        y [B, T, H, V] and the states (empty unless ``final``).

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("chunk", "recurrent"):
        raise ValueError(f"mode={mode!r}; needed 'chunk' or 'recurrent'")
    states: dict[str, Tensor] = {}
    q, k = x.q, x.k
    if x.slots is not None:
        scores, slot_keys = slot_scores(
            x.q, x.k, x.slots, x.g, initial.get("slot_keys"), chunk=SLOT_CHUNK if mode == "chunk" else 1
        )
        q, k, states["slot_keys"] = scores.softmax(-1), x.slots, slot_keys
    v = torch.cat([x.v, torch.ones_like(x.v[..., :1])], -1) if config.normalize else x.v
    y, states["recurrent_state"] = _read(q, k, v, x.g, initial.get("recurrent_state"), mode, final)
    if config.normalize:
        y = y[..., :-1] / y[..., -1:].clamp_min(_EPS)
    return y.flatten(2, 3), states if final else {}


def _read(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, mode: str, final: bool
) -> tuple[Tensor, Tensor]:
    """Gated linear attention of grouped query heads: [B, T, H_kv, G, V] and the state (of no meaning unless final).

    Each query head of a group is one call on the same k, v and g, so that none of these is repeated.
    """
    if q.shape[1] == 1 and final:
        return _step(q, k, v, g, initial)
    run = chunk_gla if mode == "chunk" else fused_recurrent_gla
    outs: list[Tensor] = []
    state: Tensor | None = None
    for head in range(q.shape[3]):
        wanted = final and head == 0
        y, last = run(q[:, :, :, head], k, v, g, scale=1.0, initial_state=initial, output_final_state=wanted)
        outs.append(y)
        state = last if wanted else state
    return torch.stack(outs, 3), outs[0].new_empty(0) if state is None else state


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token: the state of each key head is updated once and read by its whole group."""
    write = k[:, 0, :, :, None] * v[:, 0, :, None, :]
    new = write if state is None else torch.addcmul(write, state, g[:, 0].exp()[..., None])
    return (q[:, 0] @ new)[:, None], new


def slot_scores(
    q: Tensor, k: Tensor, slots: Tensor, g: Tensor, initial: Tensor | None = None, *, chunk: int = SLOT_CHUNK
) -> tuple[Tensor, Tensor]:
    """First pass of gated slot attention: M <- diag(exp g) M + slots k^T, scores_t = M_t q_t.

    The decay belongs to the output channel here, so no key can be scaled beforehand: within a chunk the factors
    exp(G_t - G_i), all at most 1, are made explicitly; between chunks the state M carries.

    Args:
        q: [B, T, H_kv, G, D]; k: [B, T, H_kv, D]; slots, g: [B, T, H_kv, m].
        initial: [B, H_kv, m, D] or None.
        chunk: tokens of a chunk; memory is T chunk H_kv m.

    Returns:
        scores [B, T, H_kv, G, m] and the state [B, H_kv, m, D] after the last token.
    """
    batch, tokens, heads, _, dim = q.shape
    count = -(-tokens // chunk)
    short = count * chunk - tokens

    def chunked(x: Tensor) -> Tensor:
        """[B, T, H, ...] to [B, n, H, C, ...]."""
        padded = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, short))
        return padded.unflatten(1, (count, chunk)).transpose(2, 3)

    q, k, slots = (chunked(x) for x in (q, k, slots))
    total = chunked(g).cumsum(3)
    distance = total[:, :, :, :, None] - total[:, :, :, None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)[..., None]
    weight = distance.masked_fill(later, -torch.inf).exp() * slots[:, :, :, None]
    match = torch.einsum("bnhtgd,bnhid->bnhtgi", q, k)
    within = match @ weight
    last = total[:, :, :, -1:]
    added = ((last - total).exp() * slots).transpose(-1, -2) @ k
    state = q.new_zeros(batch, heads, slots.shape[-1], dim) if initial is None else initial.to(q.dtype)
    before = []
    for index in range(count):
        before.append(state)
        state = last[:, index, :, 0].exp()[..., None] * state + added[:, index]
    if before:
        carried = torch.einsum("bnhtgd,bnhmd->bnhtgm", q, torch.stack(before, 1))
        within = within + carried * total.exp()[:, :, :, :, None]
    return within.transpose(2, 3).flatten(1, 2)[:, :tokens], state
