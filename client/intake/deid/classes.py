"""The SOP classes that are taken in: images of patients, and nothing that is made of words.

What is not on the list waits in quarantine: documents, structured reports, presentation states,
radiotherapy objects, waveforms, segmentations and whatever the standard comes to add.
"""

from __future__ import annotations

from pydicom.dataset import Dataset

from client.intake.deidentify import registered_name, text_of
from common.errors import IntakeError

_STORAGE = "1.2.840.10008.5.1.4.1.1."

SECONDARY_CAPTURE = frozenset(_STORAGE + number for number in ("7", "7.1", "7.2", "7.3", "7.4"))
ULTRASOUND = frozenset(_STORAGE + number for number in ("3", "3.1", "6", "6.1"))

ALLOWED = SECONDARY_CAPTURE | ULTRASOUND | frozenset(
    _STORAGE + number
    for number in (
        "1",  # CR
        "1.1", "1.1.1",  # DX
        "1.2", "1.2.1",  # MG
        "1.3", "1.3.1",  # IO
        "2", "2.1", "2.2",  # CT
        "4", "4.1", "4.3", "4.4",  # MR
        "6.2",  # enhanced ultrasound volume
        "12.1", "12.1.1", "12.2", "12.2.1",  # XA, XRF
        "13.1.1", "13.1.2", "13.1.3", "13.1.4", "13.1.5",  # 3-D X-ray, tomosynthesis
        "14.1", "14.2",  # IVOCT
        "20",  # NM
        "77.1.1", "77.1.2", "77.1.3", "77.1.6",  # endoscopy, microscopy
        "77.1.5.1", "77.1.5.2", "77.1.5.4", "77.1.5.5", "77.1.5.6", "77.1.5.7", "77.1.5.8",  # eye
        "128", "128.1", "130",  # PET
    )
)  # fmt: skip
"""SOP Class UIDs of PS3.4 B.5. No photographs of a person, no video."""


def check_class(header: Dataset) -> None:
    """Refuse what is not on the list.

    Raises:
        IntakeError: with the name that the standard has for the class.
    """
    uid = text_of(header, "SOPClassUID")
    if uid in ALLOWED:
        return
    seen = registered_name(uid) if uid else "missing"
    raise IntakeError(
        f"its SOP class is {seen}; expected one of the classes of images that are taken in"
    )
