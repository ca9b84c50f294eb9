# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: links lead somewhere, commands exist, examples run, numbers come from results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from tilewright.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")] + sorted((ROOT / "docs").rglob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE_PAGES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def heading_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_to_a_file_and_heading(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in heading_anchors(file), f"{page.name} links to {target}"


def test_every_page_is_reachable_from_the_readme():
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        targets = LINK.findall(page.read_text(encoding="utf-8"))
        queue += [(page.parent / t.partition("#")[0]).resolve() for t in targets if not t.startswith("https://")]
    assert set((ROOT / "docs").rglob("*.md")) <= seen


def shell_lines(page: Path) -> list[str]:
    """Commands in a page's untagged and shell blocks."""
    blocks = [body for tag, body in BLOCK.findall(page.read_text(encoding="utf-8")) if tag in ("", "sh", "bash")]
    return [line.split("  #")[0].strip() for body in blocks for line in body.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_exists_with_its_options(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    group = get_command(app)
    for line in shell_lines(page):
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0] == "tw":
            verb = group
            for word in words[1:]:
                if not hasattr(verb, "commands") or word.startswith("-"):
                    break
                verb = verb.commands[word]
            known = {option for parameter in verb.params for option in parameter.opts} | {
                "--help",
                "--debug",
                "--version",
            }
            asked = {word.partition("=")[0] for word in words[1:] if word.startswith("-") and word != "-"}
            assert asked <= known, line


def test_the_readme_has_the_two_commands_first():
    commands = [line for line in shell_lines(ROOT / "README.md") if line.startswith("make")]
    assert commands[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("page", EXAMPLE_PAGES, ids=[str(p.relative_to(ROOT)) for p in EXAMPLE_PAGES])
@pytest.mark.model
@pytest.mark.slow
def test_the_examples_of_a_page_run_in_order(page, smollm2_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TILEWRIGHT_SMOLLM2", str(smollm2_gguf))
    code = "\n".join(body for tag, body in BLOCK.findall(page.read_text(encoding="utf-8")) if tag == "python")
    script = tmp_path / "page.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generated_numbers_are_those_of_the_recorded_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "render_docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmark_page_is_that_of_the_recorded_results():
    code = "from bench import report; print(report.page(sorted((report.BENCH / 'results').glob('*.jsonl'))), end='')"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
