"""What a person sees of the objects that wait, and how what that person says of them is recorded.

Pictures and places name patients: they are for the screen of whoever holds the site's key, and
are written nowhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.intake.decision import Decision, Shot
from client.intake.deid.burned_in import Box
from client.intake.desk import Desk, Entry, State
from common.clock import Clock
from common.errors import ConfigError
from deploy.node_pages import bullets, day, facts
from deploy.screen import printable

MOST_BOXES = 500
LONGEST_WORDS = 2000
LONGEST_NAME = 120
_REASONS_SHOWN = 12


class Queue(StrEnum):
    """What a person can look through.

    ``waits``: nobody has decided on it; ``decided``: the next `intake run` acts on it;
    ``blanked``: it was kept, and pixels of it were blanked; ``rejected``: a person said no.
    """

    WAITS = "waits"
    DECIDED = "decided"
    BLANKED = "blanked"
    REJECTED = "rejected"


def queued(desk: Desk, queue: Queue) -> list[int]:
    """The numbers of all objects in a queue, ascending."""
    undone = desk.undone()
    if queue is Queue.DECIDED:
        return sorted(undone)
    if queue is Queue.BLANKED:
        found = desk.blanked()
    else:
        found = desk.numbers(State.WAITS if queue is Queue.WAITS else State.REJECTED)
    passed = set(undone)
    return [number for number in found if number not in passed]


@dataclass(frozen=True)
class Case:
    """One object before a person.

    Attributes:
        entry: as the journal has it.
        place: in the source; of printable characters. It may name a patient.
        shots: pictures of its frames.
        said: what was said of it so far, the newest last.
    """

    entry: Entry
    place: str
    shots: tuple[Shot, ...]
    said: tuple[Decision, ...]

    @classmethod
    def of(cls, desk: Desk, entry: Entry) -> Case:
        """All of one object.

        Raises:
            SealError: if the desk was changed.
        """
        said = tuple(decision for _, _, decision in desk.decisions(entry))
        return cls(entry, printable(desk.place(entry)), desk.shots(entry), said)

    @property
    def why(self) -> str:
        """Why it is here."""
        last = in_words(self.said[-1]) if self.said else ""
        kept = "kept, with pixels blanked" if self.entry.state is State.KEPT else ""
        return _without_the_way_out(self.entry.reason) or last or kept

    @property
    def found(self) -> int:
        """Boxes in its pictures that a detector found; what a person drew is among those kept."""
        return sum(len(shot.boxes) for shot in self.shots)

    @property
    def drawn(self) -> tuple[Box, ...]:
        """What was drawn in the newest decision, if that was a release."""
        return self.said[-1].blank if self.said else ()

    @property
    def seen(self) -> str:
        """Stands for the object as it is shown: another one if it was read again since."""
        return hashlib.sha256(repr(self.entry).encode()).hexdigest()[:32]

    @property
    def caution(self) -> str:
        """What these pictures do not show; empty if there is nothing to say."""
        if not self.shots:
            return (
                "There is no picture of it: whoever releases it has not seen what is kept. Look at "
                "the file itself first."
            )
        if any(after.frame - before.frame > 1 for before, after in pairwise(self.shots)):
            return (
                "Not every frame is shown. A release lets all of them through, and what is drawn "
                "is blanked in all of them."
            )
        return ""


def _without_the_way_out(reason: str) -> str:
    """A reason without what every one of them says: that a person has to look, or which profile."""
    return printable(reason.partition("; ")[0].partition(": a person has to")[0])


def parsed_box(text: str) -> Box:
    """A rectangle as a person writes it: TOP,LEFT,BOTTOM,RIGHT in pixels, each end excluded.

    Raises:
        ConfigError: if it is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 4 and all(part.isascii() and part.isdecimal() for part in parts):
        made = Box(*(int(part[:9]) for part in parts))
        if made.top < made.bottom and made.left < made.right:
            return made
    raise ConfigError(
        f"{printable(text)[:80]!r} is no rectangle; expected TOP,LEFT,BOTTOM,RIGHT in pixels of "
        "the frame, as in 0,0,40,512: rows 0 to 39, columns 0 to 511"
    )


def decide(desk: Desk, case: Case, said: Decision, clock: Clock | None = None) -> Decision:
    """Record what a person said of an object, with the time; the next `intake run` acts on it.

    Args:
        desk: where it lies.
        case: the object as that person has seen it.
        said: verdict, boxes, by whom and why; its time is set here.
        clock: tells the time.

    Returns:
        What was recorded.

    Raises:
        ConfigError: if nobody is named, a rejection has no reason, a box lies outside of the
            picture, or the object was read again meanwhile.
    """
    _check(case, said)
    at = (clock or Clock()).date().isoformat(timespec="seconds")
    recorded = replace(said, by=said.by.strip(), why=said.why.strip(), at=at)
    desk.decide(case.entry, recorded)
    return recorded


def _check(case: Case, said: Decision) -> None:
    if not 0 < len(said.by.strip()) <= LONGEST_NAME:
        raise ConfigError(f"say who decides, in at most {LONGEST_NAME} characters")
    if said.verdict == "reject" and not said.why.strip():
        raise ConfigError("a rejection needs a reason: say why nothing of it is kept")
    if len(said.why) > LONGEST_WORDS:
        raise ConfigError(f"a reason of {len(said.why)} characters; at most {LONGEST_WORDS}")
    if len(said.blank) > MOST_BOXES:
        raise ConfigError(f"{len(said.blank)} rectangles to blank; at most {MOST_BOXES}")
    sizes = {(shot.rows, shot.columns) for shot in case.shots}
    for drawn in said.blank:
        for rows, columns in sizes:
            if drawn.bottom > rows or drawn.right > columns:
                raise ConfigError(
                    f"the rectangle {written(drawn)} reaches outside of the picture, which has "
                    f"{rows} rows and {columns} columns; expected TOP,LEFT,BOTTOM,RIGHT within it"
                )


def written(drawn: Box) -> str:
    """A rectangle as a person writes it."""
    return ",".join(map(str, drawn))


def in_words(said: Decision) -> str:
    """What was decided, in a few words."""
    if said.verdict == "reject":
        return "rejected"
    words = ["released"]
    if said.blank:
        words.append(f"{len(said.blank)} drawn box{'es' if len(said.blank) > 1 else ''} blanked")
    words.append("found text blanked" if said.found else "found text left as it is")
    return ", ".join(words)


# --- On the terminal ------------------------------------------------------------------------------


def overview(desk: Desk, queue: Queue, most: int) -> Iterator[RenderableType]:
    """One queue: how many for which reason, and the first of them."""
    numbers = queued(desk, queue)
    yield Text(_HEADINGS[queue].format(len(numbers)), style="bold")
    if queue is Queue.WAITS:
        yield from _by_reason(desk, numbers)
    if not numbers:
        return
    yield _table(desk, numbers[:most])
    if len(numbers) > most:
        yield Text(f"  and {len(numbers) - most} more: --rows {len(numbers)} lists all", "dim")


_HEADINGS = {
    Queue.WAITS: "{} wait for a person",
    Queue.DECIDED: "{} decided, and not acted on yet: `cloister intake run` does it",
    Queue.BLANKED: "{} kept, with pixels blanked",
    Queue.REJECTED: "{} rejected",
}


def _by_reason(desk: Desk, numbers: Sequence[int]) -> Iterator[RenderableType]:
    reasons = Counter(_without_the_way_out(desk.entry(number).reason) for number in numbers)
    if len(reasons) > 1:
        ranked = reasons.most_common(_REASONS_SHOWN)
        yield facts((str(count), reason) for reason, count in ranked)


def _table(desk: Desk, numbers: Sequence[int]) -> Table:
    """Places come from the source: they are for this screen alone."""
    table = Table(box=box.SIMPLE, caption="Places may name patients: for your eyes alone.")
    for name, right in (("id", 0), ("why", 0), ("frames", 1), ("boxes", 1), ("place", 0)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for number in numbers:
        case = Case.of(desk, desk.entry(number))
        counts = str(len(case.shots)), str(case.found)
        table.add_row(case.entry.short, Text(case.why), *counts, Text(case.place))
    return table


def one(case: Case) -> Iterator[RenderableType]:
    """All of one object but its pictures."""
    entry = case.entry
    yield Text(f"Object {entry.short}", style="bold")
    sizes = sorted({f"{shot.rows} x {shot.columns}" for shot in case.shots})
    rows = [
        ("state", str(entry.state)),
        ("why", entry.reason or case.why),
        ("place", case.place),
        ("pictures", f"{len(case.shots)} of {', '.join(sizes)} pixels" if sizes else "none"),
    ]
    yield facts(rows)
    boxes = [
        f"frame {shot.frame}: " + "  ".join(written(found) for found in shot.boxes)
        for shot in case.shots
        if shot.boxes
    ]
    yield Text("Found in its pixels (TOP,LEFT,BOTTOM,RIGHT)", style="bold")
    yield bullets(boxes or ["nothing"])
    if case.caution:
        yield bullets([case.caution], "!", "yellow")
    if case.said:
        yield Text("Said so far", style="bold")
        yield bullets(_sentence(said) for said in case.said)


def _sentence(said: Decision) -> str:
    because = f": {printable(said.why)}" if said.why else ""
    return f"{day(said.at)}, {printable(said.by)}: {in_words(said)}{because}"


def decisions(desk: Desk) -> Iterator[RenderableType]:
    """Everything that was decided: when, on what, who and why."""
    every = list(desk.decisions())
    newest = {entry.number: number for number, entry, _ in every}
    undone = {newest[item] for item in desk.undone()}
    table = Table(title="What was decided", title_justify="left", box=box.SIMPLE)
    for name in ("when (UTC)", "id"):
        table.add_column(name, no_wrap=True)
    for name in ("what", "who", "why"):
        table.add_column(name, overflow="fold")
    for number, entry, said in every:
        when = said.at[:19].replace("T", " ")
        what = in_words(said) + (" (by the next run)" if number in undone else "")
        row = (when, entry.short, what, printable(said.by), printable(said.why))
        table.add_row(*map(Text, row))
    yield table
