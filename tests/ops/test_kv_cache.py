# SPDX-License-Identifier: Apache-2.0
"""kv_append_ and KVCache: codes and scales equal their definition exactly, at every level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_oracle import filled_cache, offsets_of, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.ops import KVCache, kv_append_

GROUP = 128
SCALE_DTYPES = [torch.bfloat16, torch.float32]


def defined(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers and stored scales of x [..., D]: every step is one float32 operation, as the definition states it."""
    codes, scales = [], []
    for group in x.float().split(GROUP, -1):
        s = (group.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7).to(scale_dtype)
        codes.append((group / s.float()).round().clamp(-7, 7))
        scales.append(s)
    return torch.cat(codes, -1), torch.cat(scales, -1)


def stored_codes(data: Tensor, head_dim: int) -> Tensor:
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., :head_dim].float() - 8


def tensors(cache: KVCache) -> list[Tensor]:
    return [t for t in (cache.k, cache.v, cache.k_scales, cache.v_scales, cache.lengths) if t is not None]


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 2, 3, 16, 60, 64, 65, 80, 127, 128, 129, 200, 256])
@pytest.mark.usefixtures("level")
def test_codes_and_scales_equal_the_definition(head_dim: int, scale_dtype: torch.dtype) -> None:
    cache = KVCache.allocate(1, 3, head_dim, 40, scale_dtype=scale_dtype)
    k, v = (torch.randn(37, 3, head_dim) * torch.logspace(-8, 6, 37)[:, None, None] for _ in range(2))
    kv_append_(cache, k, v, offsets_of([37]))
    for data, scales, x in ((cache.k, cache.k_scales, k), (cache.v, cache.v_scales, v)):
        codes, want = defined(x.transpose(0, 1), scale_dtype)
        assert torch.equal(stored_codes(data[0, :, :37], head_dim), codes)
        assert scales is not None
        assert torch.equal(scales[0, :, :37], want)
        if head_dim % 2:
            assert (data[0, :, :37, -1] >> 4 == 8).all()


@pytest.mark.usefixtures("level")
def test_ties_round_to_even() -> None:
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 6.5, -6.5])
    cache = KVCache.allocate(1, 1, 10, 1, scale_dtype=torch.float32)
    kv_append_(cache, x[None, None], -x[None, None], offsets_of([1]))
    want = torch.tensor([7.0, 0, 2, 2, 4, 0, -2, -2, 6, -6])
    assert torch.equal(stored_codes(cache.k[0, 0, 0], 10), want)
    assert torch.equal(stored_codes(cache.v[0, 0, 0], 10), -want)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.usefixtures("level")
def test_dequantized_values_are_within_half_a_step(scale_dtype: torch.dtype) -> None:
    """|x / s| is at most 7 (1 + 2^-8) for a bfloat16 scale, so clamping costs less than rounding does."""
    cache = KVCache.allocate(1, 2, 64, 30, scale_dtype=scale_dtype)
    k, v = torch.randn(30, 2, 64), torch.randn(30, 2, 64)
    kv_append_(cache, k, v, offsets_of([30]))
    for got, scales, x in zip(cache.dequantize(torch.float64), (cache.k_scales, cache.v_scales), (k, v), strict=True):
        assert scales is not None
        step = scales.double()
        assert ((got - x.transpose(0, 1).double()).abs() <= step * (0.5 + 2.0**-20)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("level")
def test_a_group_that_is_not_finite_is_marked_and_alone(bad: float) -> None:
    k, v = torch.randn(5, 2, 200), torch.randn(5, 2, 200)
    clean, spoiled = (KVCache.allocate(1, 2, 200, 5) for _ in range(2))
    kv_append_(clean, k, v, offsets_of([5]))
    k[3, 1, 150] = bad
    kv_append_(spoiled, k, v, offsets_of([5]))
    got, want = spoiled.dequantize()[0], clean.dequantize()[0]
    assert got[0, 1, 3, 128:].isnan().all()
    assert (stored_codes(spoiled.k[0, 1, 3], 200)[128:] == 0).all()
    got[0, 1, 3, 128:] = want[0, 1, 3, 128:]
    assert torch.equal(got, want)
    assert torch.equal(spoiled.v, clean.v)


@pytest.mark.usefixtures("level")
def test_bfloat16_rounds_as_torch_does() -> None:
    cache = KVCache.allocate(1, 2, 33, 9, "bf16")
    k, v = torch.randn(9, 2, 33), torch.randn(9, 2, 33)
    k[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.39e38])
    kv_append_(cache, k, v, offsets_of([9]))
    for data, x in ((cache.k, k), (cache.v, v)):
        torch.testing.assert_close(data[0].transpose(0, 1), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(
    rounds=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=5),
    format=st.sampled_from(["int4", "bf16"]),
)
def test_appending_in_pieces_equals_appending_at_once(rounds: list[list[int]], format: str) -> None:
    totals = [sum(counts[s] for counts in rounds) for s in range(3)]
    k, v = ([torch.randn(total, 2, 20) for total in totals] for _ in range(2))
    whole, pieces = (KVCache.allocate(3, 2, 20, 31, format) for _ in range(2))
    kv_append_(whole, torch.cat(k), torch.cat(v), offsets_of(totals))
    done = [0, 0, 0]
    for counts in rounds:
        part = [slice(done[s], done[s] + counts[s]) for s in range(3)]
        kv_append_(
            pieces,
            torch.cat([k[s][part[s]] for s in range(3)]),
            torch.cat([v[s][part[s]] for s in range(3)]),
            offsets_of(counts),
        )
        done = [done[s] + counts[s] for s in range(3)]
    assert pieces.lengths.tolist() == totals
    for a, b in zip(tensors(whole), tensors(pieces), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.usefixtures("level")
def test_only_the_new_rows_are_written(format: str) -> None:
    cache = filled_cache([10, 4], 2, 64, format, room=9)
    before = [t.clone() for t in tensors(cache)]
    kv_append_(cache, torch.randn(5, 2, 64), torch.randn(5, 2, 64), offsets_of([3, 1]).int())
    assert cache.lengths.tolist() == [13, 5]
    for was, now in zip(before[:-1], tensors(cache)[:-1], strict=True):
        changed = (was.view(torch.uint8) != now.view(torch.uint8)).flatten(3).any(-1).any(1)
        rows = torch.zeros_like(changed)
        rows[0, 10:13] = rows[1, 4:5] = True
        assert not (changed & ~rows).any()
        assert changed[0, 10:13].all()


@pytest.mark.usefixtures("level")
def test_an_overflow_names_the_way_out_and_writes_nothing() -> None:
    cache = filled_cache([10, 4], 2, 64, room=2)
    before = [t.clone() for t in tensors(cache)]
    with pytest.raises(
        RuntimeError,
        match=r"sequence 1 holds 4 tokens and gets 9 more, .* max_length = 12; allocate it longer, or reset",
    ):
        kv_append_(cache, torch.randn(11, 2, 64), torch.randn(11, 2, 64), offsets_of([2, 9]))
    for was, now in zip(before, tensors(cache), strict=True):
        assert torch.equal(was.view(torch.uint8), now.view(torch.uint8))


@pytest.mark.usefixtures("level")
def test_the_same_bits_at_any_number_of_threads() -> None:
    k, v = torch.randn(200, 3, 64), torch.randn(200, 3, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = KVCache.allocate(1, 3, 64, 200)
            kv_append_(cache, k, v, offsets_of([200]))
            results.append(cache)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(tensors(results[0]), tensors(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("level")
def test_tokens_of_any_floating_type_and_layout(dtype: torch.dtype) -> None:
    k, v = (torch.randn(64, 2, 7).to(dtype).permute(2, 1, 0) for _ in range(2))
    got, want = (KVCache.allocate(1, 2, 64, 7) for _ in range(2))
    kv_append_(got, k, v, offsets_of([7]))
    kv_append_(want, k.float().contiguous(), v.float().contiguous(), offsets_of([7]))
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert torch.equal(a, b)


def test_reset_keeps_the_memory_and_forgets_the_tokens() -> None:
    cache = filled_cache([6], 1, 16)
    address = cache.k.data_ptr()
    cache.reset()
    assert cache.lengths.tolist() == [0]
    assert cache.k.data_ptr() == address
    kv_append_(cache, torch.randn(9, 1, 16), torch.randn(9, 1, 16), offsets_of([9]))
    assert cache.lengths.tolist() == [9]


def test_a_cache_states_its_shape_and_size() -> None:
    int4 = KVCache.allocate(2, 3, 65, 10)
    assert (int4.format, int4.sequences, int4.kv_heads, int4.max_length) == ("int4", 2, 3, 10)
    assert int4.k_codes is int4.k
    assert int4.v_codes is int4.v
    assert int4.nbytes == 2 * 2 * 3 * 10 * (33 + 2) + 2 * 8
    bf16 = KVCache.allocate(2, 3, 65, 10, "bf16")
    assert bf16.nbytes == 2 * 2 * 3 * 10 * 130 + 2 * 8
    with pytest.raises(ValueError, match="a bf16 cache holds values, not codes"):
        _ = bf16.k_codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": 0}, "sequences = 0, needed at least 1"),
        ({"kv_heads": 0}, "kv_heads = 0, needed at least 1"),
        ({"max_length": 0}, "max_length = 0, needed at least 1"),
        ({"head_dim": 0}, "head_dim = 0, needed 1 to 256"),
        ({"head_dim": 257}, "head_dim = 257, needed 1 to 256"),
        ({"format": "int8"}, "format = 'int8', needed 'int4' or 'bf16'"),
        ({"scale_dtype": torch.float16}, "scale_dtype = torch.float16, needed torch.bfloat16 or torch.float32"),
    ],
)
def test_allocate_names_a_wrong_argument(arguments: dict[str, object], message: str) -> None:
    sizes = {"sequences": 1, "kv_heads": 1, "head_dim": 64, "max_length": 4}
    with pytest.raises(ValueError, match=message):
        KVCache.allocate(**(sizes | arguments))  # type: ignore[arg-type]


def op_arguments(**changes: object) -> dict[str, object]:
    cache = filled_cache([3, 2], 2, 64)
    arguments = {
        "k": torch.randn(3, 2, 64),
        "v": torch.randn(3, 2, 64),
        "cu_seqlens": offsets_of([1, 2]),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k_scales": cache.k_scales,
        "v_scales": cache.v_scales,
        "lengths": cache.lengths,
    }
    return arguments | changes


WRONG: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "k dimensions": (lambda: {"k": torch.randn(3, 128)}, r"k has shape \[3, 128\], needed \[T, H_kv, D\]"),
    "v dimensions": (lambda: {"v": torch.randn(3, 128)}, r"v has shape \[3, 128\], needed \[T, H_kv, D\]"),
    "v size": (lambda: {"v": torch.randn(4, 2, 64)}, "v has shape .* its dimension 0 must be that of k = 3"),
    "k dtype": (lambda: {"k": torch.ones(3, 2, 64).int()}, "k has dtype .*needed float32, bfloat16"),
    "v dtype": (lambda: {"v": torch.ones(3, 2, 64).int()}, "v has dtype .*needed float32, bfloat16"),
    "heads": (lambda: {"k": torch.randn(3, 1, 64), "v": torch.randn(3, 1, 64)}, "k has shape .* must be H_kv = 2"),
    "head size": (lambda: {"k": torch.randn(3, 2, 66), "v": torch.randn(3, 2, 66)}, r"must be ceil\(D/2\) = 33"),
    "offsets": (lambda: {"cu_seqlens": torch.tensor([0, 1])}, r"must be S\+1 = 3"),
    "offsets end": (lambda: {"cu_seqlens": torch.tensor([0, 1, 4])}, "cu_seqlens ends at 4, .* T = 3"),
    "lengths": (lambda: {"lengths": torch.zeros(2)}, "lengths has dtype"),
    "negative length": (lambda: {"lengths": torch.tensor([-1, 0])}, "sequence 0 holds -1 tokens"),
    "scales": (lambda: {"v_scales": None}, "needs k_scales and v_scales"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tilewright.int4_kv_append(*op_arguments(**changes()).values())


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_opcheck(format: str) -> None:
    cache = filled_cache([3, 2], 2, 64, format)
    k, v = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    arguments = (k, v, offsets_of([1, 2]), cache.k, cache.v, cache.k_scales, cache.v_scales, cache.lengths)
    # Poison is NaN, which opcheck's comparison of mutated arguments takes for a difference.
    for tensor in tensors(cache)[:-1]:
        tensor.zero_()
    torch.library.opcheck(torch.ops.tilewright.int4_kv_append.default, arguments)


def test_compiles_whole_with_a_dynamic_number_of_tokens() -> None:
    compiled = torch.compile(kv_append_, fullgraph=True, dynamic=True, backend="aot_eager")
    eager, traced = (KVCache.allocate(2, 2, 20, 31) for _ in range(2))
    for counts in ([5, 3], [1, 1], [0, 7]):
        k, v = torch.randn(sum(counts), 2, 20), torch.randn(sum(counts), 2, 20)
        kv_append_(eager, k, v, offsets_of(counts))
        compiled(traced, k, v, offsets_of(counts))
    for a, b in zip(tensors(eager), tensors(traced), strict=True):
        assert torch.equal(a, b)


def test_poison_changes_every_row() -> None:
    """The tool of the tests above does what they rely on."""
    cache = filled_cache([2], 1, 8)
    spoiled = dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone())
    poison(spoiled)
    assert (spoiled.k == 255).all()
    assert spoiled.k_scales is not None
    assert spoiled.k_scales.isnan().all()
