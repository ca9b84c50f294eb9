# SPDX-License-Identifier: Apache-2.0
"""The paper's claim at small scale: robustness of four networks on handwritten digits, with and without branching."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most, spread
from tilewright.verify.genbab import attack
from tilewright.verify.genbab.bab import Outcome, Search, Settings
from tilewright.verify.genbab.bounded_module import BoundedModule
from tilewright.verify.genbab.branching import Branching
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.optimise import Schedule, alpha_crown
from tilewright.verify.genbab.properties import Property
from tilewright.verify.genbab.region import Region, box_region

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "gelu": nn.functional.gelu,
}
WAYS = {"BBPS, best points": Branching("bbps", "opt"), "BaBSR-like, midpoints": Branching("babsr", "uniform")}
TRAIN_EPS = 0.08
EPSILONS = [0.03 + 0.0025 * i for i in range(40)]
EPOCHS = {"sigmoid": 240}
"""Of training, where it is not 40: sigmoids learn slowly."""


@dataclass(frozen=True)
class Size:
    """How much of it: activations, training seeds, images a net, subdomains and seconds an image.

    The short form is limited by subdomains alone, so that its verdicts do not depend on how busy the machine is.
    """

    activations: tuple[str, ...]
    seeds: tuple[int, ...]
    images: int
    domains: int
    seconds: float


FULL = Size(("sigmoid", "tanh", "sin", "gelu"), (0,), 20, 1 << 30, 6.0)
QUICK = Size(("tanh", "sin"), (0,), 8, 48, 600.0)


class Classifier(nn.Module):
    """64-50-50-50-10."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        sizes = (64, 50, 50, 50, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.f: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.f(layer(x))
        return self.layers[-1](x)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits in [0, 1]: 1500 to train on, 297 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.data / 16.0)
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1500]], y[order[:1500]], x[order[1500:]], y[order[1500:]]


def trained(activation: str, seed: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Classifier, float]:
    """A classifier trained with Adam, and its accuracy on the test part.

    It trains on images that one signed gradient step made worse: attacks break plainly trained nets at radii where
    bounds are still tight, and nothing is left to branch on.
    """
    torch.manual_seed(seed)
    net = Classifier(activation).double()
    x, y, test_x, test_y = data
    adam = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(EPOCHS.get(activation, 40)):
        for rows in torch.randperm(len(x)).split(100):
            loss = nn.functional.cross_entropy(net(worse(net, x[rows], y[rows])), y[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        return net.eval(), float((net(test_x).argmax(1) == test_y).double().mean())


def worse(net: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Images moved by TRAIN_EPS up the gradient's sign, from a random point within TRAIN_EPS."""
    near = (x + TRAIN_EPS * (2 * torch.rand_like(x) - 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(near), y), near)
    return (x + TRAIN_EPS * gradient.sign()).clamp(0, 1)


def against(label: int) -> Tensor:
    """Rows e_label - e_other: [9, 10]."""
    eye = torch.eye(10, dtype=torch.float64)
    return torch.stack([eye[label] - eye[other] for other in range(10) if other != label])


def robustness(label: int) -> Property:
    """Every other class below the label's."""
    rows = against(label)
    return Property(rows[:, None], torch.zeros((9, 1), dtype=torch.float64))


def ball(x: Tensor, eps: float) -> Region:
    """Images [B, 64] within eps of each pixel, pixels in [0, 1]."""
    return box_region((x - eps).clamp(0, 1), (x + eps).clamp(0, 1), torch.float64)


def proved_alone(graph: Graph, x: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """Which images alpha-CROWN alone proves: [B]."""
    c = torch.stack([against(int(label)) for label in labels])
    return (alpha_crown(graph, ball(x, eps), c, Schedule(steps)).lower > 1e-7).all(1)


def choose_eps(graph: Graph, x: Tensor, labels: Tensor) -> float:
    """The largest radius of EPSILONS at which a short alpha-CROWN still proves at least 40 % of the images."""
    low, high = 0, len(EPSILONS) - 1
    while low < high:
        middle = (low + high + 1) // 2
        share = proved_alone(graph, x, labels, EPSILONS[middle], 15).double().mean()
        low, high = (middle, high) if share >= 0.4 else (low, middle - 1)
    return EPSILONS[low]


def one_image(graph: Graph, x: Tensor, label: int, eps: float, size: Size) -> dict[str, Any]:
    """alpha-CROWN, then both ways of branching from the same root; attacks before and after."""
    region, prop = ball(x[None], eps), robustness(label)
    _, margin = attack.pgd(graph, region, prop, seed=0)
    if float(margin.min()) <= 0:
        return {"broken": True, "alone": False}
    found: dict[str, Any] = {"broken": False}
    root = Search(graph, region, prop, settings(size, Branching()), _yes)
    root.root()
    found["alone"] = not root.heap
    found["root"] = root.lower_bound
    for name, how in WAYS.items():
        found[name] = {"status": "verified", "domains": 0, "seconds": 0.0}
        if root.heap:
            outcome, seconds = branched(root, how)
            found[name] = {"status": outcome.status, "domains": outcome.domains_visited, "seconds": seconds}
            found[name]["trace"] = [(d, b) for _, d, b in outcome.trace]
    if any(found[name]["status"] == "verified" for name in WAYS):
        _, margin = attack.pgd(graph, region, prop, restarts=200, seed=1)
        found["wrong"] = bool(float(margin.min()) <= 0)
    return found


def _yes(x: Tensor) -> bool:  # noqa: ARG001
    """The graph is the network: what it calls a violation is one."""
    return True


def settings(size: Size, how: Branching) -> Settings:
    """The search's settings, the same for both ways."""
    return Settings(how, timeout=size.seconds, max_domains=size.domains, batch_size=32, root=Schedule(60))


def branched(root: Search, how: Branching) -> tuple[Outcome, float]:
    """A search from the root's subdomains."""
    search = Search(root.graph, root.region, root.prop, replace(root.settings, branching=how), root.confirm)
    search.adopt(root)
    start = time.perf_counter()
    return search.run(), time.perf_counter() - start


def rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5."""
    size = QUICK if experiment.quick else FULL
    experiment.say(f"digits: {', '.join(size.activations)}")
    nets = spread(partial(one_net, size=size), list(itertools.product(size.activations, size.seeds)))
    experiment.values["digits"] = nets
    yield at_least("test accuracy, worst net", min(net["accuracy"] for net in nets), 0.9)
    share = [net["alone"] / net["images"] for net in nets]
    yield experiment.in_full(
        Row(
            "alpha-CROWN alone proves, share of images, by net",
            "",
            ", ".join(f"{s:.2f}" for s in share),
            "0.2 to 0.6 each",
            all(0.2 <= s <= 0.6 for s in share),
        )
    )
    broken = max(net["broken"] / net["images"] for net in nets)
    yield experiment.in_full(at_most("images that the attack breaks, worst share", broken, 0.149))
    for name in size.activations:
        mine = [net for net in nets if net["activation"] == name]
        alone, ours, other = (sum(net[key] for net in mine) for key in ("alone", *WAYS))
        images = sum(net["images"] for net in mine)
        text = f"{ours} of {images} against {alone}"
        yield experiment.in_full(
            Row(f"{name}: proved with branching, against alpha-CROWN alone", "more", text, "more", ours > alone)
        )
        yield Row(f"{name}: proved by BaBSR-like scores at midpoints", "", float(other), "reported", True)
    ours, other = (sum(net[way] for net in nets) for way in WAYS)
    yield experiment.in_full(at_least("proved by BBPS at best points minus BaBSR-like at midpoints", ours - other, 0))
    both = [pair for net in nets for pair in net["common"]]
    medians = [statistics.median(pair[i] for pair in both) if both else math.nan for i in range(2)]
    totals = [sum(pair[i] for pair in both) for i in range(2)]
    name = f"subdomains on the {len(both)} images that both prove by branching, BBPS over BaBSR-like"
    ratio = medians[0] / medians[1] if both and medians[1] else math.nan
    yield experiment.in_full(at_most(f"{name}, ratio of medians", ratio, 0.999, paper="fewer"))
    yield Row(f"{name}, ratio of sums", "", totals[0] / totals[1] if both else math.nan, "reported", True)
    yield at_most("images proved though 200 restarts of the attack break them", sum(net["wrong"] for net in nets), 0)


def one_net(which: tuple[str, int], size: Size) -> dict[str, Any]:
    """Train, choose a radius, verify the first correctly classified test images; which: activation and seed."""
    name, seed = which
    data = digits()
    net, accuracy = trained(name, seed, data)
    graph = BoundedModule(net, data[2][:1]).graph
    with torch.no_grad():
        right = (net(data[2]).argmax(1) == data[3]).nonzero().squeeze(1)[: size.images]
    x, labels = data[2][right], data[3][right]
    eps = choose_eps(graph, x, labels)
    found = [one_image(graph, x[i], int(labels[i]), eps, size) for i in range(len(x))]
    open_ones = [f for f in found if not f["broken"]]
    result: dict[str, Any] = {
        "activation": name,
        "seed": seed,
        "accuracy": accuracy,
        "eps": eps,
        "images": len(found),
        "broken": len(found) - len(open_ones),
        "alone": sum(f["alone"] for f in found),
        "wrong": sum(bool(f.get("wrong")) for f in open_ones),
    }
    for way in WAYS:
        result[way] = sum(f[way]["status"] == "verified" for f in open_ones)
        result[f"{way}, seconds"] = sum(f[way]["seconds"] for f in open_ones)
    result["common"] = [
        [f[way]["domains"] for way in WAYS]
        for f in open_ones
        if not f["alone"] and all(f[way]["status"] == "verified" for way in WAYS)
    ]
    result["traces"] = [{way: f[way].get("trace", []) for way in WAYS} for f in open_ones if not f["alone"]][:4]
    result["proved at"] = {
        way: sorted(f[way]["domains"] for f in open_ones if f[way]["status"] == "verified") for way in WAYS
    }
    return result
