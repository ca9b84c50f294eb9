# SPDX-License-Identifier: Apache-2.0
"""Which linear mixer, and how much full attention? A grid of small trainings: mixers x ratios x seeds on one task.

The method is that of arXiv 2507.06457 at a scale for a CPU: equal steps, paired initial weights, and a learning rate
tuned for each mixer (or each cell) on the first seed. ``tw study`` and
``python -m tilewright.nn.hybrid_linear_attention.study`` run it; the file it writes is complete after every training,
so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from tilewright._files import atomic_write
from tilewright.nn.hybrid_linear_attention._study_cells import FULL, SOFTMAX, TASKS, Cell, Setting, execute
from tilewright.nn.hybrid_linear_attention.layout import attention_layers

MIXERS = ("hgrn", "hgrn2", "retnet", "gla", "deltanet", "gated_deltanet")
RATIOS = ("pure", "7:1", "3:1", "1:1", "full")
RATES = (1e-3, 3e-3, 1e-2)


class StudyError(ValueError):
    """A study's file does not belong to the study that is asked for."""


@dataclass(frozen=True)
class Study:
    """A grid of trainings.

    Args:
        setting: task, sizes and length of every training.
        mixers: names of linear mixers.
        ratios: "pure", "r:1", "full"; "full" is one softmax stack for all mixers.
        rates: peak learning rates that are tried with seed 0.
        seeds: how many, from 0.
        tune: "cell" tries the rates for every mixer and ratio; "mixer" tries them for each mixer's first ratio (and
            for "full"), and its other ratios take what was best there.
    """

    setting: Setting = field(default_factory=Setting)
    mixers: tuple[str, ...] = MIXERS
    ratios: tuple[str, ...] = RATIOS
    rates: tuple[float, ...] = RATES
    seeds: int = 3
    tune: Literal["cell", "mixer"] = "cell"

    def __post_init__(self) -> None:
        from tilewright.nn import mixers

        if not (self.mixers or self.ratios == (FULL,)) or not self.ratios or not self.rates or self.seeds < 1:
            raise ValueError(
                f"mixers={self.mixers}, ratios={self.ratios}, rates={self.rates}, seeds={self.seeds}: "
                "at least one of each is needed"
            )
        if self.tune not in ("cell", "mixer"):
            raise ValueError(f"tune={self.tune!r}: needed 'cell' or 'mixer'")
        for name in self.mixers:
            mixers.find(name)
        for ratio in self.ratios:
            attention_layers(ratio, self.setting.num_layers)

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Every (mixer, ratio) of the grid, the softmax stack once."""
        linear = [r for r in self.ratios if r != FULL]
        pairs = [(mixer, ratio) for mixer in self.mixers for ratio in linear]
        return [*pairs, *([(SOFTMAX, FULL)] if FULL in self.ratios else [])]

    def tuned_on(self, mixer: str, ratio: str) -> tuple[str, str]:
        """The group whose best rate a group takes."""
        first = next((r for r in self.ratios if r != FULL), FULL)
        return (mixer, ratio) if self.tune == "cell" or ratio == FULL else (mixer, first)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: what a study's file is recognised by."""
        lists = {"mixers": list(self.mixers), "ratios": list(self.ratios), "rates": list(self.rates)}
        return {"setting": self.setting.to_dict(), **lists, "seeds": self.seeds, "tune": self.tune}


@dataclass
class Outcome:
    """What a study found: the records of its trainings by their cells' names."""

    study: Study
    records: dict[str, dict[str, Any]]

    def best_rate(self, mixer: str, ratio: str) -> float:
        """The rate with the best score of seed 0 in the group that this one is tuned on."""
        group = self.study.tuned_on(mixer, ratio)
        scores = {rate: self.records[Cell(*group, rate, 0).key]["score"] for rate in self.study.rates}
        return _best(scores, self.study.setting.higher_is_better)

    def chosen(self, mixer: str, ratio: str) -> list[dict[str, Any]]:
        """The group's records at its best rate, one a seed."""
        rate = self.best_rate(mixer, ratio)
        return [self.records[Cell(mixer, ratio, rate, seed).key] for seed in range(self.study.seeds)]

    def scores(self, mixer: str, ratio: str) -> list[float]:
        """Accuracy, or loss in nats per byte, by seed."""
        return [record["score"] for record in self.chosen(mixer, ratio)]

    def mean(self, mixer: str, ratio: str) -> float:
        """Mean of :meth:`scores`."""
        return mean(self.scores(mixer, ratio))

    def ranking(self, ratio: str) -> list[str]:
        """The mixers at one ratio, best first."""
        sign = -1 if self.study.setting.higher_is_better else 1
        return sorted(self.study.mixers, key=lambda mixer: sign * self.mean(mixer, ratio))

    def tau(self, first: str, second: str) -> float:
        """Kendall's rank correlation of the mixers' means at two ratios."""
        means = [[self.mean(mixer, ratio) for mixer in self.study.mixers] for ratio in (first, second)]
        return kendall(*means)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, with a summary by group."""
        groups = [
            {
                "mixer": mixer,
                "ratio": ratio,
                "rate": self.best_rate(mixer, ratio),
                "scores": self.scores(mixer, ratio),
                "layers": self.chosen(mixer, ratio)[0]["layers"],
            }
            for mixer, ratio in self.study.groups
        ]
        return {"study": self.study.to_dict(), "groups": groups, "records": self.records}


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two lists: (concordant - discordant) / sqrt((n - ties in x) (n - ties in y)) over pairs.

    NaN when a list is constant.
    """
    signs = [
        (_sign(a[0] - b[0]), _sign(a[1] - b[1])) for a, b in itertools.combinations(list(zip(x, y, strict=True)), 2)
    ]
    untied = math.prod(sum(1 for pair in signs if pair[side]) for side in (0, 1))
    return sum(a * b for a, b in signs) / math.sqrt(untied) if untied else math.nan


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _best(scores: dict[float, float], higher: bool) -> float:
    """The rate of the best score; a run that gave no number loses."""
    worst = -math.inf if higher else math.inf
    valid = {rate: worst if math.isnan(score) else score for rate, score in scores.items()}
    return (max if higher else min)(valid, key=lambda rate: valid[rate])


def run_study(
    study: Study,
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Do the trainings that ``out`` does not hold yet, and write it after each.

    Args:
        study: the grid.
        out: JSON file to go on from and to write; None keeps nothing.
        workers: processes of one thread each; 1 works in this process.
        say: called with a line for each training done.

    Raises:
        StudyError: ``out`` holds another study.
        TrainingError: a loss is not finite; the file keeps what was done before.
    """
    path = None if out is None else Path(out)
    records = {} if path is None else _stored(path, study)
    outcome = Outcome(study, records)
    seen = len(records)

    def keep(cell: Cell, record: dict[str, Any]) -> None:
        records[cell.key] = record
        if path is not None:
            _write(path, {"study": study.to_dict(), "records": records})
        say(f"{len(records)}: {cell.key} score {record['score']:.4f} in {record['seconds']:.0f} s")

    tuning = dict.fromkeys(study.tuned_on(*group) for group in study.groups)
    first = [Cell(*group, rate, 0) for group in tuning for rate in study.rates]
    _execute(study.setting, [c for c in first if c.key not in records], workers, keep)
    rest = [Cell(*g, outcome.best_rate(*g), seed) for g in study.groups for seed in range(study.seeds)]
    _execute(study.setting, [c for c in rest if c.key not in records], workers, keep)
    if path is not None and (len(records) > seen or "groups" not in _read(path)):
        _write(path, outcome.to_dict())
    return outcome


def _execute(
    setting: Setting, cells: Sequence[Cell], workers: int, keep: Callable[[Cell, dict[str, Any]], None]
) -> None:
    if workers <= 1:
        for cell in cells:
            keep(cell, execute(setting, cell))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {pool.submit(execute, setting, c): c for c in cells}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    keep(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"study": found["study"], **found, "records": dict(found["records"])}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as wrong:
        raise StudyError(f"{path} is no study's file ({type(wrong).__name__}: {wrong}); name another file") from wrong


def _stored(path: Path, study: Study) -> dict[str, dict[str, Any]]:
    """The records of an earlier run of the same trainings; more seeds, mixers, ratios or rates may be asked for."""
    if not path.exists():
        return {}
    found = _read(path)
    asked = study.to_dict()
    if other := [k for k, v in asked["setting"].items() if found["study"]["setting"].get(k) != v]:
        theirs = found["study"]["setting"].get(other[0])
        raise StudyError(
            f"{path} holds a study with {other[0]}={theirs!r}, not {asked['setting'][other[0]]!r}; "
            "use its settings or another file"
        )
    return dict(found["records"])


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def names(text: str, everything: Iterable[str]) -> tuple[str, ...]:
    """A comma-separated list; "all" stands for everything."""
    return tuple(everything) if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(prog="hybrid-study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mixers", default="all", help="comma-separated, or all")
    parser.add_argument("--ratios", default="all", help=f"comma-separated; all is {','.join(RATIOS)}")
    parser.add_argument("--task", default="mqar", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default=",".join(f"{r:g}" for r in RATES), help="learning rates to try")
    parser.add_argument("--tune", default="cell", choices=("cell", "mixer"), help="what a rate is chosen for")
    defaults = Setting()
    for option in ("steps", "batch", "length", "num_layers", "hidden_size", "num_heads", "pairs", "vocabulary"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(defaults, option))
    parser.add_argument("--placement", default="last", choices=("last", "middle", "first"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("reports") / "hybrid-study.json")
    options = vars(parser.parse_args(arguments))
    grid = {name: options.pop(name) for name in ("mixers", "ratios", "rates", "seeds", "tune", "workers", "out")}
    study = Study(
        Setting(**options),
        names(grid["mixers"], MIXERS),
        names(grid["ratios"], RATIOS),
        tuple(float(rate) for rate in names(grid["rates"], ())),
        grid["seeds"],
        grid["tune"],
    )
    report(study, grid["out"], grid["workers"])
    return 0


def report(study: Study, out: Path, workers: int) -> None:
    """Run a study with its progress on standard error; print its table, write its plot beside its file."""
    from tilewright.nn.hybrid_linear_attention._study_report import save_plot, table

    outcome = run_study(study, out=out, workers=workers, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(outcome))
    picture = out.with_suffix(".png")
    print(f"saved {out}" + (f" and {picture}" if save_plot(outcome, picture) else " (no plot: matplotlib is absent)"))


if __name__ == "__main__":
    sys.exit(main())
