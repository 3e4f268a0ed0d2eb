"""What a de-identified object says of itself (PS3.15 E.1.1, PS3.3 C.12.1 and C.7.6.1)."""

from __future__ import annotations

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from client.intake.deid.profile import Profile
from client.intake.deid.table import EDITION
from client.intake.deidentify import text_of

# A UUID of our own (PS3.5 B.2).
IMPLEMENTATION = UID("2.25.198217667439157113006742768826888403206")
IMPLEMENTATION_NAME = "CLOISTER_DEID_1"
_TEMPORAL = {"removed": "REMOVED", "modified": "MODIFIED", "full": "UNMODIFIED"}


def stamp(clean: Dataset, profile: Profile, *, face: bool) -> None:
    """Write what was done into a cleaned data set.

    Args:
        clean: changed in place.
        profile: what was done.
        face: whether a face may be recognised in it, and the profile keeps it.
    """
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = ["Cloister", "PS3.15 annex E", f"edition {EDITION}"]
    clean.DeidentificationMethodCodeSequence = Sequence(
        [_code(value, meaning) for value, meaning in profile.codes]
    )
    clean.BurnedInAnnotation = "NO"
    if face:
        clean.RecognizableVisualFeatures = "YES"
    clean.LongitudinalTemporalInformationModified = _TEMPORAL[profile.dates]


def new_file_meta(clean: Dataset, syntax: UID) -> FileMetaDataset:
    """File meta information (PS3.10 7.1) of our own making; nothing of the old one is in it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(text_of(clean, "SOPClassUID"))
    meta.MediaStorageSOPInstanceUID = UID(text_of(clean, "SOPInstanceUID"))
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = IMPLEMENTATION
    meta.ImplementationVersionName = IMPLEMENTATION_NAME
    return meta


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue = value
    code.CodingSchemeDesignator = "DCM"
    code.CodeMeaning = meaning
    return code
