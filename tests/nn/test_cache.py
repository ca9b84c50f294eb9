# SPDX-License-Identifier: Apache-2.0
"""The cache of token mixers: counting, reordering, taking tokens off."""

from __future__ import annotations

import copy

import pytest
import torch

from tilewright.nn import MixerCache


def keys_and_values(tokens: int) -> dict[str, torch.Tensor]:
    return {"key": torch.randn(3, 2, tokens, 4), "value": torch.randn(3, 2, tokens, 5)}


def test_counts_tokens_per_layer_and_bytes():
    cache = MixerCache()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes) == (0, -1, 0)
    cache.update(1, 7, recurrent_state=torch.zeros(3, 2, 4, 4))
    cache.update(1, 2, conv_state=torch.zeros(3, 6, 3, dtype=torch.float16))
    assert [cache.get_seq_length(i) for i in range(3)] == [0, 9, 0]
    assert (cache.batch_size, cache.nbytes, len(cache)) == (3, 3 * 2 * 16 * 4 + 3 * 18 * 2, 2)
    assert cache.get_mask_sizes(5, 1) == (14, 0)
    cache.reset()
    assert (cache.get_seq_length(1), len(cache)) == (0, 0)


def test_rows_follow_the_beams():
    cache, state = MixerCache(), torch.randn(3, 2, 4, 4)
    cache.update(0, 1, recurrent_state=state)
    cache.update(1, 1, **keys_and_values(1))
    values = cache[1]["value"]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(cache[0]["recurrent_state"], state[[2, 2, 0]])
    assert torch.equal(cache[1]["value"], values[[2, 2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache[0]["recurrent_state"], state[[2, 2, 2, 2, 0, 0]])
    cache.batch_select_indices(torch.tensor([4]))
    assert torch.equal(cache[0]["recurrent_state"], state[[0]])


def test_keys_and_values_can_be_cropped():
    cache, held = MixerCache(), keys_and_values(6)
    cache.update(0, 6, **held)
    assert cache.is_croppable
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    assert torch.equal(cache[0]["key"], held["key"][:, :, :4])
    cache.crop(0)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    ("tokens", "tensors", "remove", "error", "message"),
    [
        (6, keys_and_values(6), 1, ValueError, "0 or a negative number"),
        (6, keys_and_values(6), -7, ValueError, "layer 0 has seen 6"),
        (6, {"recurrent_state": torch.zeros(3, 4)}, -1, RuntimeError, "recurrent_state, which cannot go back"),
        (6, {"conv_state": torch.zeros(3, 4, 3)}, -1, RuntimeError, "conv_state"),
        (6, keys_and_values(4), -1, RuntimeError, "sliding window"),
    ],
)
def test_what_cannot_be_cropped_says_so_and_stays(tokens, tensors, remove, error, message):
    cache = MixerCache()
    cache.update(0, tokens, **tensors)
    with pytest.raises(error, match=message):
        cache.crop(remove)
    assert cache.get_seq_length() == tokens
    assert all(torch.equal(cache[0][name], tensor) for name, tensor in tensors.items())
    assert cache.is_sliding == ["window" in message]


def test_nothing_is_cropped_where_one_layer_cannot_be():
    cache = MixerCache()
    cache.update(0, 6, **keys_and_values(6))
    cache.update(1, 6, recurrent_state=torch.zeros(3, 4))
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="layer 1"):
        cache.crop(-1)
    assert cache[0]["key"].shape[-2] == 6


def test_a_deep_copy_is_a_snapshot():
    cache = MixerCache()
    cache.update(0, 3, recurrent_state=torch.zeros(1, 2))
    before = copy.deepcopy(cache)
    cache.update(0, 1, recurrent_state=torch.ones(1, 2))
    cache[0]["recurrent_state"].add_(1)
    assert before.get_seq_length() == 3
    assert not before[0]["recurrent_state"].any()


def test_a_negative_layer_is_refused():
    with pytest.raises(IndexError, match="layer_idx = -1"):
        MixerCache()[-1]
