# SPDX-License-Identifier: Apache-2.0
"""The one error that a file which cannot be trusted raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is damaged, mislabelled or of a kind that cannot be loaded.

    The message names the file or tensor, what came, what is needed and, where there is one, the way out.
    """
