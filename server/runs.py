"""The runs of a coordinator on disk: what is to be done, how it stands, and what happened.

    runs/ID/spec.json      the run, frozen when it was launched
    runs/ID/standing.json  how it stands; written by who holds it: the service while nobody
                           conducts it, its conductor while it does
    runs/ID/asked.stop     a person has asked for its end
    runs/ID/asked.resume   a person has asked for it to go on
    runs/ID/events.jsonl   what its observer was told, for who follows it from another process
    runs/ID/conductor.log  what its conductors said

Whoever may write in the folder may launch, stop and resume: there is no other door.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, ValidationError

from common.errors import ConfigError, RunError
from common.files import write_durably
from common.spec import RunSpec, Section
from server.witness import WITNESS_FILE

if TYPE_CHECKING:  # who lists runs need not wait for torch
    from server.rounds import Observer

EVENTS = "events.jsonl"
_LARGEST = 2**20


class Standing(StrEnum):
    """How a run stands.

    ``queued``: nobody has begun it. ``running``: a conductor has it, or is about to. ``waiting``:
    its conductor died, and is started again in a while. ``finished``, ``stopped`` (by a person):
    over for ever. ``failed``: it waits for a person, who mends the cause and resumes it.
    """

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


OPEN = frozenset({Standing.QUEUED, Standing.RUNNING, Standing.WAITING})
OVER = frozenset({Standing.FINISHED, Standing.STOPPED})


class State(Section):
    """How a run stands.

    Attributes:
        since: when it came to stand so.
        reason: why, in words; empty if there is nothing to say.
        submission: Flower's number of its last submission; 0 before the first.
        deaths: conductors that died since the last round was finished.
    """

    format: Literal["cloister run 1"] = "cloister run 1"
    standing: Standing
    since: AwareDatetime
    reason: str = ""
    submission: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class CoordinatorHome:
    """The folder of a coordinator, as far as runs go."""

    path: Path

    @property
    def runs(self) -> Path:
        """A folder for each run."""
        return self.path / "runs"

    @property
    def evaluation(self) -> Path:
        """The operator's held-out cohort."""
        return self.path / "evaluation"

    @property
    def witnesses(self) -> Path:
        """The sites' witnesses, for all runs."""
        return self.path / WITNESS_FILE

    @property
    def service(self) -> Path:
        """What the service keeps for itself; held while it runs."""
        return self.path / "service"

    @property
    def database(self) -> Path:
        """Flower's state."""
        return self.service / "flower.sqlite"

    def all_runs(self) -> list[Run]:
        """Every run, the oldest first."""
        found = self.runs.glob("*/standing.json") if self.runs.is_dir() else ()
        made = [Run(path.parent) for path in found if not path.parent.name.startswith(".")]
        return sorted(made, key=lambda run: (run.name.rsplit("-", 3)[1:], run.name))

    def run(self, name: str) -> Run:
        """One of them.

        Raises:
            ConfigError: if there is none of that name.
        """
        found = Run(self.runs / name)
        if name != Path(name).name or not found.exists:
            there = ", ".join(run.name for run in self.all_runs()[-5:]) or "none"
            raise ConfigError(f"{self.runs}: no run {name!r}; the newest are: {there}")
        return found


class Run:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Its identity, for people and in the spec."""
        return self.path.name

    @property
    def exists(self) -> bool:
        """Whether it was launched."""
        return (self.path / "standing.json").is_file()

    @cached_property
    def spec(self) -> RunSpec:
        """What runs.

        Raises:
            RunError: if the file cannot be read, or was changed.
        """
        path = self.path / "spec.json"
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: cannot be read ({error}); put it back") from error
        spec = RunSpec.from_json(text, source=str(path))
        if spec.run_id != self.name:
            raise RunError(f"{path}: is the run {spec.run_id!r}, expected {self.name!r}")
        return spec

    @property
    def state(self) -> State:
        """How it stands.

        Raises:
            RunError: if the file cannot be read.
        """
        path = self.path / "standing.json"
        try:
            with path.open("rb") as file:
                return State.model_validate_json(file.read(_LARGEST))
        except (OSError, ValidationError) as error:
            raise RunError(f"{path}: damaged ({error}); remove it to forget the run") from error

    def write(self, standing: Standing, reason: str = "", **changed: int) -> None:
        """Replace how it stands; what is not named stays."""
        before = self.state.model_dump(include={"submission", "deaths"}) if self.exists else {}
        now = datetime.now(UTC)
        state = State(standing=standing, since=now, reason=reason, **(before | changed))
        write_durably(self.path / "standing.json", state.model_dump_json(indent=1).encode())

    @property
    def finished_rounds(self) -> int:
        """How many are in the record."""
        try:
            return (self.path / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    @property
    def told(self) -> int:
        """Bytes of ``events.jsonl``."""
        try:
            return (self.path / EVENTS).stat().st_size
        except FileNotFoundError:
            return 0

    def ask(self, what: Literal["stop", "resume"]) -> None:
        """Ask whoever holds the run.

        Raises:
            RunError: if nothing can be written there.
        """
        try:
            write_durably(self.path / f"asked.{what}", b"")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error})") from error

    def asked(self, what: Literal["stop", "resume"]) -> bool:
        """Whether a person has asked."""
        return (self.path / f"asked.{what}").exists()

    def answered(self, what: Literal["stop", "resume"]) -> None:
        """It is done."""
        (self.path / f"asked.{what}").unlink(missing_ok=True)


# --- What an observer is told, across processes -------------------------------------------------


class EventLog:
    """An observer that writes down what it is told.

    Args:
        path: a file, which is added to.
        also: is told as well.
    """

    def __init__(self, path: Path, also: Observer) -> None:
        self._path, self._also = path, also
        self._end_torn_line()

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """See `server.rounds.Observer`."""
        self._also.run_opened(spec, sites, finished_rounds)
        self._add("run_opened", sites=sites, finished_rounds=finished_rounds)

    def sites_wait(self, waiting: Mapping[str, str]) -> None:
        """See `server.rounds.Observer`."""
        self._also.sites_wait(waiting)
        self._add("sites_wait", waiting=dict(waiting))

    def round_opened(self, number: int) -> None:
        """See `server.rounds.Observer`."""
        self._also.round_opened(number)
        self._add("round_opened", number=number)

    def site_answered(self, number: int, site: str, status: str) -> None:
        """See `server.rounds.Observer`."""
        self._also.site_answered(number, site, status)
        self._add("site_answered", number=number, site=site, status=status)

    def round_closed(self, row: Mapping[str, Any]) -> None:
        """See `server.rounds.Observer`."""
        self._also.round_closed(row)
        self._add("round_closed", row=dict(row))

    def _end_torn_line(self) -> None:
        """What a full disk or a crash has cut is a line of its own, and takes no other with it."""
        with self._path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def _add(self, event: str, **what: Any) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(), "event": event, **what})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Follower:
    """Reads an `EventLog`, and tells an observer what is new.

    Args:
        run: that is followed.
        observer: is told.
        start: from which byte of it on.
    """

    def __init__(self, run: Run, observer: Observer, start: int = 0) -> None:
        self._run, self._observer, self._read = run, observer, start

    def follow(self) -> int:
        """Tell what has come since the last time; how much that was."""
        lines = list(self._lines())
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:
                continue  # cut off (`EventLog`)
            told.pop("time", None)
            self._tell(told.pop("event"), told)
        return len(lines)

    def _lines(self) -> Iterator[str]:
        try:
            with (self._run.path / EVENTS).open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        if whole:
            self._read += len(whole) + 1
            yield from whole.decode().split("\n")

    def _tell(self, event: str, told: Mapping[str, Any]) -> None:
        match event:
            case "run_opened":
                rounds = told["finished_rounds"]
                self._observer.run_opened(self._run.spec, told["sites"], rounds)
            case "sites_wait":
                self._observer.sites_wait(told["waiting"])
            case "round_opened":
                self._observer.round_opened(told["number"])
            case "site_answered":
                self._observer.site_answered(told["number"], told["site"], told["status"])
            case "round_closed":
                self._observer.round_closed(told["row"])


def open_home(path: Path) -> CoordinatorHome:
    """The home in a folder.

    Raises:
        ConfigError: if it is no coordinator's.
    """
    home = CoordinatorHome(Path(os.path.abspath(path)))
    if not (home.path / "ca.pem").is_file():
        raise ConfigError(
            f"{path}: no coordinator's folder; `cloister coordinator init` makes one, or name "
            "another with --home"
        )
    return home
