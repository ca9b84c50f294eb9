# SPDX-License-Identifier: Apache-2.0
"""`tw sparsity`: fits and plots without a model; the rest on the real one."""

from __future__ import annotations

import json

import pytest
from sparsing_law_models import text, tiny
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode
from tilewright.sparsify.sparsing_law import Measurement, cett_ppl, frequency_distribution, pareto
from tilewright.sparsify.sparsing_law._claim_exact import published
from tilewright.sparsify.sparsing_law.cli import pareto_lines, report_lines

run = CliRunner().invoke


def curve(path, kind="relu"):
    law, tokens = published(kind, "0.4B")
    lines = ["tokens,ratio"] + [f"{d:.6g},{law.predict(d):.8f}" for d in tokens]
    path.write_text("\n".join(lines) + "\n")
    return law


def test_fit_prints_the_limit_and_the_tokens_to_a_target(tmp_path):
    pytest.importorskip("scipy")
    law = curve(tmp_path / "curve.csv")
    done = run(
        app, ["sparsity", "fit", str(tmp_path / "curve.csv"), "--target", "0.072", "-o", str(tmp_path / "f.json")]
    )
    assert done.exit_code == 0, done.output
    assert "law relu" in done.output
    assert "limit 6.90 %" in done.output
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["tokens_to_target"] == pytest.approx(law.tokens_to(0.072), rel=1e-3)
    drawn = run(app, ["sparsity", "plot", str(tmp_path / "f.json"), "-o", str(tmp_path / "f.png")])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_target_beyond_the_limit_is_an_error(tmp_path):
    pytest.importorskip("scipy")
    curve(tmp_path / "curve.csv")
    done = run(app, ["sparsity", "fit", str(tmp_path / "curve.csv"), "--target", "0.05"])
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "unreachable" in done.output


def test_a_bad_curve_is_named(tmp_path):
    (tmp_path / "curve.csv").write_text("1e9,0.1\n2e9\n")
    done = run(app, ["sparsity", "fit", str(tmp_path / "curve.csv")])
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "line 2" in done.output


def test_lines_of_a_report_and_pictures_of_it(tmp_path):
    measured = Measurement(tiny(), [text(6, 60)])
    report = cett_ppl(measured, p=5.0)
    lines = report_lines(report)
    assert len(lines) >= 4
    assert lines[1].split()[0] == "layers.0"
    assert f"{100 * report.activation_ratio:.2f} % of neurons active" in lines[3]
    curves = {"cett": pareto(measured, metric="cett", grid=(0.05, 0.2))}
    assert f"{curves['cett'][1].ppl_ratio:.4f}" in pareto_lines(curves, [0.7, 0.5])[1]
    documents = {
        "measure": {"report": report.to_dict(), "frequency": vars(frequency_distribution(report.frequency))},
        "pareto": {"curves": {"cett": [one.to_dict() for one in curves["cett"]]}},
    }
    for verb, document in documents.items():
        (tmp_path / f"{verb}.json").write_text(json.dumps({"verb": verb, **document}))
        drawn = run(app, ["sparsity", "plot", str(tmp_path / f"{verb}.json"), "-o", str(tmp_path / f"{verb}.png")])
        assert drawn.exit_code == 0, drawn.output
        assert (tmp_path / f"{verb}.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("body", "part"), [("{}", "one of measure, pareto or fit"), ("[]", "no JSON object"), ("{", "is not JSON")]
)
def test_a_document_of_another_kind_is_refused(body, part, tmp_path):
    (tmp_path / "d.json").write_text(body)
    done = run(app, ["sparsity", "plot", str(tmp_path / "d.json"), "-o", str(tmp_path / "d.png")])
    assert done.exit_code == ExitCode.BAD_INPUT
    assert part in done.output
    assert not (tmp_path / "d.png").exists()


@pytest.mark.model
@pytest.mark.slow
def test_measure_and_pareto_of_the_real_model(smollm2_gguf, tmp_path):
    common = [str(smollm2_gguf), "--tokens", "128", "--window", "64"]
    export = str(tmp_path / "t.safetensors")
    done = run(app, ["sparsity", "measure", *common, "--arg", "0.1", "--export", export, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert report["cett"] == 0.1
    assert 0.3 < report["activation_ratio"] < 0.7
    done = run(app, ["sparsity", "pareto", *common, "--metrics", "cett,topk", "--ratios", "0.5"])
    assert done.exit_code == 0, done.output
    cett, topk = (float(line.split()[1]) for line in done.stdout.splitlines()[1:])
    assert cett < topk
