# SPDX-License-Identifier: Apache-2.0
"""What Lightning Attention promises: exact blocks, a cost per token that does not know the length, a usable layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS, SIZE = 8, 64
RATES = (3e-3, 6e-3, 1.2e-2)
BLOCKS = (16, 64, 256)


def run(experiment: Experiment) -> Iterator[Row]:
    """Exactness, MiniMax, time and memory by length, a byte model, block sizes."""
    from tilewright.nn.lightning_attention import _claim_exact

    yield from _claim_exact.definition_rows(experiment)
    yield from _claim_exact.minimax_rows(experiment)
    yield from _claim_exact.relative_rows(experiment)
    yield from length_rows(experiment)
    yield from memory_rows(experiment)
    yield from block_rows(experiment)
    yield from model_rows(experiment)


def length_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 3: time per token at T = 512 to 16384 beside torch's softmax attention, all taken in turn.

    A work repeats its call so often that it covers as many tokens at every length.
    """
    from tilewright.nn.delta_rule._claim_tools import medians_in_turn

    experiment.say("time per token by length")
    longest, rounds = (8192, 2) if experiment.quick else (16384, 9)
    lengths = [longest >> i for i in reversed(range(longest.bit_length() - 9))]
    softmax_lengths = lengths[-4:]
    works: dict[str, Callable[[], Any]] = {}
    for tokens in lengths:
        for form in ("forward", "training"):
            works[f"{form} {tokens}"] = _lightning(tokens, longest // tokens, form == "training")
    for tokens in softmax_lengths:
        works[f"softmax {tokens}"] = _softmax(tokens, longest // tokens)
    times = medians_in_turn(works, rounds)
    each = {
        form: {t: times[f"{form} {t}"] / longest for t in (softmax_lengths if form == "softmax" else lengths)}
        for form in ("forward", "training", "softmax")
    }
    experiment.values["seconds per token"] = each
    for form, name in (("forward", "forward"), ("training", "forward and backward")):
        middle = median(each[form].values())
        widest = max(max(t / middle, middle / t) for t in each[form].values())
        title = f"{name}: time per token at T = {lengths[0]} to {longest}, largest ratio to the median"
        yield experiment.in_full(at_most(title, widest, 1.2, paper="constant"))
    growth = each["softmax"][longest] / each["softmax"][softmax_lengths[0]]
    title = f"softmax attention, T = {softmax_lengths[0]} to {longest}: growth of time per token"
    yield experiment.in_full(at_least(title, growth, 4.0))
    slower = [t for t in softmax_lengths if each["softmax"][t] > each["forward"][t]]
    crossover = str(slower[0]) if slower else f"beyond {longest}"
    yield Row("shortest measured T at which softmax attention is slower", "", crossover, "reported", True)


def _lightning(tokens: int, times: int, training: bool) -> Callable[[], None]:
    """Work: `times` calls of the operator, with its backward pass when training."""
    import torch

    from tilewright.ops import build_slope_tensor, lightning_attn_func

    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, tokens, HEADS, SIZE, generator=random).requires_grad_(training) for _ in range(3))
    slopes, gradient = build_slope_tensor(HEADS), torch.randn(1, tokens, HEADS, SIZE, generator=random)

    def work() -> None:
        for _ in range(times):
            out, _ = lightning_attn_func(q, k, v, slopes)
            if training:
                out.backward(gradient)

    return work


def _softmax(tokens: int, times: int) -> Callable[[], None]:
    """Work: `times` calls of torch's causal attention, in the layout it likes best."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE, generator=random) for _ in range(3))

    def work() -> None:
        for _ in range(times):
            scaled_dot_product_attention(q, k, v, is_causal=True)

    return work


def memory_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 3: what the forward pass needs besides inputs and outputs, at two lengths, in processes of their own."""
    from tilewright.nn.delta_rule._claim_memory import peak_growth

    experiment.say("memory of the forward pass")
    lengths = (8192, 32768)
    extra = [
        peak_growth("forward_of_lightning", tokens=t, heads=HEADS, size=SIZE) - 4 * t * HEADS * SIZE for t in lengths
    ]
    experiment.values["memory"] = {"tokens": lengths, "bytes besides input and output": extra}
    # The state is H K V floats; pages and arenas of the allocator make the measurement coarse by about a megabyte.
    grown = (extra[1] - extra[0]) / (4 * (lengths[1] - lengths[0]) * HEADS * SIZE)
    yield at_most("forward: growth of other memory from T = 8192 to 32768, share of the output's", grown, 0.05)


def block_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5: training with blocks of 16, 64 and 256 tokens, states carried between calls, against one call.

    In float64, where the curves are apart if the algorithm is: in float32 training amplifies what rounding leaves.
    """
    import torch

    experiment.say("training with blocks of 16, 64 and 256 tokens")
    steps = 10 if experiment.quick else 60
    name = f"blocks of 16, 64, 256 tokens: largest difference of the loss over {steps} steps, nats"
    apart = {dtype: _apart(steps, dtype) for dtype in (torch.float64, torch.float32)}
    differences = {str(dtype).removeprefix("torch."): found for dtype, found in apart.items()}
    experiment.values["blocks"] = {"largest difference of a step's loss": differences, "steps": steps}
    yield at_most(f"{name}, float64", max(apart[torch.float64].values()), 1e-4, paper="0")
    yield Row("the same, float32", "", max(apart[torch.float32].values()), "reported", True)


def _apart(steps: int, dtype: Any) -> dict[int, float]:
    """Largest difference of a step's loss by block."""
    import torch

    from tilewright.nn.lightning_attention._claim_exact import BlockedLightning

    curves = {}
    for block in (None, *BLOCKS):
        model = _byte_model("pure", seed=0)
        for layer in model.model.layers:
            if block is not None:
                place = {"layer_idx": layer.mixer.layer_idx, "num_layers": len(model.model.layers)}
                blocked = BlockedLightning(model.config.hidden_size, model.config.num_heads, block=block, **place)
                blocked.load_state_dict(layer.mixer.state_dict())
                layer.mixer = blocked
        curves[block] = torch.tensor(_train_bytes(model.to(dtype), steps), dtype=torch.float64)
    return {block: float((curves[block] - curves[None]).abs().max()) for block in BLOCKS}


def _byte_model(ratio: str, seed: int) -> Any:
    import torch

    from tilewright.nn import build_hybrid

    torch.manual_seed(seed)
    return build_hybrid("lightning", ratio, num_layers=2, hidden_size=64, num_heads=4, vocab_size=256, use_cache=False)


def _train_bytes(model: Any, steps: int) -> list[float]:
    from tilewright.data.bytes import ByteWindows, byte_text
    from tilewright.train import TrainConfig, Trainer

    windows = ByteWindows(byte_text("speeches", "calibration"), batch=4, length=512, seed=1)
    return Trainer(model, windows, TrainConfig(steps, 3e-3, warmup=steps // 10), progress=False).run().losses


def model_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5: a byte model of Lightning layers against the same model of softmax layers, each at its best rate."""
    from dataclasses import replace

    from tilewright.nn.delta_rule._claim_tools import cores
    from tilewright.nn.hybrid_linear_attention.study import Setting, Study, run_study

    experiment.say("byte models: lightning against softmax")
    setting = Setting(
        task="lm", num_layers=3, steps=300, batch=8, length=256, text="documentation", initializer_range=0.05
    )
    study = Study(setting, ("lightning",), ("pure", "full"), RATES, seeds=3)
    if experiment.quick:
        small = replace(setting, steps=40, num_layers=2, batch=4, text="speeches", evaluation=32)
        study = Study(small, ("lightning",), ("pure", "full"), RATES[1:2], seeds=1)
    outcome = run_study(study, workers=1 if experiment.quick else cores(), say=experiment.say)
    scores = {name: outcome.scores(name, ratio) for name, ratio in study.groups}
    curves = {name: [record["curve"] for record in outcome.chosen(name, ratio)] for name, ratio in study.groups}
    experiment.values["bytes"] = {"scores": scores, "curves": curves}
    ratio = mean(scores["lightning"]) / mean(scores["softmax"])
    title = f"byte model, {study.setting.steps} steps, {study.seeds} seed(s): held-out loss over softmax's"
    yield at_most(title, ratio, 1.05, paper="2.228 / 2.229 nats (0.4B)")


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: time per token by length. Right: training loss of the byte models."""
    left, right = figure.subplots(1, 2)
    names = {
        "forward": "lightning, forward",
        "training": "lightning, forward + backward",
        "softmax": "softmax, forward",
    }
    for form, seconds in values["seconds per token"].items():
        left.plot(list(seconds), [1e6 * s for s in seconds.values()], marker="o", label=names[form])
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("tokens")
    left.set_ylabel("microseconds per token")
    left.legend(fontsize=8)
    for i, (name, curves) in enumerate(values["bytes"]["curves"].items()):
        for j, curve in enumerate(curves):
            right.plot(curve, color=f"C{i}", alpha=0.8, label=name if j == 0 else None)
    right.set_xlabel("twentieths of the training")
    right.set_ylabel("training loss, nats per byte")
    right.legend(fontsize=8)


CLAIM = Claim(
    "lightning-attention",
    "Lightning Attention: exact in blocks of any size, at a cost per token that does not grow with the sequence",
    "Lightning Attention-2, arXiv 2401.04658; TransNormerLLM, arXiv 2307.14995",
    run,
    plot,
)
