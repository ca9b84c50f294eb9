# SPDX-License-Identifier: Apache-2.0
"""Sparsing Law's claim: its checks hold, and fail when what they check is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("scipy")

from tilewright import claims
from tilewright.claims import Experiment
from tilewright.sparsify.sparsing_law import TailError, _claim_exact


def test_it_is_found():
    assert "sparsing-law" in claims.discover()


def test_the_definition_holds():
    rows = list(_claim_exact.definition_rows(Experiment(quick=True)))
    assert len(rows) == 3
    assert all(row.holds for row in rows)


@pytest.mark.parametrize(("name", "factor"), [("error", 1.001), ("threshold", 1.5)])
def test_a_wrong_definition_is_seen(name, factor, monkeypatch):
    right = getattr(TailError, name)
    monkeypatch.setattr(TailError, name, lambda self, value: factor * right(self, value))
    assert not all(row.holds for row in _claim_exact.definition_rows(Experiment(quick=True)))


def test_a_wrong_fit_is_seen(monkeypatch):
    right = _claim_exact.fit_activation_law

    def wrong(*arguments, **options):
        law = right(*arguments, **options)
        return dataclasses.replace(law, params={**law.params, "A0": 1.1 * law.limit})

    monkeypatch.setattr(_claim_exact, "fit_activation_law", wrong)
    rows = list(_claim_exact.fit_rows(Experiment(quick=True)))
    assert not rows[0].holds


@pytest.mark.parametrize(("kind", "name"), [("silu", "0.2B"), ("relu", "2.4B")])
def test_the_standard_error_of_an_exponent_is_that_of_fits(kind, name):
    law, tokens = _claim_exact.published(kind, name)
    random = np.random.default_rng(0)
    found = []
    for _ in range(40):
        noisy = law.predict(tokens) * (1 + _claim_exact.NOISE * random.standard_normal(len(tokens)))
        found.append(_claim_exact.fit_activation_law(tokens, noisy, kind=kind, bootstrap=0).params["alpha"])
    # The standard deviation of 40 normal values is known to one part in sqrt(78); four of these, and curvature.
    assert np.std(found) == pytest.approx(_claim_exact.exponent_error(law, tokens), rel=0.5)
