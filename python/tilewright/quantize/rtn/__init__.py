# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline that every quantizer has to beat."""

from __future__ import annotations

from tilewright.quantize import Method
from tilewright.quantize.rtn.method import RTNConfig, quantize_model

METHOD = Method("rtn", "round every linear to the nearest INT4 value; no calibration", RTNConfig, quantize_model)

__all__ = ["METHOD", "RTNConfig", "quantize_model"]
