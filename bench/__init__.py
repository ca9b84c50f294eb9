# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: cases.toml says what is measured, `run` measures, `report` makes the tables."""

from __future__ import annotations
