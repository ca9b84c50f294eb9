# SPDX-License-Identifier: Apache-2.0
"""Activation sparsity: fewer neurons a token, by one folder per method."""
