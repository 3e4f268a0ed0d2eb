"""Runs that wait for a person, and what exactly a person says yes to.

A run that is asked for in ``ask`` mode is kept as a file until somebody has looked. What is
approved is one digest of everything that was shown: the version of Cloister, the run's spec, the
cohort, and what the run would cost; if any of it changes, the person is asked again.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

from client.book import Said
from common import accounting
from common.accounting import Share
from common.errors import ConfigError, Refusal, RefusalCode
from common.files import write_durably
from common.spec import DpSgd, RunSpec

_MOST_WAITING = 50
_BEGINNING = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True)
class Asked:
    """Everything that a person sees of a run before saying yes.

    Attributes:
        spec: the run.
        cohort: digest of the cohort's index.
        shares: what the run would do at this site.
        synthetic: the images that it would mix in, and what is known of those behind them.
        version: of Cloister.
    """

    spec: RunSpec
    cohort: str
    shares: tuple[Share, ...]
    synthetic: str = ""
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
        shown += [self.synthetic] if self.synthetic else []
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()

    @property
    def said(self) -> Said:
        """What the ledger keeps of it when the run is set aside."""
        said: Said = {"name": self.spec.name, "run_id": self.spec.run_id}
        return said | ({"synthetic": self.synthetic} if self.synthetic else {})


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
        self.check_room(spec)
        write_durably(path, spec.canonical_json.encode())

    def check_room(self, spec: RunSpec) -> None:
        """Refuse one more run than a person can look through.

        Raises:
            Refusal: ``approval``.
        """
        waiting = {path.stem for path in self._folder.glob("*.json")}
        if spec.digest not in waiting and len(waiting) >= _MOST_WAITING:
            raise Refusal(RefusalCode.APPROVAL, f"{_MOST_WAITING} runs wait already; deny some")

    def waiting(self) -> list[RunSpec]:
        """All that wait, by name; what holds no run is told of by `faults`."""
        found = (_read(path) for path in self._folder.glob("*.json"))
        runs = [spec for spec in found if isinstance(spec, RunSpec)]
        return sorted(runs, key=lambda spec: (spec.name, spec.digest))

    def faults(self) -> list[str]:
        """What is wrong with each file that holds no run; one keeps no other from being seen."""
        found = (_read(path) for path in sorted(self._folder.glob("*.json")))
        return [str(fault) for fault in found if isinstance(fault, ConfigError)]

    def find(self, start: str) -> RunSpec:
        """The one whose digest begins with `start`.

        Raises:
            ConfigError: if there is none, or more than one, or it is too short.
        """
        begin = beginning(start)
        found = [spec for spec in self.waiting() if spec.digest.startswith(begin)]
        if len(found) != 1:
            raise ConfigError(
                f"{start!r}: {len(found)} waiting runs begin with it; `cloister node requests` "
                "lists them"
            )
        return found[0]

    def drop(self, spec: RunSpec) -> None:
        """It waits no longer."""
        (self._folder / f"{spec.digest}.json").unlink(missing_ok=True)


def beginning(digest: str) -> str:
    """The beginning of a digest as a person typed it, in small letters.

    Raises:
        ConfigError: if it is too short to be meant for one run, or no digest.
    """
    if not _BEGINNING.fullmatch(digest.lower()):
        raise ConfigError(f"{digest!r}: expected at least 6 hexadecimal digits of a digest")
    return digest.lower()


def _read(path: Path) -> RunSpec | ConfigError:
    try:
        return RunSpec.from_json(path.read_text("utf-8"), source=str(path))
    except (OSError, ValueError) as error:
        return ConfigError(f"{path}: holds no run ({error})")
    except ConfigError as error:
        return error
