# SPDX-License-Identifier: Apache-2.0
"""``python -m tilewright.verify model.onnx property.vnnlib``: `tw verify`."""

from __future__ import annotations

import typer

from tilewright.verify.genbab.cli import verify

if __name__ == "__main__":
    typer.run(verify)
