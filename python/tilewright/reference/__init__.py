# SPDX-License-Identifier: Apache-2.0
"""Oracles in torch, in the notation of the papers, float64 capable; they share no code with any kernel."""
