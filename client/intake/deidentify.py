"""The seam of de-identification: every data set passes here before anything of it is kept.

Reading (`client.intake.dicom`) hands each image to a `Deidentifier` with its whole header and its
pixels at full resolution, and keeps nothing but what comes back. `PixelsOnly` is the plainest one
that is safe for the header: it builds nothing from it but keyed pseudonyms. It does not look for
text that is burned into the pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from client.intake.deid.vocabulary import terms
from client.intake.keys import SiteKey
from client.intake.pixels import Floats

_SHORT = 5


@dataclass(frozen=True)
class Deidentified:
    """What may be kept of one image: pseudonyms, and pixels in 0..1 at full resolution.

    ``patient`` is empty where the data set names none.
    """

    patient: str
    study: str
    series: str
    instance: str
    pixels: Floats


class Deidentifier(Protocol):
    """Turns one image of an unverified data set into what may be kept of it."""

    def __call__(self, unverified: Dataset, frame: int, pixels: Floats) -> Deidentified:
        """De-identify one frame.

        Args:
            unverified: the header, all of it, as the file has it.
            frame: number of the frame, from 0.
            pixels: its brightness in 0..1, (height, width) or (height, width, 3).

        Raises:
            IntakeError: to keep nothing of this image; the text is the reason.
        """


@dataclass(frozen=True)
class PixelsOnly:
    """Keeps the pixels as they are, and of the header keyed pseudonyms alone.

    A patient is an issuer and an identifier: the same number from two issuers is two patients.
    """

    key: SiteKey

    def __call__(self, unverified: Dataset, frame: int, pixels: Floats) -> Deidentified:
        """See `Deidentifier`."""
        patient = text_of(unverified, "PatientID")
        issuer = text_of(unverified, "IssuerOfPatientID")
        instance = text_of(unverified, "SOPInstanceUID") or _digest(pixels)
        return Deidentified(
            patient=self.key.pseudonym("patient", issuer, patient) if patient else "",
            study=self.key.pseudonym("study", text_of(unverified, "StudyInstanceUID")),
            series=self.key.pseudonym("series", text_of(unverified, "SeriesInstanceUID")),
            instance=self.key.pseudonym("instance", instance, str(frame)),
            pixels=pixels,
        )


def text_of(dataset: Dataset, keyword: str) -> str:
    """An attribute's value as text without its padding; empty where there is none."""
    value = dataset.get(keyword)
    if value is None:
        return ""
    parts = [value] if isinstance(value, str | int | float) else list(value)
    return "\\".join(map(str, parts)).strip(" \0\t\r\n")


def quoted(text: str) -> str:
    """A value as a reason may show it: a technical term, a short number, or not at all.

    In a file that is broken or hostile any attribute may hold a name.
    """
    short = text.removeprefix("-").isdecimal() and len(text) <= _SHORT
    return repr(text) if not text or short or text in terms() else "a text that is not shown here"


def registered_name(uid: str) -> str:
    """The standard's name for a UID, in quotes; whatever else stands in its place is not shown."""
    name = UID(uid).name
    return repr(name) if name != uid else "one that the standard does not register"


def _digest(pixels: Floats) -> str:
    """Stands in for a missing instance UID, so that a copy is still recognised as one."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
