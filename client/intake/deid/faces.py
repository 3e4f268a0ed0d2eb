"""Faces: a head CT, MR or PET can be rendered into the patient's face, and found by it.

PS3.15 E.3.2 (Clean Recognizable Visual Features) wants the face gone; nothing here removes it, so
such images are recognised by their header and, unless the hospital decides otherwise, refused.
A header that says nothing of the body part is not recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from pydicom.dataset import Dataset

from client.intake.deid.rules import code_of
from client.intake.deidentify import items_of, text_of

_MODALITIES = frozenset({"CT", "MR", "PT"})
_TEXTS = (
    "BodyPartExamined",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "RequestedProcedureDescription",
    "PerformedProcedureStepDescription",
    "ReceiveCoilName",
    "TransmitCoilName",
    "FilterType",
    "RadiopharmaceuticalRoute",
)
_STEM_LIST = (
    "HEAD BRAIN FACE FACIAL SKULL CRANI NEURO ORBIT SINUS MAXILL MANDIB CEREB PITUIT STROKE "
    "KOPF SCHADEL SCHÄDEL SCHAEDEL GEHIRN HIRN GESICHT TETE TÊTE CRANE CRÂNE CERVEAU CABEZA "
    "CEREBRO TESTA ENCEF CRÂNIO WHOLEBODY GANZKÖRPER MPRAGE DENTAL CBCT"
)
_WORD_LIST = "NNH CCT CMRT TMJ EAR EARS IAC EYE NOSE JAW WB"
_STEMS, _WORDS = tuple(_STEM_LIST.split()), frozenset(_WORD_LIST.split())
_PIECE = re.compile(r"[^\W_]+")
_PAIRS = ("WHOLE BODY",)
# What is drawn in heads; the names of AAPM's TG-263 among them. Lobes, ventricles and cortices are
# of other organs too.
_ORGAN_LIST = (
    "EYES EYEBALL EYEBALLS GLOBE GLOBES LENS LENSES CORNEA CORNEAS RETINA RETINAS VITREOUS EYELID "
    "EYELIDS LACRIMAL OPTIC OPTICUS CHIASM CHIASMA COCHLEA COCHLEAS COCHLEAE VESTIBULAR "
    "PAROTID PAROTIDS PAROTIS SUBMAND TONGUE TOOTH TEETH PALATE UVULA LIP LIPS MOUTH BUCCAL CHEEK "
    "CHEEKS NASAL NASOPHARYNX OROPHARYNX MASSETER MASSETERS PTERYGOID ZYGOMA ZYGOMATIC SCALP "
    "HIPPOCAMPUS HIPPOCAMPI HIPPOCAMPAL THALAMUS THALAMI HYPOTHALAMUS PUTAMEN PALLIDUM PALLIDUS "
    "AMYGDALA AMYGDALAE CALLOSUM PONS GLIOMA GLIOBLASTOMA GBM MENINGIOMA "
    "AUGE AUGEN AUGAPFEL LINSE LINSEN SEHNERV ZUNGE ZAHN ZÄHNE ZAEHNE MUND LIPPE LIPPEN NASE OHR "
    "OHREN KIEFER OBERKIEFER UNTERKIEFER OEIL ŒIL YEUX LANGUE DENTS OREILLE NEZ BOUCHE OJO OJOS "
    "LENGUA DIENTES NARIZ BOCA OREJA OCCHIO OCCHI DENTI NASO BOCCA ORECCHIO"
)
_ORGANS = _WORDS | frozenset(_ORGAN_LIST.split())
_ORGAN_PAIRS = (
    *_PAIRS, "ORAL CAVITY", "CAVITY ORAL", "JOINT TM", "WHITE MATTER", "GREY MATTER", "GRAY MATTER"
)  # fmt: skip
_UPPER, _LOWER, _LETTER = "A-ZÀ-ÖØ-ÞŒ", "a-zß-öø-ÿœ", r"[^\W\d_]"
_SEAM = re.compile(
    f"(?<=[{_LOWER}])(?=[{_UPPER}])|(?<=[{_UPPER}])(?=[{_UPPER}][{_LOWER}])"
    rf"|(?<={_LETTER})(?=\d)|(?<=\d)(?={_LETTER})"
)
"""Where a word ends within a name: ``OpticNerve``, ``LEye``, ``Tooth38``."""
_OF_SEGMENTS = ("SegmentLabel", "SegmentDescription")
_CODES_OF_SEGMENTS = (
    "SegmentedPropertyTypeCodeSequence",
    "AnatomicRegionSequence",
    "PrimaryAnatomicStructureSequence",
)
_ANATOMY = ("AnatomicRegionSequence", "ProcedureCodeSequence", "RequestedProcedureCodeSequence")


def shows_face(header: Dataset, segmentations: Sequence[Dataset] = ()) -> bool:
    """Whether the header of an image of slices, or of one of its segmentations, names a head."""
    if text_of(header, "Modality").upper() not in _MODALITIES:
        return False
    segments = [text for one in segmentations for text in _segments(one)]
    parted = [_SEAM.sub(" ", text) for text in segments]
    return _name_head(_descriptions(header), _WORDS, _PAIRS) or _name_head(
        [*segments, *parted], _ORGANS, _ORGAN_PAIRS
    )


def _name_head(texts: Iterable[str], words: frozenset[str], pairs: Iterable[str]) -> bool:
    spaced = [" ".join(_PIECE.findall(text.upper())) for text in texts if text]
    said = "|".join(spaced)
    parts = (*_STEMS, *pairs)
    return not words.isdisjoint(said.replace("|", " ").split()) or any(p in said for p in parts)


def _segments(header: Dataset) -> Iterator[str]:
    """What a segmentation says of itself and of each of its segments (PS3.3 C.8.20.4)."""
    yield from _descriptions(header)
    for segment in items_of(header, "SegmentSequence"):
        yield from (text_of(segment, keyword) for keyword in _OF_SEGMENTS)
        for keyword in _CODES_OF_SEGMENTS:
            for code in items_of(segment, keyword):
                yield from (text_of(code, "CodeMeaning"), code_of(code)[2])


def _descriptions(header: Dataset) -> Iterator[str]:
    yield from (text_of(header, keyword) for keyword in _TEXTS)
    shared = items_of(header, "SharedFunctionalGroupsSequence")[:1]
    frames = items_of(header, "PerFrameFunctionalGroupsSequence")[:1]
    groups = [
        item for group in (*shared, *frames) for item in items_of(group, "FrameAnatomySequence")
    ]
    for level in (header, *groups):
        for keyword in _ANATOMY:
            yield from (text_of(code, "CodeMeaning") for code in items_of(level, keyword))
