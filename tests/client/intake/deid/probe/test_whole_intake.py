"""The probe through the whole intake: cohort, desk, report and exported files hold no identity."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from client.intake.deid.profile import Profile
from client.intake.desk import Desk, State
from client.intake.export import ExportOrder, export
from client.intake.keys import SiteKey
from client.intake.labels import LabelEntry, LabelTable
from client.intake.quiet import quiet
from client.intake.take import Order, desk_of, take_in
from deploy.intake_report import write_report

KEY = SiteKey(bytes(range(32)))
Probes = Mapping[str, Any]


@pytest.fixture(scope="module")
def source(probes: Probes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probes as files whose very names are identities, some of them within a ZIP."""
    folder = tmp_path_factory.mktemp("source") / "KOWALSKI^QX"
    folder.mkdir()
    with zipfile.ZipFile(folder / "QXEXPORTKOWALSKI.zip", "w") as archive:
        for number, (name, probe) in enumerate(probes.items()):
            if number % 3:
                (folder / f"QXFILE{number}KOWALSKI {name}").write_bytes(probe.data)
            else:
                archive.writestr(f"QXFILE{number}KOWALSKI {name}", probe.data)
    return folder


def identities(probes: Probes) -> set[bytes]:
    """All that was planted, but what is too short to mean anything among millions of bytes."""
    planted = {value for probe in probes.values() for value in probe.planted.values()}
    planted |= {value for probe in probes.values() for value in probe.also.values()}
    return {value for value in planted if len(value) >= 8} | {b"KOWALSKI"}


def found(places: Iterable[Path], wanted: set[bytes]) -> set[bytes]:
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    names = "\n".join(str(path) for path in files).encode()
    everything = [names, *(path.read_bytes() for path in files)]
    return {value for value in wanted if any(value in data for data in everything)}


def labels(probes: Probes) -> LabelTable:
    """A label for every patient of the probes."""
    entries: dict[str, LabelEntry] = {}
    for probe in probes.values():
        with quiet():
            header = dcmread(BytesIO(probe.data), force=True, stop_before_pixels=True)
        name = str(header.get("PatientID", "")).strip()
        if name:
            entries[name] = LabelEntry(0, "", len(entries) + 2)
    return LabelTable("labels.csv", "PatientID", entries)


def test_a_cohort_its_desk_and_its_report_hold_no_identity(
    probes: Probes, source: Path, tmp_path: Path, make_spec: Any, in_this_process: Any
) -> None:
    run = make_spec(input={"height": 96, "width": 96, "frames": "middle"})
    order = Order(source, tmp_path / "cohort", run, labels(probes), KEY)

    summary = take_in(order, pool=in_this_process)
    with Desk(order.desk, KEY) as desk:
        write_report(desk, order.profile)
        waiting = len(desk.numbers(State.WAITS))

    assert summary.contents.images >= 10
    assert waiting >= 1
    assert any("KOWALSKI" in item.what for item in summary.not_used)
    assert not any("KOWALSKI" in item.reason for item in summary.not_used)
    assert found([order.cohort, order.desk], identities(probes)) == set()
    assert len(found([source], identities(probes))) > 400


def test_exported_files_and_their_desk_hold_no_identity(
    probes: Probes, source: Path, tmp_path: Path, in_this_process: Any
) -> None:
    order = ExportOrder(source, tmp_path / "exported", KEY)

    summary = export(order, pool=in_this_process)
    with Desk(desk_of(order.folder), KEY) as desk:
        write_report(desk, order.profile)

    assert summary.files >= 10
    assert found([order.folder, desk_of(order.folder)], identities(probes)) == set()


def test_the_search_sees_a_profile_that_keeps_names_of_places(
    probes: Probes, source: Path, tmp_path: Path, in_this_process: Any
) -> None:
    """Negative control: what an option retains is found, so what is not found is not there."""
    order = ExportOrder(source, tmp_path / "exported", KEY)
    profile = Profile(retain_institution_identity=True)

    export(dataclasses.replace(order, profile=profile), pool=in_this_process)

    assert found([order.folder], identities(probes))
