# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on a CUDA device: one module a kernel, each with `cases()`; run them with `python -m bench.cuda.run`."""
