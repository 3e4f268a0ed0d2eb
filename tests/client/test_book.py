"""What entries mean: every kind after every state, and totals against a slow, obvious sum."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client.book
from client.book import Book, Entry, Kind, Limit, Step, book_of, columns, note
from common import accounting
from common.accounting import Part, Share, SubsampledGaussian
from common.errors import LedgerError

MECHANISM = SubsampledGaussian(0.1, 1.5, 4, "patient")
OTHER = SubsampledGaussian(0.2, 1.0, 3, "patient")
TASK, RUN = "1" * 64, "a" * 64
ORDER = 8.0

SAID: dict[Kind, dict[str, Any]] = {
    Kind.OPENED: {"site": "north", "by": "somebody"},
    Kind.BUDGET: {"epsilon": 3.0, "delta": 1e-5, "order": 8.0},
    Kind.APPROVED: {"approval": "d" * 64, "by": "a person", "reason": "it helps", "name": "lungs"},
    Kind.DENIED: {"approval": "d" * 64, "by": "a person", "reason": "no", "name": "lungs"},
    Kind.EARMARKED: {"name": "lungs", "run_id": "r1"},
    Kind.HALTED: {"reason": "put back", "witness": "9:x:y", "number": 9},
}


def entry(number: int, kind: Kind, run: str = RUN, round_number: int = 1) -> Entry:
    """A plain entry of each kind, on its own line of the table."""
    plain = Entry(number, kind, note=note(**SAID.get(kind, {})), time=f"2026-01-{number:02d}")
    booked = dict(columns(MECHANISM))
    attempt = {"part": "training", "round": round_number, "task": TASK}
    own: dict[Kind, dict[str, Any]] = {
        Kind.EARMARKED: {"part": "training", "round": 5, **booked},
        Kind.RESERVED: attempt | booked,
        Kind.COMMITTED: {"refers": 3, "release": "e" * 64},
        Kind.ADMITTED: {"cohort": "c" * 64},
        Kind.CARRIED: {"divergence": 0.5},
    }
    of_no_run = {Kind.OPENED, Kind.BUDGET, Kind.HALTED, Kind.ADMITTED, Kind.CARRIED}
    return plain._replace(run="" if kind in of_no_run else run, **own.get(kind, {}))


def history(*kinds: Kind) -> list[Entry]:
    return [entry(number, kind) for number, kind in enumerate(kinds, start=1)]


STATES = {
    "nothing": [],
    "opened": [Kind.OPENED],
    "a budget": [Kind.OPENED, Kind.BUDGET],
    "approved": [Kind.OPENED, Kind.APPROVED],
    "denied": [Kind.OPENED, Kind.DENIED],
    "earmarked": [Kind.OPENED, Kind.EARMARKED],
    "reserved": [Kind.OPENED, Kind.EARMARKED, Kind.RESERVED],
    "released": [Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.COMMITTED],
    "lapsed": [Kind.OPENED, Kind.EARMARKED, Kind.LAPSED],
    "lapsed while training": [Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.LAPSED],
    "earmarked again": [Kind.OPENED, Kind.EARMARKED, Kind.LAPSED, Kind.EARMARKED],
    "closed": [Kind.OPENED, Kind.EARMARKED, Kind.CLOSED],
    "closed while training": [Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.CLOSED],
    "closed after it lapsed": [Kind.OPENED, Kind.EARMARKED, Kind.LAPSED, Kind.CLOSED],
    "halted": [Kind.OPENED, Kind.HALTED],
    "carried": [Kind.OPENED, Kind.HALTED, Kind.CARRIED],
}
ALWAYS = {
    Kind.BUDGET,
    Kind.ADMITTED,
    Kind.APPROVED,
    Kind.DENIED,
    Kind.HALTED,
    Kind.CARRIED,
}
"""What may follow anything but nothing; the run's own kinds depend on its state."""

OF_THE_RUN = {
    "nothing": {Kind.OPENED},
    "opened": {Kind.EARMARKED},
    "a budget": {Kind.EARMARKED},
    "approved": {Kind.EARMARKED},
    "denied": {Kind.EARMARKED},
    "earmarked": {Kind.EARMARKED, Kind.RESERVED, Kind.LAPSED, Kind.CLOSED},
    "reserved": {Kind.EARMARKED, Kind.RESERVED, Kind.COMMITTED, Kind.LAPSED, Kind.CLOSED},
    "released": {Kind.EARMARKED, Kind.RESERVED, Kind.LAPSED, Kind.CLOSED},
    "lapsed": {Kind.EARMARKED, Kind.CLOSED},
    "lapsed while training": {Kind.EARMARKED, Kind.COMMITTED, Kind.CLOSED},
    "earmarked again": {Kind.EARMARKED, Kind.RESERVED, Kind.LAPSED, Kind.CLOSED},
    "closed": set(),
    "closed while training": {Kind.COMMITTED},
    "closed after it lapsed": set(),
    "halted": {Kind.EARMARKED},
    "carried": {Kind.EARMARKED},
}
PAIRS = [(state, kind) for state in STATES for kind in Kind]


def legal(state: str, kind: Kind) -> bool:
    return kind in OF_THE_RUN[state] or (kind in ALWAYS and state != "nothing")


@pytest.mark.parametrize(("state", "kind"), [pair for pair in PAIRS if legal(*pair)])
def test_what_may_follow_a_state_is_taken(state: str, kind: Kind):
    before = history(*STATES[state])
    book = book_of(before)
    book.apply(entry(len(before) + 1, kind))
    assert book.last == len(before) + 1


@pytest.mark.parametrize(("state", "kind"), [pair for pair in PAIRS if not legal(*pair)])
def test_what_may_not_follow_a_state_is_refused_by_its_number(state: str, kind: Kind):
    before = history(*STATES[state])
    book, number = book_of(before), len(before) + 1
    with pytest.raises(LedgerError, match=f"entry {number}:"):
        book.apply(entry(number, kind))
    assert book.last == len(before)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(LedgerError, match="entry 2: kind 'gift' is not known"):
        book_of([entry(1, Kind.OPENED), Entry(2, "gift")])


def test_every_kind_stands_in_the_table_of_the_page():
    table = str(client.book.__doc__).splitlines()
    rows = {line.split()[0] for line in table if line.startswith("    ") and line[4:5].strip()}
    assert rows == set(Kind)


# --- Numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ALWAYS | {Kind.EARMARKED}))
@pytest.mark.parametrize("number", [0, 1, 2, 4, 40, -3])
def test_a_number_is_the_next_but_for_what_is_carried(kind: Kind, number: int):
    book = book_of(history(Kind.OPENED, Kind.ADMITTED))
    if kind == Kind.CARRIED and number > 2:
        book.apply(entry(2, kind)._replace(number=number))
        assert book.last == number
        book.apply(entry(1, Kind.ADMITTED)._replace(number=number + 1))
        return
    with pytest.raises(LedgerError, match="entry 3: missing"):
        book.apply(entry(2, kind)._replace(number=number))


@pytest.mark.parametrize("first", [1, 2, 977])
def test_a_ledger_may_begin_after_the_numbers_of_a_lost_one(first: int):
    assert book_of([entry(1, Kind.OPENED)._replace(number=first)]).last == first


@pytest.mark.parametrize("first", [0, -1])
def test_a_ledger_begins_at_a_number_above_zero(first: int):
    with pytest.raises(LedgerError, match="missing"):
        book_of([entry(1, Kind.OPENED)._replace(number=first)])


# --- Totals -----------------------------------------------------------------------------------

MECHANISMS = (MECHANISM, OTHER, SubsampledGaussian(0.1, 1.5, 1, "image"), None)
RUNS = ("a" * 64, "b" * 64, "c" * 64)
PARTS: tuple[Part, ...] = ("training", "evaluation")
OFTEN = [
    *(Kind.EARMARKED, Kind.EARMARKED, Kind.RESERVED, Kind.RESERVED, Kind.RESERVED, Kind.RESERVED),
    *(Kind.COMMITTED, Kind.COMMITTED, Kind.LAPSED, Kind.CLOSED, Kind.CARRIED, Kind.HALTED),
]
TRIED = st.tuples(
    st.sampled_from(OFTEN),
    st.sampled_from(RUNS),
    st.sampled_from(PARTS),
    st.integers(1, 4),
    st.sampled_from(MECHANISMS),
    st.floats(0, 3),
)


def drawn(tried: Sequence[tuple[Kind, str, Part, int, SubsampledGaussian | None, float]]):
    """The history that is left of what was tried when everything illegal is taken out."""
    entries = [entry(1, Kind.OPENED)]
    book = book_of(entries)
    for kind, run, part, number, mechanism, divergence in tried:
        new = entry(len(entries) + 1, kind, run)._replace(run=run, time="2026")
        if kind in {Kind.EARMARKED, Kind.RESERVED}:
            nothing = dict.fromkeys(("sampling_rate", "noise_multiplier", "steps")) | {"unit": ""}
            new = new._replace(part=part, round=number, **(columns(mechanism) or nothing))
        elif kind == Kind.COMMITTED:
            reserved = [e.number for e in entries if e.kind == Kind.RESERVED] or [0]
            new = new._replace(refers=reserved[-number % len(reserved)])
        elif kind == Kind.CARRIED:
            new = new._replace(divergence=divergence)
        try:
            book.apply(new)
            entries.append(new)
        except LedgerError:
            book = book_of(entries)  # the other one is of no use any more
    return entries


def slowly_set_aside(entries: list[Entry]) -> float:
    """For each part of each run, by looking through everything again."""
    total = 0.0
    for run in RUNS:
        states = {Kind.EARMARKED, Kind.LAPSED, Kind.CLOSED}
        of_run = [e for e in entries if e.run == run]
        last = [e.kind for e in of_run if e.kind in states][-1:]
        if last != [Kind.EARMARKED]:
            continue
        for part in PARTS:
            of_part = [e for e in of_run if e.part == part]
            marks = [e for e in of_part if e.kind == Kind.EARMARKED and e.mechanism]
            rounds = {e.round for e in of_part if e.kind == Kind.RESERVED}
            if marks and marks[-1].mechanism:
                cost = accounting.divergence(marks[-1].mechanism, ORDER)
                total += cost * max(0, marks[-1].round - len(rounds))
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(TRIED, min_size=15, max_size=60))
def test_spent_set_aside_and_carried_are_what_a_slow_sum_says(tried):
    entries = drawn(tried)
    book = book_of(entries)
    attempts = [e.mechanism for e in entries if e.kind == Kind.RESERVED]
    spent = [m for m in attempts if m]
    carried = [e.divergence or 0.0 for e in entries if e.kind == Kind.CARRIED]
    steps: Counter[Step] = Counter()
    for m in spent:
        steps[Step(m.sampling_rate, m.noise_multiplier, m.unit)] += m.steps
    found = {Step(m.sampling_rate, m.noise_multiplier, m.unit): m.steps for m in book.spent()}
    assert found == dict(steps)
    assert [charge.mechanism for charge in book.charges] == attempts
    assert book.carried == pytest.approx(math.fsum(carried))
    total = math.fsum(accounting.divergence(m, ORDER) for m in spent)
    aside = slowly_set_aside(entries)
    assert sum(accounting.divergence(m, ORDER) for m in book.set_aside()) == pytest.approx(aside)
    assert book.divergence(ORDER) == pytest.approx(total + math.fsum(carried) + aside, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(TRIED, min_size=15, max_size=60))
def test_what_counts_never_falls_but_by_ending_a_run_or_setting_it_aside_anew(tried):
    book, before = Book(), 0.0
    for each in drawn(tried):
        share = next((s for s in book.run(each.run).shares.values() if s.part == each.part), None)
        book.apply(each)
        total = book.divergence(ORDER)
        gives_back = each.kind in {Kind.LAPSED, Kind.CLOSED, Kind.EARMARKED}
        as_set_aside = each.kind != Kind.RESERVED or (share and share.mechanism) == each.mechanism
        assert total >= before * (1 - 1e-9) or gives_back or not as_set_aside
        before = total


@settings(max_examples=100, deadline=None)
@given(st.lists(TRIED, min_size=15, max_size=60))
def test_what_was_spent_by_run_adds_up_to_what_was_spent(tried):
    book = book_of(drawn(tried))
    by_run = [m for run in book.runs.values() for m in run.spent()]
    everything = [accounting.divergence(m, ORDER) for m in book.spent()]
    assert sum(accounting.divergence(m, ORDER) for m in by_run) == pytest.approx(sum(everything))


def test_an_attempt_takes_from_what_was_set_aside_and_a_second_one_adds():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED))
    whole = accounting.divergence(MECHANISM.of_steps(20), ORDER)
    assert book.divergence(ORDER) == pytest.approx(whole)
    book.apply(entry(3, Kind.RESERVED))
    assert book.run(RUN).remaining("training") == 4
    assert book.divergence(ORDER) == pytest.approx(whole)
    book.apply(entry(4, Kind.RESERVED))
    assert book.run(RUN).remaining("training") == 4
    assert book.divergence(ORDER) == pytest.approx(whole * 6 / 5)


def test_a_later_earmark_takes_the_place_of_the_first_and_rounds_attempted_stay_attempted():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED))
    book.apply(entry(4, Kind.EARMARKED)._replace(round=2, **columns(OTHER)))
    assert book.run(RUN).shares == {"training": Share("training", OTHER, 2)}
    assert book.set_aside() == [OTHER]
    book.apply(entry(5, Kind.EARMARKED)._replace(round=1))
    assert book.set_aside() == []


@pytest.mark.parametrize("end", [Kind.LAPSED, Kind.CLOSED])
def test_a_run_that_ended_holds_nothing_aside_and_keeps_what_it_spent(end: Kind):
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, end))
    assert book.set_aside() == []
    assert book.open_runs() == []
    assert book.spent() == book.run(RUN).spent() == [MECHANISM]
    assert book.run(RUN).state == end


def test_a_lapsed_run_is_set_aside_again_for_the_rounds_that_are_left():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.LAPSED))
    book.apply(entry(5, Kind.EARMARKED))
    assert book.open_runs() == [RUN]
    assert book.run(RUN).remaining("training") == 4


def test_a_run_without_privacy_is_open_and_costs_nothing():
    plain = entry(2, Kind.EARMARKED)._replace(part="", round=0, steps=None)
    book = book_of([entry(1, Kind.OPENED), plain])
    attempt = entry(3, Kind.RESERVED)._replace(steps=None)
    book.apply(attempt)
    assert book.open_runs() == [RUN]
    assert book.spent() == book.set_aside() == []
    assert [charge.mechanism for charge in book.charges] == [None]
    assert book.divergence(ORDER) == 0.0


def test_what_is_not_known_is_empty_and_is_not_remembered():
    book = book_of(history(Kind.OPENED))
    assert book.run("f" * 64).state == ""
    assert book.runs == {}


# --- Attempts ---------------------------------------------------------------------------------


def test_a_round_has_one_content():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED))
    with pytest.raises(LedgerError, match="entry 4: another content of round 1"):
        book.apply(entry(4, Kind.RESERVED)._replace(task="2" * 64))
    other_part = entry(4, Kind.RESERVED)._replace(task="2" * 64, part="evaluation")
    book.apply(other_part)


def test_a_round_is_released_once_whichever_attempt_comes_first():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.RESERVED))
    book.apply(entry(5, Kind.COMMITTED)._replace(refers=4))
    with pytest.raises(LedgerError, match="releases round 1 a second time"):
        book.apply(entry(6, Kind.COMMITTED)._replace(refers=3))
    assert book.run(RUN).released == {("training", 1): (4, "e" * 64)}


@pytest.mark.parametrize("refers", [0, 1, 2, 4, 99])
def test_only_an_attempt_is_committed(refers: int):
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED))
    with pytest.raises(LedgerError, match=f"commits {refers}, no waiting attempt"):
        book.apply(entry(4, Kind.COMMITTED)._replace(refers=refers))


def test_every_attempt_at_a_run_is_known_by_its_number_released_or_not():
    book = book_of(history(Kind.OPENED, Kind.EARMARKED, Kind.RESERVED, Kind.COMMITTED))
    book.apply(entry(5, Kind.RESERVED, round_number=2))
    book.apply(entry(6, Kind.EARMARKED, run="b" * 64))
    book.apply(entry(7, Kind.RESERVED, run="b" * 64))
    assert book.attempts_of(RUN) == {3: ("training", 1), 5: ("training", 2)}
    assert book.attempts_of("b" * 64) == {7: ("training", 1)}
    assert book.attempts_of("f" * 64) == {}


@given(st.lists(st.integers(10, 30)), st.integers(10, 31))
def test_attempts_since_a_time_are_found_in_whatever_order_the_clock_went(days, since):
    book = book_of(history(Kind.OPENED, Kind.EARMARKED))
    for number, day in enumerate(days, start=3):
        book.apply(entry(number, Kind.RESERVED)._replace(time=f"2026-01-{day}"))
    found = [charge.time for charge in book.since(f"2026-01-{since}")]
    assert found == [f"2026-01-{day}" for day in days if day >= since]


def test_attempts_since_a_time_are_found_though_the_clock_was_put_back_in_between():
    times = ("2026-01-05", "2026-01-01", "2026-01-06")
    book = book_of(history(Kind.OPENED, Kind.EARMARKED))
    for number, time in enumerate(times, start=3):
        book.apply(entry(number, Kind.RESERVED)._replace(time=time))
    assert [charge.time for charge in book.since("2026-01-05")] == ["2026-01-05", "2026-01-06"]
    assert book.since("2027") == []


# --- What people said -------------------------------------------------------------------------


def test_the_last_decision_of_a_person_stands_with_who_and_why():
    book = book_of(history(Kind.OPENED, Kind.APPROVED))
    decision = book.run(RUN).decision
    assert decision == (True, "d" * 64, "a person", "it helps", "2026-01-02")
    book.apply(entry(3, Kind.DENIED))
    decision = book.run(RUN).decision
    assert decision is not None
    assert not decision.approved
    assert decision.reason == "no"
    assert book.run(RUN).name == "lungs"
    assert book.run(RUN).state == ""


def test_a_decision_survives_that_the_run_is_set_aside_and_ends():
    book = book_of(history(Kind.OPENED, Kind.APPROVED, Kind.EARMARKED, Kind.LAPSED))
    decision = book.run(RUN).decision
    assert decision is not None
    assert decision.approved
    assert book.run(RUN).run_id == "r1"


def test_the_last_budget_and_the_last_admitted_cohort_stand():
    book = book_of(history(Kind.OPENED, Kind.BUDGET, Kind.ADMITTED))
    assert (book.site, book.limit) == ("north", Limit(3.0, 1e-5, 8.0))
    assert book.admitted == "c" * 64
    wider = entry(4, Kind.BUDGET)._replace(note=note(epsilon=4.0, delta=1e-5, order=8.0))
    book.apply(wider)
    book.apply(entry(5, Kind.ADMITTED)._replace(cohort="d" * 64))
    assert book.limit == Limit(4.0, 1e-5, 8.0)
    assert book.admitted == "d" * 64


def test_a_halt_lasts_until_something_is_carried_and_what_was_seen_is_remembered():
    book = book_of(history(Kind.OPENED, Kind.HALTED, Kind.ADMITTED, Kind.APPROVED))
    assert (book.halted, book.witnessed, book.recovered) == ("put back", 9, 0)
    book.apply(entry(5, Kind.CARRIED)._replace(number=10))
    assert (book.halted, book.witnessed, book.recovered) == ("", 9, 10)


def test_carrying_in_a_sound_ledger_is_no_recovery():
    book = book_of(history(Kind.OPENED, Kind.CARRIED))
    assert (book.carried, book.recovered) == (0.5, 0)


# --- Entries ----------------------------------------------------------------------------------


@given(
    st.floats(1e-9, 1), st.floats(1e-3, 1e6), st.integers(1, 10**9), st.sampled_from(["patient"])
)
def test_a_mechanism_comes_back_from_an_entry_as_it_was(rate, noise, steps, unit):
    mechanism = SubsampledGaussian(rate, noise, steps, unit)
    assert Entry(1, Kind.RESERVED, **columns(mechanism)).mechanism == mechanism


def test_an_entry_without_a_mechanism_has_none():
    assert Entry(1, Kind.RESERVED, **columns(None)).mechanism is None


@given(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False) | st.integers()))
def test_a_note_is_ascii_and_comes_back_as_it_was(said):
    text = note(**said)
    assert text.isascii()
    assert Entry(1, Kind.ADMITTED, note=text).said == json.loads(json.dumps(said)) == said
