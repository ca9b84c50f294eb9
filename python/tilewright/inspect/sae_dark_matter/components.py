# SPDX-License-Identifier: Apache-2.0
"""Can what came before predict the error? Regressions of one layer's error on parts of earlier components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tilewright.inspect.sae_dark_matter.analysis import SAEErrorAnalysis, Score
from tilewright.inspect.sae_dark_matter.least_squares import LeastSquares

PREDICTORS = ("x", "sae", "linear", "nonlinear")
TARGETS = ("error", "linear", "nonlinear")
Grid = dict[str, dict[str, dict[str, float]]]
Rowsets = Iterable[Mapping[str, Tensor]]


@torch.no_grad()
def component_prediction(
    target: SAEErrorAnalysis,
    components: Mapping[str, SAEErrorAnalysis],
    train: Rowsets,
    test: Rowsets,
    *,
    target_name: str = "target",
    intercept: bool = True,
    ridge: float | None = None,
) -> Grid:
    """R^2 of predicting SaeError, LinearError and NonlinearError from {x, Sae(x), linear, nonlinear} of each component.

    train, test: batches of rows [n, d] by name: ``target_name``'s and those of the components, of the same tokens (as
    :func:`tilewright.capture.stream` yields them). Returns ``grid[component][predictor][target]``, R^2 over all
    dimensions on the test tokens.

    Raises:
        ValueError: a name is missing in a batch, or too few tokens for the regressions.
    """
    width = target.train.width
    fits: dict[tuple[str, str], LeastSquares] = {}
    for rows in train:
        wanted = _targets(target, _named(rows, target_name))
        for name, analysis in components.items():
            parts = analysis.parts(_named(rows, name))
            for part in PREDICTORS:
                key = name, part
                if key not in fits:
                    fits[key] = LeastSquares(
                        parts[part].shape[1], len(TARGETS) * width, intercept=intercept, ridge=ridge
                    )
                fits[key].update(parts[part], wanted)
    maps = {key: fit.solve() for key, fit in fits.items()}
    scores = {key: Score(len(TARGETS) * width) for key in maps}
    for rows in test:
        wanted = _targets(target, _named(rows, target_name)).double()
        for name, analysis in components.items():
            parts = analysis.parts(_named(rows, name))
            for part in PREDICTORS:
                scores[name, part].add(wanted, maps[name, part](parts[part].double()))
    grid: Grid = {}
    for (name, part), score in scores.items():
        missed, spread = score.missed.view(len(TARGETS), width).sum(1), score.spread().view(len(TARGETS), width).sum(1)
        grid.setdefault(name, {})[part] = dict(zip(TARGETS, (1 - missed / spread).tolist(), strict=True))
    return grid


def _targets(analysis: SAEErrorAnalysis, x: Tensor) -> Tensor:
    parts = analysis.parts(x)
    return torch.cat([parts[name] for name in TARGETS], 1)


def _named(rows: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in rows:
        raise ValueError(f"a batch of rows lacks {name!r}; it holds {', '.join(rows)}")
    return rows[name].float()
