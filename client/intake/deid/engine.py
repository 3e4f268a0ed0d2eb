"""The engine of de-identification: one DICOM file in, a new data set out, or a reason against it.

PS3.15 annex E by default deny: a new data set is built, and what no rule lets through is not in
it. The order is that of what is cheapest to refuse: the class, the patient, what the header says
of text and faces; then the pixels; then the header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID

from client.intake.deid.burned_in import risk_of
from client.intake.deid.classes import check_class
from client.intake.deid.faces import shows_face
from client.intake.deid.findtext import find_text
from client.intake.deid.graphics import clean_overlays
from client.intake.deid.pixeldata import CleanPixels, PixelCleaner
from client.intake.deid.profile import Profile
from client.intake.deid.rules import Rule
from client.intake.deid.stamp import new_file_meta, stamp
from client.intake.deid.treatments import TREATMENTS, Treatment
from client.intake.deid.values import is_well_formed, values_of
from client.intake.deid.walk import Account, Walk, read_again
from client.intake.deidentify import text_of
from client.intake.keys import SiteKey
from client.intake.part10 import DicomFile, Directory, Limits
from client.intake.quiet import quiet
from common.errors import DataError, IntakeError, ReviewError

Check = Callable[[Dataset, Profile], None]
_PREAMBLE = bytes(128)


@dataclass(frozen=True)
class Cleaned:
    """A de-identified object.

    Attributes:
        dataset: with file meta and an empty preamble, ready to be written.
        name: a file name made of its new UID.
        account: what was done, without any value.
    """

    dataset: FileDataset
    name: str
    account: Account


def check_allowed(header: Dataset, _profile: Profile) -> None:
    """Refuse classes that are not on the list (`check_class`)."""
    check_class(header)


def check_patient(header: Dataset, _profile: Profile) -> None:
    """Refuse what names no patient: nothing would hold the patient's images together."""
    if not text_of(header, "PatientID"):
        raise IntakeError("its patient identifier is blank; expected one in (0010,0020)")


def check_instance(header: Dataset, profile: Profile) -> None:
    """Refuse what has no name of its own: nothing could be written under it."""
    if not text_of(header, "SOPInstanceUID"):
        raise IntakeError("its SOP Instance UID is blank; expected one in (0008,0018)")
    element = read_again(header, Tag("SOPInstanceUID"))
    names = [] if element is None else [str(name).strip(" \0") for name in values_of(element)]
    fine = not profile.retain_uids or is_well_formed("UI", names)
    if len(names) != 1 or not names[0] or not fine:
        raise IntakeError("its SOP Instance UID is not readable; expected one in (0008,0018)")


def check_text(header: Dataset, profile: Profile) -> None:
    """Refuse what the header says has text in its pixels, unless the detector is trusted."""
    reason = risk_of(header)
    if reason and profile.risky_pixels == "refuse":
        raise ReviewError(
            f"{reason}, so text in its pixels is likely: a person has to look at it; "
            "risky_pixels = 'blank' in the profile would trust the detector"
        )


def check_faces(header: Dataset, profile: Profile, segmentations: Sequence[Dataset] = ()) -> None:
    """Refuse slices of a head, unless the profile keeps them."""
    if profile.faces == "refuse" and shows_face(header, segmentations):
        raise ReviewError(
            "it is a slice of a head, and slices can be rendered into a face; "
            "faces = 'keep' in the profile would take it"
        )


CHECKS: Mapping[str, Check] = {
    "class": check_allowed,
    "patient": check_patient,
    "instance": check_instance,
    "text": check_text,
    "faces": check_faces,
}
"""What is asked of a header before anything is done."""


@dataclass(frozen=True)
class Engine:
    """De-identifies files under one profile and one key.

    Args:
        profile: the hospital's choice.
        key: the site's.
        checks: what is asked of a header first.
        treatments: what each rule does to an element.
        pixels: cleans pixels; by the profile if not given.
        file_meta: makes the new file meta information.
        spool: folder for files without a name, as large as the pixels of a large file; the
            system's for temporary files if not given.
    """

    profile: Profile
    key: SiteKey
    checks: Mapping[str, Check] = field(default_factory=lambda: CHECKS)
    treatments: Mapping[Rule, Treatment] = field(default_factory=lambda: TREATMENTS)
    pixels: Callable[[DicomFile], CleanPixels] | None = None
    file_meta: Callable[[Dataset, UID], FileMetaDataset] = new_file_meta
    spool: Path | None = None

    def clean(self, file: DicomFile) -> Cleaned:
        """De-identify a file that has just been parsed.

        Raises:
            IntakeError: to keep nothing of it; the text is the reason and says nothing of a
                patient.
        """
        with _told_by_kind(), quiet():
            return self._clean(file)

    def clean_stream(self, stream: BinaryIO, limits: Limits | None = None) -> Cleaned:
        """Parse a file and de-identify it.

        Args:
            stream: an opened file, bounded by whoever opens it (`BoundedFile`).
            limits: what the file may ask for.

        Raises:
            IntakeError: as `clean`; for what is no DICOM file, and for a DICOMDIR, too.
        """
        with _told_by_kind(), quiet():
            return self._clean(DicomFile.parse(stream, limits or Limits()))

    def clean_header(self, header: Dataset, account: Account) -> Dataset:
        """The header of a file by the profile's rules, without pixels; nothing is checked.

        Args:
            header: all of it, as the file has it.
            account: what is done is added to it.
        """
        patient = (text_of(header, "IssuerOfPatientID"), text_of(header, "PatientID"))
        walk = Walk(
            self.profile,
            self.key,
            patient=self.key.pseudonym("patient", *patient),
            days=self.key.date_shift(*patient),
            treatments=self.treatments,
            account=account,
        )
        return walk(header)

    @property
    def _may_keep_faces(self) -> bool:
        """Whether a face can have come through the checks."""
        return self.profile.faces == "keep" or "faces" not in self.checks

    def _clean(self, file: DicomFile) -> Cleaned:
        header = file.header
        for check in self.checks.values():
            check(header, self.profile)
        pixels = (self.pixels or PixelCleaner(self.profile, spool=self.spool))(file)
        account = Account()
        clean = self.clean_header(header, account)
        _put_pixels(clean, pixels, account)
        if self.profile.clean_graphics:
            account.counts["overlays: box blanked", "OverlayData"] += clean_overlays(
                clean, find_text
            )
        stamp(clean, self.profile, face=self._may_keep_faces and shows_face(header))
        meta = self.file_meta(clean, pixels.syntax)
        dataset = FileDataset("", clean, preamble=_PREAMBLE, file_meta=meta)
        dataset.set_original_encoding(False, True)
        return Cleaned(dataset, f"{text_of(clean, 'SOPInstanceUID')}.dcm", account)


@contextmanager
def _told_by_kind() -> Iterator[None]:
    """Parsers and codecs raise whatever the bytes of a broken file drive them to, and quote them.

    Of their errors only the kind may be told.
    """
    try:
        yield
    except DataError:
        raise
    except Directory:
        raise IntakeError("it is a DICOMDIR, which lists files and is none") from None
    except Exception as error:  # noqa: BLE001
        raise IntakeError(f"cannot be read ({type(error).__name__})") from None


def _put_pixels(clean: Dataset, pixels: CleanPixels, account: Account) -> None:
    for keyword, value in pixels.attributes.items():
        setattr(clean, keyword, value)
    compressed = pixels.syntax.is_encapsulated
    wide = int(clean.BitsAllocated) > 8
    clean.add_new(0x7FE00010, "OB" if compressed or not wide else "OW", pixels.data)
    clean["PixelData"].is_undefined_length = compressed
    account.counts["pixels: box blanked", "PixelData"] += pixels.boxes
    account.counts["pixels: outside of regions blanked", "PixelData"] += pixels.outside
