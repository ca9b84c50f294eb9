# SPDX-License-Identifier: Apache-2.0
"""CATS: thresholds of the gate activation, so that few rows of up and down projections are read (arXiv 2404.08763)."""

from __future__ import annotations

from tilewright.nn.cats_mlp import CATSMLP
from tilewright.sparsify import Method
from tilewright.sparsify.cats.apply import LayerSparsity, apply_cats, mean_sparsity, remove_cats, sparsity_report
from tilewright.sparsify.cats.baselines import (
    Criterion,
    Neurons,
    random_mask,
    relu_swap,
    sparsified,
    thresholded,
    top_k,
)
from tilewright.sparsify.cats.calibrate import Scores, calibrate_thresholds, collect_scores
from tilewright.sparsify.cats.method import CATSConfig, model_thresholds, sparsify_model, with_thresholds
from tilewright.sparsify.cats.tuning import Tuning, finetune
from tilewright.sparsify.thresholds import Thresholds, load_thresholds, save_thresholds

METHOD = Method(
    "cats", "drop gate activations below a threshold a layer; their rows are not read", CATSConfig, sparsify_model
)

__all__ = [
    "CATSMLP",
    "METHOD",
    "CATSConfig",
    "Criterion",
    "LayerSparsity",
    "Neurons",
    "Scores",
    "Thresholds",
    "Tuning",
    "apply_cats",
    "calibrate_thresholds",
    "collect_scores",
    "finetune",
    "load_thresholds",
    "mean_sparsity",
    "model_thresholds",
    "random_mask",
    "relu_swap",
    "remove_cats",
    "save_thresholds",
    "sparsified",
    "sparsify_model",
    "sparsity_report",
    "thresholded",
    "top_k",
    "with_thresholds",
]
