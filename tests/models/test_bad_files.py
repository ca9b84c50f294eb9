# SPDX-License-Identifier: Apache-2.0
"""About 15,000 damaged files: each gives a CheckpointError or exactly the model that the file describes.

Damage to the bytes of a weight that leaves it finite cannot be seen in formats without checksums (GGUF,
plain safetensors); there the loaded tensor must equal the independent reading of the damaged bytes and all
others must be untouched. tilewright's own checkpoints carry checksums: there any damage is an error. Damage
to a constant that stays in range (rope_theta, eps, a token id) is likewise visible only in the latter.
"""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import KINDS, gguf_name, random_weights, tiny_config, write_gguf, write_transformers

from tilewright.formats import quantize_int4
from tilewright.models import CheckpointError, LanguageModel, load, save
from tilewright.models.gguf_file import read_header
from tilewright.models.language_model import linear_names

# constants whose damage no other part of a file contradicts
FREE = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id")
KIND_NAMES = ("Q4_0", "Q4_1", "Q8_0", "F16")


def parts(model: LanguageModel) -> dict[str, bytes]:
    """Every weight as bytes, with its type, for exact comparison."""
    found = {}
    for name, weight in model.weights.items():
        tensors = {"": weight} if isinstance(weight, torch.Tensor) else weight.to_tensors("")
        for part, tensor in tensors.items():
            key = f"{name}{part} {tensor.dtype} {tuple(tensor.shape)}"
            found[key] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def try_load(path: Path) -> LanguageModel | None:
    """The model, or None for a CheckpointError with a message; any other exception fails the test."""
    try:
        return load(path)
    except CheckpointError as error:
        message = str(error)
    assert len(message) > 15
    return None


def same_structure(model: LanguageModel, original: LanguageModel) -> bool:
    free = {name: getattr(original.config, name) for name in FREE}
    return dataclasses.replace(model.config, **free) == original.config


def check_cases(
    path: Path, cases: Iterable[bytes], original: LanguageModel, place: Path | None = None
) -> tuple[int, int]:
    """Load every damaged content; returns (refused, loaded). What loads must be the original in all its weights."""
    expected, refused, loaded = parts(original), 0, 0
    for content in cases:
        path.write_bytes(content)
        model = try_load(place or path)
        if model is None:
            refused += 1
            continue
        loaded += 1
        assert same_structure(model, original)
        assert parts(model) == expected
    return refused, loaded


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory) -> dict[str, tuple[Path, bytes, LanguageModel]]:
    """A tiny GGUF file per weight type: path to overwrite, sound content, the model it holds."""
    folder = tmp_path_factory.mktemp("gguf")
    config, files = tiny_config(rope_theta=50000.0), {}
    for kind in KIND_NAMES:
        path = write_gguf(folder / f"{kind}.gguf", config, random_weights(config), KINDS[kind])
        files[kind] = (path, path.read_bytes(), load(path))
    return files


def header_size(path: Path) -> int:
    return min(record.offset for record in read_header(path).tensors.values())


def flip(content: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_truncated_gguf(gguf_files, kind):
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    rng = random.Random(1)
    # every length of the header's first part, then a sample of all lengths
    lengths = [*range(150), *(rng.randrange(len(content)) for _ in range(250))]
    # the last tensor's padding carries nothing, so the very last bytes may be missing
    end = max(r.offset + r.nbytes for r in read_header(path).tensors.values())
    refused, loaded = check_cases(path, (content[:n] for n in lengths if n < end), original)
    assert loaded == 0
    assert refused >= 395


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_bit_flips_in_the_gguf_header(gguf_files, kind):
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    size, rng = header_size(path), random.Random(2)
    cases = (flip(content, rng.randrange(size), rng.randrange(8)) for _ in range(600))
    refused, loaded = check_cases(path, cases, original)
    assert refused + loaded == 600
    assert refused > 200


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_overwritten_numbers_in_the_gguf_header(gguf_files, kind):
    """Eight bytes anywhere become zero, all ones, or a number far beyond the file: lengths, counts, offsets, dims."""
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    size, rng = header_size(path), random.Random(3)
    values = [b"\xff" * 8, b"\0" * 8, *(struct.pack("<Q", v) for v in (1 << 31, 1 << 40, 1 << 63, (1 << 63) - 1))]

    def cases():
        for _ in range(400):
            at, value = rng.randrange(4, size - 8), rng.choice(values)
            yield content[:at] + value + content[at + 8 :]

    refused, loaded = check_cases(path, cases(), original)
    assert refused + loaded == 400
    assert refused > 250


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_inserted_deleted_and_shuffled_pieces_of_gguf(gguf_files, kind):
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    size, rng = header_size(path), random.Random(4)

    def cases():
        for _ in range(75):
            at, count = rng.randrange(size), rng.randrange(1, 40)
            yield content[:at] + rng.randbytes(count) + content[at:]
            yield content[:at] + content[at + count :]
            other = rng.randrange(size)
            yield content[:at] + content[other : other + count] + content[at + count :]
            yield content[:at] + rng.randbytes(count) + content[at + count :]

    refused, loaded = check_cases(path, cases(), original)
    assert refused + loaded == 300
    assert refused > 150


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_bit_flips_in_gguf_weights_change_that_weight_as_the_format_says(gguf_files, kind):
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    header, rng = read_header(path), random.Random(5)
    expected, records = parts(original), list(header.tensors.values())
    names = {gguf_name(name): name for name in original.weights}
    for _ in range(250):
        record = rng.choice(records)
        position = record.offset + rng.randrange(record.nbytes)
        damaged = flip(content, position, rng.randrange(8))
        path.write_bytes(damaged)
        raw = np.frombuffer(damaged, np.uint8, record.nbytes, record.offset).reshape(record.shape[0], -1)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw if len(record.shape) > 1 else raw.reshape(1, -1), KINDS(record.type_id))
        model = try_load(path)
        if model is None:
            assert not np.isfinite(values).all()
            continue
        name = names[record.name]
        if ".q_proj." in name or ".k_proj." in name:
            heads = values.shape[0] // 16
            values = values.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(values.shape)
        np.testing.assert_array_equal(model.dense(name).numpy(), values.reshape(record.shape), err_msg=name)
        got = parts(model)
        assert {k: v for k, v in got.items() if not k.startswith(name)} == {
            k: v for k, v in expected.items() if not k.startswith(name)
        }


def type_field(content: bytes, record) -> int:
    """Position of the type id in a tensor's directory entry."""
    name = record.name.encode()
    entry = content.index(struct.pack("<Q", len(name)) + name)
    return entry + 8 + len(name) + 4 + 8 * len(record.shape)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_mislabelled_gguf_tensors(gguf_files, kind):
    """Every tensor under every other type id: refused, or read as that type says where the sizes agree."""
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    header, cases = read_header(path), 0
    type_ids = [*(int(k) for k in KINDS), 4, 5, 31, 99, 1 << 31]
    for record in list(header.tensors.values())[:8]:
        at = type_field(content, record)
        for type_id in type_ids:
            if type_id == record.type_id:
                continue
            cases += 1
            path.write_bytes(content[:at] + struct.pack("<I", type_id) + content[at + 4 :])
            model = try_load(path)
            if model is not None:
                changed = {k.split(" ")[0] for k in parts(model).keys() ^ parts(original).keys()}
                name = next(n for n in original.weights if gguf_name(n) == record.name)
                assert all(k.startswith(name) for k in changed)
                sizes = gguf.GGML_QUANT_SIZES
                assert sizes[KINDS(type_id)][1] * sizes[KINDS(record.type_id)][0] == (
                    sizes[KINDS(record.type_id)][1] * sizes[KINDS(type_id)][0]
                )
    assert cases >= 250


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_non_finite_scales_and_values_in_every_gguf_tensor(gguf_files, kind, value):
    path, content, original = gguf_files[kind]
    path.write_bytes(content)
    for record in read_header(path).tensors.values():
        form = "<f" if record.type_name == "F32" else "<e"
        damaged = bytearray(content)
        struct.pack_into(form, damaged, record.offset, value)
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=f"{record.name}'.*NaN or infinite"):
            load(path)
    assert len(original.weights) == 20


OVERSIZED = """
import resource, sys
from pathlib import Path
from tilewright.models import CheckpointError, load
path = Path(sys.argv[1])
sound = path.read_bytes()
load(path)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
refused = 0
for at in range(8, int(sys.argv[2])):
    for value in (1 << 30, 1 << 36, (1 << 62) + 1):
        path.write_bytes(sound[:at] + value.to_bytes(8, "little") + sound[at + 8 :])
        try:
            load(path)
        except CheckpointError:
            refused += 1
print(refused)
"""


def test_oversized_numbers_allocate_nothing(tmp_path):
    """With 200 MB of address space to spare, no damaged length or dimension leads to a larger request."""
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), tokens=False)
    command = [sys.executable, "-c", textwrap.dedent(OVERSIZED), str(path), "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 800


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> tuple[Path, LanguageModel]:
    config = tiny_config(rope_theta=50000.0)
    weights = {name: w.to(torch.bfloat16) for name, w in random_weights(config).items()}
    place = write_transformers(tmp_path_factory.mktemp("hf"), config, weights)
    return place, load(place)


def safetensors_header(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_truncated_safetensors(directory):
    place, original = directory
    file = place / "model.safetensors"
    content, rng = file.read_bytes(), random.Random(6)
    lengths = [*range(100), *(rng.randrange(len(content)) for _ in range(300))]
    refused, loaded = check_cases(file, (content[:n] for n in lengths), original, place)
    file.write_bytes(content)
    assert (refused, loaded) == (400, 0)


def test_damaged_safetensors_headers(directory):
    place, original = directory
    file = place / "model.safetensors"
    content, rng = file.read_bytes(), random.Random(7)
    size = safetensors_header(content)

    def cases():
        for _ in range(700):
            yield flip(content, rng.randrange(size), rng.randrange(8))
        for _ in range(150):
            at, count = rng.randrange(size), rng.randrange(1, 20)
            yield content[:at] + rng.randbytes(count) + content[at + count :]
            yield content[:at] + content[at + count :]

    refused, loaded = check_cases(file, cases(), original, place)
    file.write_bytes(content)
    assert refused + loaded == 1000
    assert refused > 850


def test_mislabelled_safetensors_entries(directory):
    """Other dtypes, shapes and offsets for every tensor; a swap of two types of one size cannot be seen."""
    place, original = directory
    file = place / "model.safetensors"
    content = file.read_bytes()
    size = safetensors_header(content)
    header = json.loads(content[8:size])

    def encode(changed) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + content[size:]

    def cases():
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, (start, end) = entry["shape"], entry["data_offsets"]
            changes = [
                {"dtype": d} for d in ("F32", "I16", "U16", "U8", "BOOL", "F64", "I64", "C64", "F7", "", 7, None)
            ]
            changes += [{"shape": s} for s in ([], [0], [*shape, 2], [1 << 40, 1 << 40], [-1], ["a"], None, shape * 9)]
            pairs = (
                [0, 0],
                [end, start],
                [start, end + 2],
                [0, 1 << 62],
                [start + 1, end + 1],
                [-2, end],
                None,
                [start],
            )
            changes += [{"data_offsets": p} for p in pairs]
            for change in changes:
                yield encode(header | {name: entry | change})

    refused, loaded = check_cases(file, cases(), original, place)
    file.write_bytes(content)
    assert loaded == 0
    assert refused == 20 * 28


def test_damaged_config_json(directory):
    place, original = directory
    file = place / "config.json"
    content, rng = file.read_bytes(), random.Random(8)

    def cases():
        for _ in range(700):
            yield flip(content, rng.randrange(len(content)), rng.randrange(8))
        for _ in range(200):
            at, count = rng.randrange(len(content)), rng.randrange(1, 12)
            yield content[:at] + content[at + count :]

    refused, loaded = check_cases(file, cases(), original, place)
    file.write_bytes(content)
    assert refused + loaded == 900
    assert refused > 600


def test_wrong_values_in_config_json(directory):
    """Every key with every kind of value: refused, or without effect on the architecture."""
    place, original = directory
    file = place / "config.json"
    content = file.read_bytes()
    raw = json.loads(content)
    values = [None, True, -1, 0, 1 << 40, 1.5, 1e308, "64", "", [], [1], {}, {"a": 1}, float("nan"), float("inf")]
    cases = [json.dumps(raw | {key: value}).encode() for key in raw for value in values]
    refused, loaded = check_cases(file, cases, original, place)
    file.write_bytes(content)
    assert refused + loaded == len(raw) * len(values)
    assert refused > len(cases) / 2


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory) -> tuple[Path, LanguageModel]:
    config = tiny_config()
    weights = dict(random_weights(config))
    for name in linear_names(config):
        weights[name] = quantize_int4(weights[name], 32)
    weights = {n: w.bfloat16() if isinstance(w, torch.Tensor) else w for n, w in weights.items()}
    model = LanguageModel(config, weights, settings={"method": "rtn"}, source="tiny")
    place = save(model, tmp_path_factory.mktemp("own") / "c")
    return place, model


def test_any_damage_to_an_own_checkpoint_is_found(own_checkpoint):
    """Weights and header carry checksums, so a damaged file either is refused or says exactly the same."""
    place, original = own_checkpoint
    file = place / "model.safetensors"
    content, rng = file.read_bytes(), random.Random(9)
    size, expected = safetensors_header(content), parts(original)

    def cases():
        for _ in range(500):
            yield flip(content, rng.randrange(size), rng.randrange(8))
            yield flip(content, rng.randrange(size, len(content)), rng.randrange(8))
        for _ in range(200):
            yield content[: rng.randrange(len(content))]
            at, count = rng.randrange(len(content)), rng.randrange(1, 50)
            yield content[:at] + content[at + count :]

    refused = 0
    for damaged in cases():
        file.write_bytes(damaged)
        model = try_load(place)
        if model is None:
            refused += 1
        else:
            assert model.config == original.config
            assert parts(model) == expected
    file.write_bytes(content)
    assert refused > 1380
