# SPDX-License-Identifier: Apache-2.0
"""Looking inside a model: features of its activations, one folder per method."""
