# SPDX-License-Identifier: Apache-2.0
"""Features in one safetensors file: components, coefficients, tokens, settings. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright._files import atomic_write
from tilewright.inspect.snmf.activations import TokenIndex

if TYPE_CHECKING:
    from tilewright.inspect.snmf.hierarchy import HierarchicalSemiNMF
    from tilewright.inspect.snmf.method import SemiNMF

FORMAT = "tilewright snmf 1"


@dataclass(frozen=True)
class FeatureSet:
    """What a file holds.

    components: Z^T [k, d] of level 1. coefficients: [n, k] of the tokens it was fitted on, or None.
    index: their tokens, or None. upper: (components [k_l, d], weights [k_l, k_(l-1)]) of the levels above.
    settings: the estimator's parameters. info: JSON values that were given, such as model and layer.
    """

    components: Tensor
    coefficients: Tensor | None = None
    index: TokenIndex | None = None
    upper: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def feature_set(
    estimator: SemiNMF | HierarchicalSemiNMF,
    coefficients: Any = None,
    index: TokenIndex | None = None,
    **info: Any,
) -> FeatureSet:
    """What :func:`save_features` writes, from a fitted estimator and what it was fitted on."""
    levels = getattr(estimator, "levels_", None)
    components = levels[0].components if levels else estimator.components_
    upper = [(torch.as_tensor(one.components), torch.as_tensor(one.weights)) for one in (levels or [])[1:]]
    held = None if coefficients is None else torch.as_tensor(coefficients)
    settings = {key: value for key, value in estimator.get_params(deep=False).items() if _is_json(value)}
    fitted = {"reconstruction_err": _err(estimator, "reconstruction_err_"), "n_iter": _err(estimator, "n_iter_")}
    return FeatureSet(torch.as_tensor(components), held, index, upper, settings, {**fitted, **info})


def _err(estimator: Any, name: str) -> Any:
    levels = getattr(estimator, "levels_", None)
    return getattr(levels[0].estimator if levels else estimator, name, None)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def save_features(path: str | os.PathLike[str], features: FeatureSet) -> None:
    """Write one safetensors file, complete or not at all."""
    from safetensors.torch import save_file

    tensors = {"components": features.components}
    if features.coefficients is not None:
        tensors["coefficients"] = features.coefficients
    if features.index is not None:
        at = features.index
        lengths = [len(ids) for ids in at.texts]
        tensors |= {"sentence": at.sentence, "position": at.position, "token": at.token}
        tensors |= {"texts": torch.tensor([one for ids in at.texts for one in ids]), "lengths": torch.tensor(lengths)}
    for number, (components, weights) in enumerate(features.upper, 2):
        tensors |= {f"level{number}.components": components, f"level{number}.weights": weights}
    stated = {"format": FORMAT, "settings": json.dumps(features.settings), "info": json.dumps(features.info)}
    with atomic_write(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(partial), metadata=stated)


def load_features(path: str | os.PathLike[str]) -> FeatureSet:
    """Read such a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file, or damaged; the message says what is wrong.
    """
    from safetensors import SafetensorError, safe_open

    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"{place}: no such file; `tw snmf fit` writes one")
    try:
        with safe_open(str(place), framework="pt") as file:
            stated = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stated.get("format") != FORMAT:
            raise ValueError(f"its format is {stated.get('format')!r}, not {FORMAT!r}")
        return _built(held, json.loads(stated["settings"]), json.loads(stated["info"]))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as wrong:
        raise ValueError(f"{place}: no readable file of features ({wrong})") from wrong


def _built(held: dict[str, Tensor], settings: dict[str, Any], info: dict[str, Any]) -> FeatureSet:
    components = held["components"]
    if components.dim() != 2:
        raise ValueError(f"components have shape {list(components.shape)}, [k, d] is needed")
    coefficients, index = held.get("coefficients"), None
    if "texts" in held:
        texts = [some.tolist() for some in held["texts"].split(held["lengths"].tolist())]
        index = TokenIndex(held["sentence"], held["position"], held["token"], texts)
    if coefficients is not None and coefficients.shape[1:] != components.shape[:1]:
        raise ValueError(f"coefficients {list(coefficients.shape)} do not fit components {list(components.shape)}")
    if coefficients is not None and index is not None and len(index) != len(coefficients):
        raise ValueError(f"{len(index)} tokens for {len(coefficients)} rows of coefficients")
    upper: list[tuple[Tensor, Tensor]] = []
    below = len(components)
    while f"level{len(upper) + 2}.components" in held:
        level = f"level{len(upper) + 2}"
        part = held[f"{level}.components"], held[f"{level}.weights"]
        if tuple(part[1].shape) != (len(part[0]), below):
            raise ValueError(f"{level}.weights have shape {list(part[1].shape)}, [{len(part[0])}, {below}] is needed")
        upper.append(part)
        below = len(part[0])
    return FeatureSet(components, coefficients, index, upper, settings, info)


def save_estimator(estimator: SemiNMF, path: str | os.PathLike[str], info: dict[str, Any]) -> None:
    """:meth:`SemiNMF.save`."""
    save_features(path, feature_set(estimator, loss_curve=estimator.loss_curve_, **info))


def load_estimator(path: str | os.PathLike[str]) -> SemiNMF:
    """:meth:`SemiNMF.load`: ready to transform."""
    from tilewright.inspect.snmf.method import SemiNMF

    held = load_features(path)
    known = SemiNMF().get_params()
    made = SemiNMF(**{key: value for key, value in held.settings.items() if key in known})
    made.set_params(n_components=len(held.components))
    made.components_ = held.components.numpy()
    made.n_features_in_, made._n_features_out = held.components.shape[1], len(held.components)
    made.loss_curve_ = held.info.get("loss_curve", [])
    made.reconstruction_err_ = held.info["reconstruction_err"]
    made.n_iter_ = held.info["n_iter"]
    return made
