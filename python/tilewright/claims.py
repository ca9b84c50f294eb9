# SPDX-License-Identifier: Apache-2.0
"""Claims: what a paper promises, rerun at a scale that fits two cores and minutes.

A method's folder ``tilewright/<family>/<method>/`` may hold a ``claim.py`` with a module attribute
``CLAIM``. Nothing else registers it: :func:`discover` walks the package, and other distributions add
theirs through the entry-point group ``tilewright.claims``. A claim module must import cheaply (heavy
imports belong inside its ``run``).

A claim yields rows (quantity, paper, here, must hold, holds). What it measured is reported as it is:
a row that does not hold is shown as not holding, and the exit code is 1.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tilewright._files import atomic_write
from tilewright._methods import modules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R")

ENTRY_POINTS = "tilewright.claims"
DEFAULT_DIRECTORY = Path("reports") / "claims"


class ClaimError(ValueError):
    """A claim is unknown, registered twice, or its module is not one."""


@dataclass(frozen=True)
class Row:
    """One line of a claim's table.

    paper: what the source reports (or what the method promises), as text. here: what was measured.
    must: the condition, readable alone. holds: whether ``here`` meets it.
    """

    quantity: str
    paper: str
    here: float | str
    must: str
    holds: bool

    def shown(self) -> str:
        """``here`` as text, four significant digits."""
        return self.here if isinstance(self.here, str) else f"{self.here:.4g}"


def at_most(quantity: str, here: float, bound: float, *, paper: str = "") -> Row:
    """A row that holds when ``here <= bound`` (never for NaN)."""
    return Row(quantity, paper, float(here), f"<= {bound:.4g}", bool(here <= bound))


def at_least(quantity: str, here: float, bound: float, *, paper: str = "") -> Row:
    """A row that holds when ``here >= bound`` (never for NaN)."""
    return Row(quantity, paper, float(here), f">= {bound:.4g}", bool(here >= bound))


def falling(quantity: str, here: Iterable[float], *, paper: str = "") -> Row:
    """A row that holds when every value is strictly below the one before it."""
    values = [float(v) for v in here]
    holds = all(later < earlier for earlier, later in itertools.pairwise(values))
    return Row(quantity, paper, " > ".join(f"{v:.4g}" for v in values), "strictly falling", holds)


@dataclass
class Experiment:
    """What a claim's run gets: how much time it has, where to keep numbers, how to say where it is.

    quick: a form for continuous integration, under 90 seconds on two cores: less data.
    values: JSON values kept in the report and handed to the plot.
    """

    quick: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda _: None

    def in_full(self, row: Row) -> Row:
        """A row that only the full form judges: the short form trains too little for it, or runs beside other work and
        measures a time. There it is reported."""
        return replace(row, must="reported", holds=True) if self.quick else row


def spread(
    function: Callable[..., R], items: Sequence[Any], setup: Callable[[], Any] | None = None, *, own: Any = None
) -> list[R]:
    """[function(item) for item in items], in a process of one thread for each of the machine's cores.

    Two processes use two cores better than two threads on matrices this small. A result depends on its item alone,
    never on how many processes there are. What is sent is pickled: functions are a module's own.

    setup: makes, once in each process, what function(item, made) takes beside the item, such as a loaded model.
    own: the same if this process has it already, for a machine of one core or a single item.
    """
    count = min(len(items), os.cpu_count() or 1)
    if count < 2:
        more = () if setup is None else (setup() if own is None else own,)
        return [function(item, *more) for item in items]
    # A forked child would inherit the locks of this process's threads, not the threads.
    context = multiprocessing.get_context("spawn")
    with _one_thread(), concurrent.futures.ProcessPoolExecutor(count, context, _begin, (setup,)) as pool:
        # Pickled here: the pool itself would pass tensors through shared memory, which containers give little of.
        sent = [pickle.dumps((function, item)) for item in items]
        return [pickle.loads(one) for one in pool.map(_apply, sent)]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile use one thread from the beginning: a runtime that has once seen more stays slower."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def call_with(work: Callable[..., R], *made: Any) -> R:
    """work(*made): the function to spread where the items are themselves what is to be done."""
    return work(*made)


_made: tuple[Any, ...] = ()
"""In a process of :func:`spread`: what its setup made."""


def _begin(setup: Callable[[], Any] | None) -> None:
    global _made
    _made = () if setup is None else (setup(),)


def _apply(sent: bytes) -> bytes:
    function, item = pickle.loads(sent)
    return pickle.dumps(function(item, *_made))


@dataclass(frozen=True)
class Claim:
    """A method's claim. ``slug`` is its name everywhere, ``source`` the paper, ``plot`` draws the values."""

    slug: str
    title: str
    source: str
    run: Callable[[Experiment], Iterable[Row]]
    plot: Callable[[dict[str, Any], Figure], None]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug):
            raise ClaimError(f"claim slug {self.slug!r}: lower-case words joined by single hyphens are needed")


@dataclass
class Report:
    """The outcome of one run of a claim; ``to_dict`` is what the JSON file holds."""

    slug: str
    title: str
    source: str
    quick: bool
    rows: list[Row]
    values: dict[str, Any]
    seconds: float
    machine: dict[str, Any]

    @property
    def holds(self) -> bool:
        """All rows hold, and there is at least one."""
        return bool(self.rows) and all(row.holds for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: every field, and ``holds``."""
        return {**asdict(self), "holds": self.holds}

    def markdown(self) -> str:
        """The table in Markdown, for the documentation."""
        lines = ["| quantity | paper | here | must hold | holds |", "|---|---|---|---|---|"]
        for row in self.rows:
            cells = (row.quantity, row.paper, row.shown(), row.must, "yes" if row.holds else "NO")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def discover() -> dict[str, Claim]:
    """All claims by slug, sorted.

    Raises:
        ClaimError: a claim module cannot be imported or defines no claim, or two have the same slug.
    """
    found: dict[str, tuple[str, Claim]] = {}
    for where, load in [*_in_package(), *_in_entry_points()]:
        try:
            claim = load()
        except Exception as wrong:
            raise ClaimError(f"{where} cannot be loaded ({type(wrong).__name__}: {wrong})") from wrong
        if not isinstance(claim, Claim):
            raise ClaimError(f"{where} is a {type(claim).__name__}; a tilewright.claims.Claim is needed")
        if claim.slug in found:
            raise ClaimError(f"claim {claim.slug!r} is registered twice: by {found[claim.slug][0]} and by {where}")
        found[claim.slug] = (where, claim)
    return {slug: found[slug][1] for slug in sorted(found)}


def _in_package() -> Iterable[tuple[str, Callable[[], Any]]]:
    """``tilewright.<family>.<method>.claim:CLAIM`` for every claim.py on disk."""
    for name in modules("claim"):
        yield f"{name}:CLAIM", lambda name=name: importlib.import_module(name).CLAIM  # type: ignore[misc]


def _in_entry_points() -> Iterable[tuple[str, Callable[[], Any]]]:
    for entry in entry_points(group=ENTRY_POINTS):
        yield f"entry point {entry.name} = {entry.value}", entry.load


def find(slug: str) -> Claim:
    """The claim of this slug; an unknown one is an error that lists near and existing slugs."""
    claims = discover()
    if slug not in claims:
        near = get_close_matches(slug, claims, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(claims)}"
        raise ClaimError(f"claim {slug!r} is not known; {hint}")
    return claims[slug]


def run_claim(
    claim: Claim,
    *,
    quick: bool = False,
    directory: str | os.PathLike[str] | None = DEFAULT_DIRECTORY,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Run one claim and save ``<slug>.json`` and ``<slug>.png`` in ``directory`` (None: save nothing).

    An exception inside the claim becomes a row that does not hold; interrupts pass through.
    say: called with one line at the start of each step.
    """
    experiment = Experiment(quick=quick, say=say or (lambda _: None))
    rows: list[Row] = []
    start = time.perf_counter()
    try:
        rows.extend(claim.run(experiment))
    except Exception as wrong:
        traceback.print_exc(file=sys.stderr)
        rows.append(Row("runs to the end", "", f"{type(wrong).__name__}: {wrong}", "no error", False))
    seconds = time.perf_counter() - start
    report = Report(
        claim.slug, claim.title, claim.source, quick, rows, experiment.values, round(seconds, 3), describe_machine()
    )
    if directory is not None:
        save(report, claim, Path(directory))
    return report


def save(report: Report, claim: Claim, directory: Path) -> None:
    """Write the JSON, and the plot unless the claim failed early or matplotlib is absent."""
    text = json.dumps(_finite(report.to_dict()), indent=1, allow_nan=False) + "\n"
    with atomic_write(directory / f"{report.slug}.json") as path:
        path.write_text(text, encoding="utf-8")
    if any(row.quantity == "runs to the end" for row in report.rows):
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install tilewright[plot])", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    claim.plot(report.values, figure)
    with atomic_write(directory / f"{report.slug}.png") as path:
        figure.savefig(path, dpi=120, format="png")


def _finite(value: Any) -> Any:
    """NaN and infinities as text: JSON has no word for them."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def describe_machine() -> dict[str, Any]:
    """What a measured number depends on: system, processor, threads, versions."""
    import torch

    try:
        own = version("tilewright")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tilewright": own,
    }


def exit_code(reports: Iterable[Report]) -> int:
    """0 when every report holds, 1 otherwise."""
    return 0 if all(report.holds for report in reports) else 1
