# SPDX-License-Identifier: Apache-2.0
"""save() and load() of tilewright checkpoints: bitwise, strict, and atomic on a full disk or an interrupt."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, random_weights, tiny_config, write_gguf, write_transformers

from tilewright import _files
from tilewright.formats import Int4Weight, Int8Weight, quantize_int4
from tilewright.models import CheckpointError, LanguageModel, RopeScaling, load, save
from tilewright.models.checkpoint import header_checksum
from tilewright.models.language_model import linear_names


def parts(weight) -> dict[str, torch.Tensor]:
    return {"": weight} if isinstance(weight, torch.Tensor) else weight.to_tensors("w")


def assert_same(first: LanguageModel, second: LanguageModel) -> None:
    """Equal in every bit and every dtype, and in what is recorded beside the weights."""
    assert first.config == second.config
    assert (first.settings, first.notes, first.source) == (second.settings, second.notes, second.source)
    assert first.weights.keys() == second.weights.keys()
    for name, weight in first.weights.items():
        other = second.weights[name]
        assert type(weight) is type(other)
        if isinstance(weight, Int4Weight | Int8Weight):
            assert weight.metadata() == other.metadata()
        for part, tensor in parts(weight).items():
            assert tensor.dtype == parts(other)[part].dtype
            assert torch.equal(tensor.view(torch.uint8), parts(other)[part].view(torch.uint8)), name


def quantized_model(seed: int = 0, **options) -> LanguageModel:
    config = tiny_config()
    weights = dict(random_weights(config, seed))
    for name in linear_names(config):
        weights[name] = quantize_int4(weights[name], **({"group_size": 32} | options))
    weights["model.layers.0.self_attn.key_scale"] = torch.ones(2, 16)
    settings = {"method": "rtn", "calibration": {"text": "speeches", "tokens": 0}}
    return LanguageModel(config, weights, notes=["a note"], settings=settings, source="tiny")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_models_come_back_bit_for_bit(tmp_path, dtype, symmetric):
    if dtype == torch.float8_e4m3fn and not symmetric:
        dtype = torch.float32
    model = quantized_model(scale_dtype=dtype, symmetric=symmetric, per_tensor_scale="auto")
    save(model, tmp_path / "c")
    assert_same(model, load(tmp_path / "c"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "Q5_0"])
def test_imported_models_come_back_bit_for_bit(tmp_path, kind):
    config = tiny_config(rope_scaling=RopeScaling("factors", factors=(1.0,) * 7 + (2.0,)), tie_word_embeddings=False)
    factors = torch.tensor(config.rope_scaling.factors).numpy()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), KINDS[kind], rope_factors=factors)
    model = load(path)
    save(model, tmp_path / "c", tokenizer=False)
    assert_same(model, load(tmp_path / "c"))
    assert_same(model, load(tmp_path / "c" / "model.safetensors"))


def test_tokenizer_is_saved_and_gives_the_same_tokens(tmp_path):
    config = tiny_config()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), extra={"tokenizer.chat_template": template})
    model = load(path)
    save(model, tmp_path / "c")
    again = load(tmp_path / "c")
    text = "abc aab <|stop|>12"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.tokenizer.chat_template == template
    save(model, tmp_path / "bare", tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        _ = load(tmp_path / "bare").tokenizer


def test_a_checkpoint_is_replaced_and_foreign_files_are_not(tmp_path):
    target = tmp_path / "c"
    save(quantized_model(0), target)
    save(quantized_model(1), target)
    assert_same(quantized_model(1), load(target))
    (target / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"diary\.txt"):
        save(quantized_model(0), target)
    foreign = write_transformers(tmp_path / "hf", tiny_config(), random_weights(tiny_config()))
    (foreign / "config.json").unlink()
    with pytest.raises(FileExistsError, match="not part of a tilewright checkpoint"):
        save(quantized_model(0), foreign)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        save(quantized_model(0), tmp_path / "file")


def test_weights_that_do_not_fit_the_configuration_are_not_saved(tmp_path):
    model = quantized_model()
    del model.weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        save(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def rewrite(directory: Path, change) -> None:
    """Apply ``change(header, tensors)`` to a saved checkpoint and write the result in its place."""
    file = directory / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["tilewright"])
    tensors = load_file(file)
    change(header, tensors)
    if "crc32" in header:
        header["crc32"] = header_checksum(header)
    save_file(tensors, file, metadata={"tilewright": json.dumps(header)})


def _drop(mapping, key):
    del mapping[key]


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, _: h.update(version=3), "'version' is 3, this tilewright reads 1 and 2"),
        (lambda h, _: h.update(version=True), "'version' is True"),
        (lambda h, _: h.update(format="other"), "'format'"),
        (lambda h, _: h.update(surprise=1), "'surprise' is unknown"),
        (lambda h, _: _drop(h, "settings"), "'settings' is missing"),
        (lambda h, _: h.update(notes="text"), "'notes' is a str"),
        (lambda h, _: h.update(notes=[1]), "list of strings"),
        (lambda h, _: h["config"].update(hidden_size=128), "shape"),
        (lambda h, _: h["config"].update(colour=1), "'colour'"),
        (lambda h, _: _drop(h["config"], "rope_theta"), "'rope_theta' is missing"),
        (lambda h, _: h["config"].update(num_hidden_layers=3), r"model\.layers\.2.*missing"),
        (lambda h, _: h["config"].update(num_hidden_layers=1), r"model\.layers\.1.*does not belong"),
        (lambda _, t: _drop(t, NORM), r"model\.norm\.weight.*missing in the file"),
        (lambda _, t: t.update(extra=torch.zeros(1)), "'extra' is not in the header"),
        (lambda h, _: _drop(h["weights"], NORM), "belongs to no weight"),
        (lambda _, t: t.update({NORM: torch.zeros(63)}), r"model\.norm\.weight.*damaged"),
        (lambda _, t: t.update({NORM: t[NORM].half()}), r"model\.norm\.weight.*damaged"),
        (lambda _, t: t[NORM].view(torch.int32)[3:4].bitwise_xor_(1), r"model\.norm\.weight.*damaged"),
        (lambda _, t: t[UP + ".codes"][0, 0:1].bitwise_xor_(16), r"up_proj\.weight\.codes.*damaged"),
        (lambda h, _: h["weights"][UP]["record"].update(group_size=64), "up_proj"),
        (lambda h, _: h["weights"][UP]["record"].update(group_size=float("inf")), "up_proj"),
        (lambda h, _: h["weights"][UP]["record"].update(shape=7), "up_proj"),
        (lambda h, _: h["weights"][UP].update(kind="int3"), "int3"),
        (lambda h, _: h["weights"][UP].update(kind=["int4"]), "up_proj"),
        (lambda h, _: h["weights"].update({NORM: None}), r"model\.norm\.weight"),
        (lambda h, _: h["checksums"].update({NORM: None}), r"model\.norm\.weight"),
    ],
)
def test_every_deviation_is_named(tmp_path, change, message):
    save(quantized_model(), tmp_path / "c")
    rewrite(tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "c")


def test_an_altered_header_is_found_by_its_checksum(tmp_path):
    save(quantized_model(), tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b"10000.0") == 1
    file.write_bytes(content.replace(b"10000.0", b"10001.0"))
    with pytest.raises(CheckpointError, match="its own crc32"):
        load(tmp_path / "c")


def test_second_metadata_key_is_refused(tmp_path):
    save(quantized_model(), tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata | {"more": "1"})
    with pytest.raises(CheckpointError, match="one key"):
        load(tmp_path / "c")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("moment", ["weights", "tokenizer", "sync", "rename"])
def test_an_interrupt_leaves_the_old_checkpoint_or_nothing(tmp_path, monkeypatch, existing, moment):
    config = tiny_config()
    model = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config)))
    target = tmp_path / "c"
    if existing:
        save(quantized_model(1), target)
    before = sorted(p.name for p in tmp_path.iterdir())

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    if moment == "weights":

        def half_written(_tensors, path, **_kwargs):
            Path(path).write_bytes(b"half a file")
            raise KeyboardInterrupt

        monkeypatch.setattr("safetensors.torch.save_file", half_written)
    elif moment == "tokenizer":
        monkeypatch.setattr(type(model.tokenizer), "save_pretrained", interrupted)
    elif moment == "sync":
        monkeypatch.setattr(_files, "sync", interrupted)
    else:
        monkeypatch.setattr(_files, "_replace_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, target)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if existing:
        assert_same(quantized_model(1), load(target))


FULL_DISK = """
import resource, sys
from pathlib import Path
from tilewright.models import load, save
model = load(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    save(model, Path(sys.argv[2]), tokenizer=False)
except OSError as error:
    print("refused:", error)
    sys.exit(7)
"""


@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_or_nothing(tmp_path, existing):
    """A limit on the size of files makes the kernel refuse the write in the middle, as a full disk does."""
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config))
    target = tmp_path / "c"
    if existing:
        save(quantized_model(1), target)
    before = sorted(p.name for p in tmp_path.iterdir())
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), str(target), "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "refused" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if existing:
        assert_same(quantized_model(1), load(target))
