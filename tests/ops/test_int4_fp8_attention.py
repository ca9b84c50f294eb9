# SPDX-License-Identifier: Apache-2.0
"""int4_fp8_attention against float64 attention over the cached values, within the bound of attention_oracle."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_oracle import Options, filled_cache, offsets_of, oracle, poison
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import _host
from tilewright.ops import KVCache, int4_fp8_attention, kv_append_
from tilewright.testing import assert_within

TILE, CHUNK = 64, 256
FORMATS = [("int4", torch.bfloat16), ("int4", torch.float32), ("bf16", torch.bfloat16)]
PLAIN = Options()


def check(q: Tensor, cache: KVCache, counts: list[int], level: str, options: Options = PLAIN) -> Tensor:
    offsets = offsets_of(counts)
    got = int4_fp8_attention(q, cache, offsets, **options.keywords())
    want, bound = oracle(q, cache, offsets, options, level)
    assert_within(got, want, bound, f"{level} {options} {cache.format} D={cache.head_dim} counts={counts}")
    return got


@pytest.mark.parametrize("head_dim", [1, 16, 60, 64, 80, 100, 128, 129, 256])
@pytest.mark.parametrize(("format", "scale_dtype"), FORMATS, ids=["int4", "int4-float32", "bf16"])
def test_every_head_size_and_grouping_matches_float64(
    level: str, head_dim: int, format: str, scale_dtype: torch.dtype
) -> None:
    counts, lengths = [1, 1, 5, 40], [1, 70, 5, 131]
    for heads, kv_heads in ((3, 3), (6, 2), (8, 1)):
        cache = filled_cache(lengths, kv_heads, head_dim, format, scale_dtype)
        q = torch.randn(sum(counts), heads, head_dim)
        for query in ("fp8", "float32"):
            check(q, cache, counts, level, Options(query=query))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, TILE - 1, TILE, TILE + 1, 127, CHUNK - 1, CHUNK, CHUNK + 1, 777])
def test_decoding_and_prefill_at_every_kind_of_length(level: str, length: int) -> None:
    cache = filled_cache([length], 3, 64)
    for count in {1, min(2, length), max(1, length // 2), length}:
        check(torch.randn(count, 9, 64), cache, [count], level)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_any_number_of_query_rows_shares_a_key(level: str, group: int) -> None:
    for head_dim in (64, 128):
        check(torch.randn(1, 2 * group, head_dim), filled_cache([300], 2, head_dim), [1], level)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(level: str, window: int, causal: bool) -> None:
    counts, lengths = [1, 90, 30], [600, 200, 30]
    for format in ("int4", "bf16"):
        cache = filled_cache(lengths, 2, 64, format)
        check(torch.randn(sum(counts), 4, 64), cache, counts, level, Options(window=window, causal=causal))


@pytest.mark.parametrize("causal", [True, False])
def test_long_prompts_of_several_blocks(level: str, causal: bool) -> None:
    cache = filled_cache([450, 260], 1, 32)
    check(torch.randn(450 + 130, 2, 32), cache, [450, 130], level, Options(causal=causal))


@pytest.mark.parametrize("scale", [0.0, -0.125, 3.0, 0.01])
def test_any_softmax_scale(level: str, scale: float) -> None:
    cache = filled_cache([80], 2, 64)
    for query in ("fp8", "float32"):
        check(torch.randn(9, 2, 64), cache, [9], level, Options(scale=scale, query=query))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_same_sign_extremes(level: str, sign: float) -> None:
    """All products of a score have one sign and the largest size; the softmax then picks one key."""
    cache = KVCache.allocate(1, 1, 128, 70)
    k = torch.ones(70, 1, 128) * torch.linspace(1, 50, 70)[:, None, None]
    kv_append_(cache, k, torch.randn(70, 1, 128), offsets_of([70]))
    q = torch.full((3, 1, 128), 448.0 * sign)
    check(q, cache, [3], level, Options(scale=1.0))


def test_the_exponential_is_accurate_and_exact_at_zero(level: str) -> None:
    """Two keys, values 0 and 1: the output is 1 / (1 + 2^x), x from 0 to far underflow."""
    cache = KVCache.allocate(1, 1, 2, 2, "bf16")
    k = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    v = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    kv_append_(cache, k, v, offsets_of([2]))
    for x in (0.0, 1e-3, 0.3, 1.0, 5.7, 20.0, 80.0, 126.0, 200.0, 1e5):
        q = torch.tensor([[[x, 0.0]]])
        got = check(q, cache, [1], level, Options(scale=1.0, query="float32"))
        if x == 0.0:
            assert torch.equal(got, torch.full_like(got, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("level")
def test_queries_of_any_floating_type_and_layout(dtype: torch.dtype) -> None:
    cache = filled_cache([90], 2, 64)
    q = torch.randn(64, 4, 20).to(dtype).permute(2, 1, 0)
    got = int4_fp8_attention(q, cache, offsets_of([20]))
    assert got.dtype == dtype
    exact = int4_fp8_attention(q.float().contiguous(), cache, offsets_of([20]))
    assert torch.equal(got, exact.to(dtype))


def heads_outside(tensor: Tensor | None) -> Tensor:
    """The same values with heads as the outermost dimension in memory."""
    assert tensor is not None
    return tensor.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)


@pytest.mark.usefixtures("level")
def test_a_cache_that_is_a_view() -> None:
    """Strides of any kind but within a row: two layers in one allocation, tokens apart."""
    cache = filled_cache([100, 37], 2, 64, room=0)
    wide = dataclasses.replace(
        cache,
        k=torch.stack((cache.k, cache.k ^ 255), 3).select(3, 0),
        v=torch.stack((cache.v, cache.v ^ 255), 3).select(3, 0),
        k_scales=torch.stack((cache.k_scales, cache.k_scales * 7), 0)[0]
        .permute(1, 0, 2, 3)
        .contiguous()
        .permute(1, 0, 2, 3),
        v_scales=torch.stack((cache.v_scales, cache.v_scales * 7), 0)[0]
        .permute(1, 0, 2, 3)
        .contiguous()
        .permute(1, 0, 2, 3),
    )
    q = torch.randn(8, 6, 64)
    for counts in ([1, 7], [4, 4]):
        dense, strided = (int4_fp8_attention(q, c, offsets_of(counts)) for c in (cache, wide))
        assert torch.equal(dense, strided)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 600)), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 50]),
    causal=st.booleans(),
    format=st.sampled_from(["int4", "bf16"]),
)
def test_packing_changes_no_bit(parts: list[tuple[int, int]], window: int | None, causal: bool, format: str) -> None:
    counts = [count for count, _ in parts]
    lengths = [count + before for count, before in parts]
    cache = filled_cache(lengths, 2, 48, format)
    q = torch.randn(sum(counts), 6, 48)
    options = {"window": window, "causal": causal}
    packed = int4_fp8_attention(q, cache, offsets_of(counts), **options)
    for s, count in enumerate(counts):
        first = sum(counts[:s])
        rows = [None if t is None else t[s : s + 1] for t in (cache.k, cache.v, cache.k_scales, cache.v_scales)]
        alone = KVCache(*rows, cache.lengths[s : s + 1].clone(), 48)
        got = int4_fp8_attention(q[first : first + count], alone, offsets_of([count]), **options)
        assert torch.equal(packed[first : first + count], got)


@pytest.mark.parametrize("query", ["fp8", "float32"])
@pytest.mark.parametrize(("format", "scale_dtype"), FORMATS, ids=["int4", "int4-float32", "bf16"])
def test_the_oracle_in_cpp_agrees(format: str, scale_dtype: torch.dtype, query: str) -> None:
    """Two float64 computations of sums of at most 100 terms: 2^-40 is generous, 2^-20 would hide a wrong formula."""
    counts = [1, 0, 30]
    for head_dim, window in ((65, None), (130, 9)):
        cache = filled_cache([90, 5, 30], 2, head_dim, format, scale_dtype)
        q = torch.randn(sum(counts), 6, head_dim)
        tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales, cache.lengths)
        got = torch.ops.tilewright.int4_fp8_attention_reference(
            q, *tensors, offsets_of(counts), 0.125, True, window, query == "fp8"
        )
        want, _ = oracle(q, cache, offsets_of(counts), Options(0.125, True, window, query), "generic")
        assert_within(got, want, 2.0**-40)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("query", ["fp8", "float32"])
@pytest.mark.parametrize(("format", "head_dim"), [("int4", 64), ("int4", 200), ("bf16", 64)])
@pytest.mark.parametrize("window", [None, 270])
def test_how_many_queries_come_at_once_changes_no_bit(
    format: str, head_dim: int, query: str, window: int | None
) -> None:
    """A prompt at once, in pieces, and token by token: panels or registers, one chunk of keys an item or several."""
    total = 530
    k, v, q = torch.randn(total, 2, head_dim), torch.randn(total, 2, head_dim), torch.randn(total, 6, head_dim)
    whole, grown = (KVCache.allocate(1, 2, head_dim, total, format) for _ in range(2))
    kv_append_(whole, k, v, offsets_of([total]))
    prefill = int4_fp8_attention(q, whole, offsets_of([total]), query=query, window=window)
    done = 0
    for count in (1, 2, 61, 190, 1, 1, 5, 250, 1, 1, 2, 15):
        part = slice(done, done + count)
        kv_append_(grown, k[part], v[part], offsets_of([count]))
        got = int4_fp8_attention(q[part], grown, offsets_of([count]), query=query, window=window)
        assert torch.equal(got, prefill[part])
        done += count
    assert done == total


@pytest.mark.usefixtures("level")
def test_the_same_bits_at_any_number_of_threads() -> None:
    cache = filled_cache([1500, 700, 90], 3, 64)
    counts = [1, 65, 90]
    q = torch.randn(sum(counts), 9, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            results.append(int4_fp8_attention(q, cache, offsets_of(counts)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.usefixtures("level")
def test_rows_past_a_length_or_before_a_window_are_never_read(format: str, head_dim: int) -> None:
    lengths, counts, window = [401, 64, 7], [1, 64, 3], 40
    cache = filled_cache(lengths, 2, head_dim, format)
    q = torch.randn(sum(counts), 6, head_dim)
    got = int4_fp8_attention(q, cache, offsets_of(counts), window=window)
    assert not got.isnan().any()
    poisoned = copy.deepcopy(cache)
    poison(poisoned)
    for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        seen = slice(max(0, length - count - window + 1), length)
        for name in ("k", "v", "k_scales", "v_scales"):
            if (target := getattr(poisoned, name)) is not None:
                target[s, :, seen] = getattr(cache, name)[s, :, seen]
    assert torch.equal(got, int4_fp8_attention(q, poisoned, offsets_of(counts), window=window))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("level")
def test_a_query_that_is_not_finite_spoils_its_own_row(bad: float) -> None:
    cache = filled_cache([150, 20], 2, 64)
    q = torch.randn(30, 6, 64)
    clean = int4_fp8_attention(q, cache, offsets_of([25, 5]))
    q[11, 4, 7] = bad
    got = int4_fp8_attention(q, cache, offsets_of([25, 5]))
    assert got[11, 4].isnan().all()
    got[11, 4] = clean[11, 4]
    assert torch.equal(got, clean)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.usefixtures("level")
def test_a_token_that_is_not_finite_reaches_only_queries_that_see_it(which: str, bad: float, format: str) -> None:
    length, spoiled, window = 140, 100, 20
    kv = {name: torch.randn(length, 2, 64) for name in ("k", "v")}
    q = torch.randn(length, 4, 64)
    results = []
    for spoil in (False, True):
        if spoil:
            kv[which][spoiled, 1] = bad
        cache = KVCache.allocate(1, 2, 64, length, format)
        kv_append_(cache, kv["k"], kv["v"], offsets_of([length]))
        results.append(int4_fp8_attention(q, cache, offsets_of([length]), window=window))
    clean, got = results
    sees = torch.zeros(length, 4, dtype=torch.bool)
    sees[spoiled : spoiled + window, 2:] = True
    assert got[sees].isnan().all(-1).all()
    assert torch.equal(got[~sees], clean[~sees])


def test_an_all_zero_query_attends_evenly(level: str) -> None:
    cache = filled_cache([5], 1, 64)
    got = check(torch.zeros(1, 1, 64), cache, [1], level)
    assert not got.isnan().any()


@pytest.mark.usefixtures("level")
def test_rows_past_the_last_offset_are_zero_and_empty_calls_work() -> None:
    cache = filled_cache([9, 0], 2, 64)
    q = torch.randn(12, 4, 64)
    got = int4_fp8_attention(q, cache, offsets_of([9, 0]).int())
    assert torch.equal(got[9:], torch.zeros(3, 4, 64))
    assert torch.equal(got[:9], int4_fp8_attention(q[:9], cache, offsets_of([9, 0])))
    assert int4_fp8_attention(q[:0], cache, offsets_of([0, 0])).shape == (0, 4, 64)
    assert int4_fp8_attention(q[:9, :0], cache, offsets_of([9, 0])).shape == (9, 0, 64)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 700)), min_size=1, max_size=3),
    group=st.sampled_from([1, 3, 8, 200]),
    window=st.sampled_from([None, 1, 100]),
    causal=st.booleans(),
)
def test_items_cover_each_visible_pair_once(
    parts: list[tuple[int, int]], group: int, window: int | None, causal: bool
) -> None:
    counts, lengths = [count for count, _ in parts], [count + before for count, before in parts]
    plan = _host.int4_fp8_attention_plan(counts, lengths, 2 * group, 2, 64, causal, window)
    offsets = offsets_of(counts).tolist()
    visits = [torch.zeros(2, count, length, dtype=torch.int64) for count, length in zip(counts, lengths, strict=True)]
    for sequence, kv_head, first, queries, key_begin, key_end, _, _ in plan["items"]:
        row = first - offsets[sequence]
        visits[sequence][kv_head, row : row + queries, key_begin:key_end] += 1
    pairs = 0
    for visit, count, length in zip(visits, counts, lengths, strict=True):
        position, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None, :]
        seen = (key > position - (window or length + 1)) & (key <= position if causal else key >= 0)
        assert (visit[:, seen] == 1).all()
        assert (visit <= 1).all()
        pairs += int(seen.sum())
    assert plan["operations"] == 4 * 2 * group * 64 * pairs


def test_any_contiguous_half_of_a_prompt_is_about_half_of_the_work() -> None:
    """What a parallel_for with two threads gets; blocks in their natural order would be 1 to 3."""
    plan = _host.int4_fp8_attention_plan([1024], [1024], 3, 1, 64)
    work = [queries * (first + queries / 2) for _, _, first, queries, *_ in plan["items"]]
    half = len(work) // 2
    assert 0.4 < sum(work[:half]) / sum(work) < 0.6


def test_a_single_sequence_gives_several_items_when_decoding() -> None:
    plan = _host.int4_fp8_attention_plan([1], [1000], 9, 3, 64)
    assert len(plan["items"]) == 3 * 4
    assert plan["cache_bytes"] == 1000 * 3 * 2 * (32 + 2)
    assert "chunked_sequences=1" in plan["text"]


def op_arguments(format: str = "int4", **changes: object) -> dict[str, object]:
    cache = filled_cache([20, 9], 2, 64, format)
    arguments = {
        "q": torch.randn(6, 4, 64),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k_scales": cache.k_scales,
        "v_scales": cache.v_scales,
        "lengths": cache.lengths,
        "cu_seqlens": offsets_of([4, 2]),
        "scale": 0.125,
        "causal": True,
        "window": None,
        "fp8_query": True,
    }
    return arguments | changes


NO_TOKENS = {"q": torch.randn(0, 4, 64), "cu_seqlens": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize("format", ["int4", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"window": 7}, {"causal": False}, {"fp8_query": False}, NO_TOKENS])
def test_opcheck(format: str, changes: dict[str, object]) -> None:
    arguments = tuple(op_arguments(format, **changes).values())
    torch.library.opcheck(torch.ops.tilewright.int4_fp8_attention.default, arguments)


def test_compiles_whole_with_a_dynamic_number_of_tokens() -> None:
    def step(cache: KVCache, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        kv_append_(cache, k, v, offsets)
        return 2 * int4_fp8_attention(q, cache, offsets, window=50)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    eager, traced = (KVCache.allocate(1, 2, 64, 100) for _ in range(2))
    for count in (17, 1, 1, 5):
        q, k, v = torch.randn(count, 4, 64), torch.randn(count, 2, 64), torch.randn(count, 2, 64)
        want = step(eager, q, k, v, offsets_of([count]))
        assert torch.equal(want, compiled(traced, q, k, v, offsets_of([count])))
    assert torch.equal(eager.k, traced.k)
    assert torch.equal(eager.lengths, traced.lengths)


WRONG: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "q dimensions": (lambda: {"q": torch.randn(6, 64)}, r"q has shape \[6, 64\], needed \[T, H, D\]"),
    "q dtype": (lambda: {"q": torch.ones(6, 4, 64, dtype=torch.int32)}, "q has dtype .*needed float32, bfloat16"),
    "heads": (lambda: {"q": torch.randn(6, 3, 64)}, "H = 3 heads, needed a multiple of the cache's H_kv = 2"),
    "head size": (lambda: {"q": torch.randn(6, 4, 62)}, "k_cache has shape .* its dimension 3 must be"),
    "head size range": (lambda: {"q": torch.randn(6, 4, 257)}, "D = 257, needed 1 to 256"),
    "cache dtype": (lambda: {"k_cache": torch.zeros(2, 2, 23, 32)}, "k_cache has dtype .*needed uint8"),
    "cache dimensions": (lambda: {"k_cache": torch.zeros(2, 2, 32, dtype=torch.uint8)}, "k_cache has shape"),
    "cache stride": (
        lambda: {name: torch.zeros(2, 2, 32, 23, dtype=torch.uint8).transpose(2, 3) for name in ("k_cache", "v_cache")},
        "last dimension of stride 23, needed 1",
    ),
    "unequal caches": (lambda: {"v_cache": torch.zeros(2, 2, 24, 32, dtype=torch.uint8)}, "v_cache has shape"),
    "missing scales": (lambda: {"k_scales": None}, "needs k_scales and v_scales"),
    "scale dtype": (lambda: {"k_scales": torch.zeros(2, 2, 23, 1).half()}, "k_scales has dtype .*needed float32 or"),
    "scale dtypes differ": (lambda: {"v_scales": torch.zeros(2, 2, 23, 1)}, "v_scales has dtype"),
    "scale shape": (lambda: {"k_scales": torch.zeros(2, 2, 23, 2)}, r"must be ceil\(D/128\) = 1"),
    "lengths dtype": (lambda: {"lengths": torch.tensor([20, 9]).int()}, "lengths has dtype .*needed"),
    "lengths shape": (lambda: {"lengths": torch.tensor([20])}, "lengths has shape .* must be S = 2"),
    "lengths too short": (lambda: {"lengths": torch.tensor([3, 9])}, "sequence 0 has 4 queries and a length of 3"),
    "lengths too long": (lambda: {"lengths": torch.tensor([20, 90])}, "length of 90, .* max_length = 23"),
    "offsets dtype": (lambda: {"cu_seqlens": torch.tensor([0.0, 4.0, 6.0])}, "cu_seqlens has dtype"),
    "offsets shape": (lambda: {"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens has shape .* must be S\+1 = 3"),
    "offsets start": (lambda: {"cu_seqlens": torch.tensor([1, 4, 6])}, "cu_seqlens starts at 1, needed 0"),
    "offsets fall": (lambda: {"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens falls from 5 to 4 at sequence 1"),
    "offsets end": (lambda: {"cu_seqlens": torch.tensor([0, 4, 7])}, "cu_seqlens ends at 7, .* T = 6"),
    "window": (lambda: {"window": 0}, "window = 0, needed at least 1, or None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tilewright.int4_fp8_attention(*op_arguments(**changes()).values())


def test_scales_of_a_bfloat16_cache_are_refused() -> None:
    with pytest.raises(RuntimeError, match="a bfloat16 cache has no scales"):
        torch.ops.tilewright.int4_fp8_attention(*op_arguments("bf16", k_scales=torch.zeros(2, 2, 23, 1)).values())


def test_an_unknown_query_format_is_refused() -> None:
    with pytest.raises(ValueError, match="query = 'fp16', needed 'fp8' or 'float32'"):
        int4_fp8_attention(torch.randn(1, 2, 64), filled_cache([3], 2, 64), offsets_of([1]), query="fp16")  # type: ignore[arg-type]
