# SPDX-License-Identifier: Apache-2.0
"""Oracles in torch, in the notation of the papers, float64 capable. Nothing here is fast; nothing here shares code with a kernel."""
