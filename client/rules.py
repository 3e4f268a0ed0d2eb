"""What may be booked next, by what the book says: refusals, and what sets a run aside."""

from __future__ import annotations

from collections.abc import Callable

from client.book import Book, Entry, Kind, RunBook, columns
from client.chain import WAY_OUT
from common.accounting import Part, Share
from common.errors import LedgerError, Refusal, RefusalCode

Allow = Callable[[Book], None]
"""Raises a Refusal if what the book says leaves no room."""


def check_open(book: Book, run: str) -> None:
    """Refuse an attempt at a run that is not set aside.

    Raises:
        Refusal: ``replay`` if it is over, ``approval`` if it never was set aside, or lapsed.
        LedgerError: if the node was halted.
    """
    check_sound(book)
    state = book.run(run).state
    if state == Kind.CLOSED:
        raise Refusal(RefusalCode.REPLAY, "the run is over at this site")
    if state != "open":
        raise Refusal(RefusalCode.APPROVAL, "the run is not set aside at this site; invite first")


def check_sound(book: Book) -> None:
    """Refuse everything after a halt.

    Raises:
        LedgerError: if the node was halted.
    """
    if book.halted:
        raise LedgerError(f"halted: {book.halted}; {WAY_OUT}")


def check_unreleased(book: Book, run: str, part: Part, round_number: int) -> None:
    """Refuse a second release of a round.

    Raises:
        Refusal: ``later``: the one that was released meanwhile is there for the asking.
    """
    if (part, round_number) in book.run(run).released:
        raise Refusal(
            RefusalCode.LATER, f"{part}, round {round_number}: released meanwhile; ask again"
        )


def check_content(run: RunBook, part: Part, round_number: int, task: str) -> None:
    """Refuse another task than the one (by digest) that a round was first asked with.

    Raises:
        Refusal: ``replay``.
    """
    if run.attempts.get((part, round_number), task) != task:
        raise Refusal(RefusalCode.REPLAY, f"round {round_number} was asked with other content")


def earmarks(
    book: Book, run: str, wanted: tuple[Share, ...], said: str, allow: Allow
) -> list[Entry]:
    """What sets a run aside; nothing if just this is set aside already.

    Raises:
        Refusal: ``replay`` if the run is over, or what `allow` raises.
        LedgerError: if the node was halted.
    """
    check_sound(book)
    known = book.run(run)
    if known.state == Kind.CLOSED:
        raise Refusal(RefusalCode.REPLAY, "the run is over at this site")
    if known.state == "open" and tuple(known.shares.values()) == wanted:
        return []
    allow(book)
    if not wanted:
        return [Entry(0, Kind.EARMARKED, run, note=said)]
    return [
        Entry(0, Kind.EARMARKED, run, part, rounds, note=said, **columns(mechanism))
        for part, mechanism, rounds in wanted
    ]


def check_identity(book: Book, run: str, run_id: str) -> None:
    """Refuse a run id under which another run was asked for before.

    Raises:
        Refusal: ``replay``.
    """
    if run_id and any(
        known.run_id == run_id and digest != run for digest, known in book.runs.items()
    ):
        raise Refusal(RefusalCode.REPLAY, f"run {run_id!r} was another one here before")
