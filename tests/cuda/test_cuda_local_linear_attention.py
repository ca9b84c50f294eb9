# SPDX-License-Identifier: Apache-2.0
"""Local linear attention and Parallax on a device against the dense float64 solve of every query's regression."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tilewright.ops import lla_attention, lla_decode, parallax
from tilewright.reference.local_linear_attention import lla_reference, parallax_reference, visible_keys

if TYPE_CHECKING:
    from conftest import Device

BLOCK = 128  # queries of a block of the tensor-core form
TIGHT = {"cg_rtol": 1e-12, "cg_max_iters": 60}


def unit(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(*shape)
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


def inputs(
    tokens: int,
    key_size: int,
    value_size: int,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    keys: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of length 1, and normal values."""
    keys = tokens if keys is None else keys
    q = unit(batch, tokens, heads, key_size, dtype=dtype)
    k = unit(batch, keys, kv_heads, key_size, dtype=dtype)
    return q, k, torch.randn(batch, keys, kv_heads, value_size).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; the absolute norm where want is nothing but rounding of zero."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    difference, size = float((got - want).norm()), float(want.norm())
    return difference / size if size > 1e-9 else difference


def on(device: Device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(device.tensor(x) for x in tensors)


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().cpu() for x in tensors)


def some_rows(q: Tensor, k: Tensor, v: Tensor, ridge: float, rows: list[int]) -> Tensor:
    """o of some causal rows in float64, one dense solve each: `[B, rows, HQ, V]`."""
    q, k, v = wide(q, k, v)
    group, size = q.shape[2] // k.shape[2], q.shape[3]
    o = torch.zeros(q.shape[0], len(rows), q.shape[2], v.shape[3], dtype=torch.float64)
    for (n, i), b, h in itertools.product(enumerate(rows), range(q.shape[0]), range(q.shape[2])):
        keys, values = k[b, : i + 1, h // group], v[b, : i + 1, h // group]
        p = (keys @ q[b, i, h] * size**-0.5).softmax(0)
        centred = keys - p @ keys
        matrix = centred.T @ (p[:, None] * centred) + ridge * torch.eye(size, dtype=torch.float64)
        x = torch.linalg.solve(matrix, p @ keys - q[b, i, h])
        o[b, n, h] = (p * (1 - centred @ x)) @ values
    return o


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("tokens", "key_size", "value_size", "dtype"),
    [
        (1, 64, 64, torch.bfloat16),
        (BLOCK - 1, 64, 64, torch.bfloat16),
        (BLOCK, 128, 128, torch.bfloat16),
        (BLOCK + 1, 64, 128, torch.bfloat16),
        (200, 48, 40, torch.bfloat16),
        (150, 128, 64, torch.float16),
    ],
)
def test_tensor_core_form(
    device: Device, tokens: int, key_size: int, value_size: int, dtype: torch.dtype, ridge: float
) -> None:
    tensors = inputs(tokens, key_size, value_size, heads=2, dtype=dtype)
    o, stats = lla_attention(*on(device, *tensors), ridge_lambda=ridge, solver="cg", return_stats=True)
    want, exact = lla_reference(*wide(*tensors), ridge_lambda=ridge)
    assert relative(o, want) <= 1e-2
    assert relative(stats["omega"], exact["omega"]) <= 1e-4
    # The solution is off by at most the residual over lambda, and rounding of the products to 16 bits.
    assert relative(stats["rho"], exact["rho"]) <= 1e-2
    assert (stats["residual"] <= 2.0**-10).all()


@pytest.mark.parametrize(("key_size", "ridge"), [(64, 0.1), (64, 1.0), (128, 0.1), (128, 10.0)])
def test_real_sizes(device: Device, key_size: int, ridge: float) -> None:
    if device.is_emulator:
        pytest.skip("a sequence of thousands is for a GPU")
    tensors = inputs(4096, key_size, key_size, batch=2, heads=4, kv_heads=2)
    rows = [0, 1, 63, 64, 127, 128, 1000, 2047, 2048, 3333, 4095]
    o = lla_attention(*on(device, *tensors), ridge_lambda=ridge, solver="cg")
    assert relative(o[:, rows], some_rows(*tensors, ridge, rows)) <= 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 1},
        {"window_size": 70},
        {"causal": False},
        {"causal": False, "window_size": 30},
        {"scale": -0.3},
        {"ridge": "absolute"},
    ],
    ids=str,
)
def test_tensor_core_form_with_options(device: Device, options: dict[str, Any]) -> None:
    tensors = inputs(150, 64, 64, heads=2, batch=2)
    o = lla_attention(*on(device, *tensors), ridge_lambda=0.5, solver="cg", **options)
    want, _ = lla_reference(*wide(*tensors), ridge_lambda=0.5, **options)
    assert relative(o, want) <= 1e-2


@pytest.mark.parametrize(
    ("tokens", "keys", "causal"), [(5, 300, True), (130, 140, True), (70, 9, False), (9, 200, False)]
)
def test_other_numbers_of_keys(device: Device, tokens: int, keys: int, causal: bool) -> None:
    tensors = inputs(tokens, 64, 64, keys=keys)
    o = lla_attention(*on(device, *tensors), causal=causal, solver="cg")
    want, _ = lla_reference(*wide(*tensors), causal=causal)
    assert relative(o, want) <= 1e-2


def test_iterations_stop_at_the_tolerance_or_the_limit(device: Device) -> None:
    tensors = on(device, *inputs(140, 64, 64))
    counts = {}
    for ridge, rtol in itertools.product((0.1, 10.0), (1e-1, 1e-3)):
        _, stats = lla_attention(*tensors, ridge_lambda=ridge, cg_rtol=rtol, return_stats=True)
        assert (stats["residual"] <= rtol).all()
        counts[ridge, rtol] = int(stats["iters"].sum())
    assert counts[0.1, 1e-3] > counts[0.1, 1e-1]
    assert counts[0.1, 1e-3] > counts[10.0, 1e-3]
    _, capped = lla_attention(*tensors, ridge_lambda=0.01, cg_max_iters=2, return_stats=True)
    assert int(capped["iters"].max()) == 2
    assert float(capped["residual"].max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_sequences_have_the_bits_that_they_have_alone(device: Device, dtype: torch.dtype) -> None:
    counts = [3, 0, 140, 1, 30] if dtype == torch.bfloat16 else [3, 0, 14, 1]
    total, size = sum(counts), 64 if dtype == torch.bfloat16 else 6
    tensors = inputs(total + 5, size, size, heads=2, dtype=dtype)
    offsets = [0, *itertools.accumulate(counts)]
    cu_seqlens = device.tensor(torch.tensor(offsets, dtype=torch.int32))
    options: dict[str, Any] = {"solver": "cg", "cg_max_iters": 6}
    leaves = [x.requires_grad_() for x in on(device, *tensors)]
    packed, stats = lla_attention(*leaves, cu_seqlens=cu_seqlens, return_stats=True, **options)
    weight = device.tensor(torch.randn(packed.shape).to(dtype))
    grads = torch.autograd.grad(packed, leaves, weight)
    for x in (packed, stats["rho"], *grads):
        assert (x[:, total:] == 0).all()
    for first, last in itertools.pairwise(offsets):
        rows = slice(first, last)
        parts = [x[:, rows].detach().requires_grad_() for x in leaves]
        alone = lla_attention(*parts, **options)
        assert torch.equal(packed[:, rows], alone)
        for whole, part in zip(grads, torch.autograd.grad(alone, parts, weight[:, rows]), strict=True):
            assert torch.equal(whole[:, rows], part)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize(("dtype", "bad"), [(torch.bfloat16, 70), (torch.bfloat16, 3), (torch.float32, 9)])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(
    device: Device, dtype: torch.dtype, bad: int, where: str
) -> None:
    tokens, size = (150, 64) if dtype == torch.bfloat16 else (20, 6)
    q, k, v = inputs(tokens, size, size, dtype=dtype)
    options: dict[str, Any] = {"solver": "cg", "cg_max_iters": 4}
    clean = lla_attention(*on(device, q, k, v), **options)
    {"q": q, "k": k, "v": v}[where][0, bad] = torch.nan if bad != 70 else torch.inf
    o = lla_attention(*on(device, q, k, v), **options).cpu()
    sees = torch.zeros(tokens, dtype=torch.bool)
    sees[bad : None if where in "kv" else bad + 1] = True
    assert not o[0, sees].isfinite().any()
    assert torch.equal(o[0, ~sees], clean[0, ~sees.to(clean.device)].cpu())


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
def test_decoding_reads_only_what_the_cache_holds(device: Device, dtype: torch.dtype, causal: bool) -> None:
    size = 64 if dtype == torch.bfloat16 else 5
    lengths = [90, 17, 1] if dtype == torch.bfloat16 else [20, 7, 1]
    q, k, v = inputs(1, size, size, batch=3, heads=4, kv_heads=2, keys=lengths[0] + 10, dtype=dtype)
    for b, n in enumerate(lengths):
        k[b, n:], v[b, n:] = torch.nan, torch.nan
    o, stats = lla_decode(
        *on(device, q, k, v), device.tensor(torch.tensor(lengths)), ridge_lambda=0.5, solver="cg", return_stats=True,
        **(TIGHT if dtype == torch.float64 else {}),
    )  # fmt: skip
    for b, n in enumerate(lengths):
        want, exact = lla_reference(*wide(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]), ridge_lambda=0.5)
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-9
        assert relative(o[b : b + 1], want) <= limit
        assert relative(stats["rho"][b : b + 1], exact["rho"]) <= limit


@pytest.mark.parametrize("window", [None, 20])
def test_decoding_several_tokens_of_a_group(device: Device, window: int | None) -> None:
    """Queries that see different keys share a cluster, and more of them than it has rows."""
    q, k, v = inputs(60, 32, 24, heads=6, kv_heads=2, dtype=torch.float16)
    v[:, :, :, 0] = 0.0
    o, rho = lla_decode(
        *on(device, q[:, 57:], k, v), device.tensor(torch.tensor([60])), solver="cg", window_size=window
    )
    want, exact = lla_reference(*wide(q, k, v), window_size=window)
    assert relative(o, want[:, 57:]) <= 1e-3
    assert relative(rho, exact["rho"][:, 57:]) <= 1e-3


def test_decoding_from_the_token_before(device: Device) -> None:
    torch.manual_seed(1)
    k, v = torch.randn(1, 60, 1, 40), torch.randn(1, 60, 1, 8)
    q = torch.randn(1, 1, 1, 40) + 1e-3 * torch.randn(1, 2, 1, 40)
    before, now = (on(device, q[:, i : i + 1], k, v) for i in (0, 1))
    _, rho = lla_decode(*before, device.tensor(torch.tensor([59])), ridge_lambda=0.1)
    lengths = device.tensor(torch.tensor([60]))
    o, cold = lla_decode(*now, lengths, ridge_lambda=0.1, return_stats=True)
    again, warm = lla_decode(*now, lengths, ridge_lambda=0.1, rho_init=rho, return_stats=True)
    assert int(warm["iters"]) < int(cold["iters"])
    want, _ = lla_reference(*wide(q[:, 1:], k, v), ridge_lambda=0.1)
    assert max(relative(o, want), relative(again, want)) <= 1e-3


def check_gradients(
    device: Device, tensors: tuple[Tensor, ...], strength: Tensor, limit: float, exact: dict[str, Any], **options: Any
) -> None:
    leaves = [x.detach().requires_grad_() for x in (*tensors, strength)]
    there = [device.tensor(x) for x in leaves]
    o = lla_attention(*there[:3], ridge_lambda=there[3], **exact, **options)
    oracle = [x.detach().double().requires_grad_() for x in leaves]
    want, _ = lla_reference(*oracle[:3], ridge_lambda=oracle[3], **options)
    weight = torch.randn(o.shape)
    found = torch.autograd.grad(o, there, device.tensor(weight.to(o.dtype)))
    wanted = torch.autograd.grad(want, oracle, weight.to(o.dtype).double())
    assert relative(o, want) <= limit
    for name, a, b in zip(("q", "k", "v", "lambda"), found, wanted, strict=True):
        assert relative(a, b) <= 2 * limit, name


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("tokens", "key_size", "value_size", "heads", "kv_heads"),
    [(1, 64, 64, 1, 1), (100, 64, 64, 4, 2), (BLOCK + 1, 128, 128, 1, 1), (260, 48, 64, 1, 1), (150, 64, 128, 2, 1)],
)
def test_gradients_of_the_tensor_core_form(
    device: Device, tokens: int, key_size: int, value_size: int, heads: int, kv_heads: int, strength: float
) -> None:
    tensors = inputs(tokens, key_size, value_size, heads=heads, kv_heads=kv_heads)
    check_gradients(device, tensors, torch.full((1, tokens, heads), strength), 1e-2, {"solver": "cg"})


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 40},
        {"causal": False},
        {"causal": False, "window_size": 30},
        {"scale": -0.3},
        {"ridge": "absolute"},
        {"ridge_grad": False},
    ],
    ids=str,
)
def test_gradients_of_the_tensor_core_form_with_options(device: Device, options: dict[str, Any]) -> None:
    tensors = inputs(150, 64, 64, heads=2, batch=2)
    check_gradients(device, tensors, 0.3 + torch.rand(2, 150, 2), 1e-2, {"solver": "cg"}, **options)


@pytest.mark.sanitize
@pytest.mark.parametrize(("tokens", "keys", "causal"), [(5, 200, True), (130, 140, True), (70, 9, False)])
def test_gradients_with_other_numbers_of_keys(device: Device, tokens: int, keys: int, causal: bool) -> None:
    tensors = inputs(tokens, 64, 64, keys=keys)
    check_gradients(device, tensors, torch.full((1, tokens, 1), 0.5), 1e-2, {"solver": "cg"}, causal=causal)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_gradients_beside_what_is_not_finite(device: Device, where: str) -> None:
    """Rows that a bad entry does not reach keep their bits; keys that no bad row sees keep their gradient."""
    bad, tokens = 70, 150
    q, k, v = inputs(tokens, 64, 64)

    def gradients(rows: slice) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in on(device, *(x.detach().clone() for x in (q, k, v)))]
        o = lla_attention(*leaves, solver="cg")
        return torch.autograd.grad(o[:, rows].float().sum(), leaves)

    clean = gradients(slice(0, bad))
    {"q": q, "k": k, "v": v}[where][0, bad] = torch.nan
    spoilt = gradients(slice(0, bad))
    assert torch.equal(spoilt[0][:, :bad], clean[0][:, :bad])
    if where == "q":
        late = gradients(slice(bad + 1, None))
        assert all(bool(g[:, bad + 1 :].isfinite().all()) for g in late)
        assert all(bool(g[:, : bad + 1].isnan().all()) for g in late[1:])


@pytest.mark.sanitize
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 5},
        {"causal": False, "window_size": 4},
        {"ridge": "absolute"},
        {"ridge_grad": False},
    ],
    ids=str,
)
def test_float64_values_and_gradients(device: Device, options: dict[str, Any], solver: str) -> None:
    q, k, v = inputs(17, 5, 4, heads=4, kv_heads=2, dtype=torch.float64)
    ridge = 0.3 + torch.rand(1, 17, 4, dtype=torch.float64)
    check_gradients(device, (q, k, v), ridge, 1e-8, {"solver": solver, **TIGHT}, **options)


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_every_kind_of_size(device: Device, solver: str) -> None:
    sizes = [(1, 3, 1), (9, 1, 40), (6, 33, 3)]
    for tokens, key_size, value_size in (
        sizes if device.is_emulator else [*sizes, (70, 100, 200), (300, 40, 24), (20, 250, 8)]
    ):
        tensors = inputs(tokens, key_size, value_size, dtype=torch.float64)
        ridge = 0.3 + torch.rand(1, tokens, 1, dtype=torch.float64)
        check_gradients(device, tensors, ridge, 1e-8, {"solver": solver, "cg_rtol": 1e-12, "cg_max_iters": 300})


def test_preconditioner(device: Device) -> None:
    q, k, v = inputs(12, 8, 4, dtype=torch.float64)
    k = k * torch.logspace(-1, 1, 8)
    o = lla_attention(*on(device, q, k, v), preconditioner="jacobi", solver="cg", **TIGHT)
    want, _ = lla_reference(q, k, v)
    assert relative(o, want) <= 1e-9


@pytest.mark.parametrize(
    ("dtype", "size", "tokens", "limit"), [(torch.float64, 5, 20, 1e-9), (torch.bfloat16, 64, 150, 1e-2)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_parallax(device: Device, dtype: torch.dtype, size: int, tokens: int, limit: float, causal: bool) -> None:
    tensors = inputs(tokens, size, size, heads=2, dtype=dtype)
    r = torch.randn(1, tokens, 2, size).to(dtype)
    q, k, v = tensors
    leaves = [x.detach().requires_grad_() for x in (q, r, k, v)]
    there = [device.tensor(x) for x in leaves]
    o = parallax(*there, causal=causal)
    oracle = [x.detach().double().requires_grad_() for x in leaves]
    want = parallax_reference(*oracle, causal=causal)
    assert relative(o, want) <= limit
    weight = torch.randn(want.shape).to(dtype)
    found = torch.autograd.grad(o, there, device.tensor(weight))
    for a, b in zip(found, torch.autograd.grad(want, oracle, weight.double()), strict=True):
        assert relative(a, b) <= 2 * limit


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_sign_extremes(device: Device, sign: float, dtype: torch.dtype) -> None:
    """All products of a score have one sign and the largest size: the softmax picks one key."""
    tokens, size = (140, 64) if dtype == torch.bfloat16 else (20, 8)
    k = torch.ones(1, tokens, 1, size) * torch.linspace(1, 50, tokens)[None, :, None, None]
    q = torch.full((1, tokens, 1, size), 50.0 * sign)
    q, k, v = (x.to(dtype) for x in (q, k, torch.randn(1, tokens, 1, size)))
    o = lla_attention(*on(device, q, k, v), solver="cg")
    want, _ = lla_reference(*wide(q, k, v))
    assert relative(o, want) <= 1e-2


def test_any_layout(device: Device) -> None:
    q, k, v = inputs(80, 64, 64, heads=2, kv_heads=2)
    strange = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in (q, k, v)]
    # Rows that do not begin at a multiple of 16 bytes.
    room = [torch.cat([x.new_zeros(1), x.flatten()]) for x in (q, k, v)]
    straight = lla_attention(*on(device, q, k, v))
    assert torch.equal(lla_attention(*on(device, *strange)), straight)
    shifted = [device.tensor(x)[1:].view(q.shape) for x in room]
    assert torch.equal(lla_attention(*shifted), straight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_in_any_order_of_threads(device: Device, dtype: torch.dtype) -> None:
    tokens, size = (140, 64) if dtype == torch.bfloat16 else (12, 6)
    if not device.is_emulator:
        tokens = 1000 if dtype == torch.bfloat16 else 100
    tensors = [x.requires_grad_() for x in on(device, *inputs(tokens, size, size, heads=2, dtype=dtype))]
    results = []
    for seed in device.seeds if device.is_emulator else range(20):
        device.seed(seed)
        o = lla_attention(*tensors, solver="cg", cg_max_iters=6)
        last = [x.detach() for x in (tensors[0][:, -1:], *tensors[1:])]
        decoded = lla_decode(*last, device.tensor(torch.tensor([tokens])), solver="cg", cg_max_iters=3)
        results.append((o, *torch.autograd.grad(o.float().square().sum(), tensors), *decoded))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_rows_that_cannot_be_solved_are_not_a_number(device: Device) -> None:
    """A device is not waited for: an entry of lambda that is not positive shows in its row."""
    for dtype, size in ((torch.bfloat16, 64), (torch.float32, 6)):
        q, k, v = inputs(8, size, size, dtype=dtype)
        ridge = torch.ones(1, 8, 1)
        ridge[0, 3] = -1.0
        o = lla_attention(*on(device, q, k, v), ridge_lambda=device.tensor(ridge), solver="cg")
        assert o[0, 3].isnan().all()
        assert o[0, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_nothing_to_do(device: Device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = inputs(0, 64, 64, dtype=dtype)
        assert lla_attention(*on(device, q, k, v)).shape == (1, 0, 1, 64)
        q, k, v = inputs(4, 64, 64, keys=0, dtype=dtype)
        assert (lla_attention(*on(device, q, k, v), causal=False) == 0).all()


def test_in_a_graph(device: Device) -> None:
    """The operators themselves: autograd's engine has rules of its own about streams under capture."""
    if device.is_emulator:
        pytest.skip("there are no CUDA graphs in the emulator")
    library = torch.ops.tilewright
    options = (64**-0.5, True, None, 1e-4, 32, "cg", False, False, True)
    for dtype, tokens in ((torch.bfloat16, 300), (torch.float32, 40)):
        q, k, v = on(device, *inputs(tokens, 64, 64, heads=2, dtype=dtype))
        weight = torch.randn(1, tokens, 2, 64, device="cuda", dtype=dtype)
        ridge = torch.ones(1, tokens, 2, device="cuda")
        lengths = torch.tensor([tokens], device="cuda")

        def step(
            q: Tensor = q,
            k: Tensor = k,
            v: Tensor = v,
            weight: Tensor = weight,
            ridge: Tensor = ridge,
            lengths: Tensor = lengths,
        ) -> tuple[Tensor, ...]:
            o, tilt, *_ = library.lla_forward(q, k, v, ridge, None, None, None, *options)
            grads = library.lla_backward(weight, q, k, v, ridge, tilt, None, *options)
            decoded = library.lla_forward(q[:, -1:], k, v, ridge[:, -1:], None, None, lengths, *options)
            return o, *grads, decoded[0]

        with torch.no_grad():
            eager = step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
        for x in captured:
            x.zero_()
        graph.replay()
        device.synchronize()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)


def test_wrong_arguments_are_errors(device: Device) -> None:
    q, k, v = on(device, *inputs(8, 64, 64, heads=4, kv_heads=2))
    lengths = device.tensor(torch.tensor([8]))
    for message, tensors, options in [
        ("HQ = 3", (q[:, :, :3], k, v), {}),
        ("must be K = 64", (q, k[..., :5], v), {}),
        ("k has dtype", (q, k.float(), v), {}),
        ("8 queries|T = 8", (q, k[:, :5], v[:, :5]), {}),
        ("needed int64 or int32", (q, k, v), {"cu_seqlens": lengths.float()}),
        ("window_size = 0", (q, k, v), {"window_size": 0}),
        ("negative entry", (q, k, v), {"ridge_lambda": -1.0}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            lla_attention(*tensors, **options)
    if not device.is_emulator:
        with pytest.raises(RuntimeError, match="k is not on a CUDA device"):
            lla_attention(q, k.cpu(), v)
        with pytest.raises(RuntimeError, match="cu_seqlens is not on a CUDA device"):
            lla_attention(q, k, v, cu_seqlens=torch.tensor([0, 8]))


def test_visible_keys_of_the_oracle() -> None:
    """The oracle of sampled rows and the dense one agree: neither alone is trusted."""
    q, k, v = inputs(12, 6, 4, dtype=torch.float64)
    assert relative(some_rows(q, k, v, 0.7, list(range(12))), lla_reference(q, k, v, ridge_lambda=0.7)[0]) <= 1e-10
    assert int(visible_keys(3, 3, True, None).sum()) == 6
