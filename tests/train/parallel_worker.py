# SPDX-License-Identifier: Apache-2.0
"""What each process of the distributed tests runs: torchrun parallel_worker.py OUTPUT_FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainees import VOCABULARY, hybrid

from tilewright import ops
from tilewright.data.recall import Stream, multi_query_recall
from tilewright.nn import mixers
from tilewright.train import Parallel, TrainConfig, Trainer, sequence_parallel
from tilewright.train.language import LanguageRun, train_language
from tilewright.train.sequence_parallel import MIXERS, Stretch
from tilewright.train.trainer import Result

STREAM = Stream(multi_query_recall, 4, 1, {"length": 16, "pairs": 4, "vocabulary": VOCABULARY, "queries": 3})
# eps far above rounding errors of gradients: the step is then a smooth function of them.
CONFIG = TrainConfig(steps=4, lr=1e-2, eps=1e-3, accumulate=2, clip=0.5, schedule="constant")
KINDS = {"fsdp": {}, "replicated": {"fsdp": False}, "sequence": {"sequence": 2}}


def train(
    parallel: Parallel, dtype: torch.dtype, directory: Path | None = None, steps: int = 4
) -> tuple[Result, nn.Module, Trainer]:
    """Train the small model of these tests; the same call in one process is the expectation."""
    torch.manual_seed(parallel.rank)  # unlike everywhere: the trainer must make the weights equal
    model = hybrid(parallel.rank).to(dtype)
    config = TrainConfig(**{**CONFIG.to_dict(), "betas": CONFIG.betas, "steps": steps})
    trainer = Trainer(model, STREAM, config, parallel=parallel, directory=directory)
    return trainer.run(resume=directory is not None), model, trainer


LANGUAGE = LanguageRun(
    TrainConfig(steps=2), text=("speeches",), layers=2, ratio="1:1", width=16, heads=2, batch=4, length=16
)
# How many of the tokens process 0 holds; process 1 holds the rest.
CUTS = (6, 1, 12)
TOKENS = 13


def operator_cases() -> dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], dict[str, Tensor]]]:
    """Operators with a state, each with float64 inputs of 13 tokens by name ("initial_state" is not cut)."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def qkv(heads: int = 2) -> dict[str, Tensor]:
        shapes = {"q": (2, TOKENS, 2, 4), "k": (2, TOKENS, 2, 4), "v": (2, TOKENS, heads, 3)}
        return {name: normal(*shape) for name, shape in shapes.items()}

    def decay(*shape: int) -> Tensor:
        return -normal(*shape).abs()

    state, beta = normal(2, 2, 4, 3), torch.sigmoid(normal(2, TOKENS, 2))
    unit = {"use_qk_l2norm_in_kernel": True}
    return {
        "additive": (ops.chunk_simple_gla, qkv()),
        "by channel": (ops.chunk_gla, {**qkv(), "g": decay(2, TOKENS, 2, 4), "initial_state": state}),
        "constant": (ops.chunk_retention, {**qkv(), "initial_state": state}),
        "delta": (partial(ops.chunk_delta_rule, **unit), {**qkv(), "beta": beta, "initial_state": state}),
        "gated delta": (
            partial(ops.chunk_gated_delta_rule, **unit),
            {**qkv(4), "g": decay(2, TOKENS, 4), "beta": torch.sigmoid(normal(2, TOKENS, 4))},
        ),
        "normalised": (ops.chunk_linear_attn, {name: x.abs() for name, x in qkv().items()}),
        "element-wise": (
            ops.chunk_hgrn,
            {"x": normal(2, TOKENS, 5), "g": decay(2, TOKENS, 5), "initial_state": normal(2, 5)},
        ),
    }


def run_operator(name: str, first: int, last: int) -> dict[str, Tensor]:
    """Output, final state and gradients of a case over the tokens first to last."""
    operator, inputs = operator_cases()[name]
    mine = {k: x if k == "initial_state" else x[:, first:last] for k, x in inputs.items()}
    mine = {k: x.detach().clone().requires_grad_() for k, x in mine.items()}
    o, state = operator(**mine, output_final_state=True)
    weight = torch.cos(torch.arange(first, last, dtype=torch.float64)).view(1, -1, *[1] * (o.dim() - 2))
    (o.square() * weight).sum().backward()
    return {"o": o.detach(), "state": state.detach(), **{f"d {k}": x.grad for k, x in mine.items()}}


def run_mixer(name: str, piece: slice) -> dict[str, Tensor]:
    """Output and gradients of a mixer in float64 over a part of 12 tokens."""
    random = torch.Generator().manual_seed(5)
    x = torch.randn(2, 12, 16, generator=random, dtype=torch.float64)[:, piece].requires_grad_()
    torch.manual_seed(6)
    options = {"window_size": 7} if name == "sliding_window" else {}
    mixer = mixers.build(name, hidden_size=16, num_heads=2, layer_idx=1, num_layers=4, **options).double()
    weight = torch.cos(torch.arange(12, dtype=torch.float64))[piece, None]
    y = mixer(x)[0]
    (y.square() * weight).sum().backward()
    gradients = {f"d {n}": p.grad for n, p in mixer.named_parameters() if p.grad is not None}
    return {"o": y.detach(), "d x": x.grad, **gradients}


def operators(rank: int, group: object) -> dict[str, dict[str, Tensor]]:
    """Every operator over pieces of unlike lengths, and what a piece can ask for."""
    found = {}
    for cut in CUTS:
        first, last = ((0, cut), (cut, TOKENS))[rank]
        with sequence_parallel(group):
            for name in operator_cases():
                found[f"{name} {cut}"] = run_operator(name, first, last)
    with sequence_parallel(group):
        for name in sorted(MIXERS):
            found[name] = run_mixer(name, slice(6 * rank, 6 * rank + 6))
    x = torch.arange(24.0).view(1, 6, 4)[:, 3 * rank : 3 * rank + 3].requires_grad_()
    here = Stretch(group)
    for count in (2, 5):
        before = here.before(x, count)
        (before * torch.tensor(1.0 + rank)).sum().backward()
        found[f"before {count}"] = {"o": before.detach(), "d x": x.grad.clone()}
        x.grad = None
    until = here.until_here(x)
    until.sum().backward()
    found["until here"] = {"o": until.detach(), "d x": x.grad.clone()}
    return found


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(output: Path) -> None:
    for kind, options in KINDS.items():
        parallel = Parallel.start(**options)
        for dtype in (torch.float32, torch.float64):
            result, model, trainer = train(parallel, dtype)
            found = {
                "losses": result.losses,
                "norms": [r["grad_norm"] for r in result.records],
                "weights": {name: full(value) for name, value in model.state_dict().items()},
                "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
                "undecayed": sum(p.numel() for p in trainer.optimizer.param_groups[1]["params"]),
            }
            torch.save(found, output / f"{kind}.{dtype}.{parallel.rank}".replace("torch.", ""))
    parallel = Parallel.start(sequence=2)
    torch.save(operators(parallel.rank, parallel.group), output / f"operators.{parallel.rank}")
    parallel = Parallel.start()
    result, _, _ = train(parallel, torch.float64, output / "from_one", 4)
    torch.save(result.losses, output / f"from_one.losses.{parallel.rank}")
    train(parallel, torch.float64, output / "to_one", 2)
    report = train_language(LANGUAGE, output / "language", parallel=parallel)
    torch.save(report["held_out_loss"], output / f"language.{parallel.rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
