# SPDX-License-Identifier: Apache-2.0
"""CATS on a loaded model: thresholds among its weights, which the decode engine, `tw eval` and `tw generate` follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tilewright.capture import Batch
from tilewright.models.language_model import LanguageModel, threshold_name
from tilewright.sparsify.cats.calibrate import METHODS, calibrate_thresholds, finite
from tilewright.sparsify.quantiles import check_share
from tilewright.sparsify.thresholds import Thresholds


@dataclass(frozen=True)
class CATSConfig:
    """Settings of CATS.

    sparsity: share in [0, 1) of gate activations to drop, the same in every layer. ranking: "activation" (the paper's),
    "norm" (weighted by the norm of the neuron's column of W_down) or "up" (by the root mean square of its up
    activation). method: "exact" or "hist".

    Raises:
        ValueError: a value is none of its kind.
    """

    sparsity: float = 0.5
    ranking: Literal["activation", "norm", "up"] = "activation"
    method: Literal["exact", "hist"] = "hist"

    def __post_init__(self) -> None:
        check_share(self.sparsity)
        if self.ranking not in ("activation", "norm", "up"):
            raise ValueError(f"CATSConfig: ranking = {self.ranking!r}, needed 'activation', 'norm' or 'up'")
        if self.method not in METHODS:
            raise ValueError(f"CATSConfig: method = {self.method!r}, needed 'exact' or 'hist'")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> CATSConfig:
        """Strict inverse of :meth:`to_dict`; missing keys keep their defaults."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(raw.keys() - known):
            raise ValueError(f"cats has no setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**raw)


def sparsify_model(
    model: LanguageModel, config: CATSConfig | None = None, calibration_batches: Iterable[Batch] | None = None
) -> LanguageModel:
    """A new model whose layers have thresholds, from activations on the calibration text; weights are untouched.

    Raises:
        ValueError: there is no calibration, the model is linearized, or it has thresholds already.
    """
    config = config or CATSConfig()
    model.require_softmax("cats")
    if calibration_batches is None:
        raise ValueError("cats needs calibration_batches: a few thousand tokens of ordinary text")
    from tilewright.models import to_transformers

    _require_dense(model)
    found = calibrate_thresholds(
        to_transformers(model, dequantize=True),
        calibration_batches,
        config.sparsity,
        config.method,
        ranking=config.ranking,
    )
    return with_thresholds(model, found, config.to_dict())


def with_thresholds(
    model: LanguageModel, thresholds: Thresholds, config: dict[str, Any] | None = None
) -> LanguageModel:
    """A new model with these thresholds (of score "gate", named ``model.layers.<i>.mlp``) among its weights.

    Raises:
        ValueError: the score is another, a name is none of a layer, a size does not fit, or there are thresholds
        already.
    """
    _require_dense(model)
    if thresholds.score != "gate":
        raise ValueError(f"thresholds compare the score {thresholds.score!r}; a model needs score 'gate'")
    names = {f"model.layers.{i}.mlp": threshold_name(i) for i in range(model.config.num_hidden_layers)}
    added = {}
    for name, threshold in thresholds.items():
        if name not in names:
            raise ValueError(f"threshold of {name!r} belongs to no layer; names are model.layers.<i>.mlp")
        if threshold.numel() not in (1, model.config.intermediate_size):
            raise ValueError(
                f"threshold of {name} has {threshold.numel()} values; 1 or {model.config.intermediate_size} are needed"
            )
        added[names[name]] = finite(threshold.reshape(-1))
    about = {"method": "cats", "config": config or {}, "about": thresholds.about}
    weights = {**model.weights, **added}
    return dataclasses.replace(model, weights=weights, settings={**model.settings, "sparsity": about})


def model_thresholds(model: LanguageModel) -> Thresholds:
    """The thresholds of a model made by :func:`sparsify_model` or :func:`with_thresholds`.

    Raises:
        ValueError: it has none.
    """
    found = {}
    for index in range(model.config.num_hidden_layers):
        value = model.weights.get(threshold_name(index))
        if value is not None:
            found[f"model.layers.{index}.mlp"] = model.dense(threshold_name(index)).squeeze()
    if not found:
        raise ValueError(f"{model.source or 'model'} has no CATS thresholds")
    return Thresholds(found, about=dict(model.settings.get("sparsity", {}).get("about", {})))


def _require_dense(model: LanguageModel) -> None:
    if model.has_thresholds:
        raise ValueError(f"{model.source or 'model'} has CATS thresholds already; start from the dense checkpoint")
