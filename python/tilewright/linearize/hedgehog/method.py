# SPDX-License-Identifier: Apache-2.0
"""Converting a transformers language model, and its two stages of training (arXiv 2402.04347 and 2410.10254)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tilewright._files import atomic_write
from tilewright.linearize.conversion import convert
from tilewright.linearize.hedgehog.config import HedgehogConfig, HedgehogRecipe
from tilewright.linearize.hedgehog.distillation import Batches, distill
from tilewright.linearize.hedgehog.losses import Kind
from tilewright.linearize.hedgehog.module import feature_attentions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tilewright.linearize import tuning

_MAPS = "feature_maps.safetensors"


def convert_to_hedgehog(
    model: PreTrainedModel,
    layers: str | Iterable[int] = "all",
    window_size: int | None = None,
    *,
    softmax_layers: Iterable[int] = (),
    every: int | None = None,
    inplace: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """A model with Hedgehog attention and the weights of ``model``: a copy, or the model itself with ``inplace``.

    Its maps are still the identity; :func:`tilewright.linearize.hedgehog.distill` teaches them.

    Args:
        model: a transformers Llama, Mistral, Qwen2 or Qwen3 causal language model with float weights.
        layers: "all" or the indices to convert.
        window_size: softmax on so many last tokens beside the linear part; None: none.
        softmax_layers: indices that keep their attention. every: 8 keeps one layer in eight (7, 15, ...).
        settings: other fields of :class:`HedgehogConfig`.

    Raises:
        ValueError: as for :func:`tilewright.linearize.convert` and :class:`HedgehogConfig`.
    """
    config = HedgehogConfig.from_dict({"window_size": window_size, **settings})
    return convert(model, "hedgehog", config, layers=layers, keep=softmax_layers, keep_every=every, inplace=inplace)


def finetune_lora(
    model: PreTrainedModel,
    batches: tuning.Batches,
    *,
    steps: int = 200,
    lr: float = 1e-3,
    r: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    **options: Any,
) -> dict[str, Any]:
    """Stage two: low-rank adapters on the projections, next-token cross-entropy, merged at the end, in place.

    Args:
        batches: from a step's number to inputs and labels int64 [B, T] (``tilewright.data.bytes.ByteWindows``).
        steps, lr, r, alpha, targets, options: as for :func:`tilewright.linearize.tuning.tune_lora`.
    """
    from tilewright.linearize.tuning import tune_lora

    return tune_lora(model, batches, steps=steps, lr=lr, r=r, alpha=alpha, targets=targets, **options)


def train(
    model: PreTrainedModel,
    batches: tuning.Batches,
    recipe: HedgehogRecipe | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    directory: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """The recipe: :func:`distill`, then :func:`finetune_lora`, in place.

    Args:
        model: converted; while it is distilled its own softmax attention is the teacher, so ``teacher`` is not needed.
        batches: as for :func:`finetune_lora`.
        directory: where an interrupted training keeps the distilled maps and the state of the tuning, and goes on from.

    Returns:
        What the stages report: "distillation" (see :func:`distill`) and "tuning".
    """
    del teacher
    recipe = HedgehogRecipe() if recipe is None else recipe
    report: dict[str, Any] = {}
    if recipe.distill_steps:
        report["distillation"] = _distilled(model, cast(Batches, batches), recipe, directory, progress)
    if recipe.steps:
        report["tuning"] = finetune_lora(
            model,
            batches,
            steps=recipe.steps,
            lr=recipe.lr,
            r=recipe.r,
            alpha=recipe.lora_alpha,
            targets=recipe.target_modules,
            warmup=recipe.warmup,
            clip=recipe.clip,
            dropout=recipe.lora_dropout,
            seed=recipe.seed,
            directory=None if directory is None else directory / "tuning",
            progress=progress,
        )
    return report


def _distilled(
    model: PreTrainedModel, batches: Batches, recipe: HedgehogRecipe, directory: Path | None, progress: bool | None
) -> dict[str, Any]:
    """The first stage; where a directory holds its outcome under the same settings, that is read instead."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    settings = {"steps": recipe.distill_steps, "lr": recipe.distill_lr, "kind": recipe.kind}
    key = json.dumps(settings, sort_keys=True)
    found = feature_attentions(model)
    path = None if directory is None else directory / _MAPS
    if path is not None and path.exists():
        with safe_open(str(path), "pt") as file:
            kept = file.metadata() or {}
        if kept.get("settings") == key:
            tensors = load_file(str(path))
            for name, attention in found.items():
                mine = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
                attention.load_state_dict(mine)
            return cast("dict[str, Any]", json.loads(kept["report"]))
    report = distill(
        model,
        batches,
        steps=recipe.distill_steps,
        lr=recipe.distill_lr,
        kind=cast(Kind, recipe.kind),
        progress=progress,
    )
    if path is not None:
        tensors = {f"{name}.{n}": t.contiguous() for name, a in found.items() for n, t in a.state_dict().items()}
        with atomic_write(path) as partial:
            save_file(tensors, str(partial), metadata={"settings": key, "report": json.dumps(report)})
    return report
