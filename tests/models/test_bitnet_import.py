# SPDX-License-Identifier: Apache-2.0
"""BitNet checkpoints of users: transformers' three layouts, the first checkpoints, and GGUF's ternary types.

transformers' own BitNet classes and the gguf package are the oracles.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import KINDS, random_weights, tiny_config, write_gguf, write_transformers

from tilewright.formats import PackedTernary, pack_ternary, quantize_ternary
from tilewright.models import CheckpointError, LanguageModel, load
from tilewright.models.engine import Engine
from tilewright.models.language_model import linear_names
from tilewright.nn import BitLinear

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}


def bitnet_config(**changes: Any) -> Any:
    return tiny_config(**({"model_type": "bitnet", "hidden_act": "relu2"} | changes))


def ternary_parts(config: Any) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Float tensors of the rest, and by linear the int8 values and the scale of a random latent weight."""
    rest = random_weights(config)
    parts = {name: quantize_ternary(rest.pop(name)) for name in linear_names(config)}
    return rest, parts


def quantization(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": None} | changes}


def packed(values: torch.Tensor) -> torch.Tensor:
    """transformers' packing, by its own definition: rows in four blocks, two bits each, value + 1."""
    rows = -(-values.shape[0] // 4)
    out = torch.zeros(rows, values.shape[1], dtype=torch.uint8)
    for i, row in enumerate(values):
        out[i % rows] |= (row + 1).to(torch.uint8) << (2 * (i // rows))
    return out


def check(model: LanguageModel, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], exact_scale: bool = True) -> None:
    for name, (values, scale) in parts.items():
        weight = model.weights[name]
        assert isinstance(weight, PackedTernary), name
        assert torch.equal(weight.unpack(), values), name
        if exact_scale:
            assert torch.equal(weight.scale, scale), name
        else:
            torch.testing.assert_close(weight.scale.expand(scale.numel()), scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear", None])
def test_packed_checkpoints(tmp_path: Path, linear_class: str | None) -> None:
    config = bitnet_config()
    rest, parts = ternary_parts(config)
    tensors = dict(rest)
    multiplies = linear_class == "autobitlinear"
    for name, (values, scale) in parts.items():
        tensors[name] = packed(values)
        tensors[name + "_scale"] = scale.clone() if multiplies else 1.0 / scale
    changes = quantization(**({} if linear_class is None else {"linear_class": linear_class}))
    model = load(write_transformers(tmp_path / "m", config, tensors, changes=changes))
    assert model.config == config
    check(model, parts, exact_scale=multiplies)
    assert any("ternary matrices" in note for note in model.notes)
    for name, value in rest.items():
        assert torch.equal(model.weights[name], value)  # type: ignore[arg-type]


def test_packing_is_that_of_transformers() -> None:
    from transformers.integrations.bitnet import pack_weights

    values = torch.randint(-1, 2, (12, 7))
    assert torch.equal(packed(values), pack_weights(values.clone()))


def test_unpacked_and_latent_checkpoints(tmp_path: Path) -> None:
    config = bitnet_config(hidden_act="silu")
    rest, parts = ternary_parts(config)
    tensors = dict(rest)
    for name, (values, scale) in parts.items():
        tensors[name], tensors[name + "_scale"] = values.to(torch.bfloat16), scale.clone()
    changes = quantization(linear_class="autobitlinear", quantization_mode="offline")
    check(load(write_transformers(tmp_path / "offline", config, tensors, changes=changes)), parts)

    latent = random_weights(config)
    changes = quantization(linear_class="autobitlinear", quantization_mode="online")
    check(load(write_transformers(tmp_path / "online", config, latent, changes=changes)), parts)


def test_llama_checkpoints_with_ternary_linears(tmp_path: Path) -> None:
    config = tiny_config()
    rest, parts = ternary_parts(config)
    tensors = dict(rest)
    for name, (values, scale) in parts.items():
        tensors[name], tensors[name + "_scale"] = packed(values), 1.0 / scale
    model = load(write_transformers(tmp_path / "m", config, tensors, changes=quantization()))
    check(model, parts, exact_scale=False)
    assert not model.config.has_sub_norms


def test_the_first_checkpoints(tmp_path: Path) -> None:
    """bitnet_b1_58-large: architecture by another name, latent floats, sub-norms by other names, a Llama's type."""
    config = bitnet_config(hidden_act="silu")
    latent = random_weights(config)
    parts = {name: quantize_ternary(latent[name]) for name in linear_names(config)}
    renamed = {
        name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln").replace(
            "mlp.ffn_sub_norm", "mlp.ffn_layernorm"
        ): value
        for name, value in latent.items()
    }
    changes = {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "weight_bits": 1, "input_bits": 8}
    model = load(write_transformers(tmp_path / "m", config, renamed, changes=changes))
    assert model.config == config
    check(model, parts)
    norm = "model.layers.1.mlp.ffn_sub_norm.weight"
    assert torch.equal(model.weights[norm], latent[norm])  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden_act", ["silu", "relu2"])
def test_logits_are_near_those_of_transformers(tmp_path: Path, hidden_act: str) -> None:
    """transformers' own classes on the same files, then with our layers over the imported weights in their place.

    The two round activations by 127 / max and by max / 127, which differ in the last place: a code may fall otherwise
    at a half, one in some 10^5. One such step, 1/127 of a token's largest value in one of 64 columns, is below
    10^-3 of the logits; everything else is rounding of float32.
    """
    from transformers import AutoModelForCausalLM

    config = bitnet_config(hidden_act=hidden_act)
    latent = random_weights(config)
    changes = quantization(linear_class="autobitlinear", quantization_mode="online")
    folder = write_transformers(tmp_path / "m", config, latent, changes=changes | {"dtype": "float32"})
    theirs = AutoModelForCausalLM.from_pretrained(str(folder))
    assert type(theirs.model.layers[0].self_attn.q_proj).__name__ == "AutoBitLinear"
    ids = list(range(3, 23))
    model = load(folder)
    with torch.no_grad():
        expected = _eager(theirs, ids)
        for name in linear_names(config):
            weight = model.weights[name]
            assert isinstance(weight, PackedTernary)
            owner, _, leaf = name.removesuffix(".weight").rpartition(".")
            theirs.get_submodule(owner).register_module(leaf, BitLinear.from_packed(weight))
        got = _eager(theirs, ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    engine = Engine(model, 32).logits(ids)  # bfloat16 head and cache: 2^-9 for each value, in two layers
    assert float((engine - got).norm() / got.norm()) < 0.05


def _eager(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits without compiling the layers' rounding."""
    with torch.compiler.set_stance("force_eager"):
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"linear_class": "other"}, None, "linear_class='other'"),
        ({"quantization_mode": "often"}, None, "quantization_mode='often'"),
        ({"use_rms_norm": True}, None, "a norm of its own"),
        ({"modules_to_not_convert": "lm_head"}, None, "list of names"),
        ({}, ("weight", torch.full((16, 64), 255, dtype=torch.uint8)), "stands for no ternary value"),
        ({}, ("weight", torch.zeros(15, 64, dtype=torch.uint8)), r"uint8 \[16, 64\]"),
        ({}, ("weight", torch.full((64, 64), 0.5)), "other values"),
        ({}, ("weight_scale", torch.zeros(1)), "positive"),
        ({}, ("weight_scale", torch.ones(2)), "one float"),
        ({}, ("weight_scale", None), "is missing"),
    ],
)
def test_bad_checkpoints_are_refused(tmp_path: Path, changes: Any, tensor: Any, message: str) -> None:
    config = bitnet_config()
    rest, parts = ternary_parts(config)
    tensors = dict(rest)
    for name, (values, scale) in parts.items():
        tensors[name], tensors[name + "_scale"] = packed(values), 1.0 / scale
    if tensor is not None:
        name = f"model.layers.0.self_attn.q_proj.{tensor[0]}"
        tensors.pop(name)
        if tensor[1] is not None:
            tensors[name] = tensor[1]
    folder = write_transformers(tmp_path / "m", config, tensors, changes=quantization(**changes))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="hidden_act='relu2' of a llama must be silu"):
        tiny_config(hidden_act="relu2")
    with pytest.raises(CheckpointError, match="must be hidden_size"):
        bitnet_config(head_dim=32)


def write_bitnet_gguf(
    path: Path, architecture: str, config: Any, weights: dict[str, torch.Tensor], kind: str, *, beside: bool = False
) -> Path:
    """A GGUF file byte by byte: the gguf package does not write I2_S. Linears in ``kind``, the rest in F32."""
    keys: list[tuple[str, int, bytes]] = [("general.architecture", 8, _string(architecture))]
    for key, value in (
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ):
        keys.append((f"{architecture}.{key}", 4, struct.pack("<I", value)))
    keys.append((f"{architecture}.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", config.rms_norm_eps)))
    keys.append((f"{architecture}.rope.freq_base", 6, struct.pack("<f", config.rope_theta)))
    linears = set(linear_names(config))
    tensors: list[tuple[str, tuple[int, ...], int, bytes]] = []
    for name, tensor in weights.items():
        place, type_id, data = _gguf_name(name), 0, tensor.float().numpy().tobytes()
        if name in linears:
            type_id, data = _ternary_bytes(tensor, kind, beside)
            if beside:
                scale = quantize_ternary(tensor)[1].numpy().tobytes()
                tensors.append((place.replace(".weight", ".scale"), (1,), 0, scale))
        tensors.append((place, tuple(tensor.shape), type_id, data))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    for key, value_type, data in keys:
        head += _string(key) + struct.pack("<I", value_type) + data
    body = b""
    for name, shape, type_id, data in tensors:
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", type_id, len(body))
        body += data + bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_name(name: str) -> str:
    from tiny_models import gguf_name

    for ours, theirs in (("self_attn.attn_sub_norm", "attn_sub_norm"), ("mlp.ffn_sub_norm", "ffn_sub_norm")):
        if ours in name:
            return name.replace("model.layers", "blk").replace(ours, theirs)
    return gguf_name(name)


def _ternary_bytes(latent: torch.Tensor, kind: str, beside: bool) -> tuple[int, bytes]:
    """ggml type and bytes of a rounded weight; with ``beside`` its scale is one and kept elsewhere."""
    values, scale = quantize_ternary(latent)
    factor = torch.ones(1) if beside else scale
    if kind == "I2_S":  # blocks of 128 columns: byte j holds columns j, 32+j, 64+j, 96+j, the first in the top bits
        codes = (values + 1).to(torch.uint8).numpy().reshape(-1, 4, 32)
        out = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
        return 36, out.tobytes() + factor.numpy().tobytes() + bytes(28)
    quantized = gguf.quantize((values.float() * factor).numpy(), KINDS[kind])
    return int(KINDS[kind]), quantized.tobytes()


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "I2_S"])
@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58", "bitnet-25"])
def test_gguf_files_of_bitnets(tmp_path: Path, kind: str, architecture: str) -> None:
    act = "silu" if architecture == "bitnet" else "relu2"
    config = bitnet_config(**WIDE, hidden_act=act, bos_token_id=None, eos_token_ids=())
    weights = random_weights(config)
    model = load(write_bitnet_gguf(tmp_path / "m.gguf", architecture, config, weights, kind))
    assert model.config == config
    parts = {name: quantize_ternary(weights[name]) for name in linear_names(config)}
    for name, (values, scale) in parts.items():
        weight = model.weights[name]
        assert isinstance(weight, PackedTernary)
        assert torch.equal(weight.unpack(), values)
        stored = scale if kind == "I2_S" else scale.to(torch.float16).float()
        assert torch.equal(weight.scale, stored)
    assert bool(Engine(model, 16).logits([1, 2, 3]).isfinite().all())


def test_scales_kept_beside_the_values(tmp_path: Path) -> None:
    config = bitnet_config(**WIDE, bos_token_id=None, eos_token_ids=())
    weights = random_weights(config)
    model = load(write_bitnet_gguf(tmp_path / "m.gguf", "bitnet", config, weights, "I2_S", beside=True))
    for name in linear_names(config):
        weight = model.weights[name]
        assert isinstance(weight, PackedTernary)
        assert torch.equal(weight.scale, quantize_ternary(weights[name])[1])


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_llama_files_in_ternary_types(tmp_path: Path, kind: str) -> None:
    """Rows of Q and K are put back in order; weights that were not ternary before become float, with a note."""
    config = tiny_config(**WIDE)
    weights = random_weights(config)
    ternary = {
        name: values.float() * scale
        for name in linear_names(config)
        for values, scale in [quantize_ternary(weights[name])]
    }
    model = load(write_gguf(tmp_path / "t.gguf", config, weights | ternary, KINDS[kind]))
    for name in linear_names(config):
        weight = model.weights[name]
        assert isinstance(weight, PackedTernary)
        assert torch.equal(weight.unpack(), ternary[name].sign().to(torch.int8))
    model = load(write_gguf(tmp_path / "f.gguf", config, weights, KINDS[kind]))
    # Rows of 256 columns are one block, with one scale; the MLP's inner width takes two.
    assert isinstance(model.weights["model.layers.0.self_attn.q_proj.weight"], PackedTernary)
    name = "model.layers.0.mlp.down_proj.weight"
    assert isinstance(model.weights[name], torch.Tensor)
    assert any("dequantized" in note for note in model.notes)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        exact = gguf.dequantize(gguf.quantize(weights[name].numpy(), KINDS[kind]), KINDS[kind])
        np.testing.assert_array_equal(model.dense(name).numpy(), exact)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_blocks_of_zeros_have_no_scale(tmp_path: Path, kind: str) -> None:
    from tilewright.formats import wrap_ternary

    values = torch.randint(-1, 2, (3, 512), dtype=torch.int8)
    values[1, 256:], values[2] = 0, 0
    data = torch.from_numpy(gguf.quantize((values.float() * 0.5).numpy(), KINDS[kind]))
    packed = wrap_ternary(data, (3, 512), kind.lower())  # type: ignore[arg-type]
    assert torch.equal(packed.dequantize(), values.float() * 0.5)


def test_bad_i2_s_files_are_refused(tmp_path: Path) -> None:
    config = bitnet_config(**WIDE, bos_token_id=None, eos_token_ids=())
    path = write_bitnet_gguf(tmp_path / "m.gguf", "bitnet", config, random_weights(config), "I2_S")
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    with pytest.raises(CheckpointError, match="truncated"):
        load(path)
    values = pack_ternary(torch.ones(256, 256, dtype=torch.int8), "i2_s").payload.numpy().tobytes()
    assert values.count(0xAA) == len(values)
    narrow = bitnet_config(bos_token_id=None, eos_token_ids=())
    with pytest.raises((CheckpointError, ValueError)):
        load(write_bitnet_gguf(tmp_path / "n.gguf", "bitnet", narrow, random_weights(narrow), "I2_S"))


def test_a_bitnet_with_a_norm_in_every_linear_is_named(tmp_path: Path) -> None:
    config = bitnet_config()
    tensors = random_weights(config)
    tensors["model.layers.0.self_attn.q_proj.rms_norm.weight"] = torch.ones(64)
    folder = write_transformers(tmp_path / "m", config, tensors)
    with pytest.raises(CheckpointError, match="rms_norm"):
        load(folder)
    save_file(random_weights(config), str(folder / "model.safetensors"))
    assert load(folder).config.has_sub_norms
