"""From an unverified data set to a new one: every element once, through the one rule for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BytesIO

from pydicom import config
from pydicom.charset import default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from client.intake.deid.profile import Profile
from client.intake.deid.rules import (
    CODE_KEYWORDS,
    Rule,
    Scope,
    TagRules,
    code_of,
    keyword_of,
    rule_of,
    rule_of_value,
    tag_rules,
)
from client.intake.deid.treatments import (
    TREATMENTS,
    Treatment,
    drop,
    empty,
    keep_safe_private,
    replace_by_dummy,
)
from client.intake.keys import SiteKey

_BYTES = frozenset({"OB", "OW", "OL", "OF", "OD", "OV", "UN"})
_CHARACTER_SET = 0x00080005
_DEEPEST = 24
"""Levels of sequences; what is nested deeper is not kept. No object of PS3.3 has half as many."""


@dataclass
class Account:
    """How often each rule was applied to each attribute; it holds no value of any.

    ``counts`` has a rule and a keyword, or the words "private" and "unknown" for attributes that
    are not the standard's.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, rule: str, tag: BaseTag) -> None:
        """Count one element."""
        self.counts[rule, _name_of(int(tag))] += 1

    def __add__(self, other: Account) -> Account:
        return Account(self.counts + other.counts)

    def by_rule(self) -> Mapping[str, int]:
        """Elements by rule."""
        totals: Counter[str] = Counter()
        for (rule, _), count in self.counts.items():
            totals[rule] += count
        return totals


@dataclass(frozen=True)
class Walk:
    """De-identifies the header of one data set.

    Args:
        profile: the hospital's choice.
        key: the site's.
        patient: pseudonym of the patient.
        days: by which the patient's dates move.
        treatments: what each rule does.
    """

    profile: Profile
    key: SiteKey
    patient: str
    days: int
    treatments: Mapping[Rule, Treatment] = field(default_factory=lambda: TREATMENTS)
    account: Account = field(default_factory=Account)

    def __call__(self, unverified: Dataset) -> Dataset:
        """The new data set, without pixels; of `unverified` only ambiguous VRs change."""
        implicit, little = unverified.original_encoding
        if implicit is not False:
            with suppress(AttributeError, KeyError, ValueError):
                correct_ambiguous_vr(unverified, little is not False)
        return self._level(unverified, 0)

    def _level(self, level: Dataset, depth: int) -> Dataset:
        found: dict[BaseTag, DataElement | RawDataElement] = {}
        scope = Scope(
            self.profile,
            self.key,
            self.patient,
            self.days,
            level,
            depth,
            self._clean_items,
            self._by_tag,
        )
        for tag in sorted(level.keys()):
            if (new := self._element(scope, tag)) is not None:
                found[new.tag] = new
        clean = Dataset(found)
        if scope.in_code:
            _complete_code(clean, level)
        self._name_creators(clean)
        return clean

    @cached_property
    def _by_tag(self) -> TagRules:
        return tag_rules(self.profile)

    def _element(self, scope: Scope, tag: BaseTag) -> DataElement | None:
        rule = rule_of(scope, tag)
        if rule is not None and self._drops(rule):
            self.account.note(rule, tag)
            return None
        element = self._unread(rule, tag) or read_again(scope.level, tag)
        if element is None:
            self.account.note(Rule.UNREADABLE, tag)
            return self.treatments[Rule.UNREADABLE](scope, _as_bytes(scope.level, tag))
        rule = rule or rule_of_value(element)
        self.account.note(rule, tag)
        return self.treatments[rule](scope, element)

    def _drops(self, rule: Rule) -> bool:
        """Whether nothing is left of an element, whatever its value: then nobody reads it."""
        treatment = self.treatments[rule]
        safe = self.profile.retain_safe_private
        return treatment is drop or (treatment is keep_safe_private and not safe)

    def _unread(self, rule: Rule | None, tag: BaseTag) -> DataElement | None:
        """An element without its value, where its representation and not that is asked for."""
        if rule is None or self.treatments[rule] not in (empty, replace_by_dummy):
            return None
        representation = _representation_of(int(tag))
        if representation in (None, "SQ", "UI") or " or " in str(representation):
            return None
        return DataElement(tag, str(representation), None, already_converted=True)

    def _clean_items(self, items: Sequence, depth: int) -> Sequence:
        if depth > _DEEPEST:
            return Sequence()
        return Sequence([self._level(item, depth) for item in items])

    def _name_creators(self, clean: Dataset) -> None:
        """A private block needs its creator (PS3.5 7.8.1), as the profile spells it."""
        if not self.profile.retain_safe_private:
            return
        tags = [element.tag for element in clean]
        kept = [tag for tag in tags if tag.is_private and tag.element >= 0x1000]
        for safe in self.profile.safe_private:
            for tag in kept:
                if (tag.group, tag.element & 0xFF) == (safe.group, safe.element):
                    clean.add_new((tag.group, tag.element >> 8), "LO", safe.creator)


def read_again(level: Dataset, tag: BaseTag) -> DataElement | None:
    """An element with its value; None if its bytes cannot be read as what they ought to be.

    Standard attributes of unknown representation (UN) get the dictionary's; their bytes are then
    in implicit VR, little endian (PS3.5 6.2.2).
    """
    try:
        raw = level.get_item(tag)
        if isinstance(raw, RawDataElement) and raw.VR == "UN" and raw.value is not None:
            return _settled(_from_unknown(level, raw))
        return _settled(_as_the_dictionary_has_it(_converted(level, tag, raw)))
    except Exception:  # noqa: BLE001
        # Parsers raise whatever the bytes of a broken element drive them to.
        return None


def _converted(level: Dataset, tag: BaseTag, raw: object) -> DataElement:
    """An element with its value. Only sequences are kept by their data set, which is slow."""
    charset = level.original_character_set
    if not (charset and isinstance(raw, RawDataElement) and raw.VR not in (None, "SQ")):
        return level[tag]
    encoding = charset if tag != _CHARACTER_SET else default_encoding
    return convert_raw_data_element(raw, encoding=encoding, ds=level)


def _as_the_dictionary_has_it(element: DataElement) -> DataElement:
    """A standard attribute under its own representation, whatever the file calls it.

    Rules look at representations, and a text that is called a date is none.

    Raises:
        ValueError, TypeError: if its value is not one of that representation.
    """
    tag = element.tag
    expected = _representation_of(int(tag))
    if expected is None or " or " in element.VR:
        return element
    if element.VR in expected.split(" or ") or {element.VR, expected} <= _BYTES:
        return element
    if "SQ" in (element.VR, expected) or " or " in expected or isinstance(element.value, bytes):
        raise ValueError("not of its representation")
    return DataElement(tag, expected, element.value, validation_mode=config.RAISE)


@lru_cache(maxsize=2**13)
def _representation_of(tag: int) -> str | None:
    """What the dictionary has for a standard attribute."""
    return None if Tag(tag).is_private or not dictionary_has_tag(tag) else dictionary_VR(tag)


@lru_cache(maxsize=2**13)
def _name_of(tag: int) -> str:
    return "private" if Tag(tag).is_private else keyword_of(tag) or "unknown"


def _settled(element: DataElement) -> DataElement | None:
    """An element of one representation; None if the rest of its data set leaves it open."""
    return None if " or " in element.VR else element


def _as_bytes(level: Dataset, tag: BaseTag) -> DataElement:
    """What cannot be read, as the bytes that it is."""
    raw = level.get_item(tag)
    data = raw.value if isinstance(raw, RawDataElement) else b""
    return DataElement(tag, "OB", data)


def _from_unknown(level: Dataset, raw: RawDataElement) -> DataElement:
    tag = raw.tag
    if tag.is_private or not dictionary_has_tag(tag):
        return DataElement(tag, "UN", raw.value)
    representation = dictionary_VR(tag)
    if representation == "SQ":
        data = raw.value or b""
        sequence = read_sequence(BytesIO(data), True, True, len(data), ["iso8859"], 0)
        return DataElement(tag, "SQ", sequence)
    known = raw._replace(VR=representation, is_implicit_VR=True, is_little_endian=True)
    probe = Dataset()
    probe[tag] = known
    if "PixelRepresentation" in level:
        probe.PixelRepresentation = level.PixelRepresentation
    correct_ambiguous_vr(probe, True)
    return probe[tag]


def _complete_code(clean: Dataset, level: Dataset) -> None:
    """Value, scheme and meaning stand together (PS3.3 8.1), whatever stood there before."""
    for keyword, text in zip(CODE_KEYWORDS, code_of(level), strict=True):
        if keyword not in clean:
            setattr(clean, keyword, text)
