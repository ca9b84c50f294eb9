# SPDX-License-Identifier: Apache-2.0
"""Exactness and feature-map facts of Hedgehog's claim; the T x T oracle here shares no code with the method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.claims import Experiment, Row, at_most
from tilewright.linearize.hedgehog.losses import attention_distill_loss
from tilewright.nn.hedgehog import HedgehogFeatureMap, hedgehog_attention

HEADS, KEY_HEADS, DIM = 4, 2, 16


def exact_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: every form against matrices, the streaming loss and its gradient, memory."""
    experiment.say("forms of attention against T x T matrices")
    lengths = (1, 2, 63, 64, 65, 130) if experiment.quick else (1, 2, 3, 17, 63, 64, 65, 127, 130, 200, 257, 300)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        worst = {form: max(_error(tokens, dtype, form) for tokens in lengths) for form in _FORMS}
        experiment.values.setdefault("exact", {})[str(dtype)] = worst
        name = f"chunk, recurrent, bidirectional against quadratic, {str(dtype)[6:]}: largest error"
        yield at_most(name, max(worst.values()), bound, paper="0")
    losses = [_loss_errors(tokens, kind) for tokens in (33, 130) for kind in ("xent", "kl")]
    yield at_most("streaming distillation loss against T x T, float32: relative error", max(e[0] for e in losses), 1e-6)
    yield at_most("its gradient against autograd of the matrices, float64", max(e[1] for e in losses), 1e-10)
    short, long = 512, 1024
    sizes = [_largest_tensor(tokens) for tokens in (short, long)]
    experiment.values["largest tensor"] = dict(zip(("512", "1024"), sizes, strict=True))
    yield at_most(
        "largest tensor of the loss and its gradient, T = 1024 over T = 512", sizes[1] / sizes[0], long / short
    )


_FORMS: dict[str, dict[str, Any]] = {
    "chunk": {"mode": "chunk"},
    "recurrent": {"mode": "recurrent"},
    "bidirectional": {"causal": False},
}


def _inputs(tokens: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, tokens, HEADS, dim), (1, tokens, KEY_HEADS, dim), (1, tokens, KEY_HEADS, dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def _matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(n, DIM, DIM, generator=generator, dtype=torch.float64) for n in (HEADS, KEY_HEADS)]
    wq, wk = (torch.eye(DIM) + 0.3 * w for w in made)
    return wq.to(dtype), wk.to(dtype)


def _maps(wq: Tensor, wk: Tensor) -> tuple[HedgehogFeatureMap, HedgehogFeatureMap]:
    maps = HedgehogFeatureMap(DIM, num_heads=HEADS), HedgehogFeatureMap(DIM, num_heads=KEY_HEADS)
    for phi, w in zip(maps, (wq, wk), strict=True):
        phi.weight = torch.nn.Parameter(w.clone())
    return maps


def oracle_features(x: Tensor, w: Tensor) -> Tensor:
    """[B, T, H, D] by W [H, D, F] to ``[softmax(y), softmax(-y)]``, head by head."""
    heads = []
    for h in range(w.shape[0]):
        y = x[:, :, h] @ w[h]
        up, down = (s.sub(s.amax(-1, keepdim=True)).exp() for s in (y, -y))
        heads.append(torch.cat((up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)), -1))
    return torch.stack(heads, 2)


def oracle_weights(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, causal: bool) -> Tensor:
    """The student's a [B, H, T, T]."""
    fq, fk = oracle_features(q, wq), oracle_features(k, wk)
    fk = torch.stack([fk[:, :, h * KEY_HEADS // HEADS] for h in range(HEADS)], 2)
    s = torch.einsum("bihf,bjhf->bhij", fq, fk)
    s = torch.tril(s) if causal else s
    return s / (s.sum(-1, keepdim=True) + 1e-12)  # the definition's eps


def oracle_teacher(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax weights [B, H, T, T]."""
    keys = torch.stack([k[:, :, h * KEY_HEADS // HEADS] for h in range(HEADS)], 2)
    weights = torch.tril((torch.einsum("bihd,bjhd->bhij", q, keys) * q.shape[-1] ** -0.5).exp())
    return weights / weights.sum(-1, keepdim=True)


def _error(tokens: int, dtype: torch.dtype, form: str) -> float:
    q, k, v = _inputs(tokens, dtype)
    wq, wk = _matrices(dtype)
    phi_q, phi_k = _maps(wq, wk)
    got, _ = hedgehog_attention(q, k, v, phi_q=phi_q, phi_k=phi_k, **_FORMS[form])
    a = oracle_weights(q.double(), k.double(), wq.double(), wk.double(), form != "bidirectional")
    values = torch.stack([v[:, :, h * KEY_HEADS // HEADS] for h in range(HEADS)], 2).double()
    return float((got.double() - torch.einsum("bhij,bjhv->bihv", a, values)).detach().abs().max())


def _loss_errors(tokens: int, kind: Any) -> tuple[float, float]:
    """Relative error of the value in float32, and the largest error of a gradient in float64."""
    q, k, _ = _inputs(tokens, torch.float64)
    wq, wk = (w.requires_grad_() for w in _matrices(torch.float64))
    p, a = oracle_teacher(q, k)[:, :, 1:], oracle_weights(q, k, wq, wk, True)[:, :, 1:]
    seen = p > 0
    rows = -torch.where(seen, p * torch.where(seen, a, 1.0).log(), 0.0).sum(-1)
    expected = (rows + torch.special.xlogy(p, p).sum(-1) if kind == "kl" else rows).mean()
    theirs = torch.autograd.grad(expected, (wq, wk))
    phi_q, phi_k = _maps(wq.detach(), wk.detach())
    loss = attention_distill_loss(q, k, phi_q, phi_k, kind=kind, block_size=32)
    mine = torch.autograd.grad(loss, (phi_q.weight, phi_k.weight))
    phi_q, phi_k = _maps(wq.detach().float(), wk.detach().float())
    low = attention_distill_loss(q.float(), k.float(), phi_q, phi_k, kind=kind, block_size=32)
    off = max(float((m - t).abs().max()) for m, t in zip(mine, theirs, strict=True))
    return abs(float(low.detach()) / float(expected.detach()) - 1), off


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def _largest_tensor(tokens: int) -> int:
    q, k, _ = _inputs(tokens, torch.float32)
    phi_q, phi_k = _maps(*_matrices(torch.float32))
    with _Largest() as seen:
        attention_distill_loss(q, k, phi_q, phi_k, block_size=64).backward()
    return seen.elements


def map_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 2, first half: the identity's formula."""
    experiment.say("feature maps")
    x = torch.randn(4, 5, 2, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exp = torch.cat((x.exp(), (-x).exp()), -1)
    parts = x.exp() / x.exp().sum(-1, keepdim=True), (-x).exp() / (-x).exp().sum(-1, keepdim=True)
    error = max(
        float((HedgehogFeatureMap(DIM, activation="exp")(x) / exp - 1).abs().max().detach()),
        float((HedgehogFeatureMap(DIM)(x) / torch.cat(parts, -1) - 1).abs().max().detach()),
    )
    yield at_most(
        "identity initialisation against [exp(x), exp(-x)] and its softmax form: relative error", error, 1e-12
    )
