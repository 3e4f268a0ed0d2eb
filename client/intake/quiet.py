"""Silence for parsers: pydicom tells the values that it dislikes, and they name patients."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom import config


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from printing and logging, and from looking for what to tell, meanwhile."""
    log, settings = logging.getLogger("pydicom"), config.settings
    level, validation = log.level, settings.reading_validation_mode
    log.setLevel(logging.CRITICAL + 1)
    settings.reading_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        settings.reading_validation_mode = validation
