# SPDX-License-Identifier: Apache-2.0
"""Logic of the accelerator, scaled from the paper's per-unit figures for the XCK26.

Read in the paper's evaluation: the units below at G = 3, T = 28, Q = 16 (P = 4 assumed, as in its figures); the
table-lookup core alone takes 23,082 LUTs. Counted here with an open synthesizer (`synthesis.json`): one lane's look-ups
with their adder tree, and a copy of a table. What our own RTL takes is in :mod:`.synthesis`, and nothing here is fitted
to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.edge.contract.weights import Tiling
from tilewright.edge.tellme.synthesis import study

if TYPE_CHECKING:
    from tilewright.edge.tellme.config import Resources, TellmeConfig

_BUILD = Tiling(3, 28, 16, 4)
_LANE = study("look-up, full table")
_LOOKUP_LUT = _LANE.lut / _LANE.parameters["T"]
_CORE_LUT = 23082
_TABLE_LUT = (_CORE_LUT - _LOOKUP_LUT * _BUILD.t * _BUILD.q) / _BUILD.t
"""Of the sums of one table, what is left of the core when its look-ups are taken off."""
_COPY_LUT = _LANE.lutram / _LANE.parameters["T"]
"""One copy of a table, 32 entries of 10 bits: a RAM32M16, 8 LUTs."""
_FUSE_LUT, _FUSE_DSP = 43137 - _CORE_LUT, 320
_RPA_LUT, _RPA_DSP = 18072, 115
_DA_LUT, _DA_DSP = 9570, 123
_WBMU_LUT = 6885
_REST_LUT, _REST_DSP, _REST_BRAM, _REST_URAM = 98303 - 43137 - 18072 - 9570 - 6885, 52, 98.5, 12
_TRIT_LUT = 40
"""Of decoding one byte of five weights: a 243-entry table of 8 bits in 64-deep ROM plus regrouping, an estimate."""


def core_lut(tiling: Tiling, fill: int) -> float:
    """Table sums, look-ups, adder trees; a second set of tables when filling is hidden. Other G scale by entries."""
    depth = max(tiling.codes / 27, 32 / 27 if tiling.codes > 27 else tiling.codes / 27)
    copies = 2 if fill == 0 else 1
    look_ups = tiling.t * tiling.q * (_LOOKUP_LUT + (copies - 1) * _COPY_LUT)
    return tiling.t * _TABLE_LUT * tiling.codes / 27 + look_ups * max(depth, 1)


def estimate(config: TellmeConfig) -> Resources:
    """The whole accelerator. The paper's count at its own point (F = 27, no overlap) by construction."""
    from tilewright.edge.tellme.config import Resources

    t = config.tiling
    share = t.p / _BUILD.p
    vectors = config.beat_bits // t.vector_bits if config.packing != "trits" else 0
    trits = _TRIT_LUT * (config.beat_bits // 8) if config.packing == "trits" else 0
    gaps = 0 if config.packing == "beats" else config.beat_bits * 2 + vectors
    lut = (
        core_lut(t, config.fill) + _FUSE_LUT + _RPA_LUT * share + _DA_LUT + _WBMU_LUT * t.q / _BUILD.q
        + _REST_LUT + trits + gaps
    )  # fmt: skip
    dsp = _FUSE_DSP + _RPA_DSP * share + _DA_DSP + _REST_DSP
    # Sums of a query: 48 bits times lanes in 72-bit wide block RAMs.
    bram = _REST_BRAM + max(t.p - _BUILD.p, 0) * -(-48 * t.lanes // 72)
    return Resources(lut, dsp, bram, config.uram() + _REST_URAM)
