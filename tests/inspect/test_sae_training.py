# SPDX-License-Identifier: Apache-2.0
"""Training: planted features are found, rows come in blocks, an interrupted run goes on to the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.capture import record
from tilewright.inspect.sae import Rows, SAEConfig, SAETrainer, geometric_median, make_sae
from tilewright.inspect.sae import trainer as trainer_module
from tilewright.train.checkpoint import TrainingCheckpointError

SMALL = SAEConfig(width=24, k=2, steps=12, batch=16, lr=1e-2, seed=3)


def planted(count=40_000, features=64, d=32, active=3, seed=0):
    """(truth [features, d] of unit rows, samples [count, d]): a few features each, amplitudes uniform in [0.5, 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    chosen = torch.rand(count, features, generator=generator).topk(active, 1).indices
    amplitude = torch.rand(count, active, 1, generator=generator) + 0.5
    return truth, (truth[chosen] * amplitude).sum(1)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_planted_features_are_found(kind):
    truth, samples = planted()
    config = SAEConfig(kind=kind, width=96, k=3, steps=800, batch=512, lr=6e-3, auxk_alpha=1 / 32, dead_after=10_000)
    sae = SAETrainer(config).fit(samples)
    cosine = (truth @ sae.W_dec.detach().T).amax(1)
    fresh = samples[-4096:]
    fvu = float((sae(fresh)[0].detach() - fresh).square().sum() / (fresh - fresh.mean(0)).square().sum())
    assert float(cosine.mean()) >= 0.9
    assert fvu <= 0.1


def test_jumprelu_learns_planted_features():
    truth, samples = planted()
    config = SAEConfig(
        kind="jumprelu", width=96, steps=1000, batch=512, lr=5e-3, betas=(0.9, 0.999), sparsity=0.5, bandwidth=0.5,
        threshold=0.5,
    )  # fmt: skip
    trainer = SAETrainer(config)
    sae = trainer.fit(samples)
    cosine = (truth @ sae.W_dec.detach().T).amax(1)
    assert float(cosine.mean()) >= 0.85
    assert trainer.history[-1]["l0"] < 12
    assert trainer.history[-1]["fvu"] <= 0.15


def test_decoder_rows_have_norm_one_after_every_step(monkeypatch):
    norms = []
    advance = trainer_module.TrainingState.advance

    def watched(self, x):
        result = advance(self, x)
        norms.append(self.sae.W_dec.detach().norm(dim=1))
        return result

    monkeypatch.setattr(trainer_module.TrainingState, "advance", watched)
    SAETrainer(SMALL).fit(torch.randn(200, 8))
    assert len(norms) == 12
    # Normalising in float32 rounds each of d entries and the norm.
    bound = (8 + 2) * torch.finfo(torch.float32).eps
    assert max(float((n - 1).abs().max()) for n in norms) <= bound


def test_gradients_along_decoder_rows_are_removed():
    sae = make_sae(SMALL, 8)
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    trainer_module.remove_parallel(sae)
    along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1)
    assert float(along.abs().max()) <= 16 * torch.finfo(torch.float32).eps * float(sae.W_dec.grad.norm(dim=1).max())


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("normalize", ["scale", "center"])
def test_normalisation_is_folded_into_the_weights(kind, normalize):
    rows = torch.randn(200, 8) * 5 + 11
    config = SAEConfig(kind=kind, width=24, k=2, steps=12, batch=16, lr=1e-2, normalize=normalize)
    sae = SAETrainer(config).fit(rows)
    mean, scale = trainer_module.normalization(Rows(rows), config)
    plain = (rows - mean) * scale
    assert float(plain.square().sum(1).mean()) == pytest.approx(8, rel=1e-5)
    unfolded = SAETrainer(SAEConfig(**config.to_dict() | {"normalize": "none"})).fit(plain)
    expected = unfolded(plain)[0].detach() / scale + mean
    assert torch.allclose(sae(rows)[0].detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_interrupted_run_goes_on_to_the_same_bits(kind, tmp_path):
    rows = torch.randn(100, 8)
    config = SAEConfig(kind=kind, width=24, k=2, steps=12, batch=16, lr=1e-2)
    whole = SAETrainer(config)
    expected = whole.fit(rows)

    class Interrupted(Rows):
        def shuffled(self, *args, **kwargs):
            for number, batch in enumerate(super().shuffled(*args, **kwargs)):
                if number == 9:
                    raise KeyboardInterrupt
                yield batch

    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        SAETrainer(config).fit(Interrupted(rows), checkpoint=file, every=4)
    resumed = SAETrainer(config)
    sae = resumed.fit(rows, checkpoint=file, every=4)
    for name, value in expected.state_dict().items():
        assert torch.equal(sae.state_dict()[name], value), name
    assert resumed.history == whole.history


def test_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    SAETrainer(SMALL).fit(torch.randn(100, 8), checkpoint=file)
    with pytest.raises(ValueError, match=r"its lr is 0\.01"):
        SAETrainer(SAEConfig(**SMALL.to_dict() | {"lr": 2e-2})).fit(torch.randn(100, 8), checkpoint=file)
    with pytest.raises(ValueError, match="activations have rows 100"):
        SAETrainer(SMALL).fit(torch.randn(101, 8), checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingCheckpointError, match="damaged"):
        SAETrainer(SMALL).fit(torch.randn(100, 8), checkpoint=file)


class Table(nn.Module):
    """Rows of a table, called like a language model."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids):
        return self.embed(ids)


@pytest.fixture
def store(tmp_path):
    batches = [torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(s)) for s in range(5)]
    return record(Table(), batches, ["embed"], tmp_path / "store")


def test_store_is_trained_on_in_blocks_without_early_positions(store):
    rows = Rows(store, skip=10, block=16)
    assert len(rows) == 5 * 2 * 20
    assert bool((rows.tokens[:, 1] >= 10).all())
    assert torch.equal(torch.cat(list(rows.blocks())), store["embed@output"][store.tokens[:, 1] >= 10])
    sae = SAETrainer(SAEConfig(width=24, k=2, steps=12, batch=16, buffer=40)).fit(rows)
    assert sae.metadata["training"]["width"] == 24


def numbered(count, block=8):
    return Rows(torch.arange(count).float()[:, None], block=block)


@pytest.mark.parametrize(("count", "batch", "buffer"), [(100, 7, 24), (100, 7, 1000), (33, 33, 1), (20, 1, 1)])
def test_an_epoch_has_no_row_twice_and_leaves_few_out(count, batch, buffer):
    rows = numbered(count)
    batches = rows.batches_per_epoch(batch, seed=5, buffer=buffer)
    source = rows.shuffled(batch, 5, buffer=buffer)
    seen = torch.cat([next(source) for _ in range(batches)])[:, 0].int().tolist()
    assert len(set(seen)) == len(seen) == batches * batch
    groups = max(1, count // max(batch, buffer) + 1)
    assert count - len(seen) < groups * batch
    assert batches * batch == count or seen != sorted(seen)


def test_beginning_later_gives_the_same_batches_without_reading():
    rows = numbered(100)
    source = rows.shuffled(7, 5, buffer=24)
    expected = [next(source) for _ in range(40)]
    assert any(not torch.equal(a, b) for a, b in zip(expected[:14], expected[14:28], strict=True))
    reads = []
    watched = numbered(100).mapped(lambda block: reads.append(1) or block)
    for first in (0, 3, 13, 30):
        reads.clear()
        got = next(watched.shuffled(7, 5, first=first, buffer=24))
        assert torch.equal(got, expected[first])
        assert len(reads) <= 4
    other = numbered(100).shuffled(7, 6, buffer=24)
    assert not torch.equal(next(other), expected[0])


def test_geometric_median_ignores_an_outlier():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 1e6]])
    center = geometric_median(rows, 1000, 1e-9)
    assert float(center[0]) == pytest.approx(0.5, abs=1e-3)
    assert 0.5 <= float(center[1]) <= 1.01


def test_bad_rows_are_named():
    bad = torch.randn(50, 8)
    bad[37, 2] = torch.nan
    with pytest.raises(ValueError, match="token 37 holds NaN"):
        SAETrainer(SMALL).fit(Rows(bad, block=8))
    with pytest.raises(ValueError, match="size=16"):
        SAETrainer(SMALL).fit(torch.randn(15, 8))
    with pytest.raises(ValueError, match="floats"):
        Rows(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="store of sequences"):
        Rows(torch.zeros(30, 2), skip=3)
    with pytest.raises(ValueError, match="no row"):
        Rows(torch.zeros(3, 2), keep=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="all rows are equal"):
        SAETrainer(SAEConfig(width=4, k=1, steps=1, batch=4, normalize="center")).fit(torch.ones(9, 2))


def test_a_loss_that_grows_without_bound_is_an_error():
    config = SAEConfig(width=24, k=2, steps=40, batch=16, lr=1e30, normalize="none")
    with pytest.raises(ValueError, match="lower lr"):
        SAETrainer(config).fit(torch.randn(100, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "relu"}, "kind='relu'"),
        ({"normalize": "unit"}, "normalize='unit'"),
        ({"steps": 0}, "steps=0"),
        ({"k": 5000}, "k=5000"),
        ({"grad_clip": 0.0}, "grad_clip"),
        ({"auxk_alpha": -1.0}, "auxk_alpha"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**change)


def test_recipes_and_schedules():
    topk = SAEConfig(width=2**14, steps=100_000)
    assert topk.rate == pytest.approx(2e-4)
    assert SAEConfig(width=2**16).rate == pytest.approx(1e-4)
    assert topk.rate_at(0) == pytest.approx(2e-4 / 1000)
    assert topk.rate_at(999) == topk.rate_at(1000) == pytest.approx(2e-4)
    assert 0 < topk.rate_at(99_999) < 1e-8
    jump = SAEConfig(kind="jumprelu", steps=100, sparsity=2.0)
    assert jump.adam_betas == (0.0, 0.999)
    assert [jump.sparsity_at(s) for s in (0, 24, 49, 99)] == pytest.approx([0.04, 1.0, 2.0, 2.0])
