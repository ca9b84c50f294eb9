# SPDX-License-Identifier: Apache-2.0
"""Activation maps in every runtime of a model: the engine gives the bits of the hooked operator-by-operator model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_models import engine_model, token_ids
from engine_oracle import BFLOAT16_NOISE, Formats, distance
from mixer_models import mixer_model
from test_cuda_engine import RoundedOracle

from tilewright.capture import ActivationMap, intervened
from tilewright.models import CheckpointError, load, save, to_transformers
from tilewright.models.cuda_engine import CudaEngine
from tilewright.models.engine import Engine
from tilewright.models.language_model import map_widths

PLACES = {
    "norms": ("model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"),
    "blocks": ("model.layers.0", "model.layers.1"),
    "projections": ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    "modules around them too": (
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn",
        "model.layers.1.mlp",
        "model.layers.1.mlp.down_proj",
    ),
    "queries, keys, values": tuple(f"model.layers.1.self_attn.{n}_proj" for n in "qkv"),
    "embedding": ("model.embed_tokens",),
}
GREEDY = {"do_sample": False, "eos_token_id": None}


def maps_at(model: Any, places: Any, strength: float = 0.7) -> dict[str, ActivationMap]:
    widths, random = map_widths(model.config), torch.Generator().manual_seed(3)
    return {
        place: ActivationMap(
            1 + 0.3 * torch.randn(widths[place], generator=random),
            0.2 * torch.randn(widths[place], generator=random),
            strength,
        )
        for place in places
    }


@pytest.mark.parametrize("places", [*PLACES.values(), "all"], ids=[*PLACES, "all"])
@pytest.mark.parametrize("options", [{}, {"model_type": "qwen2", "qkv_bias": True, "intermediate_size": 288}], ids=str)
def test_logits_are_the_hooked_models_bits(places: Any, options: dict[str, Any], level: str, poisoned: None) -> None:
    del level, poisoned
    model = engine_model(**options)
    ids = token_ids(21)
    plain, theirs = Engine(model, 64).logits(ids), to_transformers(model)
    maps = maps_at(model, map_widths(model.config) if places == "all" else places)
    with torch.no_grad(), intervened(theirs, dict(maps)):
        hooked = theirs(torch.tensor([ids])).logits[0]
    model.maps = maps
    assert torch.equal(Engine(model, 64).logits(ids), hooked)
    assert torch.equal(to_transformers(model)(torch.tensor([ids])).logits[0], hooked)
    assert not torch.equal(plain, hooked)


@pytest.mark.parametrize("threads", [1, 3])
def test_generation_gives_the_hooked_models_tokens(threads: int) -> None:
    model = engine_model()
    theirs, prompt = to_transformers(model), token_ids(9)
    maps = maps_at(model, map_widths(model.config), 1.0)
    with torch.no_grad(), intervened(theirs, dict(maps)):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, **GREEDY)
    model.maps = maps
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = list(Engine(model, 64).generate(prompt, max_new_tokens=12, stop_tokens=()))
    finally:
        torch.set_num_threads(before)
    assert out[0, 9:].tolist() == got


def test_strength_zero_is_the_model_itself() -> None:
    model, ids = engine_model(), token_ids(15)
    plain = Engine(model, 64)
    logits = plain.logits(ids)
    model.maps = maps_at(model, map_widths(model.config), 0.0)
    engine = Engine(model, 64)
    assert torch.equal(engine.image.program, plain.image.program)
    assert torch.equal(engine.logits(ids), logits)


def test_blocks_and_batches_of_tokens_do_not_change_a_bit() -> None:
    model = engine_model()
    model.maps = maps_at(model, map_widths(model.config))
    ids = token_ids(30)
    whole = Engine(model, 64).logits(ids)
    engine = Engine(model, 64, batch=2)
    first = engine.forward([ids[:11], ids[:4]], all_logits=True)
    second = engine.forward([ids[11:], ids[4:5]], all_logits=True)
    assert torch.equal(torch.cat([first[:11], second[:-1]]), whole)
    assert torch.equal(torch.cat([first[11:], second[-1:]]), whole[:5])
    last = Engine(model, 64, batch=2).forward([ids, ids[:3]])
    assert torch.equal(last, torch.stack([whole[-1], whole[2]]))


def test_a_linearized_model_is_steered_too() -> None:
    """A map without a summand is a gain: the folded model differs by the rounding of that product alone."""
    place, ids = "model.layers.1.input_layernorm", token_ids(19)
    model, folded = mixer_model("liger"), mixer_model("liger")
    plain = Engine(model, 64).logits(ids)
    one = maps_at(model, [place])[place]
    model.maps = {place: dataclasses.replace(one, bias=torch.zeros_like(one.bias))}
    folded.weights[place + ".weight"] = folded.weights[place + ".weight"] * one.affine()[0]
    got, wanted = Engine(model, 64).logits(ids), Engine(folded, 64).logits(ids)
    assert distance(got, wanted) < 0.05 * distance(plain, wanted)


@pytest.mark.parametrize("kind", sorted(PLACES))
def test_the_cuda_engine_has_them(kind: str) -> None:
    model, ids = engine_model(), token_ids(20)
    with torch.no_grad():
        plain = CudaEngine(model, 64, device="cpu").forward([ids])
    model.maps = maps_at(model, PLACES[kind], 2.0)
    oracle = RoundedOracle(model, Formats("fp8", "bf16", "float32"))
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact, BFLOAT16_NOISE)
    with torch.no_grad():
        got = CudaEngine(model, 64, device="cpu").forward([ids])
    assert distance(got, exact[-1:]) < min(bound, 0.5)
    assert distance(plain, exact[-1:]) > 2 * distance(got, exact[-1:])


def test_checkpoints_keep_them(tmp_path: Any) -> None:
    model = engine_model()
    plain = save(model, tmp_path / "plain", tokenizer=False)
    assert load(plain).maps == {}
    model.maps = maps_at(model, PLACES["norms"])
    save(model, tmp_path / "steered", tokenizer=False)
    back = load(tmp_path / "steered")
    assert back.maps.keys() == model.maps.keys()
    for name, one in back.maps.items():
        assert torch.equal(one.weight, model.maps[name].weight)
        assert torch.equal(one.bias, model.maps[name].bias)
        assert one.strength == model.maps[name].strength
    ids = token_ids(8)
    assert torch.equal(Engine(back, 32).logits(ids), Engine(model, 32).logits(ids))


def test_a_damaged_map_in_a_checkpoint_is_named(tmp_path: Any) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    from tilewright.models.checkpoint import header_checksum

    model = engine_model()
    model.maps = maps_at(model, PLACES["blocks"])
    path = save(model, tmp_path / "c", tokenizer=False) / "model.safetensors"
    with safe_open(str(path), "pt") as opened:
        header = json.loads(opened.metadata()["tilewright"])
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118

    def rewritten(**changes: Any) -> Any:
        changed = header | changes
        changed["crc32"] = header_checksum(changed)
        save_file(tensors, str(path), metadata={"tilewright": json.dumps(changed)})
        return path.parent

    with pytest.raises(CheckpointError, match="strength much"):
        load(rewritten(maps={"model.layers.0": "much", "model.layers.1": 1.0}))
    with pytest.raises(CheckpointError, match=r"belongs to no weight"):
        load(rewritten(maps={"model.layers.0": 1.0}))
    with pytest.raises(CheckpointError, match=r"tensor 'maps.model.layers.7.weight' is missing"):
        load(rewritten(maps=header["maps"] | {"model.layers.7": 1.0}))


@pytest.mark.parametrize(
    "runtime", [lambda m: Engine(m, 32), to_transformers, lambda m: CudaEngine(m, 32, device="cpu")]
)
def test_what_no_runtime_can_do_is_refused(runtime: Any) -> None:
    model = engine_model()
    ones, zeros = torch.ones(64), torch.zeros(64)
    model.maps = {"model.layers.0.mlp.up_proj": ActivationMap(torch.ones(96), torch.zeros(96))}
    with pytest.raises(ValueError, match=r"no activation map can sit at 'model.layers.0.mlp.up_proj'; possible are"):
        runtime(model)
    model.maps = {"model.norm": ActivationMap(torch.ones(3), torch.zeros(3))}
    with pytest.raises(ValueError, match=r"the map at model.norm has 3 coordinates, needed 64"):
        runtime(model)
    model.maps = {"model.norm": ActivationMap(ones, zeros, low=zeros, high=ones)}
    with pytest.raises(ValueError, match=r"the map at model.norm has a range and is not affine"):
        runtime(model)


def test_a_damaged_record_is_an_error() -> None:
    """Every word of a steered program, changed one at a time, is refused or gives other logits."""
    import contextlib

    from tilewright.models.image import compile, seal
    from tilewright.ops import engine as ops

    model = engine_model(num_hidden_layers=1)
    model.maps = maps_at(model, map_widths(model.config))
    image = compile(model)
    words = image.program.tolist()
    kind = 13
    starts = [i for i in range(len(words) - 1) if words[i] == kind and words[i + 1] == 8]
    assert len(starts) >= len(model.maps)
    refused = 0
    for start in starts:
        for at in range(start, start + 10):
            for value in (-2, 2**40, words[at] + 1):
                program = image.program.clone()
                program[at] = value
                state = ops.engine_state(image.program, image.weights, 1, 16)
                with contextlib.suppress(RuntimeError):
                    refused += 1
                    seal(program)
                    state = ops.engine_state(program, image.weights, 1, 16)
                    ops.engine_forward(program, image.weights, state, torch.tensor([1, 2]), torch.tensor([0, 2]))
                    refused -= 1
    assert refused > 10 * len(starts)
