# SPDX-License-Identifier: Apache-2.0
"""Put measured numbers into the documentation: the demo's table into README.md, the claims into docs/claims.md.

    python scripts/render_docs.py            from docs/results
    python scripts/render_docs.py --adopt    first copy reports/demo.* and reports/claims/* into docs/results
    python scripts/render_docs.py --check    change nothing; exit code 1 when a page differs from its results

Numbers are never typed: pages hold a block between two marker comments, and the block is made from JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tilewright import demo
from tilewright.claims import Report, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
REPORTS = ROOT / "reports"
BEGIN, END = "<!-- begin generated: {} -->", "<!-- end generated: {} -->"
NOT_YET = "No run is recorded yet; `{}` makes one.\n"


def adopt() -> None:
    """Copy the latest reports into the documentation's results."""
    (RESULTS / "claims").mkdir(parents=True, exist_ok=True)
    for path in REPORTS.glob("demo.*"):
        shutil.copyfile(path, RESULTS / path.name)
    for path in (REPORTS / "claims").glob("*.*"):
        shutil.copyfile(path, RESULTS / "claims" / path.name)


def demo_block() -> str:
    """The demo's table and picture, or that there is none yet."""
    source = RESULTS / "demo.json"
    if not source.is_file():
        return NOT_YET.format("make demo")
    document = json.loads(source.read_text(encoding="utf-8"))
    text = demo.markdown(document).split("\n**", 1)[0].rstrip() + "\n"
    picture = "\n![The same numbers as bars](docs/results/demo.png)\n" if (RESULTS / "demo.png").is_file() else ""
    return text + picture


def claim_section(document: dict[str, Any]) -> str:
    """One claim: title, verdict, table and picture."""
    rows = [Row(**row) for row in document["rows"]]
    fields = {key: value for key, value in document.items() if key not in ("rows", "holds")}
    report = Report(rows=rows, **fields)
    verdict = "holds" if report.holds else "does not hold"
    extent = "the short form" if report.quick else "the full form"
    parts = [
        f"## {report.slug}\n",
        f"{report.title} ({report.source}). The claim **{verdict}**; {extent}, {report.seconds:.0f} s.\n",
        report.markdown(),
    ]
    if (RESULTS / "claims" / f"{report.slug}.png").is_file():
        parts.append(f"![{report.slug}](results/claims/{report.slug}.png)\n")
    return "\n".join(parts)


def claims_block() -> str:
    """All recorded claims, or that there are none yet."""
    sources = sorted((RESULTS / "claims").glob("*.json"))
    if not sources:
        return NOT_YET.format("tw reproduce --all")
    return "\n".join(claim_section(json.loads(path.read_text(encoding="utf-8"))) for path in sources)


def ternary_block() -> str:
    """What the shipped ternary model was trained with, predicts and writes."""
    source = RESULTS / "ternary-run.json"
    if not source.is_file():
        return NOT_YET.format("python scripts/ternary_run.py")
    runs = json.loads(source.read_text(encoding="utf-8"))
    names = {"ternary": "ternary", "float": "the same in float"}
    lines = ["| | " + " | ".join(names[run] for run in runs) + " |", "|---|" + "---|" * len(runs)]

    def row(what: str, *values: str) -> None:
        lines.append(f"| {what} | " + " | ".join(values) + " |")

    every = list(runs.values())
    row("steps", *(f"{run['curve']['steps']:,}" for run in every))
    row("tokens seen", *(f"{run['curve']['tokens'] / 1e6:.1f} million" for run in every))
    row("minutes, one thread of a shared machine", *(f"{run['curve']['step_seconds'] / 60:.0f}" for run in every))
    for name in every[0]["held_out_bits_per_byte"]:
        row(f"bits a byte, {name}", *(f"{run['held_out_bits_per_byte'][name]:.3f}" for run in every))
    row("bytes of all weights", *(f"{run['weight_bytes'] / 1e6:.2f} MB" for run in every))
    shipped = runs["ternary"]
    lines.append(
        f"\n{shipped['ternary_weights'] / 1e6:.2f} million ternary weights take "
        f"{shipped['ternary_bytes'] / 1e6:.2f} MB. "
        "Held-out texts are scored on the decode engine, by windows as long as those of the training."
    )
    lines.append("\n![Training loss and held-out bits a byte](../results/ternary-run.png)")
    settings = shipped["settings"]
    keys = ("layers", "width", "inner", "heads", "kv_heads", "hidden_act", "tokenizer", "context", "batch", "length")
    lines.append("\nSettings: " + ", ".join(f"{key} {settings[key]}" for key in keys) + ".")
    lines.append("\nWhat it writes (temperature 0.5, nucleus 0.95, the seed as given):")
    for sample in shipped["samples"]:
        text = " ".join(f"{sample['prompt']}{sample['text']}".split())
        lines.append(f"\n> {text} *(seed {sample['seed']})*")
    return "\n".join(lines)


def with_block(text: str, name: str, block: str) -> str:
    """`text` with the block between the markers of `name` replaced.

    Raises `ValueError` when a marker is missing.
    """
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise ValueError(f"the page has no markers {begin} and {end}")
    return f"{text.partition(begin)[0]}{begin}\n\n{block.strip()}\n\n{end}{text.partition(end)[2]}"


PAGES = {
    "README.md": ("demo", demo_block),
    "docs/claims.md": ("claims", claims_block),
    "docs/how-to/ternary.md": ("ternary", ternary_block),
}


def main() -> int:
    """Rewrite the pages, or with --check say which ones differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adopt", action="store_true", help="take over the latest reports first")
    parser.add_argument("--check", action="store_true", help="change nothing, exit code 1 when a page is stale")
    options = parser.parse_args()
    if options.adopt:
        adopt()
    stale = []
    for name, (block, make) in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = with_block(old, block, make())
        if new != old:
            stale.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'differs from docs/results' if options.check else 'rewritten'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
