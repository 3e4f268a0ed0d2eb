"""What `cloister node` shows: sentences, tables and bars, within eighty columns and without colour.

Everything that came from a coordinator or was typed by a person is a `Text`: its brackets are no
markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from client.approval import Asked
from client.book import Book, Entry, Kind
from client.chain import UNWRITABLE
from client.folder import LEDGER, NodeFolder
from client.policy import Policy
from client.recovery import Recovered, Standing
from common.errors import CohortError, ConfigError
from common.spec import DpSgd, RunSpec
from deploy.node_budget import Figures, RunShare
from deploy.node_setup import data_table
from deploy.node_words import Paragraph
from deploy.run_words import sentences
from deploy.screen import printable

if TYPE_CHECKING:  # what judges a run imports torch, which a page need not wait for
    from deploy.node_review import Finding, Review

_SHOWN, _SPANS_SHOWN = 12, 24
_WIDE, _NARROW = 72, 24
_MARKS = {"spent": "█", "carried": "▓", "set aside": "▒", "left": "░"}
_SHORT = 12


def bullets(lines: Iterable[str], mark: str = "•", style: str = "") -> Table:
    """Lines with a mark before each; what is too long goes on under itself."""
    grid = _grid()
    for line in lines:
        grid.add_row(Text(f"  {mark}", style=style), Text(line, style=style))
    return grid


def paragraphs(found: Iterable[Paragraph]) -> Iterator[RenderableType]:
    """A policy in words."""
    for heading, lines in found:
        yield Text(heading, style="bold")
        yield bullets(lines)


def findings(heading: str, found: Iterable[Finding]) -> Iterator[RenderableType]:
    """What was looked at, and whether it is as it should be."""
    yield Text(heading, style="bold")
    grid = _grid()
    for good, text in found:
        grid.add_row(Text("  ✓" if good else "  ✗", style="green" if good else "red"), Text(text))
    yield grid


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one a line."""
    grid = _grid(2)
    for name, value in rows:
        grid.add_row(Text(f"  {printable(name)}", style="dim"), Text(printable(value)))
    return grid


def data_as_it_is(node: NodeFolder) -> Iterator[RenderableType]:
    """What [data] would say of the cohort that lies there, if there is one."""
    try:
        meta = node.open_cohort().meta
    except (CohortError, ConfigError):
        return
    yield Text("[data] as the cohort has it:", style="bold")
    yield data_table(meta)


def _grid(space: int = 1) -> Table:
    """Two columns without lines; a path that is too long goes on below."""
    grid = Table.grid(padding=(0, space))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


# --- One run ------------------------------------------------------------------------------------


def run_page(spec: RunSpec, review: Review) -> Iterator[RenderableType]:
    """A run in words, and what it would cost here."""
    yield Text(printable(spec.name), style="bold")
    named = [("operator", spec.operator or "(none named)"), ("run", spec.digest)]
    yield facts([*named, ("identity", spec.run_id)] if spec.run_id else named)
    yield bullets(sentences(spec))
    yield from cost(spec, review)


def whole_page(spec: RunSpec, review: Review) -> Iterator[RenderableType]:
    """All that a person says yes or no to."""
    yield from run_page(spec, review)
    yield from verdict(review)
    if review.asked is not None:
        yield Text("What would be approved:", style="bold")
        yield approval(review.asked)


def cost(spec: RunSpec, review: Review) -> Iterator[RenderableType]:
    """What the run would take of the budget."""
    asked, privacy = review.asked, spec.privacy
    if asked is None:
        return
    yield Text("What it would cost here", style="bold")
    rows: list[tuple[str, str]] = []
    if not isinstance(privacy, DpSgd):
        what = "of training NOTHING is booked" if asked.shares else "nothing is booked"
        yield bullets([f"{what}: there is NO differential privacy in it"], style="red")
    elif asked.epsilon is not None:
        rows.append(("whole run", f"ε {asked.epsilon:.3f} at δ {privacy.delta:g}, by PLD"))
    if not asked.shares:
        return
    for part, mechanism, rounds in asked.shares:
        rows.append(
            (
                part,
                f"{rounds} round(s) of {mechanism.steps} step(s), q {mechanism.sampling_rate:.4g}, "
                f"σ {mechanism.noise_multiplier:.4g}, per {mechanism.unit}",
            )
        )
    rows += [
        ("of the budget", f"{review.part:.1%} for life, as the filter counts"),
        ("counted then", f"ε {review.epsilon_after:.3f}, with all that is set aside"),
        ("left then", f"{review.left_after:.1%} of the budget"),
    ]
    yield facts(rows)
    yield bullets(["a round that has to be tried again costs again"], style="dim")


def verdict(review: Review) -> Iterator[RenderableType]:
    """Yes, no, or a person has to say it."""
    if review.answer == "no":
        yield Text("No: this node would not take part.", style="bold red")
        yield bullets(review.objections, "✗")
    elif review.answer == "waits":
        yield Text("It would wait for a person here to say yes.", style="bold yellow")
    else:
        yield Text("Yes: this node would take part.", style="bold green")


def approval(asked: Asked) -> RenderableType:
    """What exactly a person would say yes to."""
    return facts(
        [
            ("cohort", asked.cohort),
            *([("mixed in", asked.synthetic)] if asked.synthetic else []),
            ("Cloister", asked.version),
            ("approval", asked.digest),
        ]
    )


def known_run(book: Book, digest: str, share: RunShare) -> Iterator[RenderableType]:
    """A run that does not wait any more, as the ledger has it."""
    known = book.run(digest)
    yield Text(printable(known.name) or "(a run without a name)", style="bold")
    rows = [
        ("run", digest),
        ("state", known.state or "never set aside"),
        ("rounds", f"{share.attempted} attempted of {share.rounds} set aside"),
        ("spent", f"{share.spent:.1%} of the budget"),
        ("set aside", f"{share.aside:.1%} of the budget"),
    ]
    if known.decision is not None:
        said = "yes" if known.decision.approved else "no"
        rows.append((f"{known.decision.by} said", f"{said}, {day(known.decision.time)}"))
        rows.append(("because", known.decision.reason))
        rows.append(("approval", known.decision.approval))
    yield facts(rows)


def waiting(specs: Iterable[tuple[RunSpec, Review]]) -> RenderableType:
    """The runs that wait for a person."""
    table = Table(title="Runs that wait for a person", title_justify="left")
    for column, right in (("run", 0), ("operator", 0), ("digest", 0), ("rounds", 1), ("budget", 1)):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for spec, judged in specs:
        part = "beyond" if judged.answer == "no" else f"{judged.part:.1%}"
        table.add_row(
            Text(printable(spec.name)),
            Text(printable(spec.operator) or "(none)"),
            spec.digest[:_SHORT],
            str(spec.rounds),
            part,
        )
    return table


# --- The budget ---------------------------------------------------------------------------------


def budget_page(policy: Policy, figures: Figures, fixed: float | str) -> Iterator[RenderableType]:
    """What was spent and what is left: in all, by run, over time."""
    limit = figures.limit
    unit = policy.data.unit if policy.data else policy.least_unit
    yield Text(f"{policy.site}: ({limit.epsilon:g}, {limit.delta:g}) for life, per {unit}", "bold")
    parts = {
        "spent": figures.spent,
        "carried": figures.carried,
        "set aside": figures.aside,
        "left": figures.left,
    }
    yield Text(" " + "".join(_bar(parts)))
    yield Text("   ".join(f" {_MARKS[name]} {name} {part:.1%}" for name, part in parts.items()))
    yield facts(
        [
            ("spent", f"ε {figures.epsilon_spent:.3f} at order {limit.order:g} of the filter"),
            ("counted", f"ε {figures.epsilon:.3f} with what is set aside"),
            ("left", f"ε {max(0.0, limit.epsilon - figures.epsilon):.3f}"),
            (
                "if fixed in advance",
                fixed if isinstance(fixed, str) else f"ε {fixed:.3f}, what was spent, by PLD",
            ),
        ]
    )
    yield from _by_run(figures)
    yield from _over_time(figures)


def _bar(parts: dict[str, float]) -> Iterator[str]:
    """Marks as many as there is room; they meet where the parts do."""
    total, drawn = 0.0, 0
    for name, part in parts.items():
        total += part
        end = min(_WIDE, round(total * _WIDE))
        yield _MARKS[name] * max(0, end - drawn)
        drawn = max(drawn, end)


def _by_run(figures: Figures) -> Iterator[RenderableType]:
    if not figures.runs:
        return
    table = Table(title="by run, in parts of the whole budget", title_justify="left")
    for column in ("run", "digest", "state", "rounds", "part", ""):
        table.add_column(column, justify="right" if column in ("rounds", "part") else "left")
    shown, rest = figures.runs[:_SHOWN], figures.runs[_SHOWN:]
    for run in shown:
        marks = _scaled(run.spent, "█"), _scaled(run.aside, "▒")
        table.add_row(
            Text(_cut(printable(run.name))),
            run.digest[:8],
            run.state or "–",
            f"{run.attempted}/{run.rounds}",
            f"{run.spent + run.aside:.1%}",
            "".join(marks)[:_NARROW],
        )
    yield table
    if rest:
        more = sum(run.spent + run.aside for run in rest)
        yield Text(f"  and {len(rest)} more runs: {more:.1%}", style="dim")


def _over_time(figures: Figures) -> Iterator[RenderableType]:
    if not figures.spans:
        return
    table = Table(title="over time, in parts of the whole budget", title_justify="left")
    for column in ("when", "spent", "", "since the beginning"):
        table.add_column(column, justify="left" if column in ("when", "") else "right")
    before = sum(span.spent for span in figures.spans[:-_SPANS_SHOWN])
    shown = figures.spans[-_SPANS_SHOWN:]
    for span in shown:
        before += span.spent
        bar = _scaled(span.spent, "█")
        table.add_row(span.label, f"{span.spent:.1%}", bar, f"{before:.1%}")
    yield table


def _scaled(part: float, mark: str) -> str:
    """A bar of a part of the whole budget; the whole is a full one."""
    wide = round(part * _NARROW)
    return mark * (max(1, wide) if part > 0 else 0)


def _cut(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


# --- The ledger ---------------------------------------------------------------------------------


def standing_page(
    standing: Standing, node: NodeFolder, given: list[str]
) -> Iterator[RenderableType]:
    """The judgement of an audit."""
    book = standing.book
    if standing.sound:
        yield Text("The ledger is whole.", style="bold green")
    else:
        yield Text("The ledger cannot be relied on: this node answers nothing.", style="bold red")
        yield bullets(standing.faults, "✗")
        yield bullets([_way_on(standing)])
    whole = f"whole up to {book.last}" if book.last else "none that can be read"
    yield facts([("entries", whole), ("compared", f"with {standing.witnesses} witness(es)")])
    if standing.sound and standing.ledger is not None:
        yield Text("  newest witness:", style="dim")
        yield standing.ledger.witness
    yield bullets([_outside(node, given)])


_DECIDED = (
    Kind.OPENED,
    Kind.BUDGET,
    Kind.ADMITTED,
    Kind.APPROVED,
    Kind.DENIED,
    Kind.CLOSED,
    Kind.HALTED,
    Kind.CARRIED,
)


def decisions(entries: Iterable[Entry], *, up_to: int) -> Iterator[RenderableType]:
    """What people decided, of the entries that are whole: when, who and why."""
    table = Table(title="What was decided", title_justify="left", box=box.SIMPLE)
    for name in ("entry", "when (UTC)", "what", "who", "why"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        if entry.kind not in _DECIDED or entry.number > up_to:
            continue
        said = entry.said
        what = f"{entry.kind} {said.get('name') or entry.run[:8]}".strip()
        when = entry.time[:19].replace("T", " ")
        row = (str(entry.number), when, what, str(said.get("by", "")), str(said.get("reason", "")))
        table.add_row(*map(Text, row))
    yield table


def _way_on(standing: Standing) -> str:
    if all(UNWRITABLE in fault for fault in standing.faults):
        return "Nothing is lost by that: mend the disk or the mount, and look again."
    if not standing.key_read:
        return (
            "Put node.key back from your copy. Without it nobody can verify the chain or read the "
            "kept releases; if it is gone for good: `cloister node recover --new-key`."
        )
    return (
        "Put the true file back from a copy if you have one. Otherwise a person signs for what was "
        "spent: `cloister node recover`."
    )


def _outside(node: NodeFolder, given: list[str]) -> str:
    """What a whole machine that was put back in time would show (docs/privacy.md 11)."""
    if given:
        return "A witness from outside was compared: this ledger is not older than that."
    if not same_disk(node):
        return (
            f"The witness file {node.witness} lies on another file system. If that is another "
            "machine, putting this one back in time would have been noticed."
        )
    return (
        "No witness outside this machine was compared: a whole machine that was put back in time "
        "would look just like this. Give one with --witness: from a log elsewhere, or from the "
        "record that the coordinator keeps of this site."
    )


def same_disk(node: NodeFolder) -> bool:
    """Whether the witness file lies on the ledger's own file system."""
    try:
        return node.witness.parent.stat().st_dev == (node.path / LEDGER).stat().st_dev
    except OSError:
        return True


def recovered_page(done: Recovered, limit: str) -> Iterator[RenderableType]:
    """What a recovery did."""
    yield Text(f"The node goes on from entry {done.first} of its ledger.", style="bold")
    yield bullets(
        [
            f"ε {done.epsilon:.3f} counts as spent, of {limit}.",
            "No run is set aside any more; each has to be invited again.",
            *(["A new ledger has begun: admit the cohort again."] if done.anew else []),
            *(f"Moved aside, nothing in it was changed: {path}" for path in done.moved),
        ]
    )


def day(time: str) -> str:
    """A date as the ledger has it, to the minute."""
    return f"{time[:16].replace('T', ' ')} UTC"
