# SPDX-License-Identifier: Apache-2.0
"""Adding a feature to an MLP's activation, at a strength that moves the next-token distribution by a given KL."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import add, intervened
from tilewright.inspect.snmf.activations import device_of, mlp_site, tokenize_texts
from tilewright.inspect.snmf.detection import unit

PROMPTS = ("I think that",)
KL_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
LEAST_ALPHA, LARGEST_ALPHA = 1e-3, 1e5
_STEP = math.log(8)
_ROWS = 256


def down_weight(module: nn.Module) -> Tensor:
    """W_down [hidden, d_a] of a linear, or of GPT-2's transposed one."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} holds no float weight; load the model with dequantize=True")
    return weight.T if type(module).__name__ == "Conv1D" else weight


def steering_site(model: nn.Module, layer: int | str, vectors: Any) -> tuple[str, Tensor]:
    """Where vectors [..., d_a] are added, and what is added at strength 1: the unit vectors.

    Models that normalise the MLP's output (Gemma 2 and 3) would undo part of a change in front of the norm; there the
    vector goes through W_down and that norm and is added behind it.
    """
    name = mlp_site(model, layer)
    modules = dict(model.named_modules())
    direction = unit(vectors)
    block = name.rpartition(".mlp.")[0]
    norm = f"{block}.post_feedforward_layernorm"
    if block and norm in modules:
        weight = down_weight(modules[name])
        with torch.no_grad():
            return f"{norm}@output", modules[norm](direction.to(weight) @ weight.T).float()
    width = getattr(modules[name], "in_features", None)
    if width is not None and direction.shape[-1] != width:
        raise ValueError(f"vector has {direction.shape[-1]} values; {name} takes {width}")
    return f"{name}@input", direction


@contextlib.contextmanager
def steer(model: nn.Module, layer: int | str, vector: Any, alpha: float) -> Iterator[None]:
    """While the context lives, alpha times the unit vector [d_a] is added to the MLP's activation at every position.

    A negative alpha suppresses. Works under ``generate()`` with a cache: every token is steered when it is computed.
    """
    site, direction = steering_site(model, layer, vector)
    with intervened(model, {site: add(alpha * direction)}):
        yield


class NextToken:
    """Distributions of the token after some prompts, unsteered and with many directions at once.

    Prompts run in groups of equal length without padding, and all directions share a forward pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, layer: int | str, prompts: Sequence[str] = PROMPTS) -> None:
        self.model, self.layer = model, layer
        self.device = device_of(model)
        self._prompts: dict[int, list[list[int]]] = {}
        for ids in tokenize_texts(tokenizer, prompts):
            self._prompts.setdefault(len(ids), []).append(ids)
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if keeps else {}
        self.base = [self._log_probabilities(ids) for ids in self._groups()]

    def _groups(self) -> list[Tensor]:
        return [torch.tensor(ids, device=self.device) for ids in self._prompts.values()]

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.model(input_ids=ids, **self._options).logits[:, -1].float(), -1)

    def measure(
        self, vectors: Tensor, alphas: Tensor, token_sets: Sequence[Sequence[int]] = ()
    ) -> tuple[Tensor, Tensor]:
        """KL(unsteered || steered) and how the log-probability of each set of tokens moved.

        vectors [r, d_a], alphas [r]; returns float64 [r] (mean over prompts) and [r, prompts, sets].
        """
        site, directions = steering_site(self.model, self.layer, vectors)
        shift = alphas.float()[:, None].to(directions.device) * directions
        sets = [torch.tensor(list(some), device=self.device) for some in token_sets]
        divergence, moved = [], []
        for ids, base in zip(self._groups(), self.base, strict=True):
            at_once = max(1, _ROWS // len(ids))
            kl, mass = [], []
            for some in shift.split(at_once):
                with intervened(self.model, {site: add(some.repeat_interleave(len(ids), 0)[:, None])}):
                    now = self._log_probabilities(ids.repeat(len(some), 1)).view(len(some), *base.shape)
                kl.append((base.exp() * (base - now)).sum(-1).double())
                gains = [(now[..., t].logsumexp(-1) - base[:, t].logsumexp(-1)).double() for t in sets]
                mass.append(torch.stack(gains, -1) if gains else now.new_zeros(*now.shape[:2], 0).double())
            divergence.append(torch.cat(kl))
            moved.append(torch.cat(mass))
        return torch.cat(divergence, 1).mean(1).cpu(), torch.cat(moved, 1).cpu()


@dataclass(frozen=True)
class Strength:
    """alpha and the KL that it gives; ``reached`` says whether that is within the tolerance of the target."""

    alpha: float
    kl: float
    reached: bool


def find_alphas_for_kl(
    probe: NextToken, vectors: Tensor, target: float, *, start: Tensor | None = None, tolerance: float = 0.05,
    steps: int = 20,
) -> list[Strength]:  # fmt: skip
    """Strengths at which each of vectors [r, d_a] moves the probe's distributions by KL ``target``.

    Searched in log alpha and log KL: a secant step, or half of the bracket where the secant leaves it. start: first
    guesses [r], such as the strengths found for a near target.
    """
    if target <= 0 or steps < 1:
        raise ValueError(f"target={target}, steps={steps}: a KL above 0 and at least one step are needed")
    count = len(vectors)
    where = torch.zeros(count).double() if start is None else start.double().log()
    low = torch.full((count,), math.log(LEAST_ALPHA)).double()
    high = torch.full((count,), math.log(LARGEST_ALPHA)).double()
    before: tuple[Tensor, Tensor] | None = None
    best = torch.full((count,), math.inf).double()
    alpha, reached_kl = where.exp(), torch.zeros(count).double()
    active = torch.ones(count, dtype=torch.bool)
    for _ in range(steps):
        off = torch.zeros(count).double()
        kl = torch.zeros(count).double()
        kl[active] = probe.measure(vectors[active], where[active].exp())[0].clamp(min=1e-12)
        off[active] = (kl[active] / target).log()
        better = active & (off.abs() < best)
        best, alpha = torch.where(better, off.abs(), best), torch.where(better, where.exp(), alpha)
        reached_kl = torch.where(better, kl, reached_kl)
        low, high = torch.where(active & (off < 0), where, low), torch.where(active & (off >= 0), where, high)
        active = active & (best > math.log1p(tolerance))
        if not bool(active.any()):
            break
        slope = torch.full((count,), 2.0).double()
        if before is not None:
            run = where - before[0]
            steep = (off - before[1]) / torch.where(run == 0, 1.0, run)
            slope = torch.where((run != 0) & (steep > 0.25) & steep.isfinite(), steep, slope)
        nearer = where - (off / slope).clamp(-_STEP, _STEP)
        outside = (nearer <= low) | (nearer >= high)
        before, where = (where, off), torch.where(outside, (low + high) / 2, nearer)
    return [
        Strength(float(a), float(k), bool(b <= math.log1p(tolerance)))
        for a, k, b in zip(alpha, reached_kl, best, strict=True)
    ]


def find_alpha_for_kl(
    model: nn.Module, tokenizer: Any, layer: int | str, vector: Any, target: float = 0.25, *,
    prompts: Sequence[str] = PROMPTS, negative: bool = False, tolerance: float = 0.05, steps: int = 20,
) -> Strength:  # fmt: skip
    """The alpha at which :func:`steer` moves the next token after ``prompts`` by KL(unsteered || steered) = target.

    negative: search among negative alphas, which is a search of its own. tolerance: relative, on the KL.
    """
    v = torch.as_tensor(vector).float()[None]
    probe = NextToken(model, tokenizer, layer, prompts)
    (found,) = find_alphas_for_kl(probe, -v if negative else v, target, tolerance=tolerance, steps=steps)
    return Strength(-found.alpha if negative else found.alpha, found.kl, found.reached)
