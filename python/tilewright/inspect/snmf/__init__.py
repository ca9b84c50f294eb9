# SPDX-License-Identifier: Apache-2.0
"""Semi-nonnegative factorisation of MLP activations into features of few neurons (arXiv 2506.10920).

Names are imported when they are first used: scikit-learn takes a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.inspect.snmf.activations import TokenIndex, collect_mlp_activations, mlp_site
    from tilewright.inspect.snmf.detection import (
        ConceptScore,
        auroc,
        best_feature,
        concept_detection_score,
        diff_mean,
        labelled_neuron,
        random_sparse,
        sentence_maximum,
        sentence_scores,
    )
    from tilewright.inspect.snmf.hierarchy import Edge, HierarchicalSemiNMF, Level
    from tilewright.inspect.snmf.interpret import (
        Projection,
        TokenInContext,
        feature_neurons,
        top_tokens,
        vocab_projection,
    )
    from tilewright.inspect.snmf.method import SemiNMF
    from tilewright.inspect.snmf.steering import (
        NextToken,
        Strength,
        find_alpha_for_kl,
        find_alphas_for_kl,
        steer,
    )
    from tilewright.inspect.snmf.storage import FeatureSet, feature_set, load_features, save_features

_WHERE = {
    "activations": ("TokenIndex", "collect_mlp_activations", "mlp_site"),
    "detection": (
        "ConceptScore", "auroc", "best_feature", "concept_detection_score", "diff_mean", "labelled_neuron",
        "random_sparse", "sentence_maximum", "sentence_scores",
    ),
    "hierarchy": ("Edge", "HierarchicalSemiNMF", "Level"),
    "interpret": ("Projection", "TokenInContext", "feature_neurons", "top_tokens", "vocab_projection"),
    "method": ("SemiNMF",),
    "steering": ("NextToken", "Strength", "find_alpha_for_kl", "find_alphas_for_kl", "steer"),
    "storage": ("FeatureSet", "feature_set", "load_features", "save_features"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "ConceptScore",
    "Edge",
    "FeatureSet",
    "HierarchicalSemiNMF",
    "Level",
    "NextToken",
    "Projection",
    "SemiNMF",
    "Strength",
    "TokenInContext",
    "TokenIndex",
    "auroc",
    "best_feature",
    "collect_mlp_activations",
    "concept_detection_score",
    "diff_mean",
    "feature_neurons",
    "feature_set",
    "find_alpha_for_kl",
    "find_alphas_for_kl",
    "labelled_neuron",
    "load_features",
    "mlp_site",
    "random_sparse",
    "save_features",
    "sentence_maximum",
    "sentence_scores",
    "steer",
    "top_tokens",
    "vocab_projection",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
