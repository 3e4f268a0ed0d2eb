"""The demo: three synthetic hospitals train one network together, from DICOM to report.

Everything that a real federation does is done for real: DICOM files with planted identities are
taken in, the network is trained under patient-level differential privacy at each site, and
evaluated centrally. Only the patients are invented (`hospitals`), and the randomness is seeded.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from client.intake.keys import SiteKey
from client.intake.labels import read_labels
from client.intake.take import Order
from common.errors import ConfigError
from common.spec import read_run_file
from deploy.cli_take import take_in_shown
from deploy.hospitals import Hospital, make_hospitals

RUN_FILE = "run.toml"
_SEED = 1
_MARK = ".cloister-demo"


def prepare_demo(folder: Path, console: Console, *, size: float = 1.0) -> Path:
    """Make the hospitals' DICOM folders, their cohorts and the run's file below `folder`.

    What an earlier demo made there is made anew; its runs stay.

    Args:
        folder: new or empty, or an earlier demo's.
        console: where progress is shown.
        size: how many patients, as a factor of the demo's.

    Returns:
        The run's file.

    Raises:
        ConfigError: if `folder` holds anything but an earlier demo.
    """
    _claim(folder)
    run_file = folder / RUN_FILE
    run_file.write_text((files("deploy") / "demo.toml").read_text(encoding="utf-8"))
    with console.status("Drawing three hospitals' films and an evaluation set …"):
        hospitals = make_hospitals(folder / "hospitals", seed=_SEED, size=size)
    for hospital in hospitals:
        _take_in(hospital, folder / "cohorts" / hospital.name, run_file)
    return run_file


def _take_in(hospital: Hospital, cohort: Path, run_file: Path) -> None:
    """What `cloister intake run` does."""
    spec = read_run_file(run_file).spec
    labels = read_labels(hospital.labels, spec.task)
    take_in_shown(Order(hospital.folder, cohort, spec, labels, SiteKey(bytes(32))))


def _claim(folder: Path) -> None:
    """Make `folder` this demo's; only what a demo made is removed."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise ConfigError(f"{folder}: holds something else; name a new folder: cloister demo NAME")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    for made in ("hospitals", "cohorts"):
        shutil.rmtree(folder / made, ignore_errors=True)
