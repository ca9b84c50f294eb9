# SPDX-License-Identifier: Apache-2.0
"""How far linear attention is from a teacher's softmax, in memory linear in the length (arXiv 2402.04347, section 4.2).

The T x T weights of teacher and student are formed one tile at a time and formed again for the gradient, as flash
attention does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tilewright.nn.hedgehog import hedgehog_attention, windowed_hedgehog_attention
from tilewright.nn.hedgehog.attention import EPS, masked_features, repeat_heads
from tilewright.nn.hedgehog.feature_maps import apply_feature_map

Kind = Literal["xent", "kl", "mse"]
SMALLEST_WEIGHT = 1e-12
"""The student's weights enter logarithms no smaller than this."""


def attention_distill_loss(
    q: Tensor,
    k: Tensor,
    phi_q: nn.Module,
    phi_k: nn.Module,
    *,
    causal: bool = True,
    scale: float | None = None,
    kind: Kind = "xent",
    v: Tensor | None = None,
    block_size: int = 128,
    attention_mask: Tensor | None = None,
    window: int | None = None,
    mix: Tensor | None = None,
    reduction: Literal["mean", "heads"] = "mean",
) -> Tensor:
    """Distance between the weights of softmax attention and of linear attention on the same queries and keys.

    With the teacher ``p_ij = softmax_j(scale q_i . k_j)`` and the student ``a_ij`` of
    :func:`tilewright.nn.hedgehog.hedgehog_attention`, the mean over batch, heads and rows of

    - xent: ``-sum_j p_ij ln max(a_ij, 1e-12)`` (the paper's loss, eq. 5);
    - kl: the same minus the teacher's entropy, ``-sum_j p_ij ln p_ij``: same gradient, 0 when they agree;
    - mse: ``|sum_j p_ij v_j - sum_j a_ij v_j|^2 / V`` (LoLCATs, arXiv 2410.10254).

    Rows that see fewer than two keys (row 0 of a causal sequence), and rows of padding, do not count. Gradients flow to
    the parameters of the maps and to ``mix``; q, k and v are constants.

    Args:
        q: ``[B, T, H, D]``, as the teacher's product sees it (after rotary embedding).
        k: ``[B, T, Hk, D]``; each of its heads serves H / Hk heads of q.
        phi_q, phi_k: the maps.
        causal: row i sees keys j <= i.
        scale: of the teacher's logits, ``D^-1/2`` unless given.
        v: ``[B, T, Hk, V]``, for "mse".
        block_size: rows and columns of a tile; memory is ``B H block_size^2`` beside the inputs.
        attention_mask: ``[B, T]``, 0 where a token is padding.
        window, mix: the student is :func:`tilewright.nn.hedgehog.windowed_hedgehog_attention` with these.
        reduction: "mean" for a number, "heads" for the mean of each head, ``[H]``.

    Returns:
        float32, or float64 for float64 inputs. 0 where no row counts.

    Raises:
        ValueError: an option is none of its words, or shapes do not fit.
    """
    _check(q, k, v, attention_mask, kind, block_size, window, mix, causal, reduction)
    heads, dtype = q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    tq, tk = (repeat_heads(x, heads).to(dtype).transpose(1, 2) for x in (q, k))
    tiles = _Tiles(q.shape[1], block_size, causal, scale, attention_mask, window)
    if kind == "mse":
        assert v is not None
        target = _teacher_output(tq, tk, repeat_heads(v.detach(), heads).to(dtype).transpose(1, 2), tiles)
        student = _student_output(q, k, v.detach().to(dtype), (phi_q, phi_k), tiles, mix)
        rows = (student.transpose(1, 2) - target).square().mean(-1)
    else:
        fq = apply_feature_map(phi_q, q, heads).transpose(1, 2)
        fk = masked_features(apply_feature_map(phi_k, k, heads), attention_mask).transpose(1, 2)
        share = torch.ones(heads, dtype=dtype, device=q.device) if mix is None else mix.to(dtype)
        rows = _CrossEntropy.apply(tq, tk, fq, fk, share, tiles, kind == "kl")
    counted = tiles.counted_rows(q.shape[0], q.device)[:, None, :]
    per_head = torch.where(counted, rows, 0.0).sum((0, 2)) / counted.sum().clamp_min(1)
    return per_head if reduction == "heads" else per_head.mean()


@dataclass
class _Tiles:
    """The tiles of a [T, T] matrix, row of tiles by row of tiles, and what each of its rows may see."""

    tokens: int
    block: int
    causal: bool
    scale: float
    mask: Tensor | None
    window: int | None

    def rows(self) -> Iterator[slice]:
        for start in range(0, self.tokens, self.block):
            yield slice(start, min(start + self.block, self.tokens))

    def columns(self, rows: slice) -> Iterator[slice]:
        end = rows.stop if self.causal else self.tokens
        for start in range(0, end, self.block):
            yield slice(start, min(start + self.block, end))

    def seen(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """bool, broadcasts to [B, 1, rows, columns]: which keys a row sees."""
        seen = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=device)
        seen = seen.tril(rows.start - columns.start) if self.causal else seen
        return seen if self.mask is None else seen & self.mask[:, None, None, columns].bool()

    def near(self, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
        """bool [rows, columns]: which keys are in the softmax window; None: none of this tile."""
        if self.window is None or columns.stop + self.window <= rows.start + 1:
            return None
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        return i - torch.arange(columns.start, columns.stop, device=device) < self.window

    def counted_rows(self, batch: int, device: torch.device) -> Tensor:
        """bool [B, T]: rows of real tokens that see at least two keys."""
        real = torch.ones(batch, self.tokens, dtype=torch.bool, device=device)
        real = real if self.mask is None else self.mask.bool()
        keys = real.cumsum(1) if self.causal else real.sum(1, keepdim=True).expand_as(real)
        return real & (keys >= 2)


@dataclass
class _Tile:
    """One tile of both: logits [B, H, i, j] (-inf where unseen), student's products (0 there), and their regions."""

    columns: slice
    logits: Tensor
    products: Tensor
    seen: Tensor
    near: Tensor | None


class _CrossEntropy(torch.autograd.Function):
    """``-sum_j p_ij ln max(a_ij, 1e-12)`` (minus the teacher's entropy for kl) of every row: [B, H, T].

    Row by row of tiles: the teacher's log-sum-exp and the student's denominator first, then the sum. The gradient with
    ``s_ij = phi(q_i) . phi(k_j)`` (in the window: ``mix exp(l_ij - c_i)``) is
    ``dL/ds_ij = P_i / denominator_i - p_ij / s_ij``, P_i the teacher's mass on weights above the clamp.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, mix: Tensor, tiles: _Tiles, minus_entropy: bool
    ) -> Tensor:
        shape = q.shape[:3]
        out, lse, denominator, mass, top = (q.new_empty(shape) for _ in range(5))
        for rows in tiles.rows():
            at = (slice(None), slice(None), rows)
            top[at] = _window_top(q, k, rows, tiles)
            make = _maker(q, k, fq, fk, mix, tiles, rows, top[at])
            lse[at], denominator[at] = _row_sums(make, rows, tiles, q.new_empty(shape)[at])
            out[at], mass[at] = _row_losses(make, rows, tiles, lse[at], denominator[at], minus_entropy)
        ctx.save_for_backward(q, k, fq, fk, mix, lse, denominator, mass, top)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, fq, fk, mix, lse, denominator, mass, top = ctx.saved_tensors
        tiles: _Tiles = ctx.tiles
        dfq, dfk, dmix = torch.zeros_like(fq), torch.zeros_like(fk), torch.zeros_like(mix)
        for rows in tiles.rows():
            at = (slice(None), slice(None), rows)
            make = _maker(q, k, fq, fk, mix, tiles, rows, top[at])
            weight = grads[0][at][..., None]
            den = denominator[at][..., None]
            for columns in tiles.columns(rows):
                tile = make(columns)
                p = (tile.logits - lse[at][..., None]).exp()
                kept = tile.products > SMALLEST_WEIGHT * den
                slope = torch.where(kept, -p / tile.products.where(kept, 1.0), 0.0)
                ds = torch.where(tile.seen, weight * (slope + mass[at][..., None] / den), 0.0)
                if tile.near is not None:
                    dmix += (ds * (tile.products / mix[:, None, None]) * tile.near).sum((0, 2, 3))
                    ds = ds.masked_fill(tile.near, 0.0)
                dfq[at] += ds @ fk[:, :, columns]
                dfk[:, :, columns] += ds.transpose(-1, -2) @ fq[at]
        return None, None, dfq, dfk, dmix, None, None


def _maker(
    q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, mix: Tensor, tiles: _Tiles, rows: slice, top: Tensor
) -> Callable[[slice], _Tile]:
    """A function from columns to the tile of these rows; the tile of a row of one tile is made once."""
    single: list[_Tile] = []

    def make(columns: slice) -> _Tile:
        if single and single[0].columns == columns:
            return single[0]
        seen = tiles.seen(rows, columns, q.device)
        raw = tiles.scale * (q[:, :, rows] @ k[:, :, columns].transpose(-1, -2))
        products = fq[:, :, rows] @ fk[:, :, columns].transpose(-1, -2)
        near = tiles.near(rows, columns, q.device)
        if near is not None:
            products = torch.where(near, mix[:, None, None] * (raw - top[..., None]).clamp_max(0).exp(), products)
        single[:] = [_Tile(columns, raw.masked_fill(~seen, -torch.inf), products * seen, seen, near)]
        return single[0]

    return make


def _window_top(q: Tensor, k: Tensor, rows: slice, tiles: _Tiles) -> Tensor:
    """c_i: the largest teacher logit in each row's window, [B, H, i]; 0 without a window or a visible key."""
    top = q.new_full((*q.shape[:2], rows.stop - rows.start), -torch.inf)
    for columns in tiles.columns(rows):
        near = tiles.near(rows, columns, q.device)
        if near is not None:
            seen = near & tiles.seen(rows, columns, q.device)
            logits = tiles.scale * (q[:, :, rows] @ k[:, :, columns].transpose(-1, -2))
            top = torch.maximum(top, logits.masked_fill(~seen, -torch.inf).amax(-1))
    return top.where(top.isfinite(), 0.0)


def _row_sums(make: Callable[[slice], _Tile], rows: slice, tiles: _Tiles, like: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's log-sum-exp and the student's denominator of each row, over all its tiles."""
    top, total, denominator = torch.full_like(like, -torch.inf), torch.zeros_like(like), torch.zeros_like(like)
    for columns in tiles.columns(rows):
        tile = make(columns)
        higher = torch.maximum(top, tile.logits.amax(-1))
        base = higher.where(higher.isfinite(), 0.0)
        total = total * (top - base).exp() + (tile.logits - base[..., None]).exp().sum(-1)
        top = higher
        denominator += tile.products.sum(-1)
    # A row without a visible key: any finite number, p is 0 there.
    return torch.where(total > 0, top + total.log(), 0.0), denominator + EPS


def _row_losses(
    make: Callable[[slice], _Tile], rows: slice, tiles: _Tiles, lse: Tensor, denominator: Tensor, minus_entropy: bool
) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the teacher's mass on the weights above the clamp."""
    loss, mass = torch.zeros_like(lse), torch.zeros_like(lse)
    for columns in tiles.columns(rows):
        tile = make(columns)
        log_p = tile.logits - lse[..., None]
        p = log_p.exp()
        a = tile.products / denominator[..., None]
        loss -= (p * a.clamp_min(SMALLEST_WEIGHT).log()).sum(-1)
        mass += (p * (a > SMALLEST_WEIGHT)).sum(-1)
        if minus_entropy:
            loss += (p * log_p.where(p > 0, 0.0)).sum(-1)
    return loss, mass


def _teacher_output(q: Tensor, k: Tensor, v: Tensor, tiles: _Tiles) -> Tensor:
    """``sum_j p_ij v_j`` tile by tile: [B, H, T, V]; the running sums shrink as the running maximum grows."""
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for rows in tiles.rows():
        top = q.new_full((*q.shape[:2], rows.stop - rows.start, 1), -torch.inf)
        total, sums = torch.zeros_like(top), v.new_zeros(*top.shape[:3], v.shape[-1])
        for columns in tiles.columns(rows):
            logits = tiles.scale * (q[:, :, rows] @ k[:, :, columns].transpose(-1, -2))
            logits = logits.masked_fill(~tiles.seen(rows, columns, q.device), -torch.inf)
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            base = higher.where(higher.isfinite(), 0.0)
            p, shrink = (logits - base).exp(), (top - base).exp()
            total, sums, top = total * shrink + p.sum(-1, keepdim=True), sums * shrink + p @ v[:, :, columns], higher
        out[:, :, rows] = sums / total.where(total > 0, 1.0)
    return out


def _student_output(
    q: Tensor, k: Tensor, v: Tensor, maps: tuple[nn.Module, nn.Module], tiles: _Tiles, mix: Tensor | None
) -> Tensor:
    common: dict[str, Any] = {"phi_q": maps[0], "phi_k": maps[1], "attention_mask": tiles.mask}
    if tiles.window is None:
        return hedgehog_attention(q, k, v, causal=tiles.causal, **common)[0]
    assert mix is not None
    return windowed_hedgehog_attention(q, k, v, mix=mix, window=tiles.window, scale=tiles.scale, **common)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    kind: str,
    block: int,
    window: int | None,
    mix: Tensor | None,
    causal: bool,
    reduction: str,
) -> None:
    if kind not in get_args(Kind) or reduction not in ("mean", "heads"):
        raise ValueError(f"kind={kind!r}, reduction={reduction!r}; choose 'xent', 'kl' or 'mse', and 'mean' or 'heads'")
    if (
        q.dim() != 4
        or k.dim() != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}: needed [B, T, H, D] and [B, T, Hk, D], H a multiple of Hk"
        )
    if kind == "mse" and (v is None or v.shape[:3] != k.shape[:3]):
        raise ValueError(f"kind='mse' compares outputs and needs v {[*k.shape[:3], 'V']}")
    if mask is not None and mask.shape != k.shape[:2]:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, needed {list(k.shape[:2])}")
    if block < 1:
        raise ValueError(f"block_size={block}: at least 1 is needed")
    if (window is None) != (mix is None) or (window is not None and (not causal or window < 1)):
        raise ValueError("window and mix are given together, for causal attention, and window is at least 1")
