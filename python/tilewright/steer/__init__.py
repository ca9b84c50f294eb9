# SPDX-License-Identifier: Apache-2.0
"""Moving a model's behaviour at inference by maps on its activations, one folder per method."""
