# SPDX-License-Identifier: Apache-2.0
"""BitLinear: training sees the integers of the kernels, gradients go straight through, packing changes no bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tilewright import ops
from tilewright.formats import pack_ternary
from tilewright.nn import BitLinear, build_bitnet, pack_bitlinears, replace_with_bitlinear


def oracle(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """int64 accumulators [M, N] by the paper's formulas, token scales [M] and the weight's scale, one by one."""
    gamma = max(float(weight.abs().mean()), torch.tensor(1e-5).item())
    values = (weight / torch.tensor(gamma)).round().clamp(-1, 1).to(torch.int64)
    codes, scales = [], []
    for token in x:
        scale = torch.maximum(token.abs().max(), torch.tensor(1e-5)) / 127
        codes.append((token / scale).round().to(torch.int64))
        scales.append(scale)
    return torch.stack(codes) @ values.T, torch.stack(scales), gamma


def layer_of(weight: Tensor, bias: Tensor | None = None) -> BitLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return BitLinear.from_linear(linear)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (64, 256), (33, 70), (96, 31)])
def test_training_computes_the_integers_of_the_paper(rows: int, columns: int) -> None:
    weight, x = torch.randn(rows, columns), torch.randn(7, columns) * 3
    acc, scales, gamma = oracle(x, weight)
    y = layer_of(weight)(x)
    # One rounding of the product of the scales, one of the result: equality, no tolerance.
    assert torch.equal(y, acc.float() * (scales * torch.tensor(gamma))[:, None])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packing", ["q2", "t3w", "t5"])
def test_packing_changes_no_bit(level: str, packing: str, bias: bool) -> None:
    del level
    weight = torch.randn(70, 130) * 0.02
    layer = layer_of(weight, torch.randn(70) if bias else None)
    x = torch.randn(2, 9, 130)
    expected = layer(x).detach()
    packed = layer.pack_(packing)
    assert packed.is_packed
    assert list(packed.parameters()) == ([packed.bias] if bias else [])
    assert torch.equal(packed(x), expected)
    assert not packed(x).requires_grad


@pytest.mark.parametrize("code", [1.0, -1.0])
def test_sums_of_one_sign_are_exact(code: float) -> None:
    """The largest sums: all weights of one sign, all activations at the largest code, a width beyond 2^16."""
    columns = 100_000
    layer = layer_of(torch.full((3, columns), 0.5 * code))
    x = torch.full((1, columns), 2.0)
    scale = (torch.tensor(2.0) / 127) * torch.tensor(0.5)
    assert torch.equal(layer(x), torch.full((1, 3), code * 127.0 * columns) * scale)
    assert torch.equal(layer.pack_()(x), torch.full((1, 3), code * 127.0 * columns) * scale)


def test_edges_zeros_floor_and_half_to_even() -> None:
    layer = layer_of(torch.tensor([[1.0, -1.0, 0.2]]))
    assert torch.equal(layer(torch.zeros(2, 3)), torch.zeros(2, 1))
    tiny = torch.tensor([[1e-7, 0.0, 0.0]])  # below the floor of 1e-5: code round(1.27) = 1
    assert torch.equal(layer(tiny), layer.pack_()(tiny))
    # 127 is the largest, so a code is the value itself: 0.5 and 1.5 round to 0 and 2.
    halves = torch.tensor([[127.0, 0.5, 1.5]])
    codes, _ = ops.quantize_ternary_activation(halves)
    assert codes.tolist() == [[127, 0, 2]]
    ones = layer_of(torch.ones(1, 3))
    assert float(ones(halves).detach()) == 129.0
    zero = layer_of(torch.zeros(2, 3))
    assert torch.equal(zero(halves), torch.zeros(1, 2))


def test_gradients_go_straight_through() -> None:
    """Against autograd over the dequantized values, where rounding is written as x + (rounded - x).detach()."""
    weight, x = torch.randn(6, 10, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    layer = layer_of(weight.float())
    seed = torch.randn(4, 6)
    given = x.float().requires_grad_()
    layer(given).backward(seed)
    acc, scales, gamma = oracle(x.float(), weight.float())
    del acc
    w, t = weight.clone().requires_grad_(), x.clone().requires_grad_()
    codes = (x.float() / scales[:, None]).round().double() * scales[:, None].double()
    values = (weight.float() / gamma).round().clamp(-1, 1).double() * gamma
    y = (t + (codes - t).detach()) @ (w + (values - w).detach()).T
    y.backward(seed.double())
    assert given.grad is not None
    assert layer.weight is not None
    assert layer.weight.grad is not None
    # Sums of at most 10 products: K + 2 roundings of float32 relative to the sum of magnitudes.
    bound = 12 * 2.0**-24
    for got, exact, size in (
        (given.grad, t.grad, seed.double().abs() @ values.abs()),
        (layer.weight.grad, w.grad, seed.double().abs().T @ codes.abs()),
    ):
        assert exact is not None
        assert bool(((got.double() - exact).abs() <= bound * size + 1e-300).all())


def test_inputs_of_any_dtype_shape_and_layout() -> None:
    layer = layer_of(torch.randn(5, 8))
    x = torch.randn(3, 2, 8)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(layer(x)[1, 1], layer(x[1, 1]))
    wide = torch.randn(8, 3).T
    assert torch.equal(layer(wide), layer(wide.contiguous()))
    assert layer(torch.randn(0, 8)).shape == (0, 5)
    layer.pack_()
    assert layer(torch.randn(0, 8)).shape == (0, 5)
    assert torch.equal(layer(wide), layer(wide.contiguous()))


def test_its_own_norm_comes_first() -> None:
    linear = nn.Linear(16, 4, bias=False)
    layer = BitLinear.from_linear(linear, norm_eps=1e-6)
    x = torch.randn(3, 16) * 100
    plain = BitLinear.from_linear(linear)
    assert layer.norm is not None
    layer.norm.weight.data.uniform_(0.5, 2.0)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * layer.norm.weight
    assert torch.equal(layer(x), plain(normed))
    assert torch.equal(copy.deepcopy(layer).pack_()(x), layer(x))


def test_dtype_moves_leave_packed_weights_alone() -> None:
    layer = layer_of(torch.randn(6, 40))
    layer.pack_()
    before = layer(torch.ones(1, 40))
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer(torch.ones(1, 40)), before)


def test_models_are_converted_and_packed() -> None:
    model = nn.Sequential()
    model.add_module("inner", nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    model.add_module("lm_head", nn.Linear(8, 4))
    weights = list(model.parameters())
    assert replace_with_bitlinear(model) == ["inner.0", "inner.2"]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert type(model.lm_head) is nn.Linear
    x = torch.randn(3, 8)
    expected = model(x).detach()
    assert pack_bitlinears(model) == ["inner.0", "inner.2"]
    assert pack_bitlinears(model) == []
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=r"no nn.Linear outside"):
        replace_with_bitlinear(model)


def test_from_packed_checks_the_bias() -> None:
    weight = pack_ternary(torch.randint(-1, 2, (5, 7), dtype=torch.int8), "q2", scale=0.3)
    with pytest.raises(ValueError, match=r"bias has shape \[4\], needed \[5\]"):
        BitLinear.from_packed(weight, torch.zeros(4))
    layer = BitLinear.from_packed(weight)
    x = torch.randn(2, 7)
    assert torch.equal(layer(x), ops.ternary_linear(x, weight))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="in_features = 0"):
        BitLinear(0, 3)
    with pytest.raises(ValueError, match="exact sums"):
        BitLinear(1 << 17, 1)
    layer = layer_of(torch.randn(2, 3))
    assert layer.weight is not None
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.pack_()


def test_a_token_that_is_not_finite_spoils_itself_alone() -> None:
    layer = layer_of(torch.randn(4, 6))
    x = torch.randn(3, 6)
    x[1, 2] = float("inf")
    for one in (layer, copy.deepcopy(layer).pack_()):
        y = one(x)
        assert bool(torch.isfinite(y[[0, 2]]).all())
        assert bool(y[1].isnan().all())


@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_build_bitnet_has_norms_before_all_linears(act: str) -> None:
    model = build_bitnet(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, hidden_act=act
    )
    layers = [name for name, module in model.named_modules() if isinstance(module, BitLinear)]
    assert len(layers) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.attn_sub_norm.weight.shape == (32,)
    assert model.model.layers[0].mlp.ffn_sub_norm.weight.shape == (48,)
    loss = model(torch.randint(0, 50, (2, 9))).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    for changes, message in (
        ({"num_heads": 5}, "hidden_size"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ):
        values = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4}
        with pytest.raises(ValueError, match=message):
            build_bitnet(**(values | changes))
