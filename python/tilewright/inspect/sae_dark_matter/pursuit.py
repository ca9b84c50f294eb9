# SPDX-License-Identifier: Apache-2.0
"""Gradient pursuit: better codes for a given dictionary, found at inference time (Blumensath and Davies 2008).

For each token, as often as its L0 says: the atom with the largest product with the residual joins the support, and all
weights on the support take one step along their gradient, of the length that is best, and stay at 0 or above.

The step needs only inner products: with g = D (s - w D) and G = D D^T, the support's step is <g, g> / <g, G g>, and g
itself is D s - w G. So after D s, rows of G of active atoms are all that is read; no product with a residual is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.inspect.sae.codes import sum_rows
from tilewright.inspect.sae_dark_matter.analysis import apply_sae

GRAM_BYTES = 1 << 30
TOKENS = 256
ATOMS = 512
"""Columns of D D^T that are summed together: the rows that a piece's tokens share then stay in the cache."""


@dataclass(frozen=True)
class Pursuit:
    """Found codes: ``index`` int64 [n, K] (-1 where unused), ``value`` [n, K] and the reconstruction [n, d]."""

    index: Tensor
    value: Tensor
    recon: Tensor

    def dense(self, width: int) -> Tensor:
        """Weights [n, m]."""
        out = self.value.new_zeros(len(self.value), width)
        return out.scatter_add_(1, self.index.clamp_min(0), self.value * (self.index >= 0))


def gradient_pursuit(x: Tensor, dictionary: Tensor, l0: int | Tensor, *, gram_bytes: int = GRAM_BYTES) -> Pursuit:
    """Sparse nonnegative weights w with x ~ w D.

    x: [n, d], the decoder's bias already subtracted. dictionary: D [m, d], rows of norm 1 (rows of zeros are never
    chosen; of equal rows the first is). l0: atoms at most, for all tokens or for each, int64 [n]; 0 gives weights of 0.
    gram_bytes: memory for rows of D D^T; rows beyond it are computed again.

    Raises:
        ValueError: shapes do not fit, or a token is NaN or infinite (named).
    """
    x, dictionary, steps = _checked(x, dictionary, l0)
    most = int(steps.max()) if len(steps) else 0
    # Atoms of zeros, never chosen, fill the last tile.
    padded = nn.functional.pad(dictionary, (0, 0, 0, -len(dictionary) % ATOMS))
    gram = _GramRows(padded, gram_bytes)
    allowed = selectable(padded)
    index = torch.full((len(x), most), -1)
    value = x.new_zeros(len(x), most)
    # Tokens that need most steps first: those still at work are then always the first ones of a piece.
    for some in torch.argsort(steps, descending=True, stable=True).split(TOKENS):
        found, weight = _pursue(x[some], steps[some], gram, allowed)
        index[some, : found.shape[1]] = found
        value[some, : weight.shape[1]] = weight
    used = index >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
    return Pursuit(index, value, sum_rows(index[used], value[used], offsets, dictionary))


def _pursue(x: Tensor, steps: Tensor, gram: _GramRows, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Pursuit of tokens sorted by falling steps: (index [n, K], value [n, K])."""
    n, most = len(x), int(steps.max()) if len(steps) else 0
    start = torch.matmul(x, gram.tiles.transpose(1, 2)).masked_fill_(~allowed.view(-1, 1, ATOMS), -torch.inf)
    index = torch.full((n, most), -1)
    value, own = x.new_zeros(n, most), x.new_zeros(n, most)  # own: D s of a support's atoms
    among = x.new_zeros(n, most, most)  # G between the atoms of a support
    size = torch.zeros(n, dtype=torch.int64)
    for step in range(most):
        live = int((steps > step).sum())
        chosen = gram.steepest(start[:, :live], index[:live], value[:live])
        fresh = ~(index[:live] == chosen[:, None]).any(1)
        rows = fresh.nonzero()[:, 0]
        place, atoms = size[rows], chosen[rows]
        products = gram.between(atoms, index[rows])
        index[rows, place] = atoms
        own[rows, place] = start[atoms // ATOMS, rows, atoms % ATOMS]
        among[rows, place, :] = products
        among[rows, :, place] = products
        among[rows, place, place] = gram.norms[atoms]
        size[rows] += 1
        # Unused places have rows of zeros in all of these.
        on = own[:live] - torch.einsum("nij,nj->ni", among[:live], value[:live])
        curve = torch.einsum("ni,nij,nj->n", on, among[:live], on)
        length = on.square().sum(1) / curve.clamp_min(torch.finfo(x.dtype).tiny)
        value[:live] = (value[:live] + length[:, None] * on).clamp_min(0)
    return index, value


class _GramRows:
    """Rows of D D^T of the atoms that came up, each computed once while memory lasts: [tiles, slots, ATOMS]."""

    def __init__(self, dictionary: Tensor, nbytes: int) -> None:
        self.dictionary = dictionary
        self.norms = dictionary.square().sum(1)
        m = len(dictionary)
        self.most = max(TOKENS, nbytes // (m * dictionary.element_size()))
        self._slot = torch.full((m,), -1)
        self.tiles = dictionary.view(-1, ATOMS, dictionary.shape[1])
        self._store = dictionary.new_empty(len(self.tiles), 512, ATOMS)
        self._count = 0

    def steepest(self, start: Tensor, index: Tensor, value: Tensor) -> Tensor:
        """The atom where the gradient ``start - w G`` is largest, of equal ones the first: [n].

        start: [tiles, n, ATOMS]. The gradient is never whole in memory: a tile is searched while it is in the cache.
        """
        used = index >= 0
        slots, weight = self.slots(index[used]), value[used]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), used.sum(1).cumsum(0)])
        best, atom = start.new_full((len(index),), -torch.inf), torch.zeros(len(index), dtype=torch.int64)
        for number, (tile, store) in enumerate(zip(start, self._store, strict=True)):
            gradient = tile - sum_rows(slots, weight, offsets, store[: self._count]) if len(slots) else tile
            most, where = gradient.max(1)
            atom = torch.where(most > best, where + number * ATOMS, atom)
            best = torch.maximum(best, most)
        return atom

    def slots(self, atoms: Tensor) -> Tensor:
        """Rows of the table that belong to these atoms; missing ones are computed."""
        missing = atoms[self._slot[atoms] < 0].unique()
        if len(missing):
            if self._count + len(missing) > self.most:
                self._slot.fill_(-1)
                self._count, missing = 0, atoms.unique()
            need = self._count + len(missing)
            have = self._store.shape[1]
            if need > have:
                grown = self._store.new_empty(len(self.tiles), min(max(need, 2 * have), max(need, self.most)), ATOMS)
                grown[:, : self._count] = self._store[:, : self._count]
                self._store = grown
            for store, tile in zip(self._store, self.tiles, strict=True):
                torch.mm(self.dictionary[missing], tile.T, out=store[self._count : need])
            self._slot[missing] = torch.arange(self._count, need)
            self._count = need
        return self._slot[atoms]

    def between(self, atom: Tensor, others: Tensor) -> Tensor:
        """Products of one atom [n] with others [n, K] whose rows are here; 0 where other is -1: [n, K]."""
        if self._count == 0:
            return self.dictionary.new_zeros(others.shape)
        slot = self._slot[others.clamp_min(0)].clamp_min(0)
        return torch.where(others >= 0, self._store[atom[:, None] // ATOMS, slot, atom[:, None] % ATOMS], 0)


def gradient_pursuit_dense(x: Tensor, dictionary: Tensor, l0: int | Tensor) -> Tensor:
    """The same as the definition has it, with dense weights and residuals: weights [n, m]. For checks."""
    x, dictionary, steps = _checked(x, dictionary, l0)
    weight = x.new_zeros(len(x), len(dictionary))
    support = torch.zeros_like(weight, dtype=torch.bool)
    allowed = selectable(dictionary)
    for step in range(int(steps.max()) if len(steps) else 0):
        live = (steps > step)[:, None]
        residual = x - weight @ dictionary
        gradient = residual @ dictionary.T
        chosen = gradient.masked_fill(~allowed, -torch.inf).argmax(1, keepdim=True)
        support |= torch.zeros_like(support).scatter_(1, chosen, True)
        gradient = gradient * support
        c = gradient @ dictionary
        length = (c * residual).sum(1) / c.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
        weight = torch.where(live, (weight + length[:, None] * gradient).clamp_min(0), weight)
    return weight


def selectable(dictionary: Tensor) -> Tensor:
    """Boolean [m]: False for atoms of zeros, and for all but the first of equal atoms."""
    probe = torch.rand(dictionary.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    key = (dictionary.double() * probe).sum(1)
    order = torch.argsort(key, stable=True)
    allowed = dictionary.ne(0).any(1)
    same = (dictionary[order[1:]] == dictionary[order[:-1]]).all(1)
    allowed[order[1:][same]] = False
    return allowed


def _checked(x: Tensor, dictionary: Tensor, l0: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or dictionary.dim() != 2 or x.shape[1] != dictionary.shape[1] or len(dictionary) == 0:
        raise ValueError(
            f"x has shape {list(x.shape)}, dictionary {list(dictionary.shape)}; [n, d] and [m, d] are needed"
        )
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        raise ValueError(f"x: token {int((~finite).int().argmax())} holds NaN or infinite values")
    steps = torch.as_tensor(l0, dtype=torch.int64).expand(len(x)) if not isinstance(l0, Tensor) else l0.long()
    if steps.dim() == 0:
        steps = steps.expand(len(x))
    if steps.shape != (len(x),) or bool((steps < 0).any()):
        raise ValueError(
            f"l0 has shape {list(steps.shape)}; one number of 0 or more, or one a token [{len(x)}], is needed"
        )
    dictionary = dictionary.detach().contiguous()
    return x.detach().to(dictionary.dtype).contiguous(), dictionary, steps


@torch.no_grad()
def pursue_sae(sae: object, x: Tensor) -> Pursuit:
    """Gradient pursuit of rows x [n, d] over an SAE's decoder, with the L0 that the SAE has on each token.

    ``recon`` includes the decoder's bias.
    """
    bias, dictionary = sae.b_dec.detach(), sae.W_dec.detach()  # type: ignore[attr-defined]
    norm = dictionary.norm(dim=1, keepdim=True)
    unit = dictionary / norm.clamp_min(torch.finfo(dictionary.dtype).tiny)
    found = gradient_pursuit(x - bias, unit, apply_sae(sae, x)[1])
    value = found.value / norm[:, 0].clamp_min(1e-30)[found.index.clamp_min(0)]
    return Pursuit(found.index, value, found.recon + bias)
