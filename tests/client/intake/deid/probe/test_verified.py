"""The independent checker against the probe: what a rule out of force lets through, it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from pydicom.dataelem import DataElement

from client.intake.deid.codestrip import Stripped
from client.intake.deid.engine import Engine
from client.intake.deid.pixeldata import PixelCleaner
from client.intake.deid.profile import Profile
from client.intake.deid.rules import Rule
from client.intake.deid.treatments import TREATMENTS
from client.intake.quiet import quiet
from client.intake.verify.check import Checker
from client.intake.verify.finding import Finding
from client.intake.verify.identities import Identities
from client.intake.verify.layout import take_apart
from common.errors import DataError

Probes = Mapping[str, Any]
Clean = Callable[..., Any]


class Left(NamedTuple):
    """An identity that was left in a file: of which probe, where it was planted, if it is found."""

    probe: str
    place: str
    found: bool


def as_it_stands(_scope: Any, element: DataElement) -> DataElement:
    return element


def covered(data: bytes, findings: list[Finding]) -> bytearray:
    """For each byte of a file whether a finding lies on it."""
    mask = bytearray(len(data))
    for one in findings:
        mask[one.offset : one.offset + one.length] = b"\1" * one.length
    return mask


def seen(data: bytes, identity: bytes, mask: bytearray) -> bool:
    """Whether a finding lies on any of the places where an identity stands."""
    at = data.find(identity)
    while at >= 0:
        if any(mask[at : at + len(identity)]):
            return True
        at = data.find(identity, at + 1)
    return False


def looked_at(data: bytes, planted: Mapping[str, bytes], checker: Checker, name: str) -> list[Left]:
    """What of that which was planted is left in a file, and whether the checker sees it."""
    lower = data.lower()
    left = {place: text.lower() for place, text in planted.items() if text.lower() in lower}
    with quiet():
        findings = list(checker.findings(data, f"{name}.dcm")) if left else []
    mask = covered(data, [one for one in findings if one.offset >= 0])
    return [Left(name, place, seen(lower, text, mask)) for place, text in left.items()]


def left_by(probes: Probes, clean: Clean, engine: Engine, checker: Checker) -> Iterator[Left]:
    """What an engine leaves of all probes."""
    for name, probe in probes.items():
        try:
            result = clean(probe.data, engine)
        except DataError:
            continue
        yield from looked_at(result.data, {**probe.planted, **probe.also}, checker, name)


@pytest.fixture(scope="module")
def told(probes: Probes) -> Checker:
    """A checker that knows the sources of all probes."""
    known = Identities()
    for name, probe in probes.items():
        known.add_file(probe.data, name)
    return Checker(known)


@pytest.mark.parametrize("rule", sorted(set(Rule) - {Rule.KEEP, Rule.CLEAN}))
def test_what_a_rule_out_of_force_leaves_is_found_without_a_source(
    probes: Probes, clean: Clean, engine: Engine, rule: Rule
) -> None:
    without = dataclasses.replace(engine, treatments={**TREATMENTS, rule: as_it_stands})

    left = list(left_by(probes, clean, without, Checker()))

    assert left
    assert [one for one in left if not one.found] == []


def test_what_uncleaned_descriptors_leave_is_found(
    probes: Probes, clean: Clean, engine: Engine
) -> None:
    profile = Profile(clean_descriptors=True, clean_structured_content=True, clean_graphics=True)
    treatments = {**TREATMENTS, Rule.CLEAN: as_it_stands}
    careless = dataclasses.replace(engine, profile=profile, treatments=treatments)

    left = list(left_by(probes, clean, careless, Checker()))

    assert len(left) > 1000
    assert [one for one in left if not one.found] == []


STEPS: dict[str, Any] = {
    "strip": lambda frame, _syntax: Stripped(frame, 8),
    "mask": lambda stored, _header: stored,
}


@pytest.mark.parametrize("step", STEPS)
def test_words_and_bits_left_in_pixels_are_found(
    probes: Probes, clean: Clean, engine: Engine, step: str
) -> None:
    careless = dataclasses.replace(PixelCleaner(engine.profile), **{step: STEPS[step]})

    left = list(left_by(probes, clean, dataclasses.replace(engine, pixels=careless), Checker()))

    assert left
    assert [one for one in left if not one.found] == []


def test_the_sources_own_values_are_found_by_themselves(
    probes: Probes, clean: Clean, engine: Engine, told: Checker
) -> None:
    """With no rule in force, and the structure of the file left out of account.

    What is not found so are pointers, words in codestreams and tables: structure alone tells them.
    """
    careless = dataclasses.replace(engine, treatments=dict.fromkeys(TREATMENTS, as_it_stands))

    class ByValue(Checker):
        def findings(self, *given: Any) -> Iterator[Finding]:
            return (one for one in told.findings(*given) if one.rule == "value of the source")

    left = list(left_by(probes, clean, careless, ByValue()))

    assert len(left) > 5000
    assert sum(one.found for one in left) >= 0.99 * len(left)


# Their identities are pictures, which no search of bytes can tell from other pictures.
OF_PIXELS = {"burned_in", "ultrasound", "photograph", "scanned_paper", "flagged", "head", "nobody",
             "unnamed"}  # fmt: skip


def test_in_the_probes_themselves_everything_is_found(probes: Probes) -> None:
    left: list[Left] = []
    for name, probe in probes.items():
        data = take_apart(probe.data).data
        left += looked_at(
            data if name == "deflated" else probe.data, probe.planted, Checker(), name
        )

    missed = [one for one in left if not one.found]
    assert len(left) > 5500
    assert {one.probe for one in missed} <= OF_PIXELS
    assert len(missed) <= len(OF_PIXELS) + 2


def test_in_what_the_engine_gives_away_nothing_is_found(
    probes: Probes, clean: Clean, engine: Engine, told: Checker
) -> None:
    profiles = (
        Profile(),
        Profile(clean_descriptors=True, clean_structured_content=True, clean_graphics=True),
    )
    for profile in profiles:
        for name, probe in probes.items():
            try:
                result = clean(probe.data, dataclasses.replace(engine, profile=profile))
            except DataError:
                continue
            with quiet():
                assert list(told.findings(result.data, result.cleaned.name)) == [], name
