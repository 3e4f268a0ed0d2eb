"""A run before a person's eyes: drawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from common.spec import RunSpec
from deploy.live import LiveObserver


def row(number: int, status: str = "ok", value: float | None = 0.8125) -> dict[str, Any]:
    estimate = {"value": value, "low": 0.7, "high": 0.9}
    part = {"images": 10, "patients": 10, "metrics": {"auroc": estimate}}
    return {
        "round": number,
        "seconds": 1.25,
        "sites": {"north": {"status": "ok"}, "south": {"status": status}},
        "update_norm": 0.5,
        "evaluation": {"validation": None, "test": part},
    }


@pytest.fixture
def shown(make_spec: Callable[..., RunSpec]) -> Callable[..., str]:
    """What stands on the console after these rounds."""

    def show(
        *rows: dict[str, Any], terminal: bool, waiting: Sequence[Mapping[str, str]] = ()
    ) -> str:
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=100, color_system=None)
        with LiveObserver(console).showing() as observer:
            for changed in waiting:
                observer.sites_wait(changed)
            if rows:
                observer.run_opened(make_spec(rounds=20), ["north", "south"], 0)
            for made in rows:
                observer.round_opened(made["round"])
                for name, site in made["sites"].items():
                    observer.site_answered(made["round"], name, site["status"])
                observer.round_closed(made)
        return screen.getvalue()

    return show


def test_elsewhere_each_round_is_a_line_that_names_who_was_not_there(shown: Any):
    lines = shown(row(1), row(2, "late"), row(3, "rejected"), terminal=False).splitlines()
    assert [line.split()[:2] for line in lines] == [["round", str(n)] for n in (1, 2, 3)]
    assert "test auroc 0.812 (0.700–0.900)" in lines[0]
    assert ["south" in line for line in lines] == [False, True, True]
    assert lines[1].endswith("south late")


@pytest.mark.parametrize("status", ["ok", "late", "failed", "refused", "rejected"])
def test_a_terminal_shows_progress_sites_and_the_last_rounds(shown: Any, status: str):
    picture = shown(*(row(number, status) for number in range(1, 13)), terminal=True)
    last = picture[picture.rindex("small: round") :]
    assert "12/20" in last
    assert ("✓" if status == "ok" else status) in last
    assert "0.812 (0.700–0.900)" in last
    assert last.count("1.25") == 8


WAITING = {"south": "approval", "[red]west": "later"}


def test_elsewhere_a_line_says_who_is_waited_for(shown: Any):
    said = shown(row(1), terminal=False, waiting=[WAITING, {}]).splitlines()
    assert said[0] == "the run waits for [red]west (its time), south (a person's approval)"
    assert said[1].startswith("round ")


def test_a_terminal_shows_who_is_waited_for(shown: Any):
    picture = shown(terminal=True, waiting=[{"east": "later"}, WAITING])
    last = picture[picture.rindex("[red]west") :]
    assert last.startswith("[red]west waits for its time  south waits for a person's approval")
    assert "round" not in last  # nor is an empty table drawn
    begun = shown(row(1), terminal=True, waiting=[WAITING])
    assert "waits" not in begun[begun.rindex("small: round") :]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_round_without_an_evaluation_or_a_value_is_shown_as_well(shown: Any, terminal: bool):
    unevaluated = row(1) | {"evaluation": None}
    assert shown(unevaluated, row(2, value=None), terminal=terminal)
