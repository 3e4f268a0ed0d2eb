"""Runs that wait for a person, and what exactly a person says yes to.

A run that is asked for in ``ask`` mode is kept as a file until somebody has looked. What is
approved is one digest of everything that was shown: the version of Cloister, the run's spec, the
cohort, and what the run would cost; if any of it changes, the person is asked again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

from common import accounting
from common.accounting import Share
from common.errors import ConfigError, Refusal, RefusalCode
from common.files import write_durably
from common.spec import DpSgd, RunSpec

_MOST_WAITING = 50


@dataclass(frozen=True)
class Asked:
    """Everything that a person sees of a run before saying yes.

    Attributes:
        spec: the run.
        cohort: digest of the cohort's index.
        shares: what the run would do at this site.
        version: of Cloister.
    """

    spec: RunSpec
    cohort: str
    shares: tuple[Share, ...]
    version: str = version("cloister")

    @property
    def epsilon(self) -> float | None:
        """What the whole run would cost at the spec's delta, by PLD; None without privacy."""
        privacy = self.spec.privacy
        if not self.shares or not isinstance(privacy, DpSgd):
            return None
        return accounting.epsilon([share.whole for share in self.shares], privacy.delta)

    @property
    def digest(self) -> str:
        """SHA-256 over all of it."""
        epsilon = None if self.epsilon is None else f"{self.epsilon:.4f}"
        does = [(part, astuple(mechanism), rounds) for part, mechanism, rounds in self.shares]
        shown = [self.version, self.spec.digest, self.cohort, epsilon, does]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


class Requests:
    """The runs that wait, a file each in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, spec: RunSpec) -> None:
        """Keep a run that was asked for.

        Raises:
            Refusal: ``approval``, if as many wait already as a person can look through; a
                coordinator cannot fill the disk.
        """
        path = self._folder / f"{spec.digest}.json"
        if path.exists():
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if sum(1 for _ in self._folder.glob("*.json")) >= _MOST_WAITING:
            raise Refusal(RefusalCode.APPROVAL, f"{_MOST_WAITING} runs wait already; deny some")
        write_durably(path, spec.canonical_json.encode())

    def waiting(self) -> list[RunSpec]:
        """All that wait, by name.

        Raises:
            ConfigError: for a file that holds no run.
        """
        return sorted(map(_read, self._folder.glob("*.json")), key=lambda spec: spec.name)

    def find(self, start: str) -> RunSpec:
        """The one whose digest begins with `start`.

        Raises:
            ConfigError: if there is none, or more than one.
        """
        found = [spec for spec in self.waiting() if spec.digest.startswith(start.lower())]
        if len(found) != 1:
            raise ConfigError(
                f"{start!r}: {len(found)} waiting runs begin with it; `cloister node requests` "
                "lists them"
            )
        return found[0]

    def drop(self, spec: RunSpec) -> None:
        """It waits no longer."""
        (self._folder / f"{spec.digest}.json").unlink(missing_ok=True)


def _read(path: Path) -> RunSpec:
    try:
        return RunSpec.from_json(path.read_text("utf-8"), source=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error
