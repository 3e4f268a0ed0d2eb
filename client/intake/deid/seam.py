"""The seam of de-identification: every image of a cohort passes here before anything is kept.

Reading (`client.intake.dicom`) hands over a file's whole header and gets back a new one, built by
the engine; brightness is computed from that one alone. Then each frame goes through at full
resolution, and nothing of it is kept but what comes back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from pydicom.dataset import Dataset

from client.intake.decision import Decision
from client.intake.deid.burned_in import Box, outermost, outside_regions
from client.intake.deid.engine import Engine, check_faces
from client.intake.deid.findtext import find_text
from client.intake.deid.pixeldata import PixelCleaner, channels_of, text_in
from client.intake.deid.walk import Account
from client.intake.deidentify import text_of
from client.intake.pixels import Floats
from common.errors import ReviewError

_GREY = 1 / 255
"""Brightness of one step of 8 bits."""
_FOR_A_PERSON = ("text", "faces")
_SETTLED_BY_READING = ("patient", "instance")


@dataclass(frozen=True)
class CleanFrame:
    """What may be kept of one frame: pseudonyms, and pixels in 0..1 at full resolution.

    ``patient`` is empty where the data set names none. ``boxes`` were blanked; ``outside`` says
    whether what lies outside of ultrasound regions was.
    """

    patient: str
    study: str
    series: str
    instance: str
    pixels: Floats
    boxes: tuple[Box, ...] = ()
    outside: bool = False


class CleanFile(Protocol):
    """One file on its way into a cohort."""

    @property
    def header(self) -> Dataset:
        """The new header, without pixels: all that making an image may know."""

    @property
    def account(self) -> Account:
        """What was done to the header."""

    def check(self, segmentations: Sequence[Dataset] = ()) -> None:
        """Judge what the header says, and what is said by those of its segmentations.

        Raises:
            ReviewError: if a person has to look at the file first; the text has every reason,
                for a release lets all of them through.
            IntakeError: to keep nothing of it; the text is the reason.
        """

    def frame(self, number: int, pixels: Floats) -> CleanFrame:
        """De-identify a frame.

        Args:
            number: of the frame, from 0.
            pixels: its brightness in 0..1, (height, width) or (height, width, 3).

        Raises:
            ReviewError: if a person has to look at the file first.
        """


class Deidentifier(Protocol):
    """Makes a `CleanFile` of an unverified data set, as a person decided if one did."""

    def __call__(self, unverified: Dataset, decision: Decision | None = None) -> CleanFile:
        """See `CleanFile`."""


@dataclass(frozen=True)
class CohortDeidentifier:
    """Allowed classes, no faces, no text in pixels, keyed pseudonyms: as the engine's profile says.

    A patient is an issuer and an identifier: the same number from two issuers is two patients.
    """

    engine: Engine

    def __call__(self, unverified: Dataset, decision: Decision | None = None) -> _File:
        """See `Deidentifier`."""
        return _File(self.engine, unverified, decision)


@dataclass(frozen=True)
class _File:
    engine: Engine
    unverified: Dataset
    decision: Decision | None

    @cached_property
    def account(self) -> Account:
        return Account()

    @cached_property
    def header(self) -> Dataset:
        return self.engine.clean_header(self.unverified, self.account)

    def check(self, segmentations: Sequence[Dataset] = ()) -> None:
        reasons = []
        for name, check in decided(self.engine, self.decision).checks.items():
            if name in _SETTLED_BY_READING:
                continue
            try:
                if check is check_faces:
                    check_faces(self.unverified, self.engine.profile, segmentations)
                else:
                    check(self.unverified, self.engine.profile)
            except ReviewError as error:
                reasons.append(str(error))
        if reasons:
            raise ReviewError("; ".join(reasons))

    def frame(self, number: int, pixels: Floats) -> CleanFrame:
        key, names = self.engine.key, self.unverified
        patient = patient_of(names)
        instance = text_of(names, "SOPInstanceUID") or _digest(pixels)
        boxes, outside = self._text(pixels), outside_regions(names, *pixels.shape[:2])
        clean = pixels
        if boxes or outside is not None:
            clean = np.array(pixels)
            for box in boxes:
                clean[box.top : box.bottom, box.left : box.right] = 0
            if outside is not None:
                clean[outside] = 0
        return CleanFrame(
            patient=key.pseudonym("patient", *patient) if patient[1] else "",
            study=key.pseudonym("study", text_of(names, "StudyInstanceUID")),
            series=key.pseudonym("series", text_of(names, "SeriesInstanceUID")),
            instance=key.pseudonym("instance", instance, str(number)),
            pixels=clean,
            boxes=boxes,
            outside=outside is not None,
        )

    def _text(self, pixels: Floats) -> tuple[Box, ...]:
        if self.decision is None:
            return tuple(text_in(planes(pixels), self.engine.profile))
        return blanked(pixels, self.decision)


def decided(engine: Engine, decision: Decision | None) -> Engine:
    """An engine that does what a person decided of one file."""
    if decision is None:
        return engine
    checks = {name: check for name, check in engine.checks.items() if name not in _FOR_A_PERSON}
    pixels = PixelCleaner(engine.profile, decision=decision, spool=engine.spool)
    return replace(engine, checks=checks, pixels=pixels)


def patient_of(unverified: Dataset) -> tuple[str, str]:
    """Issuer and identifier of a data set's patient; an empty identifier where it names none."""
    return text_of(unverified, "IssuerOfPatientID"), text_of(unverified, "PatientID")


def planes(pixels: Floats) -> list[Floats]:
    """Where text would stand out: grey as it is, of colour each channel, if they differ."""
    return [pixels] if pixels.ndim == 2 else list(channels_of(pixels, _GREY))


def found_text(pixels: Floats) -> tuple[Box, ...]:
    """The boxes of what looks like text, wherever and however much; nothing is judged."""
    return tuple(outermost(box for plane in planes(pixels) for box in find_text(plane)))


def blanked(pixels: Floats, said: Decision | None) -> tuple[Box, ...]:
    """The boxes that are blanked in a frame under a decision, or under none."""
    drawn = said.blank if said else ()
    return (*drawn, *(found_text(pixels) if said is None or said.found else ()))


def _digest(pixels: Floats) -> str:
    """Stands in for a missing instance UID, so that a copy is still recognised as one."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
