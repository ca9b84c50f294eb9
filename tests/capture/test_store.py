# SPDX-License-Identifier: Apache-2.0
"""Streams and stores of tilewright.capture: what is written is what was computed; bad input leaves nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tilewright.capture import ActivationStore, Site, observe, record, stream
from tilewright.reducers import AbsMax

SITES = ["first", "second@input"]


class Tokens(nn.Module):
    """Embedding and two linears, called like a language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second = nn.Embedding(11, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):  # noqa: ARG002
        return self.second(self.first(self.embed(input_ids)).relu())


def batches(count=3, length=7):
    made = []
    for seed in range(count):
        ids = torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, length - seed :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def by_hand(net, data):
    with torch.no_grad():
        return torch.cat([net.first(net.embed(b["input_ids"]))[b["attention_mask"].bool()] for b in data])


def test_stream_yields_the_rows_of_each_batch():
    net, data = Tokens(), batches()
    parts = list(stream(net, data, SITES))
    assert [list(part) for part in parts] == [["first@output", "second@input"]] * 3
    got = torch.cat([part["first@output"] for part in parts])
    assert torch.equal(got, by_hand(net, data))
    assert torch.equal(torch.cat([part["second@input"] for part in parts]), got.relu())


def test_model_is_free_between_the_batches_of_a_stream():
    net = Tokens()
    for _ in stream(net, batches(), SITES):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_module_that_runs_twice_gives_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x) + self.inner(2 * x)

    (part,) = stream(Twice(), [torch.ones(1, 2)], ["inner"])
    assert part["inner@output"].tolist() == [[1, 1], [2, 2]]


def test_module_that_does_not_run_is_an_error():
    net = Tokens()
    net.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="spare@output: the module did not run"):
        list(stream(net, batches(), ["spare"]))


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.float16])
def test_reopened_store_holds_what_the_model_computed(tmp_path, dtype):
    net, data = Tokens(), batches()
    record(net, data, SITES, tmp_path / "store", dtype=dtype)
    store = ActivationStore(tmp_path / "store")
    expected = by_hand(net, data)
    assert store.names == ["first@output", "second@input"]
    assert "first@output" in store
    assert len(store) == len(expected)
    assert torch.equal(store["first@output"], expected.to(dtype or torch.float32))
    kept = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
    assert torch.equal(store.tokens[:, 2], kept)
    assert store.tokens[0].tolist()[:2] == [0, 0]
    assert store.tokens[-1].tolist()[:2] == [5, 6]


def test_store_of_a_bf16_model_is_bitwise(tmp_path):
    net, data = Tokens().bfloat16(), batches()
    store = record(net, data, ["first"], tmp_path / "store")
    assert store["first@output"].dtype == torch.bfloat16
    assert torch.equal(store["first@output"], by_hand(net, data))


def test_recorded_model_computes_its_own_bits(tmp_path):
    net = Tokens()
    ids = batches()[0]["input_ids"]
    bare = net(ids)
    record(net, batches(), SITES, tmp_path / "store")
    assert torch.equal(net(ids), bare)


def test_writing_into_a_mapped_tensor_does_not_reach_the_file(tmp_path):
    store = record(Tokens(), batches(), ["first"], tmp_path / "store")
    before = store["first@output"].clone()
    store["first@output"].zero_()
    assert torch.equal(ActivationStore(tmp_path / "store")["first@output"], before)


def test_batches_cover_every_row_once(tmp_path):
    store = record(Tokens(), batches(), ["first"], tmp_path / "store")
    rows = store["first@output"]
    in_order = list(store.batches("first@output", 16))
    assert torch.equal(torch.cat(in_order), rows)
    assert [len(part) for part in in_order] == [16, 16, len(rows) - 32]
    shuffled = torch.cat(list(store.batches("first@output", 16, seed=1)))
    assert not torch.equal(shuffled, rows)
    assert torch.equal(shuffled.sort(0).values, rows.sort(0).values)
    assert torch.equal(shuffled, torch.cat(list(store.batches("first@output", 5, seed=1))))
    with pytest.raises(ValueError, match="size=0"):
        next(store.batches("first@output", 0))


def test_transform_gives_rows_their_shape(tmp_path):
    site = Site("first", transform=lambda y: torch.stack([y, y.abs()], -1))
    data = batches()
    store = record(Tokens(), data, [site], tmp_path / "store")
    expected = by_hand(Tokens(), data)
    assert torch.equal(store["first@output"], torch.stack([expected, expected.abs()], -1))


def test_samples_without_tokens_have_no_token_table(tmp_path):
    store = record(nn.Sequential(nn.Linear(3, 4)), [torch.ones(5, 3)], ["0"], tmp_path / "store")
    assert store["0@output"].shape == (5, 4)
    assert store.tokens is None


def test_reducers_and_stores_see_the_same_rows(tmp_path):
    net, data = Tokens(), batches()
    store = record(net, data, ["first"], tmp_path / "store")
    assert torch.equal(store["first@output"].abs().amax(0), observe(net, data, {"first": AbsMax})["first@output"])


def all_masked():
    batch = batches(1)[0]
    return [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}]


def poisoned():
    net = Tokens()
    with torch.no_grad():
        net.first.bias[0] = float("nan")
    return net


@pytest.mark.parametrize(
    ("net", "data", "sites", "message"),
    [
        (Tokens(), [], SITES, "batches is empty"),
        (Tokens(), all_masked(), SITES, "every token was masked"),
        (poisoned(), batches(), SITES, "first@output: activations hold NaN"),
        (Tokens(), batches(), ["frist"], "near names: first"),
        (Tokens(), batches(), [], "at least one site"),
        (Tokens(), batches(), ["first", "fir*"], "matched by two sites"),
    ],
)
def test_bad_input_leaves_nothing_on_the_disk(tmp_path, net, data, sites, message):
    with pytest.raises(ValueError, match=message):
        record(net, data, sites, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_value_that_overflows_the_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"NaN or infinite values in torch\.float16"):
        record(nn.Identity(), [torch.full((1, 2), 1e6)], [""], tmp_path / "store", dtype=torch.float16)


def test_integer_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        record(Tokens(), batches(), SITES, tmp_path / "store", dtype=torch.int8)


def test_existing_folders_are_kept_unless_asked(tmp_path):
    record(Tokens(), batches(), ["first"], tmp_path / "store")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        record(Tokens(), batches(), SITES, tmp_path / "store")
    assert record(Tokens(), batches(), ["second"], tmp_path / "store", overwrite=True).names == ["second@output"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="no activation store"):
        record(Tokens(), batches(), SITES, tmp_path / "mine", overwrite=True)


def test_unknown_name_lists_near_names(tmp_path):
    store = record(Tokens(), batches(), SITES, tmp_path / "store")
    with pytest.raises(ValueError, match="near names: first@output"):
        store["frist@output"]


def test_damaged_stores_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no activation store"):
        ActivationStore(tmp_path)
    folder = tmp_path / "store"
    record(Tokens(), batches(), SITES, folder)
    file = folder / "00000.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"00000.bin has \d+ bytes"):
        ActivationStore(folder)
    file.write_bytes(whole)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": "other"}))
    with pytest.raises(ValueError, match="not a readable activation store"):
        ActivationStore(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable activation store"):
        ActivationStore(folder)
