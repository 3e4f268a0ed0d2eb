"""The words of the de-identification report: what each choice, rule and state means to a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from client.intake.deid.profile import Profile
from client.intake.deid.rules import Rule
from client.intake.deid.table import Option
from client.intake.desk import State
from client.intake.keys import MOST_SHIFTED

MOST_DECISIONS = 200
"""On the page; the JSON has all."""

BASIC = "Basic Profile"
DENY = "Default deny, beyond the table"
OPTIONS: Mapping[Option, str] = {
    "full_dates": "Retain Longitudinal Temporal Information, Full Dates",
    "modified_dates": "Retain Longitudinal Temporal Information, Modified Dates",
    "patient": "Retain Patient Characteristics",
    "device": "Retain Device Identity",
    "institution": "Retain Institution Identity",
    "uids": "Retain UIDs",
    "safe_private": "Retain Safe Private",
    "descriptors": "Clean Descriptors",
    "structured": "Clean Structured Content",
    "graphics": "Clean Graphics",
}

TITLES: Mapping[State, str] = {
    State.OPEN: "not read yet",
    State.ASIDE: "put aside",
    State.KEPT: "kept",
    State.WAITS: "wait for a person",
    State.REFUSED: "refused",
    State.COPY: "copies",
    State.REJECTED: "rejected by a person",
    State.IGNORED: "directories",
    State.GONE: "gone",
}
OF_STATE: Mapping[State, str] = {
    State.OPEN: "The intake has not come to them.",
    State.ASIDE: "They name no patient; the intake has not come to an end.",
    State.KEPT: "Something of them is kept.",
    State.WAITS: "Nothing of them is kept until a person has looked.",
    State.REFUSED: "Nothing of them can be kept.",
    State.COPY: "All of their images are there already.",
    State.REJECTED: "A person said that nothing of them is kept.",
    State.IGNORED: "A DICOMDIR lists files and is none.",
    State.GONE: "They were in the source when it was listed, and are not there now.",
}

RULES: Mapping[Rule, tuple[str, str]] = {
    Rule.UNREADABLE: (
        "emptied: unreadable",
        "Their bytes are not what they ought to be: nothing of them is kept.",
    ),
    Rule.STRUCTURE: (
        "made anew",
        "Lengths, commands, file meta and what an object says of its de-identification are "
        "written by the intake, never copied.",
    ),
    Rule.PRIVATE: (
        "removed: private",
        "What a maker adds is nobody else's to judge. It is gone, but for attributes that the "
        "profile lists as safe.",
    ),
    Rule.UNKNOWN: ("removed: unknown", "Neither the standard's nor a maker's."),
    Rule.PATIENT: (
        "replaced by a pseudonym",
        "A keyed pseudonym: the same for the same patient at this site, and nothing without the "
        "key.",
    ),
    Rule.REMOVE: ("removed", "The table says X: not in the new object at all."),
    Rule.EMPTY: ("emptied", "The table says Z: it stands there without a value."),
    Rule.DUMMY: ("replaced by a dummy", "The table says D: a value that is the same for all."),
    Rule.REPLACE_UID: (
        "UID replaced",
        "The table says U: a keyed UID, the same for the same original, so that what belongs "
        "together stays together.",
    ),
    Rule.KEEP: ("kept by the table", "An option of the profile keeps it as it stands."),
    Rule.CLEAN: (
        "cleaned",
        "An option keeps a part: of dates another day, of texts the technical words, of content "
        "trees and graphics what cannot name anybody.",
    ),
    Rule.SEQUENCE: ("looked into", "A sequence: the same rules hold for all that stands in it."),
    Rule.CODE: (
        "code kept",
        "A code of a known scheme; its meaning was looked up anew, not copied. All others became "
        "“unknown”.",
    ),
    Rule.CODE_DETAIL: ("code detail removed", "Where a code came from; its scheme says it."),
    Rule.NUMBER: (
        "number judged",
        "Kept where the attribute is on the list of measures, and the value within its bounds; "
        "emptied otherwise: a number may be a record number.",
    ),
    Rule.POINTER: ("pointer kept", "A reference to a standard attribute."),
    Rule.UID: ("UID judged", "The standard's own stay; all others were replaced, with the key."),
    Rule.TERM: ("term judged", "Kept where it is one of the standard's terms; emptied otherwise."),
    Rule.LOOKUP_TABLE: (
        "lookup table kept",
        "Numbers that map brightness, of their described size.",
    ),
    Rule.COLOUR_PROFILE: (
        "colour profile judged",
        "Its texts are gone; what maps colours is kept.",
    ),
    Rule.OTHER: ("emptied: on no list", "No rule lets it through, so its value is gone."),
}


def lead(objects: Mapping[str, int]) -> str:
    """The report in one sentence."""
    parts = [
        f"{thousands(objects[state.value])} {TITLES[state]}"
        for state in State
        if objects[state.value]
    ]
    return f"Objects in the source: {thousands(objects['all'])}. {_sentence(', '.join(parts))}"


def _sentence(parts: str) -> str:
    return f"Of them: {parts}." if parts else ""


def thousands(count: int) -> str:
    """A whole number, its digits in groups of three."""
    return f"{count:,}".replace(",", "\u202f")


def choices(profile: Profile) -> Iterator[tuple[str, str]]:
    """What the profile asks for, each choice with what it means."""
    yield (
        BASIC,
        "Every attribute of the standard's table is treated as the table says; what no table and "
        "no list names is emptied.",
    )
    yield _dates(profile)
    yield from _retained(profile)
    yield from _cleaned(profile)
    yield _faces(profile)


def _dates(profile: Profile) -> tuple[str, str]:
    years = round(MOST_SHIFTED / 365.25)
    return {
        "removed": ("Dates removed", "No date and no time of a patient is kept."),
        "modified": (
            "Dates modified",
            f"All dates of a patient move by the same number of days, at most {years} years "
            "either way, which the site's key draws. Intervals stay true. Whoever knows one true "
            "date of a patient knows the shift, and with it all other dates of that patient.",
        ),
        "full": (
            "Full dates",
            "Dates and times stand as they were. With a date of birth, an admission or an event "
            "that others know, they can lead to a patient.",
        ),
    }[profile.dates]


def _retained(profile: Profile) -> Iterator[tuple[str, str]]:
    if profile.retain_patient_characteristics:
        yield (
            OPTIONS["patient"],
            "Sex, age, size, weight and the like stay; ages above 89 become 90. Rare combinations "
            "may point at a person.",
        )
    if profile.retain_device_identity:
        yield OPTIONS["device"], "Serial numbers and names of devices stay."
    if profile.retain_institution_identity:
        yield OPTIONS["institution"], "Name and address of the institution stay."
    if profile.retain_uids:
        yield (
            OPTIONS["uids"],
            "UIDs stand as they were: whoever has the originals can match object to object.",
        )
    if profile.retain_safe_private:
        count = len(profile.retain_safe_private)
        yield OPTIONS["safe_private"], f"{count} private attribute(s) that the hospital lists stay."


def _cleaned(profile: Profile) -> Iterator[tuple[str, str]]:
    if profile.clean_descriptors:
        yield OPTIONS["descriptors"], "Of descriptions the words on a list of technical terms stay."
    if profile.clean_structured_content:
        yield OPTIONS["structured"], "Content trees are cleaned attribute by attribute."
    if profile.clean_graphics:
        yield OPTIONS["graphics"], "Overlays stay, with the text that is found in them blanked."
    if profile.clean_pixel_data:
        yield "Clean Pixel Data", "Text that is found in the pixels of any image is blanked."
    else:
        yield "Pixels not cleaned", "An image in which text is found is not kept without a person."
    if profile.risky_pixels == "blank":
        yield (
            "Risky pixels trusted to the detector",
            "Images whose header says that text is likely are kept, with what is found blanked, "
            "and no person has looked. The detector does not find all text.",
        )
    else:
        yield (
            "Risky pixels wait",
            "Images whose header says that text in the pixels is likely wait for a person.",
        )


def _faces(profile: Profile) -> tuple[str, str]:
    if profile.faces == "keep":
        return (
            "Faces kept",
            "Slices of heads are kept: a face can be rendered from a whole series of them.",
        )
    return "Faces wait", "Slices of a head, from which a face can be rendered, wait for a person."
