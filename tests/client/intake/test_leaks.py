"""Pixels, keyed pseudonyms and labels: nothing else of the source is in a cohort.

Searching for known strings misses what was encoded anew, so the second test is the one that sees:
two sources that differ in everything but pixels, keys and labels make the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from client.intake.deid.engine import Engine
from client.intake.deid.profile import Profile
from client.intake.deid.seam import CleanFrame, CohortDeidentifier
from client.intake.dicom import FileReader
from client.intake.pixels import Floats
from client.intake.take import take_in

CANARIES = {
    "PatientID": "MRN-4711-0815",
    "IssuerOfPatientID": "Saint Elsewhere",
    "PatientName": "Mustermann^Erika",
    "PatientBirthDate": "19640812",
    "PatientAddress": "Heidestrasse 17",
    "StudyDate": "20231224",
    "AccessionNumber": "ACC-998877",
    "StudyInstanceUID": "1.2.826.0.1.3680043.10.777.1",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.10.777.2",
    "SOPInstanceUID": "1.2.826.0.1.3680043.10.777.3",
    "StudyDescription": "thorax of Mrs Mustermann",
    "DeviceSerialNumber": "SN-55-44-33",
    "InstitutionName": "Klinikum Nord",
}
FILE = "MUSTERMANN_ERIKA/export 2023-12-24/IM0001"


def found_in(cohort: Path, canaries: Iterable[str]) -> set[str]:
    """Which canaries stand anywhere in the bytes of the directory, in names or contents."""
    contents = b"\0".join(
        file.name.encode() + b"\0" + file.read_bytes() for file in sorted(cohort.iterdir())
    ).lower()
    spellings = {text: [text.encode(code) for code in ("utf-8", "utf-16-le")] for text in canaries}
    return {
        text for text, forms in spellings.items() if any(form.lower() in contents for form in forms)
    }


def canaries(hospital: Any) -> set[str]:
    parts = {part for text in CANARIES.values() for part in text.replace("^", " ").split(" ")}
    paths = {str(hospital.folder), *FILE.split("/"), "2023-12-24", "labels.csv"}
    return {text for text in {*CANARIES.values(), *parts, *paths} if len(text) > 4}


def test_no_identifier_path_or_date_is_in_a_cohort(hospital: Any) -> None:
    hospital.film(FILE, **CANARIES)

    taken = hospital.take_in(hospital.labels({CANARIES["PatientID"]: "normal"}))

    assert len(taken.cohort) == 1
    assert found_in(taken.cohort.path, canaries(hospital)) == set()


def test_the_search_sees_a_leak(hospital: Any, in_this_process: Any) -> None:
    """Negative control: a de-identifier that forgets one attribute at a time."""
    hospital.film(FILE, **CANARIES)
    labels = hospital.labels({CANARIES["PatientID"]: "normal"})
    plain = CohortDeidentifier(Engine(Profile(), hospital.key))

    class Forgetful:
        """Puts one attribute of the source where a pseudonym belongs."""

        def __init__(self, unverified: Any, leaked: str) -> None:
            self._plain, self._leaked = plain(unverified), str(unverified[leaked].value)
            self.header, self.account = self._plain.header, self._plain.account

        def check(self, segmentations: object = ()) -> None:
            self._plain.check()

        def frame(self, number: int, pixels: Floats) -> CleanFrame:
            return dataclasses.replace(self._plain.frame(number, pixels), study=self._leaked)

    for keyword, value in CANARIES.items():
        order = hospital.order(labels, keyword)
        reader = FileReader(
            order.spec.input,
            order.labels,
            lambda unverified, _=None, leaked=keyword: Forgetful(unverified, leaked),
        )
        take_in(order, pool=lambda *_, reader=reader: in_this_process(reader))
        assert value in found_in(order.cohort, canaries(hospital))


def test_a_cohort_is_a_function_of_pixels_pseudonyms_and_labels_alone(hospital: Any) -> None:
    """Everything else of the source may change, and no byte of the cohort does."""
    uids = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    kept = ("PatientID", "IssuerOfPatientID", *uids)
    table = hospital.labels({CANARIES["PatientID"]: "normal"})
    path = hospital.film(FILE, **CANARIES)
    one = hospital.take_in(table, "one").cohort.path
    path.unlink()
    others = {name: "20240101" if "Date" in name else "other" for name in CANARIES}
    others |= {name: CANARIES[name] for name in kept}
    moved = hospital.film("elsewhere/quite/another name", **others, PatientComments="more")
    moved.touch()
    other = hospital.take_in(table, "other").cohort.path

    for name in ("index.sqlite", "images.u16"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    hospital.film("a third", **others | {"PatientID": "P1", "SOPInstanceUID": "1.2.3"})
    third = hospital.take_in(hospital.labels({"P1": "normal"}), "third").cohort.path
    assert (one / "index.sqlite").read_bytes() != (third / "index.sqlite").read_bytes()
