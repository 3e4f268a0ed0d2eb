"""What happened in each round at this site, for the hospital's own eyes: it never leaves.

One file of JSON lines a run, readable by its owner alone. Losses and numbers of patients stand
here and in the node's log, and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError

if TYPE_CHECKING:  # the desk reads a diary without what trains
    from client.training import LocalResult


@dataclass(frozen=True)
class Page:
    """One round at this site.

    Attributes:
        round_number: from 1.
        time: when it ended, ISO 8601, UTC.
        seconds: how long training took.
        mean_loss: over the sampled patients; None if there was none.
        patients: sampled in each step.
        zeroed: patients whose gradient was not finite and became zero.
    """

    round_number: int
    time: str
    seconds: float
    mean_loss: float | None
    patients: tuple[int, ...]
    zeroed: int

    @classmethod
    def of(cls, round_number: int, time: str, seconds: float, result: LocalResult) -> Page:
        """The page of a trained round."""
        loss = None if math.isnan(result.mean_loss) else result.mean_loss
        return cls(round_number, time, seconds, loss, result.sampled, result.zeroed)


class Diary:
    """The pages of all runs, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, run: str, page: Page) -> None:
        """Write one page of the run with this digest."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        line = json.dumps(asdict(page)) + "\n"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self._folder / f"{run}.jsonl", flags, 0o600)
        try:
            end = os.fstat(descriptor).st_size
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + line.encode())
        finally:
            os.close(descriptor)

    def read(self, run: str) -> list[Page]:
        """All pages of a run, none for one that was never trained here.

        A line that a full disk cut short is left out.

        Raises:
            ConfigError: for a line that is no page, or a file that cannot be read.
        """
        path = self._folder / f"{run}.jsonl"
        if not path.exists():
            return []
        try:
            lines = path.read_text("utf-8").splitlines()
            return [_page(json.loads(line)) for line in lines if not _torn(line)]
        except OSError as error:
            raise ConfigError(f"{path}: the diary cannot be read ({error})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: a line is no page of a diary ({error})") from error


def _page(fields: dict[str, Any]) -> Page:
    return Page(**fields | {"patients": tuple(fields["patients"])})


def _torn(line: str) -> bool:
    """Whether a line is the beginning of a page and no more; no page has a table in it."""
    return line.startswith("{") and not line.endswith("}")
