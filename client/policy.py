"""The hospital's own limits, which no message can widen.

A policy is read once from ``node.toml`` and frozen. Deciding is a pure function of policy, spec,
ledger and clock; the cohort has no part in it (docs/privacy.md 5). What a limit leaves out is on
the safe side: a node whose file names no operator and no network takes part in nothing.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from client.book import Book, Limit
from client.intake.reception import Listen
from client.intake.settings import IntakeSettings, PathText
from client.ledger import stamp
from common import accounting
from common.accounting import Part, Share, SubsampledGaussian, Unit
from common.cohort import FEWEST_CLASSES, problem_with_modalities
from common.errors import ConfigError, Refusal, RefusalCode, SpecError
from common.spec import (
    CodeString,
    Count,
    DpSgd,
    Fraction,
    OpenFraction,
    Positive,
    RunSpec,
    Section,
    explain_detail,
)

_ROUNDING = 1 + 1e-9  # one sum taken in two orders
_SET_ASIDE = 1 + 2e-9  # what was granted whole is not refused in the middle by another rounding
GREATEST_SYNTHETIC = 4
"""Synthetic images to each patient of a batch: they take time, and no other limit counts them."""
Names = tuple[str, ...] | Literal["any"]


class Period(Section):
    """At most `epsilon` in any `days` days: it paces the budget, and gives nothing back."""

    days: Annotated[int, Field(ge=1, le=3660)]
    epsilon: Positive


class Budget(Section):
    """What the site may spend over its life: (epsilon, delta), counted by a Renyi filter.

    The filter adds up Renyi divergences at one fixed order, which stays valid when a coordinator
    chooses each run by the results of the last (docs/privacy.md 9). `order` is best left out: it is
    then the one at which this budget goes farthest.
    """

    epsilon: Positive
    delta: OpenFraction
    order: Annotated[float, Field(ge=2, le=256)] | None = None
    period: Period | None = None

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        for name, epsilon in (("epsilon", self.epsilon), *self._paced()):
            if accounting.divergence_within(epsilon, self.delta, self.at_order) <= 0:
                raise ValueError(
                    f"{name} = {epsilon} at delta = {self.delta} and order {self.at_order:g} "
                    "leaves room for no run at all; take a greater epsilon, or a higher order"
                )
        return self

    def _paced(self) -> tuple[tuple[str, float], ...]:
        return () if self.period is None else (("period.epsilon", self.period.epsilon),)

    @property
    def at_order(self) -> float:
        """The order of the filter."""
        return self.order or accounting.filter_order(self.epsilon, self.delta)

    @property
    def limit(self) -> Limit:
        """As the ledger books it."""
        return Limit(self.epsilon, self.delta, self.at_order)

    def epsilon_of(self, divergence: float) -> float:
        """The epsilon of a total divergence, as this budget counts."""
        return accounting.epsilon_of(divergence, self.delta, self.at_order)


class Limits(Section):
    """What a run may be.

    Attributes:
        operators: who may launch runs here, as ``operator`` in a run's file; nobody if left out.
        tasks, models: what may be trained; ``"any"`` for all; no network if left out.
        greatest_parameters: of a network.
        least_noise_multiplier: sigma of a run under privacy.
        greatest_sampling_rate: q = expected batch / declared size.
        greatest_steps_a_round: local steps.
        greatest_rounds: of one run.
        greatest_rounds_a_day: attempts in any 24 hours, of all runs.
        greatest_open_runs: set aside at the same time.
        greatest_new_runs_a_day: set aside for the first time in any 24 hours; nobody fills the
            ledger by asking.
        least_patients: in the cohort; a person settles it when the cohort is admitted.
        lapse_days: a run that nobody asks for any more is no longer set aside after so long.
        federated_evaluation: whether noised counts of held-out patients may be released, booked
            like a round of training.
        withdrawn: SHA-256 of models that were found to be bad after they were signed: no
            command takes one with this node, and no run begins at one here.
        hours: when rounds are trained, such as ``["20:00-06:00"]`` in the machine's own time;
            always if left out.
    """

    operators: Names = ()
    tasks: Names = ("classification",)
    models: Names = ()
    greatest_parameters: Count = 30_000_000
    least_noise_multiplier: Positive = 0.5
    greatest_sampling_rate: Fraction = 0.25
    greatest_steps_a_round: Count = 200
    greatest_rounds: Count = 1000
    greatest_rounds_a_day: Count = 200
    greatest_open_runs: Count = 3
    greatest_new_runs_a_day: Count = 10
    least_patients: Count = 50
    lapse_days: Annotated[int, Field(ge=1, le=3660)] = 30
    federated_evaluation: bool = False
    withdrawn: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    hours: tuple[str, ...] = ()

    @field_validator("hours")
    @classmethod
    def _hours_are_windows(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for window in windows:
            _window(window)
        return windows

    def open_at(self, now: time) -> bool:
        """Whether `now`, in the machine's own time, lies within the hours."""
        return not self.hours or any(_within(now, *_window(window)) for window in self.hours)


class Data(Section):
    """What the cohort is made for, in public terms; a run that asks for other data is refused.

    `preprocessing` is the digest of what intake did; ``cloister node init --cohort`` fills it in.
    `modalities` are those that its run's file named at the intake; a run that asks for modalities
    asks for one of these at least.
    `synthetic` is a cohort of ``cloister generate``, relative to the file, that a run may mix in;
    `synthetic_without_privacy` takes one whose generator had no differential privacy.
    """

    unit: Unit
    kind: Literal["binary", "multiclass", "multilabel", "mask", "boxes", "none"]
    classes: tuple[str, ...]
    shape: Annotated[tuple[Count, ...], Field(min_length=3, max_length=4)]
    preprocessing: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    modalities: tuple[CodeString, ...] = ()
    synthetic: PathText | None = None
    synthetic_without_privacy: bool = False

    @field_validator("classes")
    @classmethod
    def _enough_classes(cls, classes: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        fewest = FEWEST_CLASSES.get(info.data.get("kind", ""), 0)
        if len(classes) < fewest:
            raise ValueError(f"{len(classes)} classes, expected at least {fewest}")
        return classes


class Releases(Section):
    """How replies leave. `pace` is the part of a round's deadline after which each one does.

    A reply is held to that slot, or to the next whole one if training took longer, so that how
    long it took says nothing. 0: replies leave at once, and the run's report says so. A run whose
    deadline makes the slot shorter than `least_slot` seconds is refused: many short slots would
    tell the time after all. So is one beyond `greatest_slot`: meanwhile the node does nothing else.
    """

    pace: Fraction = 0.5
    least_slot: Positive = 30.0
    greatest_slot: Positive = 86_400.0

    @model_validator(mode="after")
    def _slots_can_be(self) -> Self:
        if self.least_slot > self.greatest_slot:
            raise ValueError(
                f"least_slot = {self.least_slot:g} is above greatest_slot = "
                f"{self.greatest_slot:g}; no run would be taken"
            )
        return self

    def slot(self, spec: RunSpec) -> float:
        """Seconds; 0 where replies leave at once."""
        return self.pace * spec.federation.deadline_seconds


class Machine(Section):
    """What training may take: the device, and memory in MiB for the images of one batch.

    `gradient_memory` holds what the network makes of each image, and each patient's gradient.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")] = "auto"
    gradient_memory: Annotated[int, Field(ge=16, le=1_000_000)] = 512


class LedgerFiles(Section):
    """`witness`: file to which how far the ledger went is added; best on another machine."""

    witness: PathText = "ledger.witness"


class Policy(Section):
    """What this node does and does not do; the content of ``node.toml``.

    Attributes:
        site: the public name of the site.
        declared_size: the public, rounded number of units that the hospital declares; a person
            types it and nothing derives it from the data.
        cohort: directory of the training cohort, relative to the file.
        least_unit: ``patient``, or ``image`` where runs that protect images alone are taken.
        approval: ``ask``: each new run waits for a person; ``automatic``: within the limits.
        allow_no_privacy: whether runs without differential privacy are taken at all.
        budget: for life; None only where no real patient stands behind the cohort.
        data: None only there as well.
        intake: how images are taken in; no run is judged by it.
        listen: what may be sent here over the network; None: nothing listens.
    """

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
    declared_size: Count
    cohort: PathText
    least_unit: Unit = "patient"
    approval: Literal["ask", "automatic"] = "ask"
    allow_no_privacy: bool = False
    budget: Budget | None
    limits: Limits = Limits()
    data: Data | None
    release: Releases = Releases()
    machine: Machine = Machine()
    ledger: LedgerFiles = LedgerFiles()
    intake: IntakeSettings = IntakeSettings()
    listen: Listen | None = None

    @model_validator(mode="after")
    def _delta_is_meaningful(self) -> Self:
        if self.budget is not None and self.budget.delta >= 1 / self.declared_size:
            raise ValueError(
                f"budget.delta = {self.budget.delta}: expected below 1 / declared_size = "
                f"{1 / self.declared_size:.3g}; otherwise giving away one patient whole would fit"
            )
        return self

    def judge(self, spec: RunSpec, parameters: int) -> tuple[Share, ...]:
        """What the run would do at this site, if the limits allow it.

        Args:
            spec: the run.
            parameters: how many its network has.

        Raises:
            Refusal: ``policy``, naming every limit that the run is beyond; ``spec`` if the run
                makes no sense at the declared size.
        """
        try:
            self._check(spec, parameters, ())  # noise for a target is sought within limits alone
            shares = accounting.shares(spec, self.declared_size)
            self._check(spec, parameters, shares)
        except SpecError as error:
            raise Refusal(RefusalCode.SPEC, str(error)) from error
        return shares

    def _check(self, spec: RunSpec, parameters: int, shares: tuple[Share, ...]) -> None:
        objections = list(self.objections(spec, parameters, shares))
        if objections:
            raise Refusal(RefusalCode.POLICY, "; ".join(objections))

    def objections(
        self, spec: RunSpec, parameters: int, shares: tuple[Share, ...]
    ) -> Iterator[str]:
        """Every limit that a run is beyond, in words; noise for a target is seen in `shares`."""
        limits, rate = self.limits, accounting.sampling_rate(spec, self.declared_size)
        yield from self._objections_to_privacy(spec, shares)
        yield from self._objections_to_data(spec)
        for what, name, allowed in (
            ("operator", spec.operator, limits.operators),
            ("task", spec.task.name, limits.tasks),
            ("network", spec.model.name, limits.models),
        ):
            if allowed != "any" and name not in allowed:
                known = ", ".join(allowed) or "none"
                yield f"{what} {name!r} is not on this site's list ({known})"
        if spec.start is not None and spec.start.model_sha256 in limits.withdrawn:
            yield f"it begins at the model {spec.start.model_sha256}, which is withdrawn here"
        slot = self.release.slot(spec)
        if 0 < slot < self.release.least_slot:
            yield f"a reply's slot: {slot:g} s, at least {self.release.least_slot:g} s"
        if slot > self.release.greatest_slot:
            yield f"a reply's slot: {slot:g} s, at most {self.release.greatest_slot:g} s"
        for what, seen, most in (
            ("parameters", parameters, limits.greatest_parameters),
            ("sampling rate", rate, limits.greatest_sampling_rate),
            ("steps a round", spec.local.steps, limits.greatest_steps_a_round),
            ("rounds", spec.rounds, limits.greatest_rounds),
            (
                "synthetic images to a patient",
                spec.augmentation.synthetic / spec.local.batch_size,
                GREATEST_SYNTHETIC,
            ),
        ):
            if seen > most:
                yield f"{what}: {_figure(seen)}, at most {most:g}"

    def _objections_to_privacy(self, spec: RunSpec, shares: tuple[Share, ...]) -> Iterator[str]:
        if not isinstance(spec.privacy, DpSgd) and not self.allow_no_privacy:
            yield f"run {spec.name!r} asks for no privacy; allow_no_privacy is false"
        if spec.privacy.unit == "image" and self.least_unit == "patient":
            yield "it protects images alone, the unit is to be at least the patient"
        if spec.evaluation.federated and not self.limits.federated_evaluation:
            yield "it asks for a federated evaluation; federated_evaluation is false"
        least = self.limits.least_noise_multiplier
        for part, noise in _noises(spec, shares):
            if noise < least:
                yield f"noise multiplier of {part}: {noise:g}, at least {least:g}"

    def objections_to_memory(self, needed: Mapping[str, int]) -> Iterator[str]:
        """Why a run would not fit into this machine's memory, in words; nothing if it does.

        Args:
            needed: the bytes of the least that goes through at once, by the part of the run
                (`client.counting.memory_of`).
        """
        most = self.machine.gradient_memory
        for part, size in needed.items():
            if size > most * 2**20:
                yield (
                    f"memory for one patient in {part}: {math.ceil(size / 2**20)} MiB, at "
                    f"most {most} (machine.gradient_memory)"
                )

    def _objections_to_data(self, spec: RunSpec) -> Iterator[str]:
        if self.data is None:
            return
        if problem := spec.task.problem_with(self.data.kind, self.data.classes):
            yield f"this site's data: {problem}"
        if problem := problem_with_modalities(self.data.modalities, spec.input):
            yield f"this site's data: {problem}"
        if spec.augmentation.synthetic and self.data.synthetic is None:
            yield "it mixes in synthetic images; [data] names no synthetic cohort"
        for what, asked, ours in (
            ("image's shape", spec.input.shape, self.data.shape),
            ("preprocessing", spec.input.preprocessing_digest, self.data.preprocessing),
            ("unit", spec.privacy.unit, self.data.unit),
        ):
            if asked != ours:
                yield f"{what}: {asked}, this site's data are {ours}"

    def check_earmark(self, book: Book, run: str, shares: tuple[Share, ...]) -> None:
        """Whether a whole run fits on top of what is spent and set aside.

        Raises:
            Refusal: ``budget``; ``later`` if as many runs are open as may be.
        """
        others = [digest for digest in book.open_runs() if digest != run]
        if len(others) >= self.limits.greatest_open_runs:
            raise Refusal(
                RefusalCode.LATER,
                f"{len(others)} runs are open, at most {self.limits.greatest_open_runs}; close "
                "one that is over with `cloister node close`",
            )
        known, order = book.run(run), self._order
        more = 0.0
        for share in shares:
            attempted = known.attempted.get(share.part, 0)
            more += _cost(share.mechanism, max(0, share.rounds - attempted), order)
            old = known.shares.get(share.part)
            if old is not None:  # what was set aside for it before
                more -= _cost(old.mechanism, known.remaining(share.part), order)
        self._check_total(book, more)

    def check_booked(self, book: Book) -> None:
        """Whether this file's budget is the one that a person has booked.

        Raises:
            Refusal: ``policy``.
        """
        written = self.budget and self.budget.limit
        if written != book.limit:
            raise Refusal(
                RefusalCode.POLICY,
                f"node.toml was read with the budget {written}, booked is {book.limit}; start the "
                "node again, or have a person book the new one with `cloister node set-budget`",
            )

    def check_new_run(self, book: Book, now: datetime, run: str) -> None:
        """Whether one more run may be set aside without a person.

        Raises:
            Refusal: ``later``.
        """
        since = stamp(now - timedelta(days=1))
        new = [known for known in book.runs.values() if known.begun >= since]
        if not book.run(run).begun and len(new) >= self.limits.greatest_new_runs_a_day:
            raise Refusal(RefusalCode.LATER, f"{len(new)} new runs in the last 24 hours")

    def check_attempt(
        self, book: Book, now: datetime, run: str, part: Part, round_number: int
    ) -> None:
        """Whether one more attempt is allowed now.

        Raises:
            Refusal: ``later`` (hours, rounds a day, the budget's pace), ``budget``, or
                ``approval`` if the run's mechanism is not the one that was set aside.
        """
        if not self.limits.open_at(now.astimezone().time()):
            raise Refusal(RefusalCode.LATER, f"outside of the hours {self.limits.hours}")
        today = book.since(stamp(now - timedelta(days=1)))
        if len(today) >= self.limits.greatest_rounds_a_day:
            raise Refusal(RefusalCode.LATER, f"{len(today)} rounds in the last 24 hours")
        known = book.run(run)
        share = known.shares.get(part)
        if share is None:
            return
        again = (part, round_number) in known.attempts
        beside = again or not known.remaining(part)  # of what is set aside
        extra = _cost(share.mechanism, 1, self._order) if beside else 0.0
        self._check_total(book, extra, rounding=_ROUNDING if again else _SET_ASIDE)
        self._check_pace(book, now, share.mechanism)

    def lapsed(self, book: Book, now: datetime) -> list[str]:
        """Digests of the open runs of which nothing was heard for `lapse_days`."""
        since = stamp(now - timedelta(days=self.limits.lapse_days))
        return [digest for digest in book.open_runs() if book.run(digest).last < since]

    @property
    def _order(self) -> float:
        return self.budget.at_order if self.budget else 2.0

    def _check_total(self, book: Book, more: float, rounding: float = _ROUNDING) -> None:
        if self.budget is None:
            return
        total = self.budget.epsilon_of(book.divergence(self._order) + more)
        if total > self.budget.epsilon * rounding:
            raise Refusal(
                RefusalCode.BUDGET,
                f"epsilon would reach {total:.3f} of {self.budget.epsilon:g} for life "
                f"(delta {self.budget.delta:g})",
            )

    def _check_pace(self, book: Book, now: datetime, mechanism: SubsampledGaussian) -> None:
        if self.budget is None or self.budget.period is None:
            return
        period = self.budget.period
        recent = [c.mechanism for c in book.since(stamp(now - timedelta(days=period.days)))]
        spent = sum(accounting.divergence(m, self._order) for m in recent if m)
        total = self.budget.epsilon_of(spent + _cost(mechanism, 1, self._order))
        if total > period.epsilon * _ROUNDING:
            raise Refusal(
                RefusalCode.LATER,
                f"epsilon would reach {total:.3f} of {period.epsilon:g} in {period.days} days",
            )


def read_policy(path: Path) -> Policy:
    """Read ``node.toml``.

    Raises:
        ConfigError: naming file, key, value and what was expected.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        return Policy.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        lines = (f"{path}: {explain_detail(detail)}" for detail in error.errors())
        raise ConfigError("\n".join(lines)) from None
    except (OSError, ValueError) as error:  # not there, not text, not TOML
        raise ConfigError(f"{path}: {error}; expected the node's TOML file") from error


def _cost(mechanism: SubsampledGaussian, rounds: int, order: float) -> float:
    return rounds * accounting.divergence(mechanism, order)


def _noises(spec: RunSpec, shares: tuple[Share, ...]) -> Iterator[tuple[Part, float]]:
    """The noise of each part of a run: as it was found for a site, or else as it is written."""
    if shares:
        yield from ((share.part, share.mechanism.noise_multiplier) for share in shares)
        return
    if isinstance(spec.privacy, DpSgd) and spec.privacy.noise_multiplier is not None:
        yield "training", spec.privacy.noise_multiplier
    if spec.evaluation.federated is not None:
        yield "evaluation", spec.evaluation.federated.noise_multiplier


def _figure(number: float) -> str:
    try:
        return f"{number:g}"
    except OverflowError:  # a coordinator may write any whole number
        return "beyond 1e308"


def _window(text: str) -> tuple[time, time]:
    found = re.fullmatch(r"(\d\d:\d\d)-(\d\d:\d\d)", text)
    try:
        if found and found[1] != found[2]:
            return time.fromisoformat(found[1]), time.fromisoformat(found[2])
    except ValueError:
        pass
    raise ValueError(f"{text!r}: expected a window of hours such as 20:00-06:00")


def _within(now: time, start: time, end: time) -> bool:
    return start <= now < end if start <= end else now >= start or now < end
