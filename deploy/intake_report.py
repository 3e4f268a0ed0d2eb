"""The de-identification report: what an intake did, and why, for whoever has to answer for it.

It holds no patient's identity: no place in the source, no value of a file, no picture, and of what
a person said not the words. What it tells is counts, names of standard attributes, reasons (which
are made of our own words), and the profile. Those who decided are named.

``report.json`` is the same for a program. Its keys, in this order:

    format          1
    written         when, ISO 8601 in UTC
    software        name and version
    standard        part and edition of the table
    digests         SHA-256: deidentification (all of it), profile, table, code
    profile         settings, as in node.toml; codes (PS3.16 CID 7050); choices in words
    objects         how many of the source stand where, by state, and in all
    images          in the cohort
    pixels          objects with pixels blanked, boxes, frames outside of ultrasound regions,
                    boxes in overlays
    by_origin       header elements by what decided on them: Basic Profile, each option, deny
    actions         by rule: title, meaning, elements, and attributes (keyword, tag, name, elements)
    not_kept        by state: reasons, and objects for each
    decisions       when, object (its keyed id), verdict, boxes drawn, found, by, acted
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.tag import Tag

from client.intake.deid.profile import Profile
from client.intake.deid.rules import OF_ACTION, Rule
from client.intake.deid.table import EDITION, standard_table
from client.intake.desk import Desk, State
from client.intake.digest import code_digest, table_digest
from common.clock import Clock
from common.errors import ConfigError
from common.files import write_durably
from deploy import intake_report_words as words
from deploy.screen import printable

FORMAT = 1
HTML, JSON = "report.html", "report.json"
_TEMPLATE = "intake_report.html.j2"
_PAGE_NEEDS = ("jinja2", "matplotlib")
_LONGEST = 400
_PIXELS = {
    "boxes": "pixels: box blanked",
    "frames_outside_of_regions": "pixels: outside of regions blanked",
    "boxes_in_overlays": "overlays: box blanked",
}
_NOT_KEPT = (State.WAITS, State.REFUSED, State.REJECTED, State.COPY, State.GONE)

Contents = dict[str, Any]


def write_report(desk: Desk, profile: Profile, clock: Clock | None = None) -> Path:
    """Write ``report.html`` and ``report.json`` into a desk, each at once and for its owner alone.

    Args:
        desk: of the intake.
        profile: under which it was done.
        clock: tells the time.

    Returns:
        Where the page is; where the libraries for pages are not installed, the JSON.

    Raises:
        ConfigError: if that is not the intake's profile, or the disk refuses.
    """
    told = contents(desk, profile, clock)
    data = f"{json.dumps(told, indent=1, ensure_ascii=False)}\n"
    page = render(told) if all(map(importlib.util.find_spec, _PAGE_NEEDS)) else None
    try:
        write_durably(desk.path / JSON, data.encode(), 0o600)
        if page is None:
            (desk.path / HTML).unlink(missing_ok=True)  # an older one would say what was
        else:
            write_durably(desk.path / HTML, page.encode(), 0o600)
    except OSError as error:
        raise ConfigError(
            f"{desk.path}: the report cannot be written ({error.strerror}); is there space left?"
        ) from error
    return desk.path / (JSON if page is None else HTML)


def contents(desk: Desk, profile: Profile, clock: Clock | None = None) -> Contents:
    """All that is in the report, in its order."""
    _check_profile(desk, profile)
    account, totals = desk.account(), desk.totals()
    counts, by_rule = account.counts, account.by_rule()
    return {
        "format": FORMAT,
        "written": (clock or Clock()).date().isoformat(timespec="seconds"),
        "software": {"name": "cloister", "version": version("cloister")},
        "standard": {"part": "PS3.15 annex E, table E.1-1", "edition": EDITION},
        "digests": {
            "deidentification": printable(desk.setting("deidentification")),
            "profile": profile.digest,
            "table": table_digest(),
            "code": code_digest(),
        },
        "profile": {
            "settings": profile.model_dump(mode="json"),
            "codes": [{"value": value, "meaning": meaning} for value, meaning in profile.codes],
            "choices": [
                {"choice": choice, "means": means} for choice, means in words.choices(profile)
            ],
        },
        "objects": {state.value: totals.get(state, 0) for state in State}
        | {"all": sum(totals.values())},
        "images": len(desk.live_rows()),
        "pixels": {"objects": len(desk.blanked())}
        | {name: by_rule.get(rule, 0) for name, rule in _PIXELS.items()},
        "by_origin": _by_origin(counts, profile),
        "actions": list(_actions(counts, by_rule)),
        "not_kept": {state.value: _reasons(desk, state) for state in _NOT_KEPT},
        "decisions": list(_decisions(desk)),
    }


def _check_profile(desk: Desk, profile: Profile) -> None:
    """A report tells of the profile under which objects were read, and of no other."""
    if desk.setting("profile", profile.digest) != profile.digest:
        raise ConfigError(
            f"{desk.path}: this is not the profile of the intake; expected the one under which "
            "it was begun"
        )


Counts = Mapping[tuple[str, str], int]


def _actions(counts: Counts, by_rule: Mapping[str, int]) -> Iterator[Contents]:
    """What was done to headers, the most frequent first; attributes of each too."""
    for rule in sorted(Rule, key=lambda rule: (-by_rule.get(rule, 0), rule.value)):
        if not by_rule.get(rule):
            continue
        title, means = words.RULES[rule]
        found = [(name, count) for (of, name), count in counts.items() if of == rule and count]
        ranked = sorted(found, key=lambda pair: (-pair[1], pair[0]))
        yield {
            "rule": rule.value,
            "title": title,
            "means": means,
            "elements": by_rule[rule],
            "attributes": [_attribute(name, count) for name, count in ranked],
        }


def _attribute(keyword: str, count: int) -> Contents:
    """An attribute by its standard name; of a repeating group there is no one tag."""
    number = tag_for_keyword(keyword)
    if number is None:
        return {"attribute": keyword, "tag": "", "name": "", "elements": count}
    tag = Tag(number)
    shown = f"({tag.group:04X},{tag.element:04X})"
    name = dictionary_description(tag)
    return {"attribute": keyword, "tag": shown, "name": name, "elements": count}


def _by_origin(counts: Counts, profile: Profile) -> list[Contents]:
    """Header elements by what decided on them."""
    totals: Counter[str] = Counter()
    for (rule, keyword), count in counts.items():
        if rule in set(Rule):
            totals[_origin(Rule(rule), keyword, profile)] += count
    return [
        {"origin": origin, "elements": totals[origin]}
        for origin in (words.BASIC, *words.OPTIONS.values(), words.DENY)
        if totals[origin]
    ]


def _origin(rule: Rule, keyword: str, profile: Profile) -> str:
    """Basic Profile, an option that changed what it does, or default deny beyond the table."""
    if rule not in OF_ACTION.values():
        return words.BASIC if rule in (Rule.PATIENT, Rule.PRIVATE) else words.DENY
    number = tag_for_keyword(keyword)
    row = None if number is None else standard_table().find(Tag(number))
    if row is not None:
        action = profile.action(row)
        chosen = profile.options & {name for name, said in row.options.items() if said == action}
        for option, title in words.OPTIONS.items():
            if option in chosen:
                return title
    graphics = row is None and rule is Rule.CLEAN
    return words.OPTIONS["graphics"] if graphics else words.BASIC


def _reasons(desk: Desk, state: State) -> list[Contents]:
    return [
        {"reason": _short(reason) or words.OF_STATE[state], "objects": count}
        for reason, count in desk.reasons(state)
    ]


def _short(text: str) -> str:
    """Reasons are made of our own words; what is not would not get far."""
    clean = printable(text)
    return clean if len(clean) <= _LONGEST else f"{clean[: _LONGEST - 1]}…"


def _decisions(desk: Desk) -> Iterator[Contents]:
    """Who, when and what; the words of whoever decided may name a patient, and stay sealed."""
    every = list(desk.decisions())
    newest = {entry.number: number for number, entry, _ in every}
    waiting = {newest[item] for item in desk.undone()}
    for number, entry, said in every:
        yield {
            "when": said.at,
            "object": entry.short,
            "verdict": said.verdict,
            "boxes": len(said.blank),
            "found": said.found,
            "by": _short(said.by),
            "acted": number not in waiting,
        }


# --- The page -------------------------------------------------------------------------------------


def render(told: Contents) -> str:
    """The page: it needs no network and no script, and every text in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    from deploy.intake_report_picture import fate  # noqa: PLC0415

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = words.thousands
    return environment.get_template(_TEMPLATE).render(
        told=told,
        picture=fate(told["objects"], told["pixels"]["objects"]),
        states=[(state.value, words.TITLES[state], words.OF_STATE[state]) for state in _NOT_KEPT],
        lead=words.lead(told["objects"]),
        by_attribute=_by_attribute(told["actions"]),
        by_person=_by_person(told["decisions"]),
        newest=list(reversed(told["decisions"]))[: words.MOST_DECISIONS],
    )


def _by_attribute(actions: list[Contents]) -> list[Contents]:
    """Every attribute once, by name, with what was done to it."""
    found: dict[str, Contents] = {}
    for action in actions:
        for one in action["attributes"]:
            entry = found.setdefault(one["attribute"], one | {"elements": 0, "done": []})
            entry["elements"] += one["elements"]
            entry["done"].append((action["title"], one["elements"]))
    return [found[name] for name in sorted(found)]


def _by_person(decisions: list[Contents]) -> list[tuple[str, int, int]]:
    """Who, how often released, how often rejected."""
    counts = Counter((said["by"], said["verdict"]) for said in decisions)
    people = sorted({by for by, _ in counts})
    return [(by, counts[by, "release"], counts[by, "reject"]) for by in people]
