# SPDX-License-Identifier: Apache-2.0
"""Sparse autoencoders: x ~ W_dec^T f(x) + b_dec with few nonzero latents f.

Shapes: x [..., d], latents [..., m]; ``W_enc`` and ``W_dec`` are both [m, d], so that row i of each belongs to latent i
(files store ``W_enc`` as [d, m], as SAELens does). Activations of any float dtype and stride are cast to the weights'.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.inspect.sae.codes import Codes, Support, chosen_preactivations


class SAE(nn.Module):
    """What all kinds share. A kind chooses the active latents (:meth:`select`) and gives their values.

    d_in: size d of an activation. width: number of latents m. apply_b_dec_to_input: subtract ``b_dec`` from x first.
    metadata: where it was trained (model, hook point, settings); kept in its file.

    Raises:
        ValueError: a size is below 1.
    """

    kind = ""

    def __init__(
        self, d_in: int, width: int, *, apply_b_dec_to_input: bool = True, metadata: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if d_in < 1 or width < 1:
            raise ValueError(f"d_in={d_in}, width={width}: at least 1 of each is needed")
        self.apply_b_dec_to_input = apply_b_dec_to_input
        self.metadata = dict(metadata or {})
        self.W_enc = nn.Parameter(torch.empty(width, d_in))
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.W_dec = nn.Parameter(torch.empty(width, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform encoder rows as in ``nn.Linear``; decoder the same rows with unit norm; biases 0."""
        bound = 1 / math.sqrt(self.d_in)
        with torch.no_grad():
            self.W_enc.uniform_(-bound, bound, generator=generator)
            self.W_dec.copy_(self.W_enc)
            self.b_enc.zero_()
            self.b_dec.zero_()
        self.normalize_decoder()

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def width(self) -> int:
        return self.W_enc.shape[0]

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every decoder row norm 1; a row of zeros stays."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc (x - b_dec) + b_enc for rows x [T, d]: [T, m]."""
        x = x - self.b_dec if self.apply_b_dec_to_input else x
        return torch.addmm(self.b_enc, x, self.W_enc.T)

    def select(self, pre: Tensor) -> Support:
        """The latents that are computed, for preactivations [T, m]; no gradients flow through the choice."""
        raise NotImplementedError

    def activate(self, chosen: Tensor, support: Support) -> Tensor:
        """Values of the chosen latents from their preactivations [n]; differentiable."""
        raise NotImplementedError

    def sparse(self, x: Tensor) -> Codes:
        """Active latents of rows x [T, d], differentiable in the parameters (and x)."""
        rows = self._rows(x)
        with torch.no_grad():
            pre = self.preactivations(rows)
        return self.codes_at(rows, pre, self.select(pre))

    def codes_at(self, rows: Tensor, pre: Tensor, support: Support) -> Codes:
        """Codes at chosen places; ``pre`` are the preactivations of ``rows``."""
        center = self.b_dec if self.apply_b_dec_to_input else None
        chosen = chosen_preactivations(pre, rows, self.W_enc, self.b_enc, center, support)
        return Codes(support, self.activate(chosen, support))

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., m], mostly zeros."""
        return self.sparse(x).dense().reshape(*x.shape[:-1], self.width)

    def decode(self, latents: Tensor | Codes) -> Tensor:
        """Reconstruction [..., d] of dense latents [..., m] or of codes."""
        if isinstance(latents, Codes):
            return latents.decode(self.W_dec) + self.b_dec
        if latents.shape[-1] != self.width:
            raise ValueError(f"latents has shape {list(latents.shape)}; the last size must be {self.width}")
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction [..., d], number of active latents [...]) without a dense matrix of latents."""
        codes = self.sparse(x)
        return self.decode(codes).reshape(x.shape), codes.l0().reshape(x.shape[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(reconstruction [..., d], latents [..., m])."""
        codes = self.sparse(x)
        return self.decode(codes).reshape(x.shape), codes.dense().reshape(*x.shape[:-1], self.width)

    def settings(self) -> dict[str, Any]:
        """Arguments of this kind besides the sizes."""
        return {"apply_b_dec_to_input": self.apply_b_dec_to_input}

    @torch.no_grad()
    def fold(self, mean: Tensor | float, scale: float) -> None:
        """Make an SAE trained on scale (x - mean) one of x; decoder rows keep their norm.

        The latents shrink by ``scale``: b_enc / scale, b_dec / scale + mean.
        """
        shift = torch.as_tensor(mean, dtype=self.b_dec.dtype, device=self.b_dec.device)
        self.b_enc.div_(scale)
        self.b_dec.div_(scale).add_(shift)
        if not self.apply_b_dec_to_input:
            self.b_enc.sub_((self.W_enc * shift).sum(1))

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in or not x.is_floating_point():
            raise ValueError(
                f"x has shape {list(x.shape)} and dtype {x.dtype}; floating activations [..., {self.d_in}] are needed"
            )
        return x.reshape(-1, self.d_in).to(self.W_enc.dtype)


def top_support(pre: Tensor, k: int) -> Support:
    """The k largest of each row, largest first; all of them when there are fewer than k."""
    k = min(k, pre.shape[1])
    index = pre.topk(k, dim=1).indices
    offsets = torch.arange(0, (len(pre) + 1) * k, k, device=pre.device)
    return Support(index.flatten(), offsets, pre.shape[1])


def mask_support(mask: Tensor) -> Support:
    """The places of a boolean matrix [T, m]."""
    token, index = mask.nonzero(as_tuple=True)
    counts = torch.bincount(token, minlength=len(mask))
    return Support(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), mask.shape[1])


class TopKSAE(SAE):
    """The k largest latents of each token, ReLU applied (Gao et al. 2024)."""

    kind = "topk"

    def __init__(self, d_in: int, width: int, k: int = 32, **rest: Any) -> None:
        if not 1 <= k <= width:
            raise ValueError(f"k={k}: from 1 to the width {width} is needed")
        self.k = k
        super().__init__(d_in, width, **rest)

    def select(self, pre: Tensor) -> Support:
        return top_support(pre, self.k)

    def activate(self, chosen: Tensor, support: Support) -> Tensor:  # noqa: ARG002
        return chosen.relu()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k}


class BatchTopKSAE(SAE):
    """While training the k T largest latents of a batch of T tokens; at inference all above one threshold.

    The threshold is the running mean of the smallest value kept in a training batch, updated by each forward pass in
    training mode.
    """

    kind = "batchtopk"
    threshold: Tensor
    batches: Tensor

    def __init__(self, d_in: int, width: int, k: int = 32, *, momentum: float = 0.99, **rest: Any) -> None:
        if not 1 <= k <= width or not 0 <= momentum < 1:
            raise ValueError(f"k={k}, momentum={momentum}: need 1 <= k <= {width} and 0 <= momentum < 1")
        self.k, self.momentum = k, momentum
        super().__init__(d_in, width, **rest)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def select(self, pre: Tensor) -> Support:
        if not self.training:
            return mask_support(pre > self.threshold)
        flat = pre.flatten()
        kept = flat.topk(min(self.k * len(pre), flat.numel())).indices
        places = kept[flat[kept] > 0].sort().values
        if len(places):
            self.batches += 1
            weight = max(1 - self.momentum, 1 / int(self.batches))
            self.threshold.lerp_(flat[places].min(), weight)
        counts = torch.bincount(places // pre.shape[1], minlength=len(pre))
        return Support(places % pre.shape[1], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), pre.shape[1])

    def activate(self, chosen: Tensor, support: Support) -> Tensor:  # noqa: ARG002
        return chosen.relu()

    def fold(self, mean: Tensor | float, scale: float) -> None:
        super().fold(mean, scale)
        self.threshold.div_(scale)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k, "momentum": self.momentum}


class JumpReLUSAE(SAE):
    """f = pi 1[pi > theta], a threshold a latent, learned by straight-through gradients (Rajamanoharan et al. 2024).

    bandwidth: width e of the rectangle kernel of the gradients. threshold: first value of theta, for all latents.
    """

    kind = "jumprelu"

    def __init__(self, d_in: int, width: int, *, bandwidth: float = 1e-3, threshold: float = 1e-3, **rest: Any) -> None:
        if not bandwidth > 0 or not threshold >= 0:
            raise ValueError(f"bandwidth={bandwidth}, threshold={threshold}: need bandwidth > 0 and threshold >= 0")
        self.bandwidth = bandwidth
        rest.setdefault("apply_b_dec_to_input", False)
        super().__init__(d_in, width, **rest)
        self.log_threshold = nn.Parameter(torch.full((width,), threshold).log())

    @property
    def threshold(self) -> Tensor:
        """theta [m]."""
        return self.log_threshold.exp()

    def select(self, pre: Tensor) -> Support:
        """In training also the latents just below the threshold, which move it though their value is 0."""
        below = self.bandwidth / 2 if self.training else 0.0
        return mask_support(pre > self.threshold - below)

    def activate(self, chosen: Tensor, support: Support) -> Tensor:
        return JumpReLU.apply(chosen, self.threshold[support.index], self.bandwidth)

    def count(self, pre: Tensor, support: Support) -> Tensor:
        """Sum over tokens of ||f||_0, whose gradient reaches the thresholds."""
        chosen = pre.flatten()[support.token * support.width + support.index]
        return Step.apply(chosen, self.threshold[support.index], self.bandwidth).sum()

    @torch.no_grad()
    def fold(self, mean: Tensor | float, scale: float) -> None:
        super().fold(mean, scale)
        self.log_threshold.sub_(math.log(scale))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "bandwidth": self.bandwidth}


def _window(pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel K((pi - theta) / e)."""
    return (((pi - theta) / bandwidth).abs() < 0.5).to(pi.dtype)


class JumpReLU(torch.autograd.Function):
    """pi 1[pi > theta]; df/dpi = 1[pi > theta], df/dtheta = -(theta / e) K((pi - theta) / e)."""

    @staticmethod
    def forward(ctx: Any, pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pi, theta)
        ctx.bandwidth = bandwidth
        return pi * (pi > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pi, theta = ctx.saved_tensors
        window = _window(pi, theta, ctx.bandwidth)
        return grad * (pi > theta), -grad * window * theta / ctx.bandwidth, None


class Step(torch.autograd.Function):
    """1[pi > theta]; no gradient for pi, for theta -(1 / e) K((pi - theta) / e)."""

    @staticmethod
    def forward(ctx: Any, pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pi, theta)
        ctx.bandwidth = bandwidth
        return (pi > theta).to(pi.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pi, theta = ctx.saved_tensors
        return None, -grad * _window(pi, theta, ctx.bandwidth) / ctx.bandwidth, None


KINDS: dict[str, type[SAE]] = {"topk": TopKSAE, "batchtopk": BatchTopKSAE, "jumprelu": JumpReLUSAE}
