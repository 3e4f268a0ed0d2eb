"""What a person at a hospital has to know before saying yes: of the cohort, and of one run.

What is found here of the cohort is for the hospital's own screen. None of it leaves the node, and
no answer of the node depends on it (docs/privacy.md 5): a person looks, and then admits the cohort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from client.approval import Asked
from client.book import Book
from client.folder import KEY_FILE, LEDGER, NodeFolder, check_budget, cohort_digest
from client.policy import Data, Policy
from client.recovery import Standing, inspect
from client.synthetic import check_synthetic, synthetic_of
from common import accounting, models
from common.accounting import Share
from common.cohort import SYNTHETIC, Cohort
from common.errors import CohortError, ConfigError, ModelError, Refusal, SpecError
from common.spec import RunSpec
from deploy.node_budget import allowed
from deploy.node_pages import same_disk


class Finding(NamedTuple):
    """One thing that was looked at, and whether it is as it should be."""

    good: bool
    text: str


@dataclass(frozen=True)
class State:
    """How a node stands.

    Attributes:
        set_up: whether there is a key or a ledger.
        book: what can be read of the ledger.
        cohort: digest of the cohort's index; None if it is not there, or nothing is set up.
        node, data: what was looked at.
        notes: what a person should know.
    """

    set_up: bool
    book: Book
    cohort: str | None
    node: tuple[Finding, ...]
    data: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def bad(self) -> list[Finding]:
        """What stands in the way of taking part."""
        return [found for found in (*self.node, *self.data) if not found.good]


def state(home: NodeFolder) -> State:
    """Look at key, ledger, budget, witness and cohort."""
    if not any((home.path / name).exists() for name in (KEY_FILE, LEDGER)):
        none = Finding(True, "Not set up: no key and no ledger lie beside this file.")
        if home.witness.exists():
            none = Finding(
                False,
                f"{home.witness} is there, but no key and no ledger: a node was set up here once. "
                "See `cloister node audit`.",
            )
        seen = tuple(examine(home)) if home.cohort_path.exists() else ()
        return State(False, Book(), None, (none,), seen, ())
    standing = inspect(home)
    node, book = tuple(_node(home, standing)), standing.book
    data, cohort = list(examine(home)), None
    with suppress(CohortError):  # which `examine` has named
        cohort = cohort_digest(home.cohort_path)
        data.append(_admission(book, cohort))
    notes = (_SAME_DISK,) if same_disk(home) else ()
    return State(True, book, cohort, node, tuple(data), notes)


_SAME_DISK = (
    "the witness file lies on the ledger's own disk: who puts back the one puts back the other. "
    "Name a file on another machine in node.toml, [ledger] witness, and move the file there."
)


def _node(home: NodeFolder, standing: Standing) -> Iterator[Finding]:
    if not standing.sound:
        yield from (Finding(False, f"{fault}.") for fault in standing.faults)
        yield Finding(False, "The node answers nothing: see `cloister node audit`.")
        return
    yield Finding(True, "The key is there, and nobody else may read it.")
    yield Finding(
        True, f"The ledger is whole up to entry {standing.book.last}, and agrees with its witness."
    )
    try:
        check_budget(home.policy, standing.book.limit)
    except ConfigError as error:
        yield Finding(False, f"{error}.")


def _admission(book: Book, cohort: str) -> Finding:
    if book.admitted == cohort:
        return Finding(True, "A person has admitted it as it is.")
    if book.admitted:
        return Finding(False, "It was changed since a person admitted it: `cloister node admit`.")
    return Finding(False, "Nobody has admitted it yet: `cloister node admit`.")


def examine(home: NodeFolder) -> Iterator[Finding]:
    """Whether the cohort is one that a run can be trained on here."""
    policy = home.policy
    try:
        cohort = home.open_cohort()
    except (CohortError, ConfigError) as error:
        yield Finding(False, str(error))
        return
    if cohort.meta.source == SYNTHETIC and not policy.allow_no_privacy:
        yield Finding(
            False,
            "The cohort is of synthetic images, and every run that is taken here claims privacy "
            "for patients: take some in. Synthetic ones are named by [data] synthetic.",
        )
    differences = list(_differences(cohort, policy.data))
    yield from (Finding(False, text) for text in differences)
    if not differences:
        yield Finding(True, "The cohort is the one that [data] describes.")
    yield from _at_rest(cohort, policy)
    training = cohort.with_split("", "train")
    seen, least = len(training.patients), policy.limits.least_patients
    compared = "at least" if seen >= least else "fewer than the"
    yield Finding(
        seen >= least,
        f"{seen} {cohort.unit}s to train on, {compared} {least} of least_patients.",
    )
    if training.classes:
        yield _variety(training)


def _at_rest(cohort: Cohort, policy: Policy) -> Iterator[Finding]:
    if cohort.is_sealed:
        yield Finding(True, "It is sealed on the disk.")
    elif policy.intake.encryption is not None:
        yield Finding(
            False, "It lies there unsealed, but [intake.encryption] is set: take it in again."
        )


def _differences(cohort: Cohort, data: Data | None) -> Iterator[str]:
    if data is None:
        return
    for key, ours, written in (
        ("unit", cohort.unit, data.unit),
        ("kind", cohort.kind, data.kind),
        ("classes", cohort.classes, data.classes),
        ("shape", cohort.shape, data.shape),
        ("preprocessing", cohort.preprocessing_digest, data.preprocessing),
        ("modalities", cohort.meta.modalities, data.modalities),
    ):
        if ours != written:
            yield f"[data] {key} is {written} in node.toml, the cohort has {ours}."


def _variety(training: Cohort) -> Finding:
    """Whether there is enough to tell apart: two classes, or a thing that is not everywhere."""
    has = training.present()
    if training.kind == "multilabel":
        chosen = has.any(axis=0) & ~has.all(axis=0)
        what, enough = "Classes that some images have and others have not", chosen.any()
    else:
        chosen = has.any(axis=0)
        what = "Classes with an image to train on"
        enough = chosen.sum() > (0 if training.kind == "boxes" else 1)
    present = [training.classes[number] for number in np.flatnonzero(chosen)]
    more = "" if enough else "; expected more"
    return Finding(bool(enough), f"{what}: {', '.join(present) or 'none'}{more}.")


@dataclass(frozen=True)
class Review:
    """What the node would answer to an invitation to this run, and what the run would cost.

    Attributes:
        answer: ``yes``, ``waits`` for a person, or ``no``.
        objections: everything that stands against it.
        asked: what a person would say yes to; None if the run makes no sense here.
        part: of the whole budget that it takes; 0 without privacy.
        epsilon_after: at the filter's order, with everything that is set aside now.
        left_after: part of the budget that is left then.
    """

    answer: Literal["yes", "waits", "no"]
    objections: tuple[str, ...]
    asked: Asked | None
    part: float = 0.0
    epsilon_after: float = 0.0
    left_after: float = 1.0


def review(home: NodeFolder, spec: RunSpec, book: Book, cohort: str | None) -> Review:
    """Judge a run as the gate would at an invitation, naming every objection at once.

    Args:
        home: the node's; its policy decides.
        spec: the run.
        book: what the ledger says; an empty one for a node that is not set up.
        cohort: digest of the cohort as it is now; None leaves what lies there out of the
            judgement.
    """
    policy = home.policy
    try:
        shares = accounting.shares(spec, policy.declared_size)
    except SpecError as error:
        return Review("no", (str(error),), None)
    objections = [*_objections(policy, spec, shares), *_booked(policy, spec, book, shares)]
    if cohort is not None and book.admitted != cohort:
        objections.append("the cohort is not admitted as it is now: `cloister node admit`")
    mixed_in = ""
    if cohort is not None:
        try:
            mixed_in = _mixed_in(home, spec, book)
        except (CohortError, ConfigError, Refusal) as error:
            objections.append(str(error))
    asked = Asked(spec, cohort or "", shares, mixed_in)
    decision = book.run(spec.digest).decision
    said_yes = decision is not None and decision.approval == asked.digest
    free = policy.approval == "automatic" or said_yes
    answer: Literal["yes", "waits", "no"] = "no" if objections else "yes" if free else "waits"
    return Review(answer, tuple(objections), asked, *_cost(policy, spec, book, shares))


def _objections(policy: Policy, spec: RunSpec, shares: tuple[Share, ...]) -> Iterator[str]:
    from client.counting import memory_of  # noqa: PLC0415 - only a run has to wait for Opacus

    parameters, memory = 0, dict[str, int]()
    try:
        parameters = sum(map(math.prod, models.shapes(spec).values()))
        memory = memory_of(spec)
    except ModelError as error:
        yield str(error)
    yield from policy.objections(spec, parameters, shares)
    yield from policy.objections_to_memory(memory)


def _mixed_in(home: NodeFolder, spec: RunSpec, book: Book) -> str:
    """The synthetic images of a run that mixes some in, if it can; else nothing."""
    if not spec.augmentation.synthetic:
        return ""
    synthetic = synthetic_of(home)
    check_synthetic(spec, synthetic, book.run(spec.digest))
    return str(synthetic or "")


def _booked(policy: Policy, spec: RunSpec, book: Book, shares: tuple[Share, ...]) -> Iterator[str]:
    known = book.run(spec.digest)
    if known.decision is not None and not known.decision.approved:
        yield f"{known.decision.by} said no: {known.decision.reason}"
    if known.state == "closed":
        yield "the run is over at this site"
    try:
        policy.check_earmark(book, spec.digest, shares)
    except Refusal as refusal:
        yield refusal.detail


def _cost(
    policy: Policy, spec: RunSpec, book: Book, shares: tuple[Share, ...]
) -> tuple[float, float, float]:
    budget = policy.budget
    if budget is None:
        return 0.0, 0.0, 1.0
    order, whole = budget.at_order, allowed(budget.limit)
    mine = sum(accounting.divergence(share.whole, order) for share in shares)
    known = book.run(spec.digest)
    has = sum(accounting.divergence(m, order) for m in known.spent())
    for part, (_, mechanism, _) in known.shares.items():
        has += known.remaining(part) * accounting.divergence(mechanism, order)
    after = book.divergence(order) - has + max(mine, has)
    return mine / whole, budget.epsilon_of(after), max(0.0, 1 - after / whole)
