# SPDX-License-Identifier: Apache-2.0
"""Cycles of a run of the accelerator, derived from the schedule in `rtl/src`; ports of `16 * lanes` bits never pause.

Every number below is a count of states or registers of the module that its comment names; nothing is fitted.
`tests/edge` holds each of the accelerator's counters against it over shapes and latencies. What depends on data or on
addresses has its usual value: a root's search takes one to three cycles, a matrix begins anywhere in a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from tilewright.edge.contract import Layer, Linear, Tiling
from tilewright.edge.contract.stream import beat_count, vectors_per_beat

BURST = 16
"""Beats of a port in a burst, at most (`axi_reader`, `axi_writer`)."""
READ_AHEAD = 64
"""Beats that a reader asks for ahead of its user (`axi_reader`: Depth)."""
PORTS = 3
"""Of the weights (`weight_reader`)."""
ROOT = 1 + 2 + 34 + 17 + 1
"""`inverse_root`: start, search, division, root, done."""
QUANTIZER_DIVISION = 31 + 2
"""`quantize`: a division of 31 bits, its acceptance and its register."""
DESCRIPTOR_DIVISIONS = 2 * (18 + 2)
FUSE = 4 + 9
"""`dequant_fuse`: product, rounding, and the registers of `fuse_pair`."""
ROW_FACTOR = 4
"""`dequant_fuse`: from a row's last beat to the next one's first."""
SUMS = 8
"""`tlmm_core`: places of sums between the look-up and the gearbox."""
KEY_PERIOD = 8
"""`attention`: the least distance of two keys."""
KEY_ROWS = 4
"""`attention`: rows of keys and of values that have a place."""
RECIPROCAL = 1 + 33 + 2
"""`attention_finish`: of a head, its states taken, a division of 33 bits."""
DRAIN = 3 + 7
"""`attention`: from the last update to the first head's reciprocal."""
FINISH = 6
"""`attention_finish`: from a beat's sum to its place in the output."""


def _halves(terms: int) -> int:
    """Registers of an adder tree, one every two of its levels."""
    return (terms - 1).bit_length() // 2


@dataclass(frozen=True)
class Pipelines:
    """Memory that answers a burst ``latency`` cycles after its address, and writes as long after their last beat."""

    latency: int = 20

    @property
    def first_beat(self) -> int:
        """From a reader's command to its first beat: command, burst, address, answer, store."""
        return 3 + self.latency

    def stream(self, beats: int) -> int:
        """Cycles of a read from its first beat on: one a beat while what is asked for ahead covers a round trip. The
        burst that takes a place comes ``latency`` + 18 cycles after the one that left it."""
        bursts = -(-beats // BURST)
        late = max(0, self.latency + BURST + 2 - READ_AHEAD)
        return beats + max(0, bursts - READ_AHEAD // BURST) * late * BURST // READ_AHEAD

    def answered(self, beats: int) -> int:
        """From a row's last beat in the writer to a path that knows it is in memory: bursts wait until they are whole;
        the answer, two registers."""
        return min(beats, BURST) + self.latency + 2

    def descriptor(self, lanes: int) -> int:
        """Of one descriptor but for what it does: fetched, two divisions, products, places and checks, begun, ended."""
        return self.first_beat + 32 // lanes + DESCRIPTOR_DIVISIONS + 3 + 2 + 1


def load_cycles(linear: Linear, tiling: Tiling, pipelines: Pipelines) -> int:
    """Of a matrix and its norm: LOAD."""
    weights, latency = linear.weights, pipelines.latency
    norms = 0 if linear.norm is None else len(linear.norm)
    stream = beat_count(weights, norms)
    beats = stream * 48 // tiling.lanes
    # Pieces of a burst go to the ports in turn; a quad of beats is in its store 9 cycles after the start, and then
    # every 4 cycles. The pieces of a round are put together when the first port's has come, three beats a cycle.
    pieces = -(-beats // BURST)
    rounds, port = divmod(pieces - 1, PORTS)
    rest = beats - BURST * (pieces - 1)
    round_end = 10 + latency + BURST * rounds + 12
    last = 10 + port + latency + BURST * rounds + 4 * (-(-rest // 4) - 1)
    if port:
        last = max(last, ceil(round_end + BURST / PORTS * (port - 1) + rest / PORTS))
    last += pipelines.stream(BURST * (rounds + 1)) - BURST * (rounds + 1)
    # Groups of vectors leave one a cycle and may hold up the stream; beats of norms alone follow as fast as they come.
    # Eight cycles after the last of all is settled.
    per_beat = vectors_per_beat(tiling)
    group, filled = min(per_beat, max(tiling.q // 2, 1)), -(-weights.vectors // per_beat)
    vectors = 10 + latency + 16 // tiling.lanes + -(-weights.vectors // group) + (stream - filled) * 16 // tiling.lanes
    return max(last + (filled == stream), vectors) + 10


def entry_cycles(linear: Linear, tiling: Tiling, pipelines: Pipelines) -> tuple[int, int]:
    """Cycles until a first row is quantized, and between two (`rms_max`, `quantize`, `row_entry`)."""
    beats = -(-linear.weights.inputs // tiling.lanes)
    # Command, the row, a pass through one register or three passes with the root between the second and the third.
    known = 1 + pipelines.first_beat + pipelines.stream(beats)
    sums = beats + _halves(tiling.lanes) + 4
    if linear.norm is not None:
        known += sums + ROOT + beats + 6
    else:
        known += 1
    # The quantizer's division, its beats, three registers, the gearbox, the count.
    first = known + QUANTIZER_DIVISION + beats + 4
    if linear.norm is None:
        return first, QUANTIZER_DIVISION + beats + 3
    return first, 2 + pipelines.stream(beats) + sums + ROOT + beats + 6


@dataclass(frozen=True)
class LinearCycles:
    """Of a LINEAR: the counters LOAD, ENTER and SWEEP; rows: from the end of the load to memory's last answer."""

    load: int
    enter: int
    sweep: int
    rows: int


@dataclass(frozen=True)
class SweepCycles:
    """Of a row in `tlmm_core`. looked_up: until its last look-up; summed: as if sums took no time from there to leave,
    until the last one leaves: later where the gearbox takes them slower than they are looked up."""

    looked_up: int
    summed: int


def sweep_cycles(linear: Linear, tiling: Tiling, banks: int) -> SweepCycles:
    """A block's tables, then its look-ups; with two sets of tables beside each other."""
    weights = linear.weights
    beats, blocks = -(-weights.outputs // tiling.q), tiling.blocks(weights.inputs)
    if banks == 1:
        before = blocks * tiling.codes + (blocks - 1) * beats
    else:
        before = tiling.codes + (blocks - 1) * max(beats, tiling.codes)
    leaving = max(beats, -(-weights.outputs // tiling.lanes))
    # A look-up waits for the place of the sum that is SUMS before it, which comes back when that one has left: the
    # pipeline and a register after its look-up, and what all before it took.
    back = _halves(tiling.t) + 4
    ahead = leaving * (SUMS + 1) // beats - back - 1
    return SweepCycles(before + max(beats, leaving - ahead), before + leaving)


def linear_cycles(
    linear: Linear,
    tiling: Tiling,
    tokens: int,
    *,
    enters: bool,
    side_beats: int = 0,
    banks: int = 2,
    pipelines: Pipelines | None = None,
) -> LinearCycles:
    """Of ``tokens`` rows.

    Args:
        enters: rows are quantized first. side_beats: of a row that is read beside the sums; 0: none is.
    """
    pipelines = pipelines or Pipelines()
    beats = -(-linear.weights.outputs // tiling.lanes)
    sweep, tree = sweep_cycles(linear, tiling, banks), _halves(tiling.t)
    first, period = entry_cycles(linear, tiling, pipelines) if enters else (1, 0)
    # Tables are filled three cycles after a row is there: command, the store's register, the skid. The next row's
    # follow two cycles after the last look-up of the row before: its activations have been fetched.
    looked_up = taken = 0
    for row in range(tokens):
        entered = first + row * period
        begun = max(entered + 3, looked_up + 2 if row else 0) - 1
        looked_up, sums = begun + sweep.looked_up, begun + sweep.summed + tree + 4
        side = 0
        if side_beats:
            before = 0 if enters else row * side_beats
            side = entered + pipelines.first_beat + pipelines.stream(before + side_beats) + beats - side_beats - 1
        taken = max(sums, side, taken + ROW_FACTOR + beats - 1 if row else 0)
        # What waits for the side holds up the look-up but for the sums that have a place.
        places = max(SUMS, SUMS * tiling.q // tiling.lanes)
        if beats > places:
            looked_up = max(looked_up, taken - tree - 4 - places)
    rows = taken + FUSE + pipelines.answered(beats)
    entering = first + (tokens - 1) * period if enters else 0
    return LinearCycles(load_cycles(linear, tiling, pipelines), entering, rows - (first if enters else 0), rows)


def attention_cycles(layer: Layer, tiling: Tiling, first: int, tokens: int, pipelines: Pipelines) -> int:
    """Of ``tokens`` queries behind ``first`` positions, blocks of P from the newest down: ATTEND."""
    row = layer.heads * layer.head_size // tiling.lanes
    keys = layer.kv_heads * layer.head_size // tiling.lanes
    head = layer.head_size // tiling.lanes
    period = max(row, KEY_PERIOD)
    # From a head's last product to its first sum: alignment, products' tree, score, weight, step and their queue.
    step = 2 + 1 + _halves(tiling.lanes) + 5 + 1 + 1
    # A place is free when its key's values have been added, and then takes a row.
    waits = max(0.0, (row + step + head + keys) / KEY_ROWS - period)
    now, left = 1, tokens
    while left:
        queries, seen = min(tiling.p, left), first + left
        # Queries of the first block are read when the command is given, later ones lie there.
        loading = 3 + queries * row
        if left == tokens:
            loading = 1 + pipelines.first_beat + pipelines.stream(queries * row)
        products = now + max(loading, pipelines.first_beat + keys)
        last_key = products + (seen - 1) * period + int(max(0, seen - KEY_ROWS) * waits)
        last_key = max(last_key, now + pipelines.first_beat + pipelines.stream(seen * keys))
        added = last_key + row - 1 + step + head - 1
        written = added + DRAIN + layer.heads * RECIPROCAL
        # A beat a cycle, and one between two rows.
        now = written + queries * (row + 1) - 2 + FINISH + 2
        left -= queries
    return now - 2 + pipelines.answered(row) + 1


def _sides(layer: Layer, tiling: Tiling) -> dict[str, int]:
    """Beats of a row beside each matrix's sums: angles of a head, a residual, a gate."""
    width, gate = (-(-one.weights.outputs // tiling.lanes) for one in (layer.o, layer.gate))
    head = layer.head_size // tiling.lanes
    return {"q": head, "k": head, "v": 0, "o": width, "gate": 0, "up": gate, "down": width}


ENTERS = ("q", "o", "gate", "down")


def layer_counters(
    layer: Layer, tiling: Tiling, first: int, tokens: int, *, banks: int = 2, pipelines: Pipelines | None = None
) -> dict[str, int]:
    """What the accelerator's counters say after a layer of ``tokens`` behind ``first`` positions: cycles, load, enter,
    sweep, attend. A cycle in which rows are entered and multiplied counts in both."""
    pipelines = pipelines or Pipelines()
    parts = []
    for name, side in _sides(layer, tiling).items():
        linear, enters = getattr(layer, name), name in ENTERS
        parts.append(
            linear_cycles(linear, tiling, tokens, enters=enters, side_beats=side, banks=banks, pipelines=pipelines)
        )
    found = {name: sum(getattr(one, name) for one in parts) for name in ("load", "enter", "sweep", "rows")}
    attend = attention_cycles(layer, tiling, first, tokens, pipelines)
    # Nine descriptors, the attention's end counted with it; a reset and a start before, the last one's pulse.
    descriptors = 9 * pipelines.descriptor(tiling.lanes)
    rows = found.pop("rows")
    return {"cycles": descriptors + found["load"] + rows + attend, **found, "attend": attend}


def layer_cycles(
    layer: Layer, tiling: Tiling, first: int, tokens: int, *, banks: int = 2, pipelines: Pipelines | None = None
) -> dict[str, int]:
    """Cycles of a layer for a chunk of tokens by part: descriptors, load, rows, attend; their sum is the run's."""
    pipelines = pipelines or Pipelines()
    found = layer_counters(layer, tiling, first, tokens, banks=banks, pipelines=pipelines)
    descriptors = 9 * pipelines.descriptor(tiling.lanes)
    rows = found["cycles"] - descriptors - found["load"] - found["attend"]
    return {"descriptors": descriptors, "load": found["load"], "rows": rows, "attend": found["attend"]}
