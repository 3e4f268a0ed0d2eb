"""What part of the body an image shows, as its header says.

Where a frame of an enhanced object has a Frame Anatomy Sequence (PS3.3 C.7.6.16.2.8) of its own,
the codes in it go first. Then comes Body Part Examined (0018,0015); where that is empty, the codes
of Anatomic Region Sequence (0008,2218), of an enhanced object those of all its frames as well.
Codes are translated into the defined terms of Body Part Examined by PS3.16 Table L-1; those of
SNOMED RT, with which older objects are written, become those of SNOMED CT first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping

from client.intake.deidentify import items_of, text_of

_RETIRED = ("SRT", "SNM3", "99SDM")

# PS3.16 Table L-1, the rows of parts and organs; codes that it had in earlier editions come last.
_TABLE = """
818981001 ABDOMEN, 818982008 ABDOMENPELVIS, 7832008 ABDOMINALAORTA, 85856004 ACJOINT,
23451007 ADRENAL, 70258002 ANKLE, 15825003 AORTA, 66754008 APPENDIX, 91470000 AXILLA,
77568009 BACK, 28273000 BILEDUCT, 34707002 BILIARYTRACT, 89837001 BLADDER, 12738006 BRAIN,
76752008 BREAST, 955009 BRONCHUS, 46862004 BUTTOCK, 80144004 CALCANEUS, 53840002 CALF,
69105007 CAROTID, 8205005 CARPUS, 113305005 CEREBELLUM, 122494005 CSPINE, 1217257000 CTSPINE,
71252005 CERVIX, 816094009 CHEST, 43799004 CHEST, 416775004 CHESTABDPELVIS,
416550000 CHESTABDOMEN, 51299004 CLAVICLE, 64688005 COCCYX, 71854001 COLON,
41801008 CORONARYARTERY, 38848004 DUODENUM, 117590005 EAR, 16953009 ELBOW, 38266002 WHOLEBODY,
32849002 ESOPHAGUS, 66019005 EXTREMITY, 81745001 EYE, 89545001 FACE, 71341001 FEMUR,
87342007 FIBULA, 7569003 FINGER, 56459004 FOOT, 14975008 FOREARM, 28231008 GALLBLADDER,
85562004 HAND, 69536005 HEAD, 774007 HEADNECK, 80891009 HEART, 24136001 HIP, 85050009 HUMERUS,
34516001 ILEUM, 22356005 ILIUM, 361078006 IAC, 661005 JAW, 21306003 JEJUNUM, 39352004 JOINT,
64033007 KIDNEY, 72696002 KNEE, 14742008 LARGEINTESTINE, 4596009 LARYNX, 10200004 LIVER,
30021000 LOWERLEG, 61685007 LOWERLIMB, 122496007 LSPINE, 1217253001 LSSPINE, 39607008 LUNG,
91609006 MANDIBLE, 59066005 MASTOID, 70925003 MAXILLA, 72410000 MEDIASTINUM, 123851003 MOUTH,
360955006 NASOPHARYNX, 45048000 NECK, 417437006 NECKCHEST, 416152001 NECKCHESTABDOMEN,
416319003 NECKCHESTABDPELV, 45206002 NOSE, 363654007 ORBIT, 15497006 OVARY, 15776009 PANCREAS,
111002 PARATHYROID, 45289007 PAROTID, 64234005 PATELLA, 816092008 PELVIS,
1231522001 PELVISLOWEXTREMT, 706342009 PHANTOM, 54066008 PHARYNX, 78067005 PLACENTA,
41216001 PROSTATE, 81040000 PULMONARYA, 62413002 RADIUS, 110535000 RADIUSULNA, 34402009 RECTUM,
82849001 RETROPERITONEUM, 113197003 RIB, 39723000 SIJOINT, 54735007 SSPINE, 79601000 SCAPULA,
20233005 SCROTUM, 42575006 SELLA, 16982005 SHOULDER, 89546000 SKULL, 30315005 SMALLINTESTINE,
2748008 SPINALCORD, 421060004 SPINE, 78961009 SPLEEN, 7844006 SCJOINT, 56873002 STERNUM,
69695003 STOMACH, 53620006 TMJ, 40689003 TESTIS, 68367000 THIGH, 113262008 THORACICAORTA,
122495006 TSPINE, 1217256009 TLSPINE, 76505004 THUMB, 9875009 THYMUS, 69748006 THYROID,
12611008 TIBIA, 110536004 TIBIAFIBULA, 29707007 TOE, 21974007 TONGUE, 44567001 TRACHEA,
23416004 ULNA, 40983000 UPPERARM, 53120007 UPPERLIMB, 87953007 URETER, 13648007 URETHRA,
35039007 UTERUS, 76784001 VAGINA, 74670003 WRIST, 13881006 ZYGOMA,
113345001 ABDOMEN, 416949008 ABDOMENPELVIS, 51185008 CHEST, 12921003 PELVIS
"""
PARTS = dict(row.split() for row in _TABLE.replace("\n", " ").split(","))
"""Defined terms of Body Part Examined by code of SNOMED CT."""


def body_parts(header: Dataset) -> tuple[str, ...]:
    """The parts of the body that a header names, in capitals, each once; none if it names none.

    Of frames that have an anatomy of their own these are the parts of any.
    """
    common = _common(header)
    frames = items_of(header, "PerFrameFunctionalGroupsSequence") or [Dataset()]
    return _once(part for frame in frames for part in _once(_of_group(frame)) or common)


def parts_of_frame(header: Dataset, number: int) -> tuple[str, ...]:
    """The parts of the body that frame `number`, from 0, shows, as `body_parts` has them."""
    return _own(header, number) or _common(header)


def contradicts(header: Dataset, number: int) -> bool:
    """Whether the codes that hold for frame `number`, from 0, lack the part that the word names."""
    word = _word(header)
    coded = _own(header, number) or _once(_of_all(header))
    return bool(word and coded) and word not in coded


def _common(header: Dataset) -> tuple[str, ...]:
    """What is said of the whole object; the word goes first, and says one."""
    word = _word(header)
    return (word,) if word else _once(_of_all(header))


def _word(header: Dataset) -> str:
    return text_of(header, "BodyPartExamined").upper()


def _own(header: Dataset, number: int) -> tuple[str, ...]:
    """What codes say of a frame alone."""
    groups = items_of(header, "PerFrameFunctionalGroupsSequence")[number : number + 1]
    return _once(part for group in groups for part in _of_group(group))


def _of_all(header: Dataset) -> Iterator[str]:
    """What codes say of all frames of an object."""
    yield from _regions(header)
    for group in items_of(header, "SharedFunctionalGroupsSequence")[:1]:
        yield from _of_group(group)


def _of_group(group: Dataset) -> Iterator[str]:
    for anatomy in items_of(group, "FrameAnatomySequence"):
        yield from _regions(anatomy)


def _regions(level: Dataset) -> Iterator[str]:
    for code in items_of(level, "AnatomicRegionSequence"):
        scheme, value = (text_of(code, k) for k in ("CodingSchemeDesignator", "CodeValue"))
        if scheme in _RETIRED:
            scheme, value = "SCT", mapping["SRT"].get(value, "")
        if scheme == "SCT" and value in PARTS:
            yield PARTS[value]


def _once(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parts))
