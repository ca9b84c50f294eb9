# SPDX-License-Identifier: Apache-2.0
"""int4_fp8_linear's GPU kernels, in the emulator and on a GPU, against a float64 oracle that shares no code with them.

Bound. The float32 part rounds as on the CPU (tests/ops/test_int4_linear.py): |error| <= n u / (1 - n u) * sum
|terms|, u = 2^-24, n the longest chain of roundings of an element. Hopper's matrix unit adds the 32 products of an
instruction and the sum so far after shifting them to the exponent of the largest, of which it keeps 13 bits behind
the point: each of the 33 terms loses less than 2^-13 of the largest, and none is larger than the sum of the
magnitudes of the group so far. A group, or 128 columns of it, takes four instructions; then float32 goes on. The
emulator adds exactly, so there only the first part holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright import _host, ops
from tilewright.formats import Int4Weight, PackedInt4, pack_codes, quantize_int4
from tilewright.nn import W4A8Linear
from tilewright.testing import UNIT_ROUNDOFF, assert_within

OFFSETS = ("none", "minus8", "minimum", "zero")
SHORT = 2.0**-13
TILE = 128


def random_weight(
    rows: int, columns: int, group: int, offset: str = "none", dtype: torch.dtype = torch.bfloat16
) -> Int4Weight:
    groups = -(-columns // group)
    codes = torch.randint(1 if offset == "none" else 0, 16, (rows, columns), dtype=torch.uint8)
    scales = (torch.rand(rows, groups) + 0.1).to(dtype)
    offsets = {
        "none": None,
        "minus8": None,
        "minimum": torch.randn(rows, groups).to(dtype),
        "zero": torch.randint(0, 16, (rows, groups), dtype=torch.uint8),
    }[offset]
    return Int4Weight(pack_codes(codes), scales, offsets, (rows, columns), group)


def on(device: Any, weight: Int4Weight) -> PackedInt4:
    packed = weight.pack().repacked("cuda")
    return PackedInt4(device.tensor(packed.data), packed.shape, packed.layout)


def rounded(x: Tensor) -> Tensor:
    codes, scale = ops.quantize_fp8_per_token(x)
    return codes.double() * scale.double()[..., None]


def magnitudes(weight: Int4Weight) -> Tensor:
    """|terms| of a weight, float64 [N, K]: codes and offsets apart, as the kernels add them."""
    k, group = weight.shape[1], weight.group_size
    scale = weight.scales.double().repeat_interleave(group, -1)[:, :k]
    codes = weight.unpacked_codes().double()
    if weight.offsets is None:
        found = (codes - 8).abs() * scale if bool((codes > 0).all()) else (codes + 8) * scale
    elif weight.offsets.dtype == torch.uint8:
        found = (codes + weight.offsets.double().repeat_interleave(group, -1)[:, :k]) * scale
    else:
        found = codes * scale + weight.offsets.double().abs().repeat_interleave(group, -1)[:, :k]
    return found / weight.per_tensor_scale


def bound(device: Any, x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    k = weight.shape[1]
    terms = rounded(x).abs() @ magnitudes(weight).T
    scales = -(-k // min(weight.group_size, 32))
    chain = 3 * scales + 32 + 6
    total = terms if bias is None else terms + bias.double().abs()
    limit = chain * UNIT_ROUNDOFF / (1 - chain * UNIT_ROUNDOFF) * total
    return limit if device.is_emulator else limit + 4 * 33 * SHORT * terms


def oracle(x: Tensor, weight: Int4Weight, bias: Tensor | None = None, fold: bool = False) -> Tensor:
    dense = weight.dequantize(torch.float64)
    if fold:
        dense = (dense * weight.per_tensor_scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
        dense = dense / weight.per_tensor_scale
    y = rounded(x) @ dense.T
    return y if bias is None else y + bias.double()


def check(device: Any, x: Tensor, weight: Int4Weight, bias: Tensor | None = None, fold: bool = False) -> Tensor:
    mode = "fold" if fold else "exact"
    b = None if bias is None else device.tensor(bias)
    got = ops.int4_fp8_linear(device.tensor(x), on(device, weight), b, mode=mode).cpu()
    assert_within(
        got, oracle(x, weight, bias, fold), bound(device, x, weight, bias), f"{tuple(x.shape)} {weight.shape}"
    )
    return got


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 192, 1024])
def test_weights_of_every_kind_equal_the_float64_oracle(device: Any, offset: str, group: int) -> None:
    rows, columns = (140, 400) if device.is_emulator else (1100, 1300)
    for tokens in (3, 40):
        check(device, torch.randn(tokens, columns), random_weight(rows, columns, group, offset), torch.randn(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("offset", ["none", "zero"])
def test_scales_of_every_type(device: Any, dtype: torch.dtype, offset: str) -> None:
    check(device, torch.randn(5, 300), random_weight(70, 300, 64, offset, dtype))
    check(device, torch.randn(5, 300), random_weight(70, 300, 128, offset, dtype))


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300])
def test_every_tile_of_tokens(device: Any, tokens: int) -> None:
    rows, columns = (1000, 4096) if not device.is_emulator else (200, 1300) if tokens <= 64 else (300, 256)
    weight = random_weight(rows, columns, 128)
    for seed in device.seeds if tokens in (1, 17, 129) else (0,):
        device.seed(seed)
        check(device, torch.randn(tokens, columns), weight)


@pytest.mark.parametrize("group", [16, 64, 128])
@pytest.mark.parametrize("tokens", [3, 50, 150])
def test_fold_mode_rounds_each_weight_to_e4m3(device: Any, group: int, tokens: int) -> None:
    weight = quantize_int4(torch.randn(150, 288) * 0.02, group, torch.float8_e4m3fn, "auto")
    check(device, torch.randn(tokens, 288), weight, torch.randn(150), fold=True)


STREAMS = [
    (12, 65, 12800),
    (3, 70, 300),
    (3, 40, 12800),
    (12, 600, 8000),
    (16, 130, 900),
    (1, 2100, 130),
    (5, 16, 100),
    (9, 20, 2600),
]


@pytest.mark.parametrize(("tokens", "rows", "columns"), STREAMS)
def test_few_tokens_in_every_cut(device: Any, tokens: int, rows: int, columns: int) -> None:
    """Clusters of 1, 2 and 4 blocks, panels shared by warps, several panels a warp, more blocks than fit at once."""
    weight, bias = random_weight(rows, columns, 128), torch.randn(rows)
    want = None
    for seed in device.seeds:
        device.seed(seed)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
        got = check(device, x, weight, bias)
        assert want is None or torch.equal(got, want)
        want = got


def test_the_sizes_above_take_every_kernel() -> None:
    plans = [_host.int4_linear_device_plan(*size, 128, 4) for size in STREAMS]
    parts = {"x1 panels=1 ", "x2 panels=", "x4 panels=", "clusters=8x1"}
    assert not [part for part in parts if not any(part in plan for plan in plans)], plans
    for tokens, tile in ((17, "64x32"), (33, "64x64"), (65, "128x128"), (129, "256x128"), (300, "128x128")):
        rows, columns = (200, 1300) if tokens <= 64 else (300, 256)
        assert f"tile={tile} " in _host.int4_linear_device_plan(tokens, rows, columns, 128, 4), tokens


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(40, 65, 6400), (140, 70, 2560), (200, 300, 1280)])
def test_tiles_split_along_k_give_the_same_bits_in_every_order(
    device: Any, tokens: int, rows: int, columns: int
) -> None:
    """Few rows and many columns: every multiprocessor takes a part of K, and whoever ends last adds the parts."""
    columns = columns if device.is_emulator else 8 * columns
    plan = _host.int4_linear_device_plan(tokens, rows, columns, 128, 4 if device.is_emulator else 132)
    assert "split_tiles=" in plan, plan
    assert "split_tiles=0" not in plan, plan
    weight, x = random_weight(rows, columns, 128), torch.randn(tokens, columns)
    want = check(device, x, weight)
    packed = on(device, weight)
    for seed in device.seeds if device.is_emulator else range(50):
        device.seed(seed)
        assert torch.equal(ops.int4_fp8_linear(device.tensor(x), packed).cpu(), want)


@pytest.mark.parametrize("columns", [1, 7, 16, 17, 127, 129])
@pytest.mark.parametrize("rows", [1, 63, 65, 130])
def test_ragged_rows_and_columns(device: Any, rows: int, columns: int) -> None:
    check(device, torch.randn(3, columns), random_weight(rows, columns, 16, "minimum"))
    check(device, torch.randn(20, columns), random_weight(rows, columns, 128))


@pytest.mark.parametrize("offset", ["none", "minimum"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_of_one_sign(device: Any, offset: str, sign: float) -> None:
    """All codes and all activations the largest: where sums are longest."""
    columns = 1024
    codes = torch.full((64, columns), 15, dtype=torch.uint8)
    offsets = None if offset == "none" else torch.ones(64, columns // 128)
    weight = Int4Weight(pack_codes(codes), torch.ones(64, columns // 128), offsets, (64, columns), 128)
    check(device, torch.full((3, columns), 448.0 * sign), weight)


@pytest.mark.parametrize("offset", ["none", "zero"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_only_itself(device: Any, offset: str, poison: float) -> None:
    for tokens, group in ((7, 32), (4, 128)):
        packed, x = on(device, random_weight(70, 200, group, offset)), torch.randn(tokens, 200)
        clean = ops.int4_fp8_linear(device.tensor(x), packed).cpu()
        x[1, 57] = poison
        got = ops.int4_fp8_linear(device.tensor(x), packed).cpu()
        others = [0, *range(2, tokens)]
        assert got[1].isnan().all()
        assert torch.equal(got[others], clean[others])


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group", "offset"),
    [
        (3, 70, 300, 128, "none"),
        (12, 70, 300, 32, "minimum"),
        (140, 300, 384, 128, "none"),
        (70, 130, 300, 128, "zero"),
    ],
)
def test_small_problems_that_touch_every_kind_of_kernel(
    device: Any, tokens: int, rows: int, columns: int, group: int, offset: str
) -> None:
    check(device, torch.randn(tokens, columns), random_weight(rows, columns, group, offset), torch.randn(rows))


@pytest.mark.parametrize("offset", OFFSETS)
def test_zero_tokens_give_the_bias(device: Any, offset: str) -> None:
    bias = torch.randn(70)
    got = ops.int4_fp8_linear(
        device.tensor(torch.zeros(4, 48)), on(device, random_weight(70, 48, 16, offset)), device.tensor(bias)
    )
    assert torch.equal(got.cpu(), bias.expand(4, 70))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_very_small_and_very_large_tokens(device: Any, scale: float) -> None:
    weight, x = random_weight(66, 64, 64), torch.randn(3, 64) * scale
    if scale > 1e-38:
        check(device, x, weight)
    else:
        assert torch.isfinite(ops.int4_fp8_linear(device.tensor(x), on(device, weight)).cpu()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [68, 67])
def test_results_have_the_dtype_of_x_and_are_rounded_once(device: Any, dtype: torch.dtype, rows: int) -> None:
    packed = on(device, random_weight(rows, 256, 128))
    x, bias = torch.randn(19, 256).to(dtype), torch.randn(rows).to(dtype)
    got = ops.int4_fp8_linear(device.tensor(x), packed, device.tensor(bias))
    wide = ops.int4_fp8_linear(device.tensor(x.float()), packed, device.tensor(bias.float()))
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))


def test_strided_batched_and_empty_inputs(device: Any) -> None:
    packed = on(device, random_weight(70, 48, 16, "minimum"))
    wide = device.tensor(torch.randn(3, 5, 96))
    got = ops.int4_fp8_linear(wide[..., ::2], packed)
    assert got.shape == (3, 5, 70)
    assert torch.equal(got, ops.int4_fp8_linear(wide[..., ::2].contiguous(), packed))
    assert ops.int4_fp8_linear(wide[0, 0, :48], packed).shape == (70,)
    assert ops.int4_fp8_linear(device.tensor(torch.randn(2, 0, 48)), packed).shape == (2, 0, 70)
    none = Int4Weight(torch.empty(0, 24, dtype=torch.uint8), torch.empty(0, 3), None, (0, 48), 16)
    assert ops.int4_fp8_linear(wide[0, :, :48], on(device, none)).shape == (5, 0)


@pytest.mark.parametrize("columns", [5, 128, 300, 4500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_rounded_as_on_the_cpu(device: Any, columns: int, dtype: torch.dtype) -> None:
    x = (torch.randn(6, columns) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 1.0, 5.0])[:, None]).to(dtype)
    x[4, 2] = torch.nan
    tokens = ops.fp8_tokens(device.tensor(x), on(device, random_weight(8, columns, 32, "zero")))
    codes, scale = ops.quantize_fp8_per_token(x)
    padded = torch.zeros(6, -(-columns // TILE) * TILE)
    padded[:, :columns] = codes.float()
    assert torch.equal(tokens.data.cpu().view(torch.float8_e4m3fn).float(), padded)
    assert torch.equal(tokens.scales.cpu().nan_to_num(7), scale.nan_to_num(7))
    sub = TILE if columns <= 32 else 32
    sums = padded.double().view(6, -1, sub).sum(-1)
    got = tokens.sums.cpu()[:, :6].T
    assert_within(got, sums, sub * UNIT_ROUNDOFF * padded.double().abs().view(6, -1, sub).sum(-1), "sums of codes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [68, 67])
def test_a_residual_is_added_before_the_rounding(device: Any, dtype: torch.dtype, rows: int) -> None:
    packed = on(device, random_weight(rows, 256, 128))
    for tokens in (3, 19):
        x, residual = torch.randn(tokens, 256).to(dtype), torch.randn(tokens, rows).to(dtype)
        got = ops.int4_fp8_linear(device.tensor(x), packed, residual=device.tensor(residual))
        wide = ops.int4_fp8_linear(device.tensor(x.float()), packed)
        assert torch.equal(got, (wide + device.tensor(residual).float()).to(dtype))
        ahead = ops.int4_fp8_linear(ops.fp8_tokens(device.tensor(x), packed), packed, residual=device.tensor(residual))
        assert torch.equal(ahead, got)


@pytest.mark.parametrize("columns", [7, 300, 4500])
@pytest.mark.parametrize(("gated", "normed"), [(True, False), (False, True), (True, True)])
def test_gate_and_norm_on_the_way(device: Any, columns: int, gated: bool, normed: bool) -> None:
    """Each code is the nearest to what float64 gives, or beside it where rounding in float32 tips it over."""
    x, gate, norm = torch.randn(3, columns), torch.randn(3, columns) * 3, torch.rand(columns) + 0.5
    exact = x.double()
    if normed:
        exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    if gated:
        exact = exact * torch.nn.functional.silu(gate.double())
    tokens = ops.fp8_tokens(
        device.tensor(x),
        on(device, random_weight(8, columns, 128)),
        gate=device.tensor(gate) if gated else None,
        norm=device.tensor(norm) if normed else None,
    )
    codes = tokens.data.cpu().view(torch.float8_e4m3fn).double()[:, :columns]
    scale = tokens.scales.cpu().double()
    wanted = exact.abs().amax(-1) / 448
    slack = (columns + 20) * UNIT_ROUNDOFF  # the sum of squares, and a dozen roundings more
    assert_within(scale, wanted, slack * wanted, "scales")
    step = torch.clamp(2.0 ** (exact.abs() / scale[:, None]).clamp(min=2.0**-6).log2().floor(), min=2.0**-6) / 8
    assert_within(codes * scale[:, None], exact, scale[:, None] * step / 2 * (1 + 1e-3) + slack * exact.abs(), "codes")


@pytest.mark.parametrize("offset", ["none", "minimum"])
def test_tokens_rounded_once_serve_several_layers(device: Any, offset: str) -> None:
    weights = [on(device, random_weight(rows, 300, 128, offset)) for rows in (70, 130)]
    x = device.tensor(torch.randn(4, 9, 300).bfloat16())
    tokens = ops.fp8_tokens(x, weights[0])
    few, of_few = x[0, :2], ops.fp8_tokens(x[0, :2], weights[0])
    for weight in weights:
        assert torch.equal(ops.int4_fp8_linear(tokens, weight), ops.int4_fp8_linear(x, weight))
        assert torch.equal(ops.int4_fp8_linear(of_few, weight), ops.int4_fp8_linear(few, weight))
    assert ops.int4_fp8_linear(tokens, weights[0], out_dtype=torch.float32).dtype == torch.float32


def test_bad_input_is_an_error_that_names_it(device: Any) -> None:
    weight = random_weight(8, 32, 16)
    packed, x = on(device, weight), device.tensor(torch.randn(2, 32))
    call = torch.ops.tilewright.int4_fp8_linear
    cpu = device.tensor(weight.pack().data)
    with pytest.raises(RuntimeError, match=r"PackedInt4.to\('cuda'\)"):
        call(x, cpu, None, 8, False, 0)
    with pytest.raises(RuntimeError, match=r"weight has \d+ bytes.*need \d+"):
        call(x, cpu, None, 8, False, packed.layout)
    with pytest.raises(RuntimeError, match=r"weight has \d+ bytes.*N = 99"):
        call(x, packed.data, None, 99, False, packed.layout)
    with pytest.raises(RuntimeError, match="layout = 6"):
        call(x, packed.data, None, 8, False, 6)
    with pytest.raises(RuntimeError, match=r"bias has shape \[7\]"):
        call(x, packed.data, device.tensor(torch.ones(7)), 8, False, packed.layout)
    with pytest.raises(RuntimeError, match="residual has shape"):
        call(x, packed.data, None, 8, False, packed.layout, x)
    with pytest.raises(RuntimeError, match="x has dtype Int"):
        call(x.int(), packed.data, None, 8, False, packed.layout)
    with pytest.raises(RuntimeError, match="mode='exact'"):
        ops.int4_fp8_linear(x, on(device, random_weight(8, 32, 16, "minimum")), mode="fold")
    with pytest.raises(RuntimeError, match="has a -8"):
        ops.int4_fp8_linear(x, on(device, random_weight(8, 32, 16, "minus8")), mode="fold")
    with pytest.raises(RuntimeError, match="act='fp8'"):
        ops.int4_int8_linear(x, packed)
    with pytest.raises(RuntimeError, match="gate has shape"):
        ops.fp8_tokens(x, packed, gate=x[:1])
    tokens = ops.fp8_tokens(x, packed)
    with pytest.raises(RuntimeError, match="sums has 0 elements"):
        ops.int4_fp8_linear(tokens, on(device, random_weight(8, 32, 16, "minimum")))


# --- On a GPU only: real sizes, streams, graphs, layers.


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    return "cuda"


def grouped_in_torch(x: Tensor, weight: Int4Weight) -> Tensor:
    """The same arithmetic by torch: each 128 columns by _scaled_mm with its fast accumulator, scales in float32."""
    codes, token_scale = ops.quantize_fp8_per_token(x)
    q = (weight.unpacked_codes().float() - 8).to(torch.float8_e4m3fn).cuda()
    one, total = torch.ones((), device="cuda"), torch.zeros(x.shape[0], weight.shape[0], device="cuda")
    for g in range(weight.shape[1] // TILE):
        columns = slice(g * TILE, (g + 1) * TILE)
        part = torch._scaled_mm(
            codes[:, columns].contiguous(),
            q[:, columns].contiguous().t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.float32,
            use_fast_accum=True,
        )
        total += part * weight.scales[:, g].float().cuda()
    return total * token_scale[:, None]


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(16, 4096, 4096), (64, 6144, 4096), (1024, 4096, 2048)])
def test_error_is_at_most_twice_that_of_the_same_sums_in_torch_on_cuda(
    gpu: str, tokens: int, rows: int, columns: int
) -> None:
    weight, x = quantize_int4(torch.randn(rows, columns) * 0.02), torch.randn(tokens, columns, device=gpu)
    exact = rounded(x) @ weight.dequantize(torch.float64).cuda().T
    got = ops.int4_fp8_linear(x, weight.to(gpu).pack())

    def error(y: Tensor) -> float:
        return float((y.double() - exact).pow(2).mean().sqrt())

    floor = 4 * UNIT_ROUNDOFF * float(exact.pow(2).mean().sqrt())
    assert error(got) <= 2 * error(grouped_in_torch(x, weight)) + floor


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1024, 14336, 4096), (600, 6144, 2048), (300, 1000, 11008)])
def test_large_products_on_cuda(gpu: str, tokens: int, rows: int, columns: int) -> None:
    """Clusters, their split tiles, and rows and tokens that do not fill a tile; twice, for the same bits."""
    weight, x = quantize_int4(torch.randn(rows, columns, device=gpu)), torch.randn(tokens, columns, device=gpu)
    packed = weight.pack()
    got = ops.int4_fp8_linear(x, packed)
    dense = weight.dequantize(torch.float64)
    terms = rounded(x).abs() @ dense.abs().T
    chain = 3 * (columns // 32) + 38
    limit = (chain * UNIT_ROUNDOFF / (1 - chain * UNIT_ROUNDOFF) + 4 * 33 * SHORT) * terms
    assert_within(got, rounded(x) @ dense.T, limit, f"{tokens} x {rows} x {columns}")
    for _ in range(20):
        assert torch.equal(ops.int4_fp8_linear(x, packed), got)


def test_layers_follow_their_device_on_cuda(gpu: str) -> None:
    linear = torch.nn.Linear(300, 130)
    layer = W4A8Linear.from_linear(linear, group_size=64)
    x = torch.randn(5, 300)
    before, blob = layer(x), layer.packed.clone()
    layer.to(gpu)
    assert_within(layer(x.cuda()).cpu(), before.double(), 4 * 33 * SHORT * before.double().abs().max() * 30, "moved")
    saved = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    assert torch.equal(saved["packed"], blob)
    other = W4A8Linear.from_linear(torch.nn.Linear(300, 130), group_size=64).to(gpu)
    other.load_state_dict(saved)
    assert torch.equal(other(x.cuda()), layer(x.cuda()))
    layer.to("cpu")
    assert torch.equal(layer.packed, blob)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_graphs_and_other_streams_give_the_same_bits_on_cuda(gpu: str, tokens: int) -> None:
    packed = random_weight(520, 2048, 128).to(gpu).pack()
    x = torch.randn(tokens, 2048, device=gpu)
    want = ops.int4_fp8_linear(x, packed)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.int4_fp8_linear(x, packed)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.int4_fp8_linear(x, packed)
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


def test_a_blob_left_on_the_cpu_names_the_way_out_on_cuda(gpu: str) -> None:
    packed = random_weight(8, 32, 16).pack()
    with pytest.raises(RuntimeError, match="weight is not on a CUDA device"):
        ops.int4_fp8_linear(torch.randn(2, 32, device=gpu), packed)
    with pytest.raises(RuntimeError, match=r"PackedInt4.to\('cpu'\)"):
        ops.int4_fp8_linear(torch.randn(2, 32), packed.repacked("cuda"))
