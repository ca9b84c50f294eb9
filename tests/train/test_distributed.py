# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes train as one: sharded parameters, whole parameters, pieces of the sequences."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch
import torch.distributed as dist
from trainees import TinyModel, hybrid

from tilewright.data.bytes import byte_text, held_out_windows
from tilewright.train import Parallel, TrainConfig, Trainer, mean_loss
from tilewright.train.sequence_parallel import MIXERS

pytestmark = pytest.mark.slow
KINDS = tuple(parallel_worker.KINDS)


def run_two(script: Path, *arguments: Path) -> None:
    """Run a script by torchrun in two processes."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(here), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes found; one of the runs went on from a checkpoint of a single process, one left its own."""
    folder = tmp_path_factory.mktemp("parallel")
    parallel_worker.train(Parallel(), torch.float64, folder / "from_one", 2)
    run_two(Path(parallel_worker.__file__), folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    """Losses, gradient norms and weights of one process, by dtype."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        result, model, _ = parallel_worker.train(Parallel(), dtype)
        norms = [record["grad_norm"] for record in result.records]
        found[dtype] = {"losses": result.losses, "norms": norms, "weights": model.state_dict()}
    return found


def load(folder: Path, kind: str, dtype: torch.dtype, rank: int) -> dict:
    return torch.load(folder / f"{kind}.{dtype}.{rank}".replace("torch.", ""), weights_only=True)


def distance(one: dict, two: dict, key: str) -> float:
    """Largest difference of losses or norms, or of weights by relative L2 norm."""
    if key == "weights":
        flat = [torch.cat([w.double().flatten() for w in each["weights"].values()]) for each in (one, two)]
        return float((flat[0] - flat[1]).norm() / flat[1].norm())
    return float(
        (torch.tensor(one[key], dtype=torch.float64) - torch.tensor(two[key], dtype=torch.float64)).abs().max()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["losses", "norms", "weights"])
def test_two_processes_train_as_one(folder, expected, kind, key):
    """Both float32 runs are measured against one process in float64: two err at most twice as much as one.

    The numbers themselves are sums, of 24 terms (a loss) and of each parameter's squared norm (a norm), whose other
    order may change them by a unit in the last place for each term. In float64 all of this is smaller by the ratio of
    the precisions.
    """
    exact = expected[torch.float64]
    error_of_one = distance(expected[torch.float32], exact, key)
    terms = {"losses": 24, "norms": len(list(hybrid().parameters())), "weights": 0}[key]
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        scale = 1.0 if key == "weights" else max(exact[key])
        order = terms * eps * scale
        bound = 2 * error_of_one * eps / torch.finfo(torch.float32).eps + order
        assert 0 < bound < 1e-4 * scale
        assert distance(load(folder, kind, dtype, 0), exact, key) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_processes_agree_bit_for_bit(folder, kind):
    first, second = (load(folder, kind, torch.float32, rank) for rank in (0, 1))
    assert first["losses"] == second["losses"]
    assert first["norms"] == second["norms"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_fsdp_shards_every_parameter_and_keeps_the_marks(folder):
    model = hybrid()
    parameters = list(model.named_parameters())
    for kind in KINDS:
        sharded = 0 if kind == "replicated" else len(parameters)
        assert load(folder, kind, torch.float32, 0)["sharded"] == sharded
    undecayed = sum(p.numel() for name, p in parameters if p.dim() < 2 or name == "lm_head.weight")
    assert {load(folder, kind, torch.float32, 0)["undecayed"] for kind in KINDS} == {undecayed}


def test_a_run_goes_on_with_another_number_of_processes(folder, expected):
    exact = expected[torch.float64]["losses"]
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    bound = 2 * ratio * distance(expected[torch.float32], expected[torch.float64], "losses")
    bound += 24 * torch.finfo(torch.float64).eps * max(exact)
    from_one = torch.load(folder / "from_one.losses.0", weights_only=True)
    assert from_one[:2] == exact[:2]
    to_one, _, _ = parallel_worker.train(Parallel(), torch.float64, folder / "to_one", 4)
    for losses in (from_one, to_one.losses):
        assert torch.tensor(losses).sub(torch.tensor(exact)).abs().max() <= bound


@pytest.mark.parametrize("name", sorted(parallel_worker.operator_cases()))
@pytest.mark.parametrize("cut", parallel_worker.CUTS)
def test_operators_over_pieces_give_the_whole(folder, name, cut):
    """Outputs, states and gradients in float64, each against the whole sequence in one process."""
    pieces = [torch.load(folder / f"operators.{rank}", weights_only=True)[f"{name} {cut}"] for rank in range(2)]
    whole = parallel_worker.run_operator(name, 0, parallel_worker.TOKENS)
    assert pieces[0].keys() == whole.keys()
    for key, value in whole.items():
        if key == "state":
            together = pieces[1][key]
            assert torch.equal(pieces[0][key], together)
        elif key == "d initial_state":
            # The state at the beginning is one input of both processes: its gradient is the sum of theirs.
            together = pieces[0][key] + pieces[1][key]
        else:
            together = torch.cat([one[key] for one in pieces], 1)
        # Sums of up to 13 tokens x 4 keys, in another order and through two matrix products more: a few hundred
        # rounding errors of the largest entry.
        bound = 512 * torch.finfo(torch.float64).eps * max(float(value.abs().max()), 1.0)
        assert (together - value).abs().max() <= bound, key


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixers_over_pieces_give_the_whole(folder, name):
    """Outputs and the gradients of inputs and parameters in float64, against the whole sequence in one process."""
    pieces = [torch.load(folder / f"operators.{rank}", weights_only=True)[name] for rank in range(2)]
    whole = parallel_worker.run_mixer(name, slice(None))
    assert pieces[0].keys() == whole.keys()
    for key, value in whole.items():
        cut = key in ("o", "d x")
        together = torch.cat([one[key] for one in pieces], 1) if cut else pieces[0][key] + pieces[1][key]
        # A gradient of a weight sums 24 tokens, each behind products of 16 terms; see the bound of the operators.
        bound = 1024 * torch.finfo(torch.float64).eps * max(float(value.abs().max()), 1.0)
        assert (together - value).abs().max() <= bound, key


def test_models_that_cannot_look_beyond_their_piece_are_refused():
    from tilewright.nn import build_hybrid

    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 16}
    cut = Parallel(rank=0, world=2, sequence=2)
    for model, message in (
        (TinyModel(), "TinyModel: sequence parallelism is known"),
        (build_hybrid("mom", "pure", **sizes), "mixer 'mom' cannot look beyond its piece"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, parallel_worker.STREAM, TrainConfig(steps=1), parallel=cut)


def test_a_piece_sees_the_tokens_before_it_and_passes_gradients_back(folder):
    first, second = (torch.load(folder / f"operators.{rank}", weights_only=True) for rank in range(2))
    x = torch.arange(24.0).view(1, 6, 4)
    for count in (2, 5):
        seen = min(count, 3)
        assert torch.equal(first[f"before {count}"]["o"], torch.zeros(1, count, 4))
        expected = torch.cat([torch.zeros(1, count - seen, 4), x[:, 3 - seen : 3]], 1)
        assert torch.equal(second[f"before {count}"]["o"], expected)
        used = torch.zeros(1, 3, 4)
        used[:, 3 - seen :] = 2.0  # the weight that process 1 gave what it saw
        assert torch.equal(first[f"before {count}"]["d x"], used)
        assert torch.equal(second[f"before {count}"]["d x"], torch.zeros(1, 3, 4))
    assert torch.equal(first["until here"]["o"], x[:, :3])
    assert torch.equal(second["until here"]["o"], x)
    assert torch.equal(first["until here"]["d x"], torch.full((1, 3, 4), 2.0))
    assert torch.equal(second["until here"]["d x"], torch.ones(1, 3, 4))


def test_a_language_run_leaves_whole_weights(folder):
    from tilewright.models.hybrid import load_hybrid

    reported = [torch.load(folder / f"language.{rank}", weights_only=True) for rank in range(2)]
    text = byte_text("speeches", "evaluation")
    windows = held_out_windows(text, length=16, batch=4, count=32)
    assert reported == [mean_loss(load_hybrid(folder / "language").model, windows)] * 2


def test_pieces_are_dealt_evenly_or_refused():
    rows = torch.arange(24).view(4, 6)
    pieces = [Parallel(rank=rank, world=4, sequence=2).piece({"x": (rows, rows[:, 0])}) for rank in range(4)]
    assert torch.cat([torch.cat([pieces[r]["x"][0] for r in pair], 1) for pair in ((0, 1), (2, 3))]).equal(rows)
    assert [p["x"][1].tolist() for p in pieces] == [[0, 6], [0, 6], [12, 18], [12, 18]]
    with pytest.raises(ValueError, match=r"4 rows \(dimension 0\) cannot be dealt to 3 processes"):
        Parallel(world=3).piece(rows)
    with pytest.raises(ValueError, match=r"6 tokens \(dimension 1\) cannot be dealt to 4 processes"):
        Parallel(world=4, sequence=4).piece(rows)


def test_without_torchrun_there_is_one_process():
    assert Parallel.start() == Parallel(fsdp=False)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="sequence=2: a divisor of the 1 processes"):
        Parallel.start(sequence=2)
