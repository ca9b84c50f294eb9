# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2-135M-Instruct: all 272 tensors, its tokenizer, its memory, its first words."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
import torch
from tiny_models import gguf_name, random_weights, tiny_config, write_gguf

from tilewright.formats import Int4Weight, Int8Weight
from tilewright.models import LanguageModel, LlamaConfig, load, save, to_transformers

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(smollm2_gguf) -> LanguageModel:
    return load(smollm2_gguf)


def test_configuration(model):
    assert model.config == LlamaConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    )


def test_all_tensors_equal_the_gguf_packages_values(model, smollm2_gguf):
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2_gguf).tensors}
    assert len(tensors) == len(model.weights) == 272
    kinds = [type(w) for w in model.weights.values()]
    assert kinds.count(Int4Weight) == 210
    assert kinds.count(Int8Weight) == 1
    for name in model.weights:
        tensor = tensors[gguf_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj." in name or ".k_proj." in name:
            # file order (head, pair, member) to half-split order (head, member, pair)
            heads = values.shape[0] // 64
            values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
        np.testing.assert_array_equal(model.dense(name).numpy(), values, err_msg=name)


def test_weights_equal_transformers_own_gguf_loading(model, smollm2_gguf):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    state = theirs.state_dict()
    for name in model.weights:
        assert torch.equal(model.dense(name), state[name]), name


def test_tokenizer_gives_the_tokens_of_transformers(model, smollm2_gguf):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    texts = [
        "The capital of France is Paris.",
        "  two  spaces\n\n\tand a tab",
        "naïve café, Grüße, 你好, 🙂🙂",
        "it's we'll they've I'd",
        "def f(x):\n    return x + 1\n",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
    ]
    for text in texts:
        assert model.tokenizer.encode(text) == theirs.encode(text), text
        assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Hello"}]
    arguments = {"tokenize": False, "add_generation_prompt": True}
    assert model.tokenizer.apply_chat_template(chat, **arguments) == theirs.apply_chat_template(chat, **arguments)


def test_every_digit_is_a_token_of_its_own(model):
    """SmolLM's vocabulary was learned that way; the file says so in tokenizer.ggml.pre."""
    tokens = model.tokenizer.convert_ids_to_tokens(model.tokenizer.encode("in 1990"))
    assert tokens[-4:] == ["1", "9", "9", "0"]


def test_saved_and_loaded_again_it_is_identical(model, tmp_path):
    save(model, tmp_path / "c", tokenizer=False)
    again = load(tmp_path / "c")
    assert again.config == model.config
    assert again.weights.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        other = again.weights[name]
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, other)
            continue
        for part, tensor in weight.to_tensors("w").items():
            assert torch.equal(tensor, other.to_tensors("w")[part]), name


MEMORY = """
import sys
from pathlib import Path
from tilewright.models import load
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
load(sys.argv[2])  # a tiny model: the libraries' own pages are then there before the real one's are counted
before = resident("VmRSS")
model = load(sys.argv[1])
print(resident("VmRSS") - before, resident("VmHWM") - before, model.nbytes)
"""


def test_no_float_copy_of_the_weights_stays(smollm2_gguf, tmp_path):
    """Resident growth after loading is at most 1.15 times the bytes of the weights; float copies would be 5 times."""
    config = tiny_config()
    tiny = write_gguf(tmp_path / "tiny.gguf", config, random_weights(config))
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(smollm2_gguf), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, peak, nbytes = map(int, done.stdout.split())
    assert nbytes < 97_000_000
    assert growth <= 1.15 * nbytes
    # during loading one more copy of the largest tensor (the embedding, 30 MB) and the vocabulary's strings
    assert peak <= 2 * nbytes


@pytest.mark.parametrize(
    ("text", "continued"),
    [
        ("The capital of France is", " Paris"),
        ("The opposite of hot is", " cold"),
        ("Water freezes at zero degrees", " Celsius"),
    ],
)
def test_it_continues_with_a_low_bit_forward_pass(model, text, continued):
    # In float32 each of these leads the next token by more than two: rounding does not decide.
    theirs = to_transformers(model, act="fp8")
    prompt = model.tokenizer(text, return_tensors="pt")["input_ids"]
    out = theirs.generate(prompt, max_new_tokens=4, do_sample=False)
    assert model.tokenizer.decode(out[0, prompt.shape[1] :]).startswith(continued)
