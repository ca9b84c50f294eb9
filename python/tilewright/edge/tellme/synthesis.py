# SPDX-License-Identifier: Apache-2.0
"""What the RTL's units take of an UltraScale+ FPGA, as an open synthesizer counted them.

The numbers are those of `synthesis.json`, which `scripts/rtl_resources.py` writes: nothing here is typed. They compare
variants and show growth; a vendor's tools count within some 20 % of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tilewright.edge.tellme.config import Resources

FILE = Path(__file__).resolve().with_name("synthesis.json")


@dataclass(frozen=True)
class Counted:
    """One module at one point of its parameters.

    Attributes:
        count: how many the accelerator at the default parameters holds beyond those inside other units; 0 for parts.
        lut: lookup tables, those of distributed RAM (`lutram`) among them. bram: blocks of 36 Kb.
    """

    name: str
    module: str
    parameters: dict[str, int]
    count: int
    lut: int
    lutram: int
    ff: int
    dsp: int
    bram: float
    uram: int


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return document


def _counted(name: str, record: dict[str, Any]) -> Counted:
    return Counted(name, **{key: record[key] for key in Counted.__dataclass_fields__ if key != "name"})


def units() -> list[Counted]:
    """All units, parts included."""
    return [_counted(name, record) for name, record in _document()["units"].items()]


def study(name: str) -> Counted:
    """A small design that was counted for a comparison.

    Raises:
        ValueError: there is none of that name.
    """
    from tilewright._methods import choose

    return _counted(name, choose(_document()["studies"], name, "study"))


def command() -> str:
    """How they were counted."""
    return str(_document()["synthesis"])


def total() -> tuple[Resources, int]:
    """The accelerator at its default parameters, the sum of its units; and its flip-flops."""
    sums = {key: sum(getattr(one, key) * one.count for one in units()) for key in ("lut", "dsp", "bram", "uram", "ff")}
    return Resources(sums["lut"], sums["dsp"], sums["bram"], sums["uram"]), int(sums["ff"])
