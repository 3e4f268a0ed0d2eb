"""The command line; a small federation on disk: two sites, an evaluation cohort, the run's file."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import typer
from pydicom import dcmread

from client.intake.deid.profile import Profile
from client.intake.desk import Desk, Entry
from client.intake.dicom import FileResult, Task
from client.intake.keys import SiteKey
from client.intake.labels import read_labels
from client.intake.take import Order, take_in
from common.spec import RunSpec, read_run_file
from deploy import cli

EXTRA = """
[evaluation]
bootstrap = 0
validation_fraction = 0.0
"""
SITES = """
[simulation]
evaluation = "evaluation"
[[simulation.site]]
name = "north"
cohort = "north"
declared_size = 20
[[simulation.site]]
name = "south"
cohort = "south"
declared_size = 30
"""


class Said(NamedTuple):
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """All of it on one line: where it was broken says nothing."""
        return " ".join(f"{self.out} {self.err}".split())


made_of = cache(typer.main.get_command)


@pytest.fixture
def cloister(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Said]]:
    """`cloister("spec", "explain", path)`: the whole command line, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(typer.main, "get_command", made_of)  # once, and not at every call
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["cloister", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return Said(code, out, err)

    yield run
    for number, handler in handlers.items():  # for the children of later tests as well
        signal.signal(number, handler)


OFFICE = "trial-office"
LET_THROUGH = (
    ("operators = []", f'operators = ["{OFFICE}"]'),
    ("models = []", 'models = ["small-cnn"]'),
    ("least_patients = 50", "least_patients = 5"),
    ("pace = 0.5", "pace = 0.0"),
)


@pytest.fixture
def node_run(make_spec: Callable[..., RunSpec]) -> Callable[..., RunSpec]:
    """The small run as an operator launches it, with changes; each call is one launch."""

    def make(run_id: str = "small-1", **changes: Any) -> RunSpec:
        return make_spec(operator=OFFICE, **changes).identified(run_id)

    return make


@pytest.fixture
def make_node(
    tmp_path: Path, cloister: Callable[..., Said], write_cohort: Any, node_run: Any
) -> Callable[..., Path]:
    """A node's folder, set up by the commands, that lets the small run through once approved.

    Called with `changes` of node.toml as pairs of old and new text; `owners` and `labels` of its
    cohort; and whether the cohort is `admitted`.
    """

    def make(
        changes: Sequence[tuple[str, str]] = (),
        *,
        owners: Sequence[int] = range(24),
        labels: Sequence[int] | None = None,
        admitted: bool = True,
        epsilon: float = 20.0,
    ) -> Path:
        home, cohort = tmp_path / "north", tmp_path / "cohort"
        write_cohort(node_run(), owners, labels=labels)
        made = cloister(
            *("node", "init", home, "--site", "north", "--declared-size", 40, "--delta", 1e-4),
            *("--epsilon", epsilon, "--cohort", cohort, "--by", "Ada"),
        )
        assert made.code == 0, made
        text = (home / "node.toml").read_text()
        for old, new in (*LET_THROUGH, *changes):
            assert old in text, old
            text = text.replace(old, new)
        (home / "node.toml").write_text(text)
        if admitted:
            done = cloister("node", "admit", home, "--reason", "it is one", "--by", "Ada")
            assert done.code == 0, done
        return home

    return make


@pytest.fixture
def write_run(
    tmp_path: Path, spec_text: str, make_spec: Callable[..., RunSpec], write_cohort: Any
) -> Callable[..., Path]:
    """Write a run's file, and the cohorts of its sites beside it.

    Called with the text of the ``[simulation]`` table where it is not the one of two sites,
    `changes` as pairs of old and new text, and cohorts by name as (owners, labels).
    """

    def write(
        simulation: str = SITES,
        changes: Sequence[tuple[str, str]] = (),
        **cohorts: tuple[Sequence[int], Sequence[int] | None],
    ) -> Path:
        usual: dict[str, tuple[Sequence[int], Sequence[int] | None]] = {
            "north": ([0, 1, 1, *range(2, 22)], None),
            "south": (range(100, 130), None),
            "evaluation": (range(200, 212), [0, 1] * 6),
        }
        for name, (owners, labels) in (usual | cohorts).items():
            if not (tmp_path / name).exists():
                write_cohort(make_spec(), owners, labels=labels, name=name)
        text = spec_text + EXTRA + simulation
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


class Watching:
    """An observer that keeps what it is told, and calls `then` after each site's answer."""

    def __init__(self, then: Callable[[int, str], Any] = lambda *_: None) -> None:
        self.answers: list[tuple[int, str, str]] = []
        self.rows: list[Any] = []
        self._then = then

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        self.sites, self.finished_rounds = sites, finished_rounds

    def sites_wait(self, waiting: Mapping[str, str]) -> None: ...

    def round_opened(self, number: int) -> None:
        self._then(number, "")

    def site_answered(self, number: int, site: str, status: str) -> None:
        self.answers.append((number, site, status))
        self._then(number, site)

    def round_closed(self, row: Any) -> None:
        self.rows.append(row)


@pytest.fixture
def watching() -> Iterator[type[Watching]]:
    """`watching(then)`: an observer of one run."""
    return Watching  # type: ignore[return-value]


# --- Reviewing an intake --------------------------------------------------------------------------


class InThisProcess:
    """Reads one object after another, without another process."""

    def __init__(self, reader: Callable[[Task], FileResult], *_: object) -> None:
        self._reader = reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, tasks: Iterable[Task]) -> Iterator[FileResult]:
        return map(self._reader, tasks)


@dataclass(frozen=True)
class Ward:
    """A source, a cohort that was taken in from it, and the desk beside it."""

    source: Path
    place: Path
    profile: Profile

    @property
    def cohort(self) -> Path:
        return self.place / "north.cohort"

    @property
    def key_file(self) -> Path:
        return self.place / "site.key"

    @property
    def key(self) -> SiteKey:
        return SiteKey.from_file(self.key_file)

    def desk(self) -> Desk:
        """The desk, opened anew."""
        return Desk(self.place / "north.cohort.intake", self.key)

    def entry(self, name: str) -> Entry:
        """The object of a file."""
        with self.desk() as desk:
            return next(entry for entry in desk.entries() if desk.place(entry).endswith(name))

    def take_in(self) -> None:
        """Take the source in, or what has come or was decided since."""
        run = read_run_file(self.place / "run.toml").spec
        labels = read_labels(self.place / "labels.csv", run.task)
        order = Order(self.source, self.cohort, run, labels, self.key, self.profile)
        take_in(order, pool=InThisProcess)


@pytest.fixture(scope="session")
def make_ward(spec_text: str) -> Callable[..., Ward]:
    """`make_ward(source, place)`: take in every file of a folder, each with the same label."""

    def make(source: Path, place: Path, profile: Profile | None = None) -> Ward:
        ward = Ward(source, place, profile or Profile())
        shape = "height = 16\nwidth = 16\n"
        text = spec_text.replace(shape, 'height = 128\nwidth = 128\nframes = "all"\n')
        (place / "run.toml").write_text(text)
        files = [file for file in source.rglob("*") if file.suffix == ".dcm"]
        headers = [dcmread(file, stop_before_pixels=True, force=True) for file in files]
        names = sorted({str(header.get("PatientID") or "none") for header in headers})
        lines = ["PatientID,label", *(f'"{name}",normal' for name in names)]
        (place / "labels.csv").write_text("\n".join(lines))
        ward.take_in()
        return ward

    return make


REAL = (
    "deid-data/ultrasounds/GREYSCALE_IMAGE.dcm",  # waits, with text in it
    "deid-data/ultrasounds/RGB_IMAGE.dcm",  # kept, blanked
    "presidio/docs/samples/python/sample_data/2_ORIGINAL.dcm",  # kept, blanked
    "pydicom-data/SC_rgb_2frame.dcm",  # waits, two frames
    "highdicom/ct_image.dcm",  # kept as it is
    "highdicom/seg_image_ct_binary.dcm",  # refused
)


@pytest.fixture(scope="session")
def ward_of_all(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Path, make_ward: Callable[..., Ward]
) -> Ward:
    """Real files taken in once; what changes it works on a copy (`ward`)."""
    place = tmp_path_factory.mktemp("ward")
    (place / "source").mkdir()
    for name in REAL:
        shutil.copy(shared_data / "dicom" / name, place / "source")
    return make_ward(place / "source", place)


@pytest.fixture
def ward(ward_of_all: Ward, tmp_path: Path) -> Ward:
    """A copy of the desk and cohort of real files: two objects wait, two have blanked pixels."""
    for part in ward_of_all.place.iterdir():
        if part.name != "source":
            copy = shutil.copytree if part.is_dir() else shutil.copy
            copy(part, tmp_path / part.name)
    return Ward(ward_of_all.source, tmp_path, ward_of_all.profile)
