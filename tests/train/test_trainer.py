# SPDX-License-Identifier: Apache-2.0
"""The training loop: it trains what it is told, stops when it is told, and goes on as if never interrupted."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
import torch
from torch import nn
from trainees import VOCABULARY, TinyModel

from tilewright.data.recall import IGNORE, Stream, multi_query_recall
from tilewright.train import TrainConfig, Trainer, TrainingCheckpointError, TrainingError, token_loss
from tilewright.train.trainer import CHECKPOINT, LOG

STREAM = Stream(multi_query_recall, 4, 1, {"length": 16, "pairs": 4, "vocabulary": VOCABULARY})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_step_is_adamw_on_the_mean_loss():
    model, other = TinyModel(), TinyModel()
    Trainer(model, STREAM, TrainConfig(steps=3, lr=1e-2, clip=None, schedule="constant")).run()
    decayed = [p for p in other.parameters() if p.dim() >= 2 and p is not other.decay]
    rest = [p for p in other.parameters() if p.dim() < 2 or p is other.decay]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        inputs, labels = STREAM(step)
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(other(inputs).flatten(0, 1), labels.flatten(), reduction="sum")
        total.backward()
        for parameter in other.parameters():
            parameter.grad /= int((labels != IGNORE).sum())
        optimizer.step()
    assert_same(weights(model), weights(other))


def test_training_learns():
    result = Trainer(TinyModel(), lambda _: STREAM(0), TrainConfig(steps=150, lr=3e-2, weight_decay=0.0)).run()
    assert result.losses[-1] < 0.1 < result.losses[0]


def test_accumulated_batches_weigh_every_term_alike():
    """Batches of unlike counts make the step of their union: equal up to the order of the sums."""

    def uneven(number):
        inputs, labels = STREAM(number // 2)
        return (inputs[:1], labels[:1]) if number % 2 else (inputs[1:], labels[1:])

    def losses(batches, accumulate, dtype):
        config = TrainConfig(steps=5, lr=1e-2, accumulate=accumulate, eps=1e-3)
        return torch.tensor(Trainer(TinyModel().to(dtype), batches, config).run().losses, dtype=torch.float64)

    exact = losses(STREAM, 1, torch.float64)
    error = (losses(STREAM, 1, torch.float32) - exact).abs().max()
    assert (losses(uneven, 2, torch.float32) - exact).abs().max() <= 2 * error


def test_only_what_is_chosen_is_trained():
    model = TinyModel()
    before = weights(model)
    Trainer(model, STREAM, TrainConfig(steps=2), trainable=lambda name, _: name.startswith("blocks.0")).run()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name != "calls"} == {n for n in before if n.startswith("blocks.0")}
    frozen = [p for n, p in model.named_parameters() if not n.startswith("blocks.0")]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_any_function_can_be_the_loss():
    model, calls = TinyModel(), []

    def loss(given, batch):
        calls.append(batch)
        return (given.decay - 3.0).square().mean()

    result = Trainer(model, lambda step: {"number": step}, TrainConfig(steps=3), loss=loss).run()
    assert result.losses[0] == 9.0
    assert calls == [{"number": step} for step in range(3)]


def test_gradients_are_clipped_to_the_norm_given():
    norms = []

    def loss(model, batch):
        return 1000 * token_loss(model, batch)[0]

    model = TinyModel()
    trainer = Trainer(model, STREAM, TrainConfig(steps=1, clip=0.5), loss=loss)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
    )
    record = trainer.run().records[0]
    assert record["grad_norm"] > 1.0
    # The norm is scaled by 0.5 / (norm + 1e-6): a little below one half.
    assert norms[0] == pytest.approx(0.5, rel=1e-5)


def test_bf16_autocast_computes_in_bf16_and_keeps_float32_weights():
    seen = []

    class Watched(TinyModel):
        def forward(self, inputs):
            out = super().forward(inputs)
            seen.append(out.dtype)
            return out

    model = Watched()
    result = Trainer(model, STREAM, TrainConfig(steps=2, bf16=True)).run()
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.losses[1] != result.losses[0]


def config_with_everything(**changes):
    settings = {"steps": 12, "lr": 1e-2, "warmup": 2, "accumulate": 2, "evaluate_every": 3, "save_every": 5}
    return TrainConfig(**{**settings, "schedule": "plateau", "plateau_patience": 1, "keep_best": True, **changes})


def everything(model, directory, **changes):
    return Trainer(
        model,
        STREAM,
        config_with_everything(**changes),
        evaluate=lambda m: float(m(STREAM(99)[0]).square().mean()),
        trainable=lambda name, _: not name.startswith("embedding"),
        directory=directory,
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("when", [5, 7, 11])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, when):
    whole_model, model = TinyModel(dropout=0.2), TinyModel(dropout=0.2)
    expected = everything(whole_model, tmp_path / "whole").run()

    class Stops(Stream):
        def __call__(self, number):
            if number == 2 * when:
                raise Interrupted
            return super().__call__(number)

    first = everything(model, tmp_path / "stopped")
    first.batches = Stops(STREAM.task, STREAM.batch, STREAM.seed, STREAM.settings)
    with pytest.raises(Interrupted):
        first.run()
    torch.rand(100)  # the caller's generator is elsewhere by now
    again = TinyModel(dropout=0.2, seed=0)
    result = everything(again, tmp_path / "stopped").run(resume=True)
    assert result.losses == expected.losses
    assert result.evaluations == expected.evaluations
    assert (result.best, result.best_step) == (expected.best, expected.best_step)
    assert_same(weights(again), weights(whole_model))
    lines = [json.loads(line) for line in (tmp_path / "stopped" / LOG).read_text().splitlines()]
    assert lines == result.records


def test_more_steps_go_on_from_a_finished_run(tmp_path):
    model = TinyModel()
    everything(model, tmp_path, steps=6, schedule="constant", keep_best=False).run()
    longer = everything(TinyModel(), tmp_path, steps=9, schedule="constant", keep_best=False).run(resume=True)
    at_once = everything(TinyModel(), None, steps=9, schedule="constant", keep_best=False).run()
    assert longer.losses == at_once.losses


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Trainer(TinyModel(dropout=0.5), STREAM, TrainConfig(steps=2)).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_change_what_is_random():
    losses = [
        Trainer(TinyModel(dropout=0.5), STREAM, TrainConfig(steps=2, seed=seed)).run().losses for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_patience_stops_and_the_best_weights_stay():
    scores = itertools.chain([5.0, 3.0, 4.0, 3.5], itertools.repeat(9.0))
    kept = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        kept.append(copy.deepcopy(weights(model)))
        return {"loss": next(scores), "accuracy": 0.5}

    model = TinyModel()
    config = TrainConfig(steps=50, evaluate_every=2, patience=3, keep_best=True)
    result = Trainer(model, STREAM, config, evaluate=evaluate).run()
    assert (result.steps, result.best, result.best_step, result.stopped_early) == (10, 3.0, 4, True)
    assert [e["loss"] for e in result.evaluations] == [5.0, 3.0, 4.0, 3.5, 9.0]
    assert_same(weights(model), kept[1])


def test_a_plateau_lowers_the_rate():
    scores = iter([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0])
    config = TrainConfig(
        steps=10, lr=1.0, schedule="plateau", plateau_factor=0.5, plateau_patience=2, evaluate_every=1, clip=1e-9
    )
    result = Trainer(TinyModel(), STREAM, config, evaluate=lambda _: next(scores)).run()
    assert [r["lr"] for r in result.records if "lr" in r] == [1.0] * 4 + [0.5] * 2 + [0.25] * 3 + [0.125]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    def loss(model, batch):
        total, count = token_loss(model, batch[:2])
        return (total * torch.nan, count) if batch[2] == 1 else (total, count)

    with pytest.raises(TrainingError, match="step 1: loss nan"):
        Trainer(TinyModel(), lambda step: (*STREAM(step), step), TrainConfig(steps=4), loss=loss).run()


def test_a_run_is_not_overwritten(tmp_path):
    everything(TinyModel(), tmp_path).run()
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        everything(TinyModel(), tmp_path).run()
    with pytest.raises(ValueError, match="needs a directory"):
        everything(TinyModel(), None).run(resume=True)


def test_resuming_where_nothing_was_saved_starts(tmp_path):
    assert everything(TinyModel(), tmp_path).run(resume=True).steps == 12


def test_other_settings_than_the_runs_are_named(tmp_path):
    everything(TinyModel(), tmp_path).run()
    with pytest.raises(TrainingCheckpointError, match=r"made with lr=0\.01, not 0\.02"):
        everything(TinyModel(), tmp_path, lr=2e-2).run(resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainable": lambda *_: False}, "no parameter requires gradients"),
        ({"evaluate": lambda _: 0.0}, "go together"),
        ({"config": TrainConfig(steps=1, evaluate_every=1)}, "go together"),
    ],
)
def test_what_cannot_be_trained_is_said(arguments, message):
    config = arguments.pop("config", TrainConfig(steps=1))
    with pytest.raises(ValueError, match=message):
        Trainer(TinyModel(), STREAM, config, **arguments)


def test_a_checkpoint_is_complete_or_the_former_one(tmp_path, monkeypatch):
    everything(TinyModel(), tmp_path, steps=5).run()
    before = (tmp_path / CHECKPOINT).read_bytes()

    def half(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        everything(TinyModel(), tmp_path, steps=9).run(resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, LOG]


def test_a_bar_counts_the_steps_of_the_whole_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    config = {"schedule": "constant", "keep_best": False, "evaluate_every": 2}
    everything(TinyModel(), tmp_path, steps=2, **config).run()
    trainer = everything(TinyModel(), tmp_path, steps=4, **config)
    trainer.show = True
    losses = trainer.run(resume=True).losses
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert f"training, loss {losses[-1]:.4f}" in shown
    assert "4/4" in shown
