# SPDX-License-Identifier: Apache-2.0
"""The loss of one batch, for each kind of SAE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.inspect.sae.codes import Codes, chosen_preactivations
from tilewright.inspect.sae.config import SAEConfig
from tilewright.inspect.sae.module import SAE, JumpReLUSAE, top_support


@dataclass
class Loss:
    """total: what is minimised (scalar with gradients). fvu, l0, auxk: floats. codes: of the batch."""

    total: Tensor
    fvu: float
    l0: float
    auxk: float
    codes: Codes


def variance(x: Tensor) -> Tensor:
    """Sum of squared distances from the batch's mean; 1e-12 at least, so that a batch of equal rows has a loss."""
    return (x - x.mean(0)).square().sum().clamp_min(1e-12)


def batch_loss(sae: SAE, x: Tensor, config: SAEConfig, step: int, dead: Tensor | None = None) -> Loss:
    """Loss of rows x [T, d].

    TopK kinds: FVU + auxk_alpha auxK + multi / 8. JumpReLU: mean over tokens of ||x - x_hat||^2 + lambda ||f||_0.
    dead: boolean [m], latents that the auxiliary loss may use.
    """
    with torch.no_grad():
        pre = sae.preactivations(x)
        support = sae.select(pre)
    codes = sae.codes_at(x, pre, support)
    recon = sae.decode(codes)
    squares = (recon - x).square().sum()
    total_variance = variance(x)
    auxk = 0.0
    if isinstance(sae, JumpReLUSAE):
        total = (squares + config.sparsity_at(step) * sae.count(pre, support)) / len(x)
    else:
        total = squares / total_variance
        if config.multi_topk:
            wide = top_support(pre, 4 * config.k)
            total = total + (sae.decode(sae.codes_at(x, pre, wide)) - x).square().sum() / total_variance / 8
        if config.auxk_alpha > 0 and dead is not None and bool(dead.any()):
            loss = auxk_loss(sae, x, pre, (x - recon).detach(), dead) / total_variance
            total = total + config.auxk_alpha * loss
            auxk = float(loss.detach())
    active = float((codes.value.detach() != 0).sum()) / len(x)
    return Loss(total, float(squares.detach() / total_variance), active, auxk, codes)


def auxk_loss(sae: SAE, x: Tensor, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """Squared error of the residual as the d / 2 most active dead latents see it, without the decoder's bias.

    Scaled by min(dead / (d / 2), 1). residual: x - x_hat, detached.
    """
    count = int(dead.sum())
    most = max(1, x.shape[1] // 2)
    support = top_support(pre.masked_fill(~dead, -torch.inf), min(most, count))
    center = sae.b_dec if sae.apply_b_dec_to_input else None
    chosen = chosen_preactivations(pre, x, sae.W_enc, sae.b_enc, center, support)
    seen = Codes(support, chosen.relu()).decode(sae.W_dec)
    return min(count / most, 1.0) * (seen - residual).square().sum()


def fired(codes: Codes) -> Tensor:
    """Which latents have a value above 0: boolean [m]."""
    seen = torch.zeros(codes.support.width, dtype=torch.bool, device=codes.value.device)
    seen[codes.support.index[codes.value.detach() > 0]] = True
    return seen
