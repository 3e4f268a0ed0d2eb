"""What a de-identified header may not hold, by structure and shape alone.

Own rules, drawn from PS3.15 annex E by what a value can carry: not the table of the engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_has_tag, dictionary_VR

from client.intake.verify.finding import Finding, masked
from client.intake.verify.layout import Element, Layout, Level
from client.intake.verify.words import (
    code_meaning,
    common_words,
    dates_in,
    is_neutral_uid,
    maker_words,
    shapes_in,
    strange_words,
)

TEXTS = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_BINARIES = frozenset({"OB", "OD", "OF", "OL", "OV", "OW"})
_CHARACTER_SET, _IDENTITY_REMOVED, _METHOD, _METHOD_CODES = (
    0x00080005, 0x00120062, 0x00120063, 0x00120064,
)  # fmt: skip
_CODE_VALUE, _SCHEME, _TEMPORAL, _BURNED_IN = 0x00080100, 0x00080102, 0x00280303, 0x00280301
_PATIENT_ID, _INSTANCE, _MEDIA_INSTANCE = 0x00100020, 0x00080018, 0x00020003
_WIDTHS = {"US": 2, "SS": 2, "AT": 4, "UL": 4, "SL": 4, "FL": 4, "FD": 8, "UV": 8, "SV": 8}
_META_TAGS = frozenset(0x00020000 + number for number in (0, 1, 2, 3, 0x10, 0x12, 0x13))
_BASIC, _GRAPHICS, _STRUCTURED = "113100", "113103", "113104"
_FULL_DATES, _MODIFIED_DATES, _PATIENT = "113106", "113107", "113108"
_DEVICE, _UIDS, _PRIVATE, _INSTITUTION = "113109", "113110", "113111", "113112"
_CURVES, _OVERLAYS = 0x50, 0x60
_OLDEST = 90
_LARGEST = 10**7
"""From this number on, a number without a fraction may be a record's."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_AGE = re.compile(r"(\d{3})([DWMY])")
_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_DUMMIES = frozenset({"REMOVED", "UNKNOWN", "urn:removed"})
_NO_DATES = frozenset({"19000101", "19000101000000", "000000"})
_NO_AGE = "000Y"

# Attributes that say who somebody is, whatever words their values are made of.
_IDENTIFYING = re.compile(
    "PatientID|PatientName|OtherPatient|AccessionNumber|StudyID$|Physician|Operator|PersonName|"
    "Mother|Address|Telephone|Telecom|Insurance|MilitaryRank|Occupation|Religious|Request(er|ing)|"
    "Reviewer|AuthorObserver|Verifying|CountryOfResidence|RegionOfResidence|Responsible|"
    "AETitle|FillerOrder|PlacerOrder|AdmissionID|ServiceEpisode|PatientComments|Barcode"
)
# What the options that retain let stand as it is, by the names of its attributes.
_RETAINED = {
    _DEVICE: re.compile(
        "Manufacturer|Device|Detector|Station|Serial|Software|Gantry|Plate|Cassette|Generator|"
        "Scanner|Digitizer|Equipment|Calibration|Lens|Sensor|Source|Unit|AETitle"
    ),
    _INSTITUTION: re.compile("Institution|Department"),
    _PATIENT: re.compile(
        "^Patient(Sex|Size|Weight|Age|State|Species|Breed|Body)|Ethnic|Allerg|Smoking|Pregnan|"
        "SpecialNeeds|Medical|Species|Breed|Strain|PreMedication"
    ),
}
# Attributes that hold other values than the object's own, or documents.
_NEVER = frozenset(
    {
        "OriginalAttributesSequence",
        "EncryptedAttributesSequence",
        "ModifiedAttributesSequence",
        "DigitalSignaturesSequence",
        "MACParametersSequence",
        "IconImageSequence",
        "EncapsulatedDocument",
        "DirectoryRecordSequence",
        "ReferencedPatientPhotoSequence",
        "DataSetTrailingPadding",
        "WaveformSequence",
        "GraphicAnnotationSequence",
    }
)
PIXELS = frozenset({"PixelData", "FloatPixelData", "DoubleFloatPixelData"})
TABLES = {
    "LUTData": "LUTDescriptor",
    **{
        f"{colour}PaletteColorLookupTableData": f"{colour}PaletteColorLookupTableDescriptor"
        for colour in ("Red", "Green", "Blue", "Alpha")
    },
}
"""Lookup tables, and what describes each of them."""
_KNOWN_BINARIES = PIXELS | TABLES.keys() | {
    "ICCProfile", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
}  # fmt: skip


class Fault(NamedTuple):
    """What is wrong with an element: rule, reason, and the part of its value that is at fault."""

    rule: str
    why: str
    value: str | bytes = b""


@dataclass(frozen=True)
class Claims:
    """What an object says of its own de-identification: option codes, and what became of dates."""

    codes: frozenset[str]
    temporal: str

    def retains(self, keyword: str) -> bool:
        """Whether an option that it declares lets an attribute stand as it was."""
        return any(
            code in self.codes and names.search(keyword) for code, names in _RETAINED.items()
        )


def claims_of(layout: Layout) -> Claims:
    """What an object declares (PS3.15 E.1.1)."""
    codes = {
        text_of(layout, element)
        for element in layout.elements
        if element.tag == _CODE_VALUE and element.where.startswith("DeidentificationMethodCode")
    }
    return Claims(frozenset(codes), top_text(layout, _TEMPORAL))


def top_text(layout: Layout, tag: int) -> str:
    """The text of an attribute of the data set itself; empty if it has none."""
    element = layout.top.elements.get(tag)
    return "" if element is None else text_of(layout, element)


def text_of(layout: Layout, element: Element) -> str:
    """An element's value as text, in the character set of its data set (PS3.5 6.1)."""
    raw = layout.value(element)
    if raw.isascii() and b"\x1b" not in raw:
        return raw.decode("ascii").strip(" \0")
    try:
        text: str = decode_bytes(raw, _encodings(layout, element.level), set(b"\\^=\r\n\f\t"))
    except (LookupError, ValueError):
        text = raw.decode("latin-1")
    return text.strip(" \0")


def _encodings(layout: Layout, level: Level) -> list[str]:
    element = level.elements.get(_CHARACTER_SET) or layout.top.elements.get(_CHARACTER_SET)
    names = layout.value(element).decode("ascii", "replace") if element else ""
    encodings = convert_encodings([name.strip(" \0") for name in names.split("\\")])
    return list(encodings)


def header_findings(layout: Layout, file: str) -> Iterator[Finding]:
    """Everything that structure and shape say against a de-identified header.

    Args:
        layout: a file, taken apart.
        file: its path within what is searched.
    """
    claims = claims_of(layout)
    for element in layout.meta:
        yield from (_at(file, element, fault) for fault in _meta_faults(layout, claims, element))
    for element in layout.elements:
        yield from (_at(file, element, fault) for fault in _faults(layout, claims, element))
    for rule, why in _statements(layout, claims):
        yield Finding(file, "data set", 0, 0, rule, why)
    yield from _around(layout, file)


def _at(file: str, element: Element, fault: Fault) -> Finding:
    return Finding(
        file,
        element.where,
        element.start,
        element.end - element.start,
        fault.rule,
        fault.why,
        masked(fault.value) if fault.value else "",
    )


def _around(layout: Layout, file: str) -> Iterator[Finding]:
    """Preamble, and bytes that belong to no element."""
    if any(layout.data[:128]):
        why = "it is not empty: 128 bytes for which the standard has no use"
        yield Finding(file, "preamble", 0, 128, "preamble", why, masked(layout.data[:128]))
    for start, length in layout.gaps:
        why = "bytes that belong to no element: behind the data set, or a damaged file"
        rest = layout.data[start : start + length]
        yield Finding(file, "behind the last element", start, length, "loose bytes", why,
                      masked(rest[:64]))  # fmt: skip


def _statements(layout: Layout, claims: Claims) -> Iterator[tuple[str, str]]:
    """What PS3.15 E.1.1 wants said, and whether it fits together."""
    if top_text(layout, _IDENTITY_REMOVED) != "YES":
        yield "not declared", "PatientIdentityRemoved (0012,0062) is not YES"
    if not (claims.codes or top_text(layout, _METHOD)):
        yield "not declared", "neither (0012,0063) nor (0012,0064) says how it was de-identified"
    elif claims.codes and _BASIC not in claims.codes:
        yield "not declared", "(0012,0064) does not name the Basic Profile (113100)"
    word = "UNMODIFIED" if _FULL_DATES in claims.codes else "REMOVED"
    word = "MODIFIED" if _MODIFIED_DATES in claims.codes else word
    if claims.temporal != word:
        yield "dates", "(0028,0303) does not say of dates what (0012,0064) says"
    if top_text(layout, _BURNED_IN) not in ("NO", "") or (
        "PixelData" in {element.keyword for element in layout.elements}
        and not top_text(layout, _BURNED_IN)
    ):
        yield "burned-in text", "BurnedInAnnotation (0028,0301) is not NO"


def _meta_faults(layout: Layout, claims: Claims, element: Element) -> Iterator[Fault]:
    text = text_of(layout, element)
    if element.tag not in _META_TAGS and text:
        yield Fault("file meta", "no attribute that a de-identified file needs", text)
    elif element.representation == "UI":
        yield from _uids(claims, element, text)
    elif element.representation == "SH":
        yield from _strange(text, common_words() | maker_words())
    if element.tag == _MEDIA_INSTANCE and text != top_text(layout, _INSTANCE):
        yield Fault("UID", "it is another than that of the data set", text)


def _faults(layout: Layout, claims: Claims, element: Element) -> Iterator[Fault]:
    raw = layout.value(element)
    if not raw.strip(b" \0"):
        return
    ban = next((ban for ban in _BANS if ban.holds(claims, element)), None)
    if ban is not None and not (element.representation == "SQ" and _is_hollow(layout, element)):
        yield Fault(ban.rule, ban.why, raw if element.representation != "SQ" else b"")
        return
    check = _BY_REPRESENTATION.get(element.representation)
    if element.length % _WIDTHS.get(element.representation, 1):
        yield Fault("no number", "bytes where numbers of a fixed size belong", raw)
    if element.representation in _BINARIES:
        if element.keyword not in _KNOWN_BINARIES and not _is_overlay(element):
            yield Fault("binary value", "bytes that no image needs", raw)
    elif check is not None:
        yield from check(claims, element, text_of(layout, element))
    elif element.representation in TEXTS:
        yield from _text_faults(layout, claims, element)
    elif element.representation == "AT":
        yield from _pointer_faults(layout, raw)


class _Ban(NamedTuple):
    """What may not stand at all, whatever its value, and what says so of an element."""

    rule: str
    why: str
    holds: Callable[[Claims, Element], bool]


_BANS = (
    _Ban(
        "private attribute",
        "no option that retains any is declared",
        lambda claims, element: element.is_private and _PRIVATE not in claims.codes,
    ),
    _Ban(
        "out of place",
        "a command, file meta or directory attribute in a data set",
        lambda _claims, element: element.tag >> 16 in (0x0000, 0x0002, 0x0004),
    ),
    _Ban(
        "curve",
        "curves hold texts and are retired",
        lambda _claims, element: not element.is_private and element.tag >> 24 == _CURVES,
    ),
    _Ban(
        "overlay",
        "no option that cleans graphics is declared",
        lambda claims, element: _is_overlay(element) and _GRAPHICS not in claims.codes,
    ),
    _Ban(
        "unknown attribute",
        "no attribute of the standard",
        lambda _claims, element: _is_common(element) and not element.keyword,
    ),
    _Ban(
        "other values",
        "it holds what was said elsewhere, or documents",
        lambda claims, element: (
            element.keyword in _NEVER
            or (element.keyword == "ContentSequence" and _STRUCTURED not in claims.codes)
        ),
    ),
    _Ban(
        "unknown representation",
        "bytes that nobody reads as what the standard has under this name",
        lambda _claims, element: _is_common(element) and element.representation == "UN",
    ),
    _Ban(
        "wrong representation",
        "it is not of the representation that the standard gives it",
        lambda _claims, element: (
            _is_common(element) and element.representation not in _allowed(element.tag)
        ),
    ),
)


def _is_hollow(layout: Layout, sequence: Element) -> bool:
    """Whether nothing in the items of a sequence has a value, or one but for everybody."""
    inner = (
        one for one in layout.elements if sequence.start < one.start and one.end <= sequence.end
    )
    texts = (text_of(layout, one) for one in inner if one.representation != "SQ")
    return all(not text or text in _DUMMIES for text in texts)


def _is_common(element: Element) -> bool:
    """Neither private nor the length of a group."""
    return not element.is_private and bool(element.tag & 0xFFFF)


def _allowed(tag: int) -> tuple[str, ...]:
    names = tuple(dictionary_VR(tag).split(" or "))
    return (*names, *_BINARIES) if _BINARIES & set(names) else names


def _is_overlay(element: Element) -> bool:
    return not element.is_private and element.tag >> 24 == _OVERLAYS


def _pointer_faults(layout: Layout, raw: bytes) -> Iterator[Fault]:
    order = "big" if layout.is_big else "little"
    for at in range(0, len(raw) - 3, 4):
        group = int.from_bytes(raw[at : at + 2], order)  # type: ignore[arg-type]
        number = int.from_bytes(raw[at + 2 : at + 4], order)  # type: ignore[arg-type]
        if not dictionary_has_tag(group << 16 | number):
            yield Fault("pointer", "it points to no attribute of the standard", raw[at : at + 4])


def _parts(text: str) -> list[str]:
    """The values of a text, without their padding."""
    return [part.strip(" \0") for part in text.split("\\")]


def _uid_faults(text: str) -> Iterator[Fault]:
    for uid in _parts(text):
        if uid and not is_neutral_uid(uid):
            yield Fault("UID", "it is neither the standard's nor made of a UUID", uid)


def _uids(claims: Claims, _element: Element, text: str) -> Iterator[Fault]:
    if _UIDS not in claims.codes:
        yield from _uid_faults(text)


def _dates(claims: Claims, _element: Element, text: str) -> Iterator[Fault]:
    if {_FULL_DATES, _MODIFIED_DATES} & claims.codes:
        return
    for value in _parts(text):
        if value and value not in _NO_DATES:
            yield Fault("date or time", "no option that retains or moves dates is declared", value)


def _ages(claims: Claims, _element: Element, text: str) -> Iterator[Fault]:
    for value in _parts(text):
        match = _AGE.fullmatch(value)
        years = int(match[1]) / {"D": 365, "W": 52, "M": 12, "Y": 1}[match[2]] if match else 0
        if match is None or years > _OLDEST:
            yield Fault("age", "it is no age, or one above 90 years", value)
        elif _PATIENT not in claims.codes and value != _NO_AGE:
            yield Fault("age", "no option that retains a patient's characteristics", value)


def _numbers(_claims: Claims, _element: Element, text: str) -> Iterator[Fault]:
    for value in _parts(text):
        if value and not _NUMBER.fullmatch(value):
            yield Fault("no number", "a text where a number belongs", value)
        elif value and abs(float(value)) >= _LARGEST:
            yield Fault("large number", "so large that it may be a record's", value)


def _names(_claims: Claims, _element: Element, text: str) -> Iterator[Fault]:
    if text not in _DUMMIES and not _PSEUDONYM.fullmatch(text) and text.strip("^= \\"):
        yield Fault("name of a person", "expected nothing or a pseudonym", text)


_BY_REPRESENTATION: Mapping[str, Callable[[Claims, Element, str], Iterator[Fault]]] = {
    "UI": _uids,
    "DA": _dates,
    "DT": _dates,
    "TM": _dates,
    "AS": _ages,
    "DS": _numbers,
    "IS": _numbers,
    "PN": _names,
}


def _text_faults(layout: Layout, claims: Claims, element: Element) -> Iterator[Fault]:
    text, keyword = text_of(layout, element), element.keyword
    if element.tag == _CHARACTER_SET or text in _DUMMIES:
        return
    if element.tag == _PATIENT_ID and element.level.depth == 0:
        if not _PSEUDONYM.fullmatch(text):
            yield Fault("patient identifier", "it has not the form of a keyed pseudonym", text)
        return
    for pattern, match in (*shapes_in(text), *dates_in(text)):
        yield Fault(pattern.rule, pattern.why, match[0])
    if claims.retains(keyword):
        return
    if _IDENTIFYING.search(keyword):
        yield Fault("identifying attribute", "it says who somebody is, and is not empty", text)
    elif keyword in ("CodeMeaning", "CodeValue", "CodingSchemeDesignator"):
        yield from _code_faults(layout, element, text)
    else:
        known = common_words() | (maker_words() if "Manufacturer" in keyword else frozenset())
        yield from _strange(text, known)


def _code_faults(layout: Layout, element: Element, text: str) -> Iterator[Fault]:
    """A code is the standard's, and so is what it is called (PS3.16)."""
    beside = element.level.elements
    value, scheme = (
        text_of(layout, beside[tag]) if tag in beside else "" for tag in (_CODE_VALUE, _SCHEME)
    )
    meanings = code_meaning(scheme, value)
    if scheme == "DCM" and value.startswith("1131"):
        meanings = meanings or (text,)
    if not meanings:
        yield Fault("code", "the standard's context groups do not have it", text)
    elif element.keyword == "CodeMeaning" and text not in {name[:64].strip() for name in meanings}:
        yield Fault("code", "it is called otherwise than by the standard", text)


def _strange(text: str, known: frozenset[str]) -> Iterator[Fault]:
    first = next(strange_words(text, known), None)
    if first is not None:
        yield Fault("strange word", "a word or number that is on no list of terms", first[0])
