# SPDX-License-Identifier: Apache-2.0
"""Embeddings and linears over packed matrices: rows are exact, products are the operators'."""

from __future__ import annotations

import pytest
import torch

from tilewright.formats import quantize_int4
from tilewright.formats.int8 import Int8Weight
from tilewright.nn import BFloat16Linear, Int4Embedding, Int8Linear, PackedEmbedding
from tilewright.ops import dense_linear


def int8_weight(n: int, k: int) -> Int8Weight:
    scales = torch.rand(n, k // 32).to(torch.float16)
    return Int8Weight(torch.randint(-128, 128, (n, k)).to(torch.int8), scales)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 64), (33, 576)])
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_rows_are_the_weights(n, k, kind):
    weight = int8_weight(n, k) if kind == "int8" else torch.randn(n, k - 7).bfloat16()
    layer = Int8Linear(weight) if kind == "int8" else BFloat16Linear(weight)
    dense = weight.dequantize() if kind == "int8" else weight.float()
    tokens = torch.randint(0, n, (2, 0, 3)), torch.randint(0, n, (2, 5)), torch.tensor(n - 1)
    for index in tokens:
        assert torch.equal(PackedEmbedding(layer)(index), dense[index])
    for outside in (-1, n):
        with pytest.raises(RuntimeError, match=f"rows 0 .. {n - 1}"):
            layer.rows(torch.tensor([outside]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_rows_are_the_weights(symmetric):
    weight = quantize_int4(torch.randn(19, 100), 32, torch.bfloat16, symmetric=symmetric)
    embedding = Int4Embedding(weight)
    index = torch.randint(0, 19, (3, 4))
    assert torch.equal(embedding(index), weight.dequantize()[index])
    before = embedding.scales.clone()
    embedding.to(torch.float16)
    assert torch.equal(embedding.scales, before)
    assert embedding.scales.dtype == torch.bfloat16


def test_bias_is_added_and_checked():
    weight, bias, x = int8_weight(17, 64), torch.randn(17), torch.randn(2, 64)
    y = dense_linear.int8_linear(x, dense_linear.int8_pack(weight), 17)
    assert torch.equal(Int8Linear(weight, bias)(x), y + bias)
    with pytest.raises(ValueError, match=r"Int8Linear: bias has shape \[3\]"):
        Int8Linear(weight, torch.zeros(3))


def test_an_embedding_and_its_head_share_one_copy():
    head = Int8Linear(int8_weight(17, 64))
    both = torch.nn.ModuleDict({"embedding": PackedEmbedding(head), "head": head})
    assert len({t.data_ptr() for t in both.state_dict().values()}) == 1
