# SPDX-License-Identifier: Apache-2.0
"""The contract's tables and constants as a C++ header and a SystemVerilog package, so that the three never drift.

``python -m tilewright.edge.contract.export cpp hls/include/tilewright_hls/tables.h`` (or ``sv FILE``)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from tilewright._files import atomic_write
from tilewright.edge.contract import rows
from tilewright.edge.contract.status import Status
from tilewright.edge.contract.tables import EXP2, SIGMOID

_ORIGIN = "Generated from python/tilewright/edge/contract by `python -m tilewright.edge.contract.export`."


def _lines(values: Iterable[int], prefix: str = "") -> str:
    out, line = [], "   "
    for text in (f"{prefix}{value}" for value in values):
        if len(line) + len(text) + 2 > 118:
            out.append(line)
            line = "   "
        line += f" {text},"
    return "\n".join([*out, line])


def _camel(name: str) -> str:
    return "k" + name.title().replace("_", "")


def cpp() -> str:
    """The header of the HLS units."""
    bits = "\n".join(f"inline constexpr int {_camel(bit.name or '')} = {bit.value.bit_length() - 1};" for bit in Status)
    return f"""// SPDX-License-Identifier: Apache-2.0
// {_ORIGIN}
#pragma once

namespace tilewright_hls {{

// Bits of the status word.
{bits}

inline constexpr int kMinScaleBits = {rows.MIN_SCALE_BITS};
inline constexpr int kNormFloor = {rows.NORM_FLOOR};

// clang-format off
inline constexpr int kExp2[{len(EXP2)}] = {{
{_lines(EXP2)}
}};
inline constexpr int kSigmoid[{len(SIGMOID)}] = {{
{_lines(SIGMOID)}
}};
// clang-format on

}}  // namespace tilewright_hls
"""


def sv() -> str:
    """A SystemVerilog package: status bits, and the two tables as functions that fill ROMs."""

    def table(name: str, values: tuple[int, ...], index_bits: int, width: int) -> str:
        # One vector, the first entry in the lowest bits: a tool that works a ROM out entry by entry only takes a slice.
        vector = f"{name.title().replace('_', '')}Table"
        items = _lines(reversed(values), f"{width}'d").removesuffix(",")
        return (
            f"  localparam logic [{len(values) * width - 1}:0] {vector} = {{\n{items}\n  }};\n"
            f"  function automatic logic [{width - 1}:0] {name}(input logic [{index_bits - 1}:0] index);\n"
            f"    {name} = {vector}[index*{width}+:{width}];\n  endfunction\n"
        )

    def name(bit: Status) -> str:
        return "Status" + (bit.name or "").title().replace("_", "")

    bits = "\n".join(f"  localparam int unsigned {name(bit)} = {bit.value.bit_length() - 1};" for bit in Status)
    return f"""// SPDX-License-Identifier: Apache-2.0
// {_ORIGIN}
`default_nettype none

package contract_pkg;

{bits}

  // 2**15 * 2**(index / 128)
{table("exp2_entry", EXP2, 8, 17)}
  // 2**16 * sigmoid(index / 32)
{table("sigmoid_entry", SIGMOID, 10, 17)}
endpackage

`default_nettype wire
"""


def main(arguments: list[str]) -> None:
    """``cpp FILE`` or ``sv FILE``."""
    if len(arguments) != 2 or arguments[0] not in ("cpp", "sv"):
        raise SystemExit("needed: cpp FILE or sv FILE")
    with atomic_write(Path(arguments[1])) as path:
        path.write_text(cpp() if arguments[0] == "cpp" else sv())


if __name__ == "__main__":
    main(sys.argv[1:])
