"""What the tests of de-identification share: an engine, its input as bytes, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset

from client.intake.deid.engine import Cleaned, Engine
from client.intake.deid.profile import Profile
from client.intake.keys import SiteKey
from client.intake.quiet import quiet

KEY = SiteKey(bytes(range(32)))


class Result(NamedTuple):
    """A cleaned object, the bytes of its file, and the file as it is read again."""

    cleaned: Cleaned
    data: bytes
    again: FileDataset


def to_bytes(dataset: Dataset) -> bytes:
    """A data set as a file."""
    buffer = BytesIO()
    with quiet():
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def run(data: bytes | Dataset, engine: Engine | None = None, **profile: Any) -> Result:
    """De-identify a file, given as bytes or as a data set."""
    engine = engine or Engine(Profile(**profile), KEY)
    source = data if isinstance(data, bytes) else to_bytes(data)
    cleaned = engine.clean_stream(BytesIO(source))
    written = to_bytes(cleaned.dataset)
    return Result(cleaned, written, dcmread(BytesIO(written)))


@pytest.fixture(scope="session")
def clean() -> Callable[..., Result]:
    """`clean(bytes or data set, engine=None, **profile)`."""
    return run


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An engine of the Basic Profile; change it with `dataclasses.replace`."""
    return Engine(Profile(), KEY)


@pytest.fixture(scope="session")
def as_bytes() -> Callable[[Dataset], bytes]:
    """A data set as the bytes of a file."""
    return to_bytes


@pytest.fixture(scope="session")
def but() -> Callable[..., Engine]:
    """`but(engine, field=value)`: an engine with something else in its place."""
    return dataclasses.replace
