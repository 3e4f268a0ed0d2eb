"""A probe: thousands of identities planted over every place that a DICOM file has.

None may be left in a file that is kept, nor stand in a reason or an account. Then every rule is
put out of force in turn, and each time the probe has to find what that rule held back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple

import pytest
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.filebase import DicomBytesIO

from client.intake.deid.codestrip import Stripped
from client.intake.deid.engine import CHECKS, Engine
from client.intake.deid.pixeldata import CleanPixels, PixelCleaner
from client.intake.deid.profile import Profile
from client.intake.deid.rules import Rule
from client.intake.deid.treatments import TREATMENTS
from client.intake.part10 import DicomFile
from common.errors import DataError

Probes = Mapping[str, Any]


class Finding(NamedTuple):
    """What came of one file: where identities were left, and whether it was given away."""

    name: str
    leaks: set[str]
    kept: bool
    should_wait: bool


def look(probes: Probes, clean: Callable[..., Any], engine: Engine) -> Iterator[Finding]:
    """Run an engine over probes, one by one, and search everything that it gives away."""
    for name, probe in probes.items():
        try:
            result = clean(probe.data, engine)
        except DataError as reason:
            given, kept = str(reason).encode(), False
        else:
            account = repr(result.cleaned.account) + result.cleaned.name
            given, kept = result.data + account.encode(), True
        leaks = set(places({**probe.planted, **probe.also}, given))
        yield Finding(name, leaks, kept, probe.waits)


def first_leak(probes: Probes, clean: Callable[..., Any], engine: Engine) -> Finding | None:
    """The first file in which an identity was left."""
    return next((found for found in look(probes, clean, engine) if found.leaks), None)


def places(planted: Mapping[str, bytes], given: bytes) -> Iterator[str]:
    """Where what stands in `given` was planted; letters count in any case."""
    lower = given.lower()
    yield from (place for place, identity in planted.items() if identity.lower() in lower)


def as_it_stands(_scope: Any, element: DataElement) -> DataElement:
    """A treatment that treats nothing."""
    return element


def test_no_identity_is_left(
    probes: Probes,
    clean: Any,
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert sum(len(probe.planted) for probe in probes.values()) > 5000

    found = list(look(probes, clean, engine))

    assert {one.name: one.leaks for one in found if one.leaks} == {}
    assert [one.name for one in found if one.kept == one.should_wait] == []
    said = caplog.text + "".join(str(warning.message) for warning in recwarn)
    assert "KOWALSKI" not in said


def test_the_identities_are_there_to_be_found(probes: Probes) -> None:
    """Every one stands in its file as it is searched for, but in the deflated one."""
    for name, probe in probes.items():
        if name != "deflated":
            assert set(places(probe.planted, probe.data)) == probe.planted.keys(), name


# Rules that only a profile with options has; they have tests of their own below.
RETAINING = {Rule.KEEP, Rule.CLEAN}


@pytest.mark.parametrize("rule", sorted(set(Rule) - RETAINING))
def test_without_a_rule_the_probe_finds_a_leak(
    probes: Probes, clean: Any, engine: Engine, rule: Rule
) -> None:
    without = dataclasses.replace(engine, treatments={**TREATMENTS, rule: as_it_stands})

    assert first_leak(probes, clean, without)


def test_without_cleaning_descriptors_leak(probes: Probes, clean: Any, engine: Engine) -> None:
    """Under every option that cleans and none that retains, all the same nothing is left.

    Dates are not modified here: so many are planted that some would move onto others.
    """
    profile = Profile(
        clean_descriptors=True,
        clean_structured_content=True,
        clean_graphics=True,
    )
    cleaning = dataclasses.replace(engine, profile=profile)
    without = dataclasses.replace(cleaning, treatments={**TREATMENTS, Rule.CLEAN: as_it_stands})

    assert first_leak(probes, clean, cleaning) is None
    assert first_leak(probes, clean, without)


def test_without_the_rule_that_retains_more_than_the_options_say_is_kept(
    probes: Probes, clean: Any, engine: Engine
) -> None:
    """What stands in items of sequences that stay, a text for a date, an age that is rare."""
    profile = Profile(
        dates="full",
        retain_patient_characteristics=True,
        retain_institution_identity=True,
    )
    keeping = dataclasses.replace(engine, profile=profile)
    without = dataclasses.replace(keeping, treatments={**TREATMENTS, Rule.KEEP: as_it_stands})
    planted = probes["retained"].planted
    own = {place: planted[place] for place in planted if place.startswith("retained")}
    probe = {"retained": probes["retained"]._replace(planted=own)}

    assert first_leak(probe, clean, keeping) is None
    leak = first_leak(probe, clean, without)
    assert leak is not None
    assert leak.leaks == own.keys()
    assert len(own) == 6


@pytest.mark.parametrize("check", sorted(CHECKS.keys() - {"instance"}))
def test_without_a_check_something_passes_that_should_wait(
    probes: Probes, clean: Any, engine: Engine, check: str
) -> None:
    others = {name: done for name, done in CHECKS.items() if name != check}

    found = look(probes, clean, dataclasses.replace(engine, checks=others))

    assert any(one.kept and one.should_wait for one in found)


def test_without_the_check_of_names_a_file_comes_out_under_none(
    probes: Probes, engine: Engine
) -> None:
    others = {name: done for name, done in CHECKS.items() if name != "instance"}
    data = probes["unnamed"].data

    with pytest.raises(DataError, match="its SOP Instance UID is blank"):
        engine.clean_stream(BytesIO(data))
    assert dataclasses.replace(engine, checks=others).clean_stream(BytesIO(data)).name == ".dcm"


PIXEL_STEPS: dict[str, Any] = {
    "find": lambda _plane: [],
    "outside": lambda _header, _rows, _columns: None,
    "strip": lambda frame, _syntax: Stripped(frame, 8),
    "mask": lambda stored, _header: stored,
}


@pytest.mark.parametrize("step", PIXEL_STEPS)
def test_without_a_step_on_pixels_the_probe_finds_a_leak(
    probes: Probes, clean: Any, engine: Engine, step: str
) -> None:
    careless = dataclasses.replace(PixelCleaner(engine.profile), **{step: PIXEL_STEPS[step]})

    assert first_leak(probes, clean, dataclasses.replace(engine, pixels=careless))


def uncut(file: DicomFile) -> CleanPixels:
    """All bytes of the pixel data, however many the header describes."""
    element = file.pixel_element()
    file.stream.seek(element.start)
    return CleanPixels(file.syntax, BytesIO(file.stream.read(element.length)), {}, 0, outside=False)


def test_pixels_that_are_not_cut_to_their_described_length_leak(
    probes: Probes, clean: Any, engine: Engine
) -> None:
    container = {"container": probes["container"]}
    leak = first_leak(container, clean, dataclasses.replace(engine, pixels=uncut))

    assert leak is not None
    assert leak.leaks == {"behind the pixels"}


def test_with_the_old_file_meta_the_probe_finds_a_leak(
    probes: Probes, clean: Any, engine: Engine
) -> None:
    probe = probes["container"]
    old = dcmread(DicomBytesIO(probe.data), stop_before_pixels=True).file_meta
    careless = dataclasses.replace(engine, file_meta=lambda _clean, _syntax: old)

    assert first_leak({"container": probe}, clean, careless)
