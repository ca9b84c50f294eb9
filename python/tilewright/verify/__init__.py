# SPDX-License-Identifier: Apache-2.0
"""Proofs about a network's outputs over a set of inputs, one folder per method."""
