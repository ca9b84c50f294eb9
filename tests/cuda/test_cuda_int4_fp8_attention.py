# SPDX-License-Identifier: Apache-2.0
"""int4_fp8_attention and kv_append_ on the GPU and in its emulator, within the bound of attention_cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import Arithmetic, Options, defined, filled_cache, offsets, oracle, poison
from torch import Tensor

from tilewright.ops import KVCache, int4_fp8_attention, kv_append_
from tilewright.testing import assert_within

PLAIN, DECODE, PREFILL = "plain", "decode", "prefill"
FORMATS = [("int4", torch.bfloat16), ("int4", torch.float32), ("bf16", torch.bfloat16)]
FORMAT_NAMES = ["int4", "int4-float32", "bf16"]
DEFAULT = Options()


def tensors(cache: KVCache) -> list[Tensor]:
    return [t for t in (cache.k, cache.v, cache.k_scales, cache.v_scales, cache.lengths) if t is not None]


def stored_codes(data: Tensor, head_dim: int) -> Tensor:
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., :head_dim].float() - 8


def multiprocessors(device: Any) -> int:
    """What the choice of the kernel is told."""
    return 4 if device.is_emulator else torch.cuda.get_device_properties(0).multi_processor_count


def fast_path(device: Any, counts: list[int], heads: int, kv_heads: int) -> str:
    """Which of the fast kernels takes an INT4 cache and FP8 queries."""
    tokens = sum(counts)
    many = tokens * heads // kv_heads >= 48 * len(counts) and tokens * heads >= 28 * multiprocessors(device)
    return PREFILL if many else DECODE


def many_heads(device: Any, heads: int) -> int:
    """Enough heads that a short prompt is many rows for the device."""
    return heads if device.is_emulator else 32 * heads


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(
    device: Any,
    q: Tensor,
    cache: KVCache,
    counts: list[int],
    path: str,
    options: Options = DEFAULT,
    *,
    every_seed: bool = True,
) -> Tensor:
    """Every seed of the emulator gives the same bits, and they are within the bound of the path."""
    q = device.tensor(q)
    results = []
    for seed in device.seeds if every_seed else device.seeds[:1]:
        device.seed(seed)
        results.append(int4_fp8_attention(q, cache, offsets(counts, device.torch_device), **options.keywords()))
    arithmetic = Arithmetic(path, short_sums=path == PREFILL and not device.is_emulator)
    want, bound = oracle(q, cache, counts, options, arithmetic)
    if q.dtype != torch.float32:
        bound = bound + want.abs() * torch.finfo(q.dtype).eps
    assert_within(results[0], want, bound, f"{path} {options} {cache.format} D={cache.head_dim} counts={counts}")
    assert all(same_bits(results[0], r) for r in results[1:])
    return results[0]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 2, 64, 65, 128, 129, 256])
def test_codes_and_scales_equal_the_definition(device: Any, head_dim: int, scale_dtype: torch.dtype) -> None:
    cache = KVCache.allocate(1, 3, head_dim, 40, scale_dtype=scale_dtype, device=device.torch_device)
    k, v = (torch.randn(13, 3, head_dim) * torch.logspace(-8, 6, 13)[:, None, None] for _ in range(2))
    kv_append_(cache, device.tensor(k), device.tensor(v), offsets([13], device.torch_device))
    for data, scales, x in ((cache.k, cache.k_scales, k), (cache.v, cache.v_scales, v)):
        codes, want = defined(x.transpose(0, 1), scale_dtype)
        assert torch.equal(stored_codes(data[0, :, :13].cpu(), head_dim), codes)
        assert scales is not None
        assert torch.equal(scales[0, :, :13].cpu(), want)
        if head_dim % 2:
            assert (data[0, :, :13, -1] >> 4 == 8).all()


def test_ties_round_to_even_and_what_is_not_finite_is_marked(device: Any) -> None:
    x = torch.tensor(
        [[7.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 6.5, -6.5], [1.0] * 9 + [torch.nan], [torch.inf] * 10]
    )
    cache = KVCache.allocate(1, 1, 10, 3, scale_dtype=torch.float32, device=device.torch_device)
    kv_append_(cache, device.tensor(x[:, None]), device.tensor(-x[:, None]), offsets([3], device.torch_device))
    want = torch.tensor([7.0, 0, 2, 2, 4, 0, -2, -2, 6, -6])
    codes = stored_codes(cache.k[0, 0].cpu(), 10)
    assert torch.equal(codes[0], want)
    assert torch.equal(stored_codes(cache.v[0, 0, 0].cpu(), 10), -want)
    assert cache.k_scales is not None
    assert torch.equal(cache.k_scales[0, 0, :, 0].isnan().cpu(), torch.tensor([False, True, True]))
    assert (codes[1:] == 0).all()


def test_bfloat16_rows_round_as_torch_does(device: Any) -> None:
    cache = KVCache.allocate(1, 2, 33, 9, "bf16", device=device.torch_device)
    k, v = torch.randn(9, 2, 33), torch.randn(9, 2, 33)
    k[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.39e38])
    kv_append_(cache, device.tensor(k), device.tensor(v), offsets([9], device.torch_device))
    for data, x in ((cache.k, k), (cache.v, v)):
        torch.testing.assert_close(data[0].transpose(0, 1).cpu(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_appending_in_pieces_of_any_type_writes_only_the_new_rows(device: Any, dtype: torch.dtype) -> None:
    where = device.torch_device
    k, v = (torch.randn(64, 2, 9).to(dtype).permute(2, 1, 0) for _ in range(2))
    pieces, whole = (KVCache.allocate(2, 2, 64, 12, device=where) for _ in range(2))
    for cache in (pieces, whole):
        poison(cache)
    parts = [device.tensor(t[rows]) for t in (k, v) for rows in (slice(0, 4), slice(4, 9))]
    kv_append_(pieces, parts[0], parts[2], offsets([3, 1], where).int())
    kv_append_(pieces, parts[1], parts[3], offsets([0, 5], where))
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
    kv_append_(whole, device.tensor(k[order].float()), device.tensor(v[order].float()), offsets([3, 6], where))
    for a, b in zip(tensors(pieces), tensors(whole), strict=True):
        assert same_bits(a, b)
    assert (pieces.k[0, :, 3:] == 255).all()
    assert (pieces.k[1, :, 6:] == 255).all()


def test_a_sequence_that_would_outgrow_the_cache_is_marked_and_the_others_go_on(device: Any) -> None:
    where = device.torch_device
    cache = filled_cache([10, 4], 2, 64, where, room=2)
    before = [t.clone() for t in tensors(cache)]
    k, v = (device.tensor(torch.randn(11, 2, 64)) for _ in range(2))
    kv_append_(cache, k, v, offsets([2, 9], where))
    assert cache.lengths.tolist() == [12, -1]
    for was, now in zip(before[:-1], tensors(cache)[:-1], strict=True):
        assert same_bits(was[1], now[1])
    for heads in (4, 32):  # few and many rows
        q = device.tensor(torch.randn(6, heads, 64))
        got = int4_fp8_attention(q, cache, offsets([2, 4], where))
        assert got[2:].isnan().all()
        assert not got[:2].isnan().any()
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]


CASES: list[tuple[str, int, str, int, int]] = [
    (PLAIN, 1, "int4", 3, 3),
    (PLAIN, 80, "int4", 4, 2),
    (PLAIN, 129, "int4", 6, 2),
    (PLAIN, 200, "int4", 4, 1),
    (PLAIN, 36, "bf16", 4, 2),
    (PLAIN, 256, "bf16", 4, 2),
    (DECODE, 32, "int4", 4, 2),
    (DECODE, 64, "int4", 6, 2),
    (DECODE, 96, "int4", 3, 3),
    (DECODE, 128, "int4", 8, 2),
    (DECODE, 128, "int4", 13, 1),
    (DECODE, 160, "int4", 4, 2),
    (DECODE, 256, "int4", 4, 1),
    (DECODE, 8, "bf16", 2, 2),
    (DECODE, 64, "bf16", 6, 2),
    (DECODE, 104, "bf16", 8, 2),
    (DECODE, 128, "bf16", 8, 1),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("query", ["fp8", "float32"])
@pytest.mark.parametrize(("path", "head_dim", "format", "heads", "kv_heads"), CASES)
def test_few_queries_match_float64(
    device: Any, path: str, head_dim: int, format: str, heads: int, kv_heads: int, query: str
) -> None:
    counts, lengths = [1, 0, 2, 1], [1, 30, 300, 77]
    cache = filled_cache(lengths, kv_heads, head_dim, device.torch_device, format)
    check(device, torch.randn(sum(counts), heads, head_dim), cache, counts, path, Options(query=query))


@pytest.mark.sanitize
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"), [(32, 8, 4), (64, 9, 3), (96, 8, 2), (128, 8, 2), (128, 7, 1)]
)
def test_many_queries_match_float64(
    device: Any, head_dim: int, heads: int, kv_heads: int, scale_dtype: torch.dtype
) -> None:
    counts, lengths = [50, 1, 0, 70], [131, 64, 9, 70]
    heads, kv_heads = many_heads(device, heads), many_heads(device, kv_heads)
    assert fast_path(device, counts, heads, kv_heads) == PREFILL
    cache = filled_cache(lengths, kv_heads, head_dim, device.torch_device, scale_dtype=scale_dtype)
    check(device, torch.randn(sum(counts), heads, head_dim), cache, counts, PREFILL)


def test_rows_whose_chunks_would_take_too_much_memory_walk_their_keys_uncut(device: Any) -> None:
    """More than 2 MB of partial results for each multiprocessor; a row of the cache has room for 32 chunks."""
    where, tokens, head_dim = device.torch_device, 40 if device.is_emulator else 600, 64
    heads = 32 if device.is_emulator else 64
    assert tokens * heads * 32 * (head_dim + 2) * 4 > multiprocessors(device) * 2**21
    cache = KVCache.allocate(1, 2, head_dim, 8192, "bf16", device=where)
    k, v = (device.tensor(torch.randn(600 if tokens == 600 else 290, 2, head_dim)) for _ in range(2))
    kv_append_(cache, k, v, offsets([k.shape[0]], where))
    check(device, torch.randn(tokens, heads, head_dim), cache, [tokens], DECODE)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700])
def test_every_kind_of_length(device: Any, length: int) -> None:
    for head_dim in (64, 128):
        cache = filled_cache([length], 2, head_dim, device.torch_device)
        check(device, torch.randn(1, 4, head_dim), cache, [1], DECODE, every_seed=False)
        count, kv_heads = min(length, 100), many_heads(device, 1)
        cache = filled_cache([length], kv_heads, head_dim, device.torch_device)
        path = fast_path(device, [count], 4 * kv_heads, kv_heads)
        check(device, torch.randn(count, 4 * kv_heads, head_dim), cache, [count], path, every_seed=False)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(device: Any, window: int, causal: bool) -> None:
    options = Options(window=window, causal=causal)
    cache = filled_cache([600, 90, 30], 2, 64, device.torch_device)
    check(device, torch.randn(3, 4, 64), cache, [1, 0, 2], DECODE, options, every_seed=False)
    kv_heads = many_heads(device, 2)
    cache = filled_cache([600, 90, 30], kv_heads, 64, device.torch_device)
    check(device, torch.randn(120, 2 * kv_heads, 64), cache, [1, 90, 29], PREFILL, options, every_seed=False)
    plain = filled_cache([150, 90], 2, 36, device.torch_device, "bf16")
    check(device, torch.randn(31, 4, 36), plain, [1, 30], PLAIN, options, every_seed=False)


@pytest.mark.parametrize("scale", [0.0, -0.125, 3.0])
def test_any_softmax_scale(device: Any, scale: float) -> None:
    kv_heads = many_heads(device, 2)
    cache = filled_cache([80], kv_heads, 64, device.torch_device)
    check(device, torch.randn(80, 2 * kv_heads, 64), cache, [80], PREFILL, Options(scale=scale), every_seed=False)
    cache = filled_cache([80], 2, 64, device.torch_device)
    check(device, torch.randn(3, 4, 64), cache, [3], DECODE, Options(scale=scale), every_seed=False)
    check(device, torch.randn(3, 4, 64), cache, [3], DECODE, Options(scale=scale, query="float32"), every_seed=False)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_same_sign_extremes(device: Any, sign: float) -> None:
    """All products of a score have one sign and the largest size; the softmax then picks one key."""
    for count, heads, path in ((3, 1, DECODE), (70, many_heads(device, 2), PREFILL)):
        cache = KVCache.allocate(1, heads, 128, 70, device=device.torch_device)
        k = torch.ones(70, heads, 128) * torch.linspace(1, 50, 70)[:, None, None]
        v = torch.randn(70, heads, 128)
        kv_append_(cache, device.tensor(k), device.tensor(v), offsets([70], device.torch_device))
        scale = 1.0 if path == DECODE else 2.0**-14  # of sums of 2^21, 13 bits leave nothing to compare
        check(device, torch.full((count, heads, 128), 448.0 * sign), cache, [count], path, Options(scale=scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [2, 80])
def test_queries_of_any_floating_type_and_layout(device: Any, dtype: torch.dtype, count: int) -> None:
    where = device.torch_device
    kv_heads = many_heads(device, 2)
    cache = filled_cache([90], kv_heads, 64, where)
    q = device.tensor(torch.randn(64, 2 * kv_heads, count).to(dtype).permute(2, 1, 0))
    got = int4_fp8_attention(q, cache, offsets([count], where))
    assert got.dtype == dtype
    exact = int4_fp8_attention(q.float().contiguous(), cache, offsets([count], where))
    assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize(("format", "scale_dtype"), FORMATS, ids=FORMAT_NAMES)
def test_a_cache_that_is_a_view(device: Any, format: str, scale_dtype: torch.dtype) -> None:
    where = device.torch_device
    kv_heads = many_heads(device, 2)
    cache = filled_cache([100, 37], kv_heads, 64, where, format, scale_dtype, room=0)

    def spread(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack((t, t), 3).select(3, 0)

    wide = KVCache(*(spread(t) for t in (cache.k, cache.v, cache.k_scales, cache.v_scales)), cache.lengths, 64)  # type: ignore[arg-type]
    q = device.tensor(torch.randn(80, 3 * kv_heads, 64))
    for counts in ([1, 2], [70, 10]):
        rows = q[: sum(counts)]
        dense, strided = (int4_fp8_attention(rows, c, offsets(counts, where)) for c in (cache, wide))
        assert torch.equal(dense, strided)


@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.parametrize("counts", [[1, 2, 1], [40, 3, 30]])
def test_packing_changes_no_bit(device: Any, counts: list[int], format: str) -> None:
    where = device.torch_device
    kv_heads = many_heads(device, 2)
    heads = 8 * kv_heads
    cache = filled_cache([500, 90, 41], kv_heads, 64, where, format)
    q = device.tensor(torch.randn(sum(counts), heads, 64))
    together = int4_fp8_attention(q, cache, offsets(counts, where))
    for s, count in enumerate(counts):
        first = sum(counts[:s])
        if format == "int4" and fast_path(device, [count], heads, kv_heads) != fast_path(
            device, counts, heads, kv_heads
        ):
            continue  # the other kernel would take it
        rows = [None if t is None else t[s : s + 1] for t in (cache.k, cache.v, cache.k_scales, cache.v_scales)]
        alone = KVCache(*rows, cache.lengths[s : s + 1].clone(), 64)  # type: ignore[arg-type]
        got = int4_fp8_attention(q[first : first + count], alone, offsets([count], where))
        assert torch.equal(together[first : first + count], got)


@pytest.mark.sanitize
@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.parametrize(("head_dim", "counts"), [(64, [1, 3, 2]), (64, [1, 64, 3]), (100, [1, 20, 3])])
def test_rows_past_a_length_or_before_a_window_are_never_read(
    device: Any, format: str, head_dim: int, counts: list[int]
) -> None:
    where, lengths, window, kv_heads = device.torch_device, [401, 64, 7], 40, many_heads(device, 2)
    cache = filled_cache(lengths, kv_heads, head_dim, where, format)
    q = device.tensor(torch.randn(sum(counts), 3 * kv_heads, head_dim))
    got = int4_fp8_attention(q, cache, offsets(counts, where), window=window)
    assert not got.isnan().any()
    poisoned = copy.deepcopy(cache)
    poison(poisoned)
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        seen = slice(max(0, length - count - window + 1), length)
        for name in ("k", "v", "k_scales", "v_scales"):
            if (target := getattr(poisoned, name)) is not None:
                target[s, :, seen] = getattr(cache, name)[s, :, seen]
    assert torch.equal(got, int4_fp8_attention(q, poisoned, offsets(counts, where), window=window))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("query", ["fp8", "float32"])
def test_a_query_that_is_not_finite_spoils_its_own_row(device: Any, bad: float, query: str) -> None:
    where, kv_heads = device.torch_device, many_heads(device, 2)
    cache = filled_cache([150, 20], kv_heads, 64, where)
    for counts in ([2, 1], [45, 5]):
        q = torch.randn(sum(counts), 3 * kv_heads, 64)
        clean = int4_fp8_attention(device.tensor(q), cache, offsets(counts, where), query=query)
        q[1, 4, 7] = bad
        got = int4_fp8_attention(device.tensor(q), cache, offsets(counts, where), query=query)
        assert got[1, 4].isnan().all()
        got[1, 4] = clean[1, 4]
        assert torch.equal(got, clean)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("format", "head_dim", "count"), [("int4", 64, 70), ("int4", 64, 3), ("bf16", 64, 3), ("bf16", 36, 9)]
)
def test_a_token_that_is_not_finite_reaches_only_queries_that_see_it(
    device: Any, which: str, bad: float, format: str, head_dim: int, count: int
) -> None:
    length, window, where, kv_heads = 140, 20, device.torch_device, many_heads(device, 2)
    spoiled = length - count + 1
    kv = {name: torch.randn(length, kv_heads, head_dim) for name in ("k", "v")}
    q = device.tensor(torch.randn(count, 2 * kv_heads, head_dim))
    results = []
    for spoil in (False, True):
        if spoil:
            kv[which][spoiled, 1, 5 if which == "v" else slice(None)] = bad
        cache = KVCache.allocate(1, kv_heads, head_dim, length, format, device=where)
        kv_append_(cache, device.tensor(kv["k"]), device.tensor(kv["v"]), offsets([length], where))
        results.append(int4_fp8_attention(q, cache, offsets([count], where), window=window))
    clean, got = results
    sees = torch.zeros(count, 2 * kv_heads, dtype=torch.bool, device=where)
    sees[1 : 1 + window, 2:4] = True
    assert got[sees].isnan().all(-1).all()
    assert torch.equal(got[~sees], clean[~sees])


def test_rows_past_the_last_offset_are_zero_and_empty_calls_work(device: Any) -> None:
    where = device.torch_device
    cache = filled_cache([60, 0], 2, 64, where)
    for used, heads in ((9, 4), (60, 4)):
        q = device.tensor(torch.randn(used + 3, heads, 64))
        got = int4_fp8_attention(q, cache, offsets([used, 0], where).int())
        assert torch.equal(got[used:], torch.zeros_like(got[used:]))
        assert torch.equal(got[:used], int4_fp8_attention(q[:used], cache, offsets([used, 0], where)))
    assert int4_fp8_attention(q[:0], cache, offsets([0, 0], where)).shape == (0, 4, 64)
    assert int4_fp8_attention(q[:9, :0], cache, offsets([9, 0], where)).shape == (9, 0, 64)


def test_offsets_and_lengths_that_do_not_fit_stay_within_memory(device: Any) -> None:
    """They cannot raise without waiting for the device: rows are NaN or zero, and nothing else is touched."""
    where = device.torch_device
    cache = filled_cache([60, 20], 2, 64, where)
    for rows in (4, 64):
        q = device.tensor(torch.randn(rows, 4, 64))
        for bad in ([0, rows + 9, rows + 20], [0, 3, 2], [-5, 1, rows], [0, rows, 1]):
            int4_fp8_attention(q, cache, torch.tensor(bad, device=where))
    short = copy.deepcopy(cache)
    short.lengths.copy_(torch.tensor([2, 99], device=where))
    got = int4_fp8_attention(device.tensor(torch.randn(6, 4, 64)), short, offsets([3, 3], where))
    assert got.isnan().all()


@pytest.mark.repeat
@pytest.mark.parametrize("count", [1, 96])
def test_the_same_bits_every_time(device: Any, count: int) -> None:
    where = device.torch_device
    kv_heads = many_heads(device, 2) // (1 if device.is_emulator else 4)
    cache = filled_cache([700, 300], kv_heads, 128, where)
    q = device.tensor(torch.randn(2 * count, 4 * kv_heads, 128))
    first = int4_fp8_attention(q, cache, offsets([count, count], where))
    for seed in range(3 if device.is_emulator else 1000):
        device.seed(seed)
        assert torch.equal(first, int4_fp8_attention(q, cache, offsets([count, count], where)))


WRONG: dict[str, tuple[dict[str, Callable[[], object]], str]] = {
    "q dimensions": ({"q": lambda: torch.randn(6, 64)}, r"q has shape \[6, 64\], needed \[T, H, D\]"),
    "q dtype": ({"q": lambda: torch.ones(6, 4, 64, dtype=torch.int32)}, "q has dtype .*needed float32, bfloat16"),
    "heads": ({"q": lambda: torch.randn(6, 3, 64)}, "H = 3 heads, needed a multiple of the cache's H_kv = 2"),
    "head size": ({"q": lambda: torch.randn(6, 4, 62)}, "k_cache has shape .* its dimension 3 must be"),
    "scales": ({"k_scales": lambda: None}, "needs k_scales and v_scales"),
    "lengths": ({"lengths": lambda: torch.tensor([20])}, "lengths has shape .* must be S = 2"),
    "offsets": ({"cu_seqlens": lambda: torch.tensor([0, 6])}, r"cu_seqlens has shape .* must be S\+1 = 3"),
    "window": ({"window": lambda: 0}, "window = 0, needed at least 1, or None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(device: Any, name: str) -> None:
    cache = filled_cache([20, 9], 2, 64, device.torch_device)
    arguments: dict[str, object] = {
        "q": device.tensor(torch.randn(6, 4, 64)),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k_scales": cache.k_scales,
        "v_scales": cache.v_scales,
        "lengths": cache.lengths,
        "cu_seqlens": offsets([4, 2], device.torch_device),
        "scale": 0.125,
        "causal": True,
        "window": None,
        "fp8_query": True,
    }
    changes, message = WRONG[name]
    for key, make in changes.items():
        value = make()
        arguments[key] = device.tensor(value) if isinstance(value, Tensor) else value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tilewright.int4_fp8_attention(*arguments.values())


def test_real_sizes_match_float64(device: Any) -> None:
    if device.is_emulator:
        pytest.skip("hours in the emulator; other tests have the same shapes, smaller")
    for lengths, counts, heads, kv_heads, head_dim, path in (
        ([8192, 3000, 1, 777], [1, 1, 1, 1], 32, 8, 128, DECODE),
        ([32768], [1], 8, 1, 128, DECODE),
        ([5000, 300], [2, 3], 9, 3, 64, DECODE),
        ([1500, 700], [1500, 300], 8, 2, 128, PREFILL),
        ([2000], [2000], 9, 3, 64, PREFILL),
    ):
        cache = filled_cache(lengths, kv_heads, head_dim, "cuda")
        for dtype in (torch.float32, torch.bfloat16):
            got = check(device, torch.randn(sum(counts), heads, head_dim).to(dtype), cache, counts, path)
            assert got.dtype == dtype


def test_fp8_prefill_is_as_near_as_asked(device: Any) -> None:
    """Relative L2 error of attention on N(0, 1) below 2e-2, the figure asked of FP8 attention, short sums included."""
    where, length = device.torch_device, 96 if device.is_emulator else 2048
    cache = filled_cache([length], 2, 128, where)
    q = device.tensor(torch.randn(length, 8, 128))
    got = int4_fp8_attention(q, cache, offsets([length], where))
    want, _ = oracle(q, cache, [length], DEFAULT, Arithmetic(PREFILL))
    assert (got.double() - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize("count", [1, 80])
def test_a_captured_graph_replays_appending_and_attending(device: Any, count: int) -> None:
    if device.is_emulator:
        pytest.skip("graphs are CUDA's")
    captured, eager = (filled_cache([90], 2, 64, "cuda", room=400) for _ in range(2))
    for mine, theirs in zip(tensors(captured), tensors(eager), strict=True):
        mine.copy_(theirs)
    q, k, v = (torch.randn(count, heads, 64, device="cuda") for heads in (8, 2, 2))
    at = offsets([count], "cuda")

    def step(cache: KVCache) -> Tensor:
        kv_append_(cache, k, v, at)
        return int4_fp8_attention(q, cache, at)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for _ in range(3):
        for t in (q, k, v):
            t.normal_()
        graph.replay()
        assert torch.equal(out, step(eager))
    assert captured.lengths.tolist() == [90 + 3 * count]


def test_tensors_on_two_devices_are_refused(device: Any) -> None:
    if device.is_emulator:
        pytest.skip("the emulator's device is the CPU")
    cache = filled_cache([20], 2, 64, "cuda")
    with pytest.raises(RuntimeError, match="cu_seqlens is not on a CUDA device"):
        int4_fp8_attention(torch.randn(4, 4, 64, device="cuda"), cache, torch.tensor([0, 4]))
