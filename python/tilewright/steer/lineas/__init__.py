# SPDX-License-Identifier: Apache-2.0
"""LinEAS (arXiv 2503.10679): activation maps learned end to end with a distributional loss."""

from __future__ import annotations

from tilewright.steer import Method
from tilewright.steer.lineas.estimator import LinEAS
from tilewright.steer.lineas.loss import distributional_losses
from tilewright.steer.lineas.method import LinEASConfig, fit
from tilewright.steer.lineas.prox import prox_sparse_group

METHODS = (Method("lineas", "maps of all layers trained together, sparse on demand", LinEASConfig, fit),)

__all__ = ["METHODS", "LinEAS", "LinEASConfig", "distributional_losses", "fit", "prox_sparse_group"]
