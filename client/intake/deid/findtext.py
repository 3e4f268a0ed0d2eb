"""Finds lines of text in an image."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from client.intake.deid.burned_in import Box


def find_text(plane: NDArray[Any]) -> list[Box]:
    """Not yet."""
    return []
