# SPDX-License-Identifier: Apache-2.0
"""The GPU's ternary kernels: integers equal torch's, floats the CPU operator's bits, in any order of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tilewright import _host, ops
from tilewright.formats import PackedTernary, pack_ternary

# (tokens, rows, columns); what plan each takes with the emulator's four multiprocessors is asserted below.
SMALL = [(1, 70, 300), (2, 64, 128), (3, 130, 130), (8, 33, 1000), (9, 70, 300), (16, 48, 129), (1, 1, 1), (5, 16, 31)]
SMALL += [(2, 20, 8300), (9, 20, 4300), (3, 700, 130), (3, 300, 130), (2, 128, 260)]  # phases, panels, clusters
LARGE = [(17, 70, 300), (40, 130, 640), (70, 257, 260), (130, 300, 140), (33, 1, 17), (129, 129, 1100), (64, 500, 130)]
REAL = [
    *((m, n, k) for m in (1, 2, 8, 16, 32, 128, 512) for n, k in ((2560, 2560), (2560, 6912), (576, 1536))),
    (1, 13824, 2560),
    (7, 20480, 3200),
    (33, 13824, 2560),
    (2048, 2560, 2560),
    (1000, 3201, 1111),
]
TILES = {
    "small rows=16 ",
    "small rows=32",
    "small rows=64",
    "small rows=128",
    "cluster=1 ",
    "cluster=8",
    "tokens=32",
    "tokens=64",
    "rows=128 tokens=128",
    "rows=256 tokens=128",
}


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    """Exact: sums of at most 2^7 * 2^17 in float64."""
    return (x.double() @ weight.double().T).to(torch.int64)


def packed_on(device, weight: Tensor, scale: Tensor | float | None = None) -> PackedTernary:
    return pack_ternary(weight, "mma2", scale=scale).to(device.torch_device)


def sizes(device) -> list[tuple[int, int, int]]:
    return SMALL + LARGE if device.is_emulator else SMALL + LARGE + REAL


def test_integers_are_exact(device) -> None:
    for tokens, rows, columns in sizes(device):
        weight, x = random_weight(rows, columns), random_codes(tokens, columns)
        packed, on_device = packed_on(device, weight), device.tensor(x)
        for seed in device.seeds:
            device.seed(seed)
            got = ops.ternary_matmul(on_device, packed)
            assert torch.equal(got.cpu().long(), oracle(x, weight)), (tokens, rows, columns, seed)


@pytest.mark.sanitize
@pytest.mark.parametrize("size", SMALL + LARGE)
def test_small_sizes(device, size: tuple[int, int, int]) -> None:
    tokens, rows, columns = size
    weight, x = random_weight(rows, columns), torch.randn(tokens, columns)
    scale = x.abs().amax(-1).clamp(min=1e-5) / 127
    want = oracle((x / scale[:, None]).round(), weight).float() * scale[:, None]
    assert torch.equal(ops.ternary_linear(device.tensor(x), packed_on(device, weight)).cpu(), want)


def test_the_sizes_above_take_every_kernel() -> None:
    plans = [_host.ternary_linear_device_plan(*size, 4) for size in SMALL + LARGE]
    plans += [_host.ternary_linear_device_plan(*size, 132) for size in REAL]
    missing = [part for part in TILES if not any(part in plan for plan in plans)]
    assert not missing, plans


@pytest.mark.parametrize(("rows", "columns"), [(1100, 1300), (600, 1670)])
def test_tiles_that_a_block_takes_in_turn(device, rows: int, columns: int) -> None:
    """More tiles than blocks and more chunks than stages: the warpgroups run one behind the other."""
    tokens = 260
    plan = _host.ternary_linear_device_plan(tokens, rows, columns, 4)
    assert "tokens=128 splits=1" in plan, plan
    weight, x = random_weight(rows, columns), random_codes(tokens, columns)
    packed, on_device = packed_on(device, weight), device.tensor(x)
    for seed in device.seeds:
        device.seed(seed)
        assert torch.equal(ops.ternary_matmul(on_device, packed).cpu().long(), oracle(x, weight))


@pytest.mark.sanitize
@pytest.mark.parametrize("splits", [True, False])
def test_sums_of_split_columns(device, splits: bool) -> None:
    """A narrow matrix with many columns is cut along them, a square one is not."""
    rows, columns = (64, 4096) if splits else (512, 256)
    plan = _host.ternary_linear_device_plan(64, rows, columns, 4 if device.is_emulator else 132)
    if device.is_emulator:
        assert ("splits=1 " not in plan) == splits, plan
    weight, x = random_weight(rows, columns), random_codes(64, columns)
    packed, on_device = packed_on(device, weight), device.tensor(x)
    for seed in device.seeds:
        device.seed(seed)
        assert torch.equal(ops.ternary_matmul(on_device, packed).cpu().long(), oracle(x, weight))


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [127, -128])
def test_products_of_one_sign_do_not_wrap(device, tokens: int, sign: int, code: int) -> None:
    """Decoded weights are 64 w: sums over 2^17 columns reach 2^30 before they are scaled back."""
    columns = 1 << 11 if device.is_emulator else 1 << 18
    weight = torch.full((17, columns), sign, dtype=torch.int8)
    x = device.tensor(torch.full((tokens, columns), code, dtype=torch.int8))
    got = ops.ternary_matmul(x, packed_on(device, weight))
    assert torch.equal(got.cpu(), torch.full((tokens, 17), sign * code * columns, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 21])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_its_definition(device, dtype: torch.dtype, tokens: int, per_row: bool, with_bias: bool) -> None:
    """Bit for bit: one rounding of the scales' product, one of the result, one to the output's type."""
    for rows, columns in ((71, 100), (70, 256)):
        weight, x = random_weight(rows, columns), torch.randn(tokens, columns).to(dtype)
        scale = torch.rand(rows if per_row else 1) + 0.1
        bias = torch.randn(rows) if with_bias else None
        token_scale = x.float().abs().amax(-1).clamp(min=1e-5) / 127
        codes = (x.float() / token_scale[:, None]).round().to(torch.int8)
        exact = oracle(codes, weight).float().double() * (token_scale[:, None] * scale).double()
        want = (exact if bias is None else exact + bias.double()).float().to(dtype)
        on_device = device.tensor(bias) if bias is not None else None
        got = ops.ternary_linear(device.tensor(x), packed_on(device, weight, scale), on_device)
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("columns", [1, 16, 17, 300, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_rounded_as_defined(device, columns: int, dtype: torch.dtype) -> None:
    for size in (1.0, 0.0, 1e-7, 100.0):
        x = (torch.randn(3, columns) * size).to(dtype)
        codes, scale = ops.quantize_ternary_activation(device.tensor(x))
        want = x.float().abs().amax(-1).clamp(min=1e-5) / 127
        assert torch.equal(scale.cpu(), want)
        assert torch.equal(codes.cpu(), (x.float() / want[:, None]).round().to(torch.int8))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tokens", [7, 20])
def test_a_token_that_is_not_finite_spoils_only_itself(device, poison: float, tokens: int) -> None:
    packed, x = packed_on(device, random_weight(20, 100)), torch.randn(tokens, 100)
    clean = ops.ternary_linear(device.tensor(x), packed).cpu()
    x[3, 57] = poison
    got = ops.ternary_linear(device.tensor(x), packed).cpu()
    assert got[3].isnan().all()
    others = [t for t in range(tokens) if t != 3]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (40, 5, 0), (0, 0, 0)])
def test_empty_dimensions(device, tokens: int, rows: int, columns: int) -> None:
    packed = packed_on(device, torch.zeros(rows, columns, dtype=torch.int8))
    x = device.tensor(torch.zeros(tokens, columns))
    assert torch.equal(ops.ternary_matmul(x.to(torch.int8), packed).cpu(), torch.zeros(tokens, rows, dtype=torch.int32))
    bias = device.tensor(torch.ones(rows))
    assert torch.equal(ops.ternary_linear(x, packed, bias).cpu(), torch.ones(tokens, rows))


def test_strided_batched_and_misaligned_inputs(device) -> None:
    weight = random_weight(20, 48)
    packed = packed_on(device, weight)
    wide = random_codes(3, 5, 96)
    transposed, shifted = random_codes(48, 6).T, random_codes(4 * 48 + 1)[1:].view(4, 48)
    for x, moved in (
        (wide[..., ::2], device.tensor(wide)[..., ::2]),
        (transposed, device.tensor(transposed)),
        (shifted, device.tensor(torch.cat((shifted.flatten()[:1], shifted.flatten())))[1:].view(4, 48)),
    ):
        assert torch.equal(ops.ternary_matmul(moved, packed).cpu().long(), oracle(x, weight))


def test_weights_come_back(device) -> None:
    for rows, columns in ((1, 1), (70, 300), (129, 128)):
        weight = random_weight(rows, columns)
        assert torch.equal(packed_on(device, weight).unpack().cpu(), weight)


@pytest.mark.parametrize("tokens", [5, 24])
def test_gradients_go_straight_through(device, tokens: int) -> None:
    weight, scale = random_weight(12, 40), torch.rand(12) + 0.5
    packed = packed_on(device, weight, scale)
    x = device.tensor(torch.randn(tokens, 40, requires_grad=True))
    bias = device.tensor(torch.randn(12, requires_grad=True))
    grad = torch.randn(tokens, 12)
    d_x, d_bias = torch.autograd.grad(ops.ternary_linear(x, packed, bias), (x, bias), device.tensor(grad))
    dense = weight.double() * scale.double()[:, None]
    bound = 14 * 2.0**-24 * (grad.double().abs() @ dense.abs())  # twelve products, one rounding of the weight
    assert ((d_x.cpu().double() - grad.double() @ dense).abs() <= bound).all()
    assert (
        (d_bias.cpu().double() - grad.double().sum(0)).abs() <= tokens * 2.0**-24 * grad.double().abs().sum(0)
    ).all()


@pytest.mark.repeat
@pytest.mark.parametrize("tokens", [4, 64])
def test_runs_repeat_bit_for_bit(device, tokens: int) -> None:
    rows, columns = (96, 1152) if device.is_emulator else (2560, 6912)
    packed = packed_on(device, random_weight(rows, columns), 0.03)
    x = device.tensor(torch.randn(tokens, columns, dtype=torch.bfloat16))
    first = ops.ternary_linear(x, packed)
    for run in range(3 if device.is_emulator else 1000):
        device.seed(run)
        assert torch.equal(ops.ternary_linear(x, packed), first)


def test_bad_input_is_an_error_that_names_it(device) -> None:
    weight = random_weight(20, 48)
    packed, x = packed_on(device, weight), device.tensor(random_codes(3, 48))
    other = pack_ternary(weight, "q2")
    foreign = PackedTernary(other.data.to(device.torch_device), other.shape, "q2", other.scale.to(device.torch_device))
    with pytest.raises(RuntimeError, match=r"packing 0, CUDA kernels read 'mma2'.*PackedTernary\.to"):
        ops.ternary_matmul(x, foreign)
    with pytest.raises(RuntimeError, match=r"data holds \d+ bytes, \[20, 200\] as 'mma2' has"):
        ops.ternary_matmul(device.tensor(random_codes(3, 200)), packed)
    with pytest.raises(RuntimeError, match="x has dtype Float, needed Char"):
        ops.ternary_matmul(x.float(), packed)
    with pytest.raises(RuntimeError, match=r"bias has shape \[7\]"):
        ops.ternary_linear(x.float(), packed, device.tensor(torch.ones(7)))
    if not device.is_emulator:
        with pytest.raises(RuntimeError, match="data is not on a CUDA device"):
            ops.ternary_matmul(x, pack_ternary(weight, "mma2"))


@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_graphs_capture_it(device, tokens: int) -> None:
    if device.is_emulator:
        pytest.skip("graphs are the GPU's")
    packed, bias = packed_on(device, random_weight(2560, 2560), 0.02), torch.randn(2560, device="cuda")
    source = torch.randn(tokens, 2560, device="cuda", dtype=torch.bfloat16)
    x, codes = torch.empty_like(source), torch.empty(tokens, 2560, device="cuda", dtype=torch.int8)
    ops.ternary_linear(source, packed, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(source)  # a copy, which no kernel can overlap
        y = ops.ternary_linear(x, packed, bias)
        codes.copy_(source.clamp(-100, 100))
        acc = ops.ternary_matmul(codes, packed)
    for _ in range(3):
        source.normal_().mul_(50)
        graph.replay()
        assert torch.equal(y, ops.ternary_linear(source, packed, bias))
        assert torch.equal(acc, ops.ternary_matmul(source.clamp(-100, 100).to(torch.int8), packed))


@pytest.mark.parametrize("tokens", [1, 8, 40, 600])
def test_calls_that_follow_each_other_at_once(device, tokens: int) -> None:
    """Each kernel may start before the one before has ended: results of a chain are those of its single steps."""
    sizes_of_steps = [96, 160, 64, 128] if device.is_emulator else [2560, 6912, 2560, 2560]
    if device.is_emulator:
        tokens = min(tokens, 40)
    steps = [
        (packed_on(device, random_weight(rows, columns), 0.02), device.tensor(torch.randn(rows)))
        for columns, rows in itertools.pairwise(sizes_of_steps)
    ]
    x = device.tensor(torch.randn(tokens, sizes_of_steps[0]))
    for _ in range(1 if device.is_emulator else 20):
        chained, single = x, x
        for packed, bias in steps:
            chained = ops.ternary_linear(chained, packed, bias)
        for packed, bias in steps:
            device.synchronize()
            single = ops.ternary_linear(single, packed, bias)
            device.synchronize()
        assert torch.equal(chained, single)


def test_gpu_and_cpu_give_the_same_bits(device) -> None:
    if device.is_emulator:
        pytest.skip("inside, the CPU's operators are the emulated ones")
    for tokens in (1, 8, 33, 512):
        weight, x = random_weight(1536, 576), torch.randn(tokens, 576)
        bias = torch.randn(1536)
        theirs = ops.ternary_linear(x, pack_ternary(weight, "q2", scale=0.02), bias)
        ours = ops.ternary_linear(x.cuda(), packed_on(device, weight, 0.02), bias.cuda())
        assert torch.equal(ours.cpu(), theirs)
