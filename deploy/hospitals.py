"""Synthetic hospitals for the demo: drawn chest films as DICOM, with planted identities.

No pixel and no name is anyone's. Each hospital has its own film size, depth, brightness, contrast
and share of patients with the finding, some patients have several films, and the folders hold
what such folders hold: odd names, a DICOMDIR, a note, a report, a file that was cut short. The
same seed makes the same files.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

from deploy.films import Anatomy, Film, Opacity, draw

CLASSES = ("normal", "opacity")
_FAMILIES = (
    "Achterberg", "Bellini", "Castellanos", "Dvorak", "Eriksdottir", "Fairweather", "Grunwald",
    "Haverkamp", "Iglesias", "Jankowski", "Kowalczyk", "Lindqvist", "Montague", "Nakagawa",
    "Okonkwo", "Papadakis", "Quisling", "Rasmussen", "Szymanski", "Thorvaldsen", "Underhill",
    "Vasquez", "Wetherby", "Xanthopoulos", "Yamamoto", "Zielinski",
)  # fmt: skip
_GIVEN = (
    "Agnieszka", "Bartholomew", "Cornelia", "Demetrius", "Evangeline", "Ferdinand", "Gwendolyn",
    "Hyacinth", "Ignatius", "Josephine", "Konstantin", "Leopoldine", "Maximilian", "Nathaniel",
    "Ophelia", "Perpetua", "Quentin", "Rosalind", "Sebastian", "Theodora", "Ulysses", "Valentina",
    "Wilhelmina", "Xaverius", "Yolanda", "Zachariah",
)  # fmt: skip
_STREETS = (
    "Kastanienallee", "Rosenweg", "Harbour-Lane", "Via-Garibaldi", "Calle-Mayor", "Storgatan",
)  # fmt: skip


@dataclass(frozen=True)
class Hospital:
    """A hospital's folder as it was made.

    Attributes:
        name: a short name; ``evaluation`` is the held-out set.
        folder: its DICOM files, and a few others.
        labels: the CSV of their labels.
        patients: how many there are.
        images: how many films intake can use.
        unusable: how many other files there are, the DICOMDIR left out.
        planted: names, identifiers, addresses and dates in headers and paths; a cohort may hold
            none of them.
    """

    name: str
    folder: Path
    labels: Path
    patients: int
    images: int
    unusable: int
    planted: frozenset[str]


@dataclass(frozen=True)
class _Patient:
    number: int
    family: str
    given: str
    identifier: str
    born: str
    address: str
    phone: str
    study: str
    accession: str
    taken: str
    positive: bool
    films: int

    @property
    def name(self) -> str:
        return f"{self.family}^{self.given}"

    @property
    def identities(self) -> tuple[str, ...]:
        """Every text that would give the patient away."""
        return (
            self.family, self.given, self.identifier, self.born, self.address, self.phone,
            self.study, self.accession, self.taken,
        )  # fmt: skip


@dataclass(frozen=True)
class _Look:
    """Brightness is floor + gain x density ** gamma, plus noise, in parts of the full scale."""

    floor: float
    gain: float
    gamma: float
    noise: float


@dataclass(frozen=True)
class _Site:
    """How a hospital's films look, and how its files lie."""

    name: str
    patients: int
    prevalence: float
    shape: tuple[int, int]
    bits: int
    looks: tuple[_Look, ...]
    key: str
    institution: str
    place: Callable[[_Patient, int], str] = field(repr=False)
    inverted: bool = False
    window: bool = True


def _by_name(patient: _Patient, film: int) -> str:
    folder = f"{patient.family.upper()}_{patient.given} {patient.born}"
    return f"{folder}/Study {patient.taken}/IM{film:06d}"


def _by_uid(patient: _Patient, film: int) -> str:
    return f"{patient.number % 7:02d}/{patient.number % 5}/{patient.study}.{film}.dcm"


def _by_ward(patient: _Patient, film: int) -> str:
    return f"ward {patient.number % 3}/{patient.identifier}/export/img ({film}).DCM.bak"


_NORTH = _Look(0.05, 0.90, 1.00, 0.030)
_HARBOUR = _Look(0.14, 0.62, 0.80, 0.024)
_HILL = _Look(0.02, 0.72, 1.30, 0.036)
_SITES = (
    _Site(
        name="north", patients=440, prevalence=0.35, shape=(208, 176), bits=12, looks=(_NORTH,),
        key="StudyInstanceUID", institution="Northern Infirmary", place=_by_name,
    ),
    _Site(
        name="harbour", patients=380, prevalence=0.50, shape=(224, 200), bits=16,
        looks=(_HARBOUR,), key="PatientID", institution="Harbour Teaching Hospital",
        place=_by_uid, inverted=True,
    ),
    _Site(
        name="hill", patients=320, prevalence=0.25, shape=(160, 160), bits=12, looks=(_HILL,),
        key="StudyInstanceUID", institution="Hilltop District Clinic", place=_by_ward,
        window=False,
    ),
    _Site(
        name="evaluation", patients=300, prevalence=0.40, shape=(192, 176), bits=12,
        looks=(_NORTH, _HARBOUR, _HILL), key="StudyInstanceUID",
        institution="Reference Reading Centre", place=_by_uid,
    ),
)  # fmt: skip


def make_hospitals(folder: Path, *, seed: int, size: float = 1.0) -> list[Hospital]:
    """Make three hospitals and one evaluation set.

    Args:
        folder: each becomes a directory in it, which must not exist.
        seed: of everything; equal seeds make equal files.
        size: how many patients, as a factor of the demo's 1440.

    Returns:
        ``north``, ``harbour``, ``hill`` and, held out, ``evaluation``.

    Raises:
        FileExistsError: if one of the directories exists.
    """
    return [
        _make(folder / site.name, site, np.random.default_rng((seed, number)), size)
        for number, site in enumerate(_SITES)
    ]


def _make(folder: Path, site: _Site, random: np.random.Generator, size: float) -> Hospital:
    folder.mkdir(parents=True)
    patients = [
        _patient(number, site, random) for number in range(max(4, round(site.patients * size)))
    ]
    header = _header(site)
    for patient in patients:
        for film, pixels in enumerate(_films(site, patient, random)):
            _describe(header, site, patient, film)
            header.PixelData = pixels.tobytes()
            _save(header, folder / site.place(patient, film))
    labels = folder.parent / f"{site.name}-labels.csv"
    _write_labels(labels, site, patients)
    return Hospital(
        name=site.name,
        folder=folder,
        labels=labels,
        patients=len(patients),
        images=sum(patient.films for patient in patients),
        unusable=_add_clutter(folder, header),
        planted=frozenset(text for patient in patients for text in patient.identities)
        | {site.institution},
    )


def _patient(number: int, site: _Site, random: np.random.Generator) -> _Patient:
    def digits(count: int) -> str:
        return "".join(map(str, random.integers(0, 10, count)))

    def date(first: int, last: int) -> str:
        year, month, day = random.integers((first, 1, 1), (last, 13, 29))
        return f"{year}{month:02d}{day:02d}"

    return _Patient(
        number=number,
        family=str(random.choice(_FAMILIES)),
        given=str(random.choice(_GIVEN)),
        identifier=f"{site.name[:2].upper()}-{number:04d}-{digits(6)}",
        born=date(1930, 2004),
        address=f"{random.choice(_STREETS)} {random.integers(100, 999)}",
        phone=f"+49 555 {digits(7)}",
        study=f"2.25.{1 + number}{digits(30)}",
        accession=f"ACC{digits(9)}",
        taken=date(2018, 2025),
        positive=bool(random.random() < site.prevalence),
        films=int(random.choice((1, 2, 3), p=(0.75, 0.19, 0.06))),
    )


def _films(
    site: _Site, patient: _Patient, random: np.random.Generator
) -> Iterator[NDArray[np.uint16]]:
    """The stored values of a patient's films: one chest and one finding, seen again and again."""
    anatomy = Anatomy.of(random)
    opacity = Opacity.of(random) if patient.positive else None
    look = site.looks[patient.number % len(site.looks)]
    for _ in range(patient.films):
        yield _developed(draw(anatomy, opacity, site.shape, random), site, look, random)


def _developed(
    film: Film, site: _Site, look: _Look, random: np.random.Generator
) -> NDArray[np.uint16]:
    exposure = 1 + 0.06 * float(random.standard_normal())
    bright = look.floor + look.gain * exposure * film**look.gamma
    bright += look.noise * random.standard_normal(film.shape, dtype=np.float32)
    bright = np.clip(bright, 0, 1)
    values: Film = np.rint((1 - bright if site.inverted else bright) * (2**site.bits - 1))
    return values.astype("<u2")


def _header(site: _Site) -> FileDataset:
    """What all films of a hospital have in common."""
    digital = site.inverted
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = (
        DigitalXRayImageStorageForPresentation if digital else ComputedRadiographyImageStorage
    )
    common: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "Modality": "DX" if digital else "CR",
        "Manufacturer": "Pellworm Imaging" if digital else "Ashgrove Imaging",
        "InstitutionName": site.institution,
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME1" if site.inverted else "MONOCHROME2",
        "Rows": site.shape[0],
        "Columns": site.shape[1],
        "BitsAllocated": 16,
        "BitsStored": site.bits,
        "HighBit": site.bits - 1,
        "PixelRepresentation": 0,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
    }
    if site.window:
        common |= {"WindowCenter": 2 ** (site.bits - 1), "WindowWidth": 2**site.bits}
    header = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
    _set(header, common)
    return header


def _describe(header: FileDataset, site: _Site, patient: _Patient, film: int) -> None:
    """Whose film it is: everything that must not come through."""
    instance = f"{patient.study}.1.{film + 1}"
    header.file_meta.MediaStorageSOPInstanceUID = UID(instance)
    identity = {
        "SOPInstanceUID": instance,
        "StudyDate": patient.taken,
        "ContentDate": patient.taken,
        "AccessionNumber": patient.accession,
        "ReferringPhysicianName": f"{patient.family}-Referrer^{patient.given}",
        "StudyDescription": f"Chest of {patient.given} {patient.family}",
        "PatientName": patient.name,
        "PatientID": patient.identifier,
        "IssuerOfPatientID": site.institution,
        "PatientBirthDate": patient.born,
        "PatientAddress": patient.address,
        "PatientTelephoneNumbers": patient.phone,
        "PatientComments": f"lives at {patient.address}, call {patient.phone}",
        "StudyInstanceUID": patient.study,
        "SeriesInstanceUID": f"{patient.study}.1",
        "InstanceNumber": film + 1,
    }
    _set(header, identity)


def _set(header: FileDataset, values: dict[str, Any]) -> None:
    for keyword, value in values.items():
        setattr(header, keyword, value)


def _save(header: FileDataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def _write_labels(path: Path, site: _Site, patients: list[_Patient]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow((site.key, "label"))
        for patient in patients:
            key = patient.study if site.key == "StudyInstanceUID" else patient.identifier
            table.writerow((key, CLASSES[patient.positive]))


def _add_clutter(folder: Path, header: FileDataset) -> int:
    """What lies about in such folders; returns how many files intake will have to refuse."""
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "read me.txt").write_text("Export of the archive, ask the front desk.\n")
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = UID("2.25.1")
    _save(header, folder / "misc" / "cut short.dcm")
    with (folder / "misc" / "cut short.dcm").open("r+b") as file:
        file.truncate(4000)
    del header.PixelData
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    _save(header, folder / "misc" / "report")
    return 3
