"""The hospital's choice of a confidentiality profile: PS3.15 Annex E, Basic and its options."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from typing import Literal, NamedTuple, Self

from pydantic import ValidationError, field_validator, model_validator

from client.intake.deid.table import RESOLVED, Action, Option, Row
from common.errors import ConfigError
from common.spec import Section, explain_detail

_PRIVATE = re.compile(r"\(([0-9A-Fa-f]{4}),xx([0-9A-Fa-f]{2})\) (\S(?:.{0,62}\S)?)")

# PS3.16 CID 7050, the codes of (0012,0064).
_BASIC = ("113100", "Basic Application Confidentiality Profile")

# X/Z, and of type 3 with one item or more wherever an image has it: empty would be wrong.
_ONE_OR_MORE = ("(0008,1110)",)


class PrivateElement(NamedTuple):
    """A private attribute: its group, the low byte of its element, and who created its block."""

    group: int
    element: int
    creator: str


class Profile(Section):
    """What is kept beyond the Basic Profile, and what is done about pixels.

    Everything is off unless it is asked for. The names of the standard's options:

    ``dates``: ``removed`` (Basic), ``modified`` (Retain Longitudinal Temporal Information with
    Modified Dates: all dates of a patient move by one keyed number of days, within ten years;
    one known true date of that patient reveals them all), or ``full`` (with Full Dates).
    ``retain_patient_characteristics``: sex, age, size, weight and the like; ages above 89 become
    90. ``retain_device_identity``, ``retain_institution_identity``, ``retain_uids``: as they
    stand. ``retain_safe_private``: private attributes by list, each written as
    ``"(0019,xx0C) SIEMENS MR HEADER"``. ``clean_descriptors``: of descriptions, the words that
    are on a list of technical terms. ``clean_structured_content``: content trees and acquisition
    context, cleaned attribute by attribute. ``clean_graphics``: overlays without text in them.
    ``clean_pixel_data``: text that is found in pixels is blanked; without it, an image with text
    is refused.

    ``risky_pixels``: images whose header says that text in the pixels is likely are refused for a
    person to look at (``refuse``), or trusted to the detector (``blank``). ``faces``: head CT,
    MR and PET, from which a face can be rendered, are refused or kept.
    """

    dates: Literal["removed", "modified", "full"] = "removed"
    retain_patient_characteristics: bool = False
    retain_device_identity: bool = False
    retain_institution_identity: bool = False
    retain_uids: bool = False
    retain_safe_private: tuple[str, ...] = ()
    clean_descriptors: bool = False
    clean_structured_content: bool = False
    clean_graphics: bool = False
    clean_pixel_data: bool = True
    risky_pixels: Literal["refuse", "blank"] = "refuse"
    faces: Literal["refuse", "keep"] = "refuse"

    @field_validator("retain_safe_private")
    @classmethod
    def _are_private(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _private_element(entry)
        if len(set(entries)) != len(entries):
            raise ValueError("an attribute is named twice")
        return entries

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.retain_uids and self.dates != "full":
            raise ValueError(
                f"retain_uids with dates = {self.dates!r}: most makers write the date and time "
                "into the UIDs; expected dates = 'full' beside it, or no retain_uids"
            )
        if self.clean_graphics and not self.clean_pixel_data:
            raise ValueError(
                "clean_graphics without clean_pixel_data: an overlay is cleaned by the same "
                "detector; expected both"
            )
        if self.risky_pixels == "blank" and not self.clean_pixel_data:
            raise ValueError(
                "risky_pixels = 'blank' without clean_pixel_data: nothing would be blanked"
            )
        return self

    @property
    def options(self) -> frozenset[Option]:
        """The option columns of the table that hold."""
        chosen: dict[Option, bool] = {
            "safe_private": bool(self.retain_safe_private),
            "uids": self.retain_uids,
            "device": self.retain_device_identity,
            "institution": self.retain_institution_identity,
            "patient": self.retain_patient_characteristics,
            "full_dates": self.dates == "full",
            "modified_dates": self.dates == "modified",
            "descriptors": self.clean_descriptors,
            "structured": self.clean_structured_content,
            "graphics": self.clean_graphics,
        }
        return frozenset(name for name, wanted in chosen.items() if wanted)

    @property
    def safe_private(self) -> frozenset[PrivateElement]:
        """The private attributes that are kept."""
        return frozenset(map(_private_element, self.retain_safe_private))

    def action(self, row: Row) -> Action:
        """What is done to an attribute of the table.

        Where two options that hold differ, cleaning goes before keeping. Of a date only the date
        options decide: no other option lets one through.
        """
        options = self.options & row.options.keys()
        if row.is_date:
            options &= {"full_dates", "modified_dates"}
        said = {row.options[option] for option in options}
        for action in (Action.CLEAN, Action.KEEP):
            if action.value in said:
                return action
        return Action.REMOVE if row.tag in _ONE_OR_MORE else RESOLVED[row.basic]

    @property
    def codes(self) -> tuple[tuple[str, str], ...]:
        """Code values and meanings of (0012,0064), from PS3.16 CID 7050."""
        chosen = (
            (True, *_BASIC),
            (self.clean_pixel_data, "113101", "Clean Pixel Data Option"),
            (self.clean_graphics, "113103", "Clean Graphics Option"),
            (self.clean_structured_content, "113104", "Clean Structured Content Option"),
            (self.clean_descriptors, "113105", "Clean Descriptors Option"),
            (
                self.dates == "full",
                "113106",
                "Retain Longitudinal Temporal Information Full Dates Option",
            ),
            (
                self.dates == "modified",
                "113107",
                "Retain Longitudinal Temporal Information Modified Dates Option",
            ),
            (
                self.retain_patient_characteristics,
                "113108",
                "Retain Patient Characteristics Option",
            ),
            (self.retain_device_identity, "113109", "Retain Device Identity Option"),
            (self.retain_uids, "113110", "Retain UIDs Option"),
            (bool(self.retain_safe_private), "113111", "Retain Safe Private Option"),
            (self.retain_institution_identity, "113112", "Retain Institution Identity Option"),
        )
        return tuple((value, meaning) for holds, value, meaning in chosen if holds)

    @property
    def digest(self) -> str:
        """SHA-256 of every setting."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def parse_profile(text: str, *, source: str) -> Profile:
    """A profile from TOML, by itself or below ``[intake.profile]`` as in ``node.toml``.

    Args:
        text: the file.
        source: what to call it in an error.

    Raises:
        ConfigError: naming each key that is wrong, what it is and what was expected.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: this is not TOML: {error}") from error
    match document:
        case {"intake": {"profile": table}}:
            within: tuple[str, ...] = ("intake", "profile")
        case table:
            within = ()
    try:
        return Profile.model_validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        lines = [f"{source}: {explain_detail(detail, *within)}" for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _private_element(entry: str) -> PrivateElement:
    match = _PRIVATE.fullmatch(entry)
    if match is None or int(match[1], 16) % 2 == 0:
        raise ValueError(
            f"{entry!r} names no private attribute; expected an odd group, the last two digits of "
            'the element and the private creator, as in "(0019,xx0C) SIEMENS MR HEADER"'
        )
    return PrivateElement(int(match[1], 16), int(match[2], 16), match[3])
