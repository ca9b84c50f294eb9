# SPDX-License-Identifier: Apache-2.0
"""The accelerator for ternary models on an edge FPGA: its integer contract, its HLS units, its cycle model."""
