# SPDX-License-Identifier: Apache-2.0
"""Items 1 to 3 and 7: the kernels against solves that share nothing with them, limits, gradients, memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most

SEEDS = (0, 1, 2)
TIGHT: dict[str, Any] = {"solver": "cg", "cg_rtol": 1e-12, "cg_max_iters": 400}


def rows(experiment: Experiment) -> Iterator[Row]:
    """All of them."""
    experiment.say("values against dense solves")
    yield from value_rows(experiment.quick)
    yield from system_rows(experiment.quick)
    experiment.say("gradients against those of the dense solve")
    yield from gradient_rows(experiment.quick)
    experiment.say("limits")
    yield from limit_rows()
    experiment.say("memory, in a process of its own")
    yield from memory_rows(experiment)


def draw(seed: int, tokens: int, size: int, value_size: int, unit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[1, T, 1, .]`, float64, q and k of norm 1 if asked."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, tokens, 1, width, generator=generator, dtype=torch.float64) for width in (size, size, value_size)
    )
    if unit:
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return q, k, v


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def least_squares(q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """o of one head by numpy's least squares on rows sqrt(w) (1, k - q) and ridge rows, query by query."""
    import numpy as np

    a, b, c = (x[0, :, 0].numpy() for x in (q, k, v))
    size, fits = a.shape[1], []
    for i in range(len(a)):
        w = np.exp(b[: i + 1] @ a[i] * size**-0.5)
        points = np.sqrt(w)[:, None] * np.hstack([np.ones((i + 1, 1)), b[: i + 1] - a[i]])
        ridges = np.sqrt(ridge * w.sum()) * np.hstack([np.zeros((size, 1)), np.eye(size)])
        targets = np.vstack([np.sqrt(w)[:, None] * c[: i + 1], np.zeros((size, c.shape[1]))])
        fits.append(np.linalg.lstsq(np.vstack([points, ridges]), targets, rcond=None)[0][0])
    return torch.from_numpy(np.stack(fits))[None, :, None]


def value_rows(quick: bool) -> Iterator[Row]:
    """Item 1."""
    from tilewright.ops import lla_attention
    from tilewright.reference.local_linear_attention import lla_reference

    tokens, size = (64, 16) if quick else (192, 64)
    exact, independent, default, direct = [], [], [], []
    for seed in SEEDS:
        q, k, v = draw(seed, tokens, size, 16, unit=True)
        for ridge in (0.1, 1.0, 10.0):
            want, _ = lla_reference(q, k, v, ridge_lambda=ridge)
            got = lla_attention(q, k, v, ridge_lambda=ridge, **TIGHT)
            exact.append(relative(got, want))
            narrow = tuple(x.float() for x in (q, k, v))
            default.append(relative(lla_attention(*narrow, ridge_lambda=ridge, solver="cg"), want))
            direct.append(relative(lla_attention(*narrow, ridge_lambda=ridge, solver="direct"), want))
        fitted = least_squares(q, k, v, 1.0)
        found = lla_attention(q, k, v, ridge_lambda=1.0, **TIGHT)
        independent.append(float((fitted - found).abs().max()))
    what = "lambda 0.1, 1 and 10, worst of 3 seeds"
    yield at_most(f"float64, CG to 1e-12, against the dense solve, relative: {what}", max(exact), 1e-9)
    yield at_most("float64 against numpy's weighted least squares, largest difference", max(independent), 1e-8)
    yield at_most(f"float32, default CG, against the float64 solve, relative: {what}", max(default), 1e-3)
    yield at_most(f"float32, Cholesky, against the float64 solve, relative: {what}", max(direct), 1e-5)


def iterations_needed(matrix: Tensor, right: Tensor, estimate: Callable[[Tensor], Tensor], want: Tensor) -> int:
    """Iterations of conjugate gradients for all rows at once, from zero, until o is within 1e-3."""
    x, left = torch.zeros_like(right), right.clone()
    direction, square = left.clone(), left.square().sum(-1, keepdim=True)
    for count in range(1, 4 * right.shape[-1]):
        image = torch.einsum("tab,tb->ta", matrix, direction)
        step = square / (direction * image).sum(-1, keepdim=True).clamp_min(1e-300)
        x, left = x + step * direction, left - step * image
        if relative(estimate(x), want) <= 1e-3:
            return count
        before, square = square, left.square().sum(-1, keepdim=True)
        direction = left + square / before.clamp_min(1e-300) * direction
    raise RuntimeError("conjugate gradients did not reach 1e-3")


def compare_systems(inputs: tuple[Tensor, Tensor, Tensor], ridge: float) -> tuple[int, int]:
    """Iterations that Cov + lambda I needs, and that the paper's Sigma needs, on one causal problem."""
    q, k, v = (x[0, :, 0] for x in inputs)
    tokens, size = q.shape
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    p = (size**-0.5 * q @ k.T).masked_fill(~visible, -torch.inf).softmax(-1)
    mean = p @ k
    right = mean - q
    centred = torch.einsum("tj,ja,jb->tab", p, k, k) - mean[:, :, None] * mean[:, None]
    centred = centred + ridge * torch.eye(size, dtype=q.dtype)

    def tilted(x: Tensor, origin: Tensor) -> Tensor:
        return (p * (1 - (x @ k.T - (origin * x).sum(-1, keepdim=True)))) @ v

    want = tilted(torch.linalg.solve(centred, right[..., None])[..., 0], mean)
    ours = iterations_needed(centred, right, lambda x: tilted(x, mean), want)
    sigma = centred + right[:, :, None] * right[:, None]
    theirs = iterations_needed(sigma, right, lambda x: tilted(x, q) / (1 - (right * x).sum(-1, keepdim=True)), want)
    return ours, theirs


def system_rows(quick: bool) -> Iterator[Row]:
    """The system with the intercept eliminated against the paper's: iterations for the same error of the output."""
    tokens, size = (96, 16) if quick else (256, 64)
    problems = [
        compare_systems(draw(seed, tokens, size, 16, unit), ridge)
        for seed in SEEDS
        for unit, ridge in ((False, 1.0), (False, 0.1), (True, 0.1), (True, 0.01))
    ]
    ours, theirs = (sum(counts) for counts in zip(*problems, strict=True))
    name = f"iterations to an output within 1e-3: Cov + lambda I ({ours}) over the paper's Sigma ({theirs})"
    yield at_most(name, ours / theirs, 1.0)


def gradient_rows(quick: bool) -> Iterator[Row]:
    """Item 2."""
    from tilewright.ops import lla_attention
    from tilewright.reference.local_linear_attention import lla_reference

    tokens = 48 if quick else 120
    worst, published = 0.0, []
    for seed in SEEDS:
        for strength in (0.1, 1.0, 10.0):
            q, k, v = (x.requires_grad_() for x in draw(seed, tokens, 12, 10))
            ridge = torch.full((tokens, 1), strength, dtype=torch.float64, requires_grad=True)
            inputs = (q, k, v, ridge)
            want, _ = lla_reference(q, k, v, ridge_lambda=ridge)
            weight = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(seed))
            exact = torch.autograd.grad(want, inputs, weight)
            for full in (True, False):
                o = lla_attention(q, k, v, ridge_lambda=ridge, ridge_grad=full, **TIGHT)
                errors = [relative(a, b) for a, b in zip(torch.autograd.grad(o, inputs, weight), exact, strict=True)]
                if full:
                    worst = max(worst, *errors)
                else:
                    published.append(max(errors[:2]))
    yield at_most("dq, dk, dv, dlambda against autograd of the dense solve, float64, relative", worst, 1e-8)
    name = "the published gradient (ridge as a constant): error of dq or dk, smallest over seeds and lambdas"
    yield at_least(name, min(published), 0.01, paper="checked against its own formula")


def limit_rows() -> Iterator[Row]:
    """Item 3."""
    from torch.nn.functional import scaled_dot_product_attention

    from tilewright.ops import lla_attention

    softmax, affine, average, sums = [], [], [], []
    for seed in SEEDS:
        q, k, v = (x.float() for x in draw(seed, 256, 16, 8))
        a, b, c = (x.transpose(1, 2).double() for x in (q, k, v))
        plain = scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2)
        softmax.append(relative(lla_attention(q, k, v, ridge_lambda=1e8), plain))
        generator = torch.Generator().manual_seed(seed)
        slope, offset = torch.randn(16, 8, generator=generator), torch.randn(8, generator=generator)
        values, truth = k @ slope + offset, q @ slope + offset
        late = slice(64, None)
        found = lla_attention(q, k, values, ridge_lambda=1e-7, solver="direct")
        affine.append(relative(found[:, late], truth[:, late]))
        average.append(relative(lla_attention(q, k, values, ridge_lambda=1e8)[:, late], truth[:, late]))
        sums.append(float((lla_attention(q, k, torch.ones_like(v), ridge_lambda=0.1) - 1).abs().max()))
    yield at_most("lambda = 1e8 against softmax attention, relative", max(softmax), 1e-6, paper="equal")
    yield at_most("values affine in keys, lambda = 1e-7, float32: error at the query", max(affine), 1e-5, paper="0")
    yield at_least("the same values, softmax attention: error at the query", min(average), 0.1)
    yield at_most("sum of the weights of a row, minus 1, largest", max(sums), 1e-6, paper="0")


_PROBE = """
import json, sys
import torch
from tilewright.ops import lla_attention
from tilewright.reference.local_linear_attention import lla_reference

torch.set_num_threads(1)
form, sizes = sys.argv[1], json.loads(sys.argv[2])

def status(name):
    line = next(x for x in open("/proc/self/status") if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def call(tokens):
    q, k, v = (torch.randn(1, tokens, 8 if form == "FlashLLA" else 1, 64, requires_grad=True) for _ in range(3))
    if form == "FlashLLA":
        lla_attention(q, k, v, cg_max_iters=2).sum().backward()
    else:
        lla_reference(q.detach(), k.detach(), v.detach())

call(32)
start, peaks = status("VmRSS"), []
for tokens in sizes:
    call(tokens)
    peaks.append(status("VmHWM") - start)
print(json.dumps(peaks))
"""


def peak_bytes(form: str, sizes: list[int]) -> list[int]:
    """Growth of the resident peak of a fresh process by the time that it has run each of the rising sizes.

    The C library gives back at once what is freed (from 64 KiB on), so that the peak is what was needed at one time.
    """
    command = [sys.executable, "-c", _PROBE, form, json.dumps(sizes)]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | given_back)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-300:]}")
    return list(json.loads(done.stdout))


def memory_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: the peak at most 2.2 times as large at twice the length, where the dense solve's grows fourfold."""
    sizes = {"FlashLLA": [512, 1024, 2048, 4096], "dense solve": [128, 256, 512]}
    if experiment.quick:
        sizes = {"FlashLLA": [512, 1024, 2048], "dense solve": [128, 256, 512]}
    found = experiment.values["memory"] = {
        form: {"tokens": lengths, "bytes": peak_bytes(form, lengths)} for form, lengths in sizes.items()
    }
    growth = {}
    for form, measured in found.items():
        peaks: list[int] = measured["bytes"]
        growth[form] = [later / earlier for earlier, later in itertools.pairwise(peaks)]
    name = "forward and backward, 8 heads of 64: peak memory at twice the length, largest ratio from T = 512"
    yield at_most(name, max(growth["FlashLLA"]), 2.2, paper="linear")
    yield at_least("the dense solve, one head: the same ratio from T = 256", growth["dense solve"][-1], 3.0)
