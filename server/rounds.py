"""One run: invite, collect, aggregate, evaluate, checkpoint; round after round, resumable.

This is our own loop on Flower's public `Grid`, and the same in the simulation and in the field.
What it promises:

- **Waiting is bounded.** A round closes when every invited site has answered, or at the deadline
  with at least the quorum of updates. Without the quorum the run stops with a `RunError`; its
  last round is on disk and it can be resumed.
- **Nobody is dropped in silence.** Each round's record names every site with what became of it:
  ``ok``, ``late``, ``failed``, ``refused`` (the node said no) or ``rejected`` (the update is not
  one). Every site that took part is asked again in the next round.
- **One model in memory.** Updates are folded in as they come (robust rules excepted).
- **Killed at any point**, a run goes on after its last finished round with the same weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import nn

from common import accounting, models
from common.accounting import SubsampledGaussian
from common.clock import Clock
from common.errors import MessageError, PeerError, RunError, SpecError, UpdateError
from common.messages import (
    INVITE,
    LARGEST_WEIGHT,
    TRAIN,
    Arrays,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from server.aggregation import GlobalModel, aggregator_for, check_update
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.evaluation import CentralEvaluator, EarlyStopping
from server.journal import RunJournal

log = logging.getLogger("cloister.rounds")

_LONGEST_SLEEP, _SLEEP_SHARE = 0.25, 0.01


class Observer(Protocol):
    """Watches a run; a terminal's live table, a log."""

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """The sites that said yes, and how many rounds an earlier process finished."""

    def round_opened(self, number: int) -> None:
        """Tasks are about to be sent."""

    def site_answered(self, number: int, site: str, status: str) -> None:
        """One site's part of the round is over."""

    def round_closed(self, row: Mapping[str, Any]) -> None:
        """The round is aggregated, evaluated and on disk; `row` is its line of the record."""


class LogObserver:
    """Writes one line a round to the log."""

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """See `Observer`."""
        log.info("run %s: %d sites, from round %d", spec.name, len(sites), finished_rounds + 1)

    def round_opened(self, number: int) -> None:
        """See `Observer`."""

    def site_answered(self, number: int, site: str, status: str) -> None:
        """See `Observer`."""
        if status != "ok":
            log.warning("round %d: %s is %s", number, site, status)

    def round_closed(self, row: Mapping[str, Any]) -> None:
        """See `Observer`."""
        log.info("round %d closed after %.2f s", row["round"], row["seconds"])


@dataclass(frozen=True)
class Conduct:
    """How a run is conducted.

    Attributes:
        engine: what carries the messages: ``field``, ``local`` or ``ray``; for the record.
        seeded: whether the sites' randomness comes from a seed; the report then says that the
            run is accounted, not protected.
        observer: who watches.
        clock: time.
    """

    engine: str = "field"
    seeded: bool = False
    observer: Observer = field(default_factory=LogObserver)
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True)
class Site:
    """A site that said yes: what it declared, and what a round costs there."""

    node_id: int
    card: NodeCard
    mechanism: SubsampledGaussian | None


@dataclass
class Round:
    """A round in the making: what came of each site, and the sum so far."""

    number: int
    sites: dict[str, dict[str, str]] = field(default_factory=dict)
    updates: int = 0


@dataclass
class RunState:
    """Where a run stands between two rounds: what a checkpoint holds."""

    model: GlobalModel
    best: Arrays
    stopping: EarlyStopping
    history: list[dict[str, Any]]


class FederatedRun:
    """One run of `spec`, kept in `folder`.

    Args:
        spec: the run, with its own `run_id`.
        folder: where checkpoint, record and results lie; a run found there is resumed.
        evaluator: the central evaluation.
        conduct: engine, observer, clock.

    Raises:
        RunError: if `folder` holds another run, or one whose checkpoint is damaged or gone.
    """

    def __init__(
        self,
        spec: RunSpec,
        folder: Path,
        *,
        evaluator: CentralEvaluator,
        conduct: Conduct,
    ) -> None:
        self._spec, self._folder = spec, folder
        self._evaluator = evaluator
        self._observer, self._clock = conduct.observer, conduct.clock
        self._network = models.build(spec)
        start = {name: p.detach().numpy().copy() for name, p in self._network.named_parameters()}
        found = load_checkpoint(folder / "checkpoint", spec.digest)
        if found is None:
            _check_new(folder)
        try:
            self._state = _restored(spec, start, found)
            self._journal = RunJournal(
                folder, spec, self._state.history, engine=conduct.engine, seeded=conduct.seeded
            )
            if found is not None:
                self._journal.restore_sites(found.notes["sites"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{folder / 'checkpoint'}: damaged checkpoint ({error!r}); start a new run"
            ) from error

    def run(self, grid: Grid) -> None:
        """Conduct the run to its end, from the round after the last finished one.

        Raises:
            RunError: if fewer sites than the quorum say yes, or answer a round before its
                deadline.
        """
        if not self._finished:
            sites = self._invite(grid)
            self._observer.run_opened(self._spec, sorted(sites), len(self._state.history))
            for number in range(len(self._state.history) + 1, self._spec.rounds + 1):
                self._round(grid, number, sites)
                if self._finished:
                    break
        self._conclude()

    @property
    def _finished(self) -> bool:
        return len(self._state.history) >= self._spec.rounds or self._state.stopping.stop

    def _invite(self, grid: Grid) -> dict[str, Site]:
        """The sites that said yes, by name; at least the quorum."""
        deadline = self._clock.now() + self._spec.federation.deadline_seconds
        nodes = self._wait_for_nodes(grid, deadline)
        request = Invitation(self._spec).to_records()
        sites: dict[str, Site] = {}
        for node_id, reply in self._ask(grid, INVITE, nodes, request, deadline):
            try:
                site = self._accepted(node_id, reply)
                if site.card.site in sites:
                    raise MessageError(f"a second node calls itself {site.card.site!r}")
                sites[site.card.site] = site
            except (PeerError, SpecError) as error:
                self._decline(node_id, error)
        joined = {site.node_id for site in sites.values()}
        for node_id in set(nodes) - joined - set(map(int, self._journal.declined)):
            self._decline(node_id, "no answer to the invitation before the deadline")
        if len(sites) < self._spec.federation.quorum:
            raise RunError(
                f"{len(sites)} of {len(nodes)} nodes take part, the quorum is "
                f"{self._spec.federation.quorum}; "
                f"{'; '.join(sorted(set(self._journal.declined.values()))) or 'none is connected'}"
            )
        for name, site in sites.items():
            self._journal.sites[name] = site.card.declared_size, site.mechanism
        return sites

    def _decline(self, node_id: int, reason: object) -> None:
        log.warning("node %d does not take part: %s", node_id, reason)
        self._journal.declined[str(node_id)] = str(reason)

    def _accepted(self, node_id: int, reply: RecordDict | None) -> Site:
        if reply is None:
            raise MessageError("no answer to the invitation")
        card = read_reply(reply)
        if isinstance(card, RefusalReply):
            raise MessageError(f"it refused: {card.code.value} {card.incident}".rstrip())
        if not isinstance(card, NodeCard) or card.digest != self._spec.digest:
            raise MessageError("the answer to the invitation is no card for this run")
        return Site(node_id, card, accounting.planned(self._spec, card.declared_size))

    def _wait_for_nodes(self, grid: Grid, deadline: float) -> list[int]:
        """All connected nodes, once there are as many as the quorum."""
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= self._spec.federation.quorum or self._clock.now() >= deadline:
                return nodes
            self._clock.sleep(_LONGEST_SLEEP)

    def _round(self, grid: Grid, number: int, sites: Mapping[str, Site]) -> None:
        opened = self._clock.now()
        self._observer.round_opened(number)
        made = Round(number)
        update = self._collect(grid, made, sites)
        self._state.model.apply(update, number)
        self._check_model(number)
        waited = self._clock.now() - opened
        row: dict[str, Any] = {
            "round": number,
            "learning_rate": self._spec.learning_rate(number, 0),
            "sites": {name: made.sites[name] for name in sorted(made.sites)},
            "update_norm": check_update(update, update, None),
            "evaluation": self._evaluate(number),
            "waited_seconds": waited,
        }
        row["seconds"] = self._clock.now() - opened
        self._state.history.append(row)
        save_checkpoint(self._folder / "checkpoint", self._checkpoint())
        self._journal.append(row)
        self._observer.round_closed(row)

    def _check_model(self, number: int) -> None:
        """Stop before a model is kept that no site would take, and no resumed run could leave."""
        weights = self._state.model.weights.items()
        odd = [name for name, array in weights if not np.all(np.abs(array) <= LARGEST_WEIGHT)]
        if odd:
            raise RunError(
                f"round {number}: the global model is not finite any more, or beyond "
                f"{LARGEST_WEIGHT:g} ({odd[0]}); the last finished round is kept. Start a new run "
                "with a smaller learning_rate or server_learning_rate, or with "
                "aggregation.max_update_norm against a site that sends too much"
            )

    def _collect(self, grid: Grid, made: Round, sites: Mapping[str, Site]) -> Arrays:
        """The aggregate of one round; every site's outcome is in `made`."""
        aggregator = aggregator_for(self._spec)
        by_node = {site.node_id: site for site in sites.values()}
        request = TrainTask(self._spec, made.number, self._state.model.weights).to_records()
        deadline = self._clock.now() + self._spec.federation.deadline_seconds
        self._journal.ask(made.number, sites)
        for node_id, reply in self._ask(grid, TRAIN, list(by_node), request, deadline):
            site = by_node[node_id]
            status, reason = self._fold(aggregator, site, made, reply)
            made.sites[site.card.site] = {"status": status, "reason": reason}
            self._observer.site_answered(made.number, site.card.site, status)
        for name in sites.keys() - made.sites.keys():
            made.sites[name] = {"status": "late", "reason": "no answer before the deadline"}
            self._observer.site_answered(made.number, name, "late")
        if made.updates < self._spec.federation.quorum:
            told = "; ".join(
                f"{name}: {seen['status']} {seen['reason']}".rstrip()
                for name, seen in sorted(made.sites.items())
            )
            raise RunError(
                f"round {made.number}: {made.updates} updates, the quorum is "
                f"{self._spec.federation.quorum} ({told}); the last finished round is kept, "
                "resume the run when the cause is mended"
            )
        return aggregator.result()

    def _fold(
        self, aggregator: Any, site: Site, made: Round, reply: RecordDict | None
    ) -> tuple[str, str]:
        """Fold one reply in; its status and, unless it is ``ok``, the reason."""
        if reply is None:
            return "failed", "the node answered with an error, or not at all"
        try:
            answer = read_reply(reply)
            if isinstance(answer, RefusalReply):
                return "refused", f"{answer.code.value} {answer.incident}".rstrip()
            update = self._checked(answer, site, made.number)
        except PeerError as error:
            return "rejected", str(error)
        uniform = self._spec.aggregation.weighting == "uniform"
        aggregator.fold(site.card.site, update, 1.0 if uniform else site.card.declared_size)
        made.updates += 1
        return "ok", ""

    def _checked(self, answer: Reply, site: Site, number: int) -> Arrays:
        if not isinstance(answer, Release) or answer.digest != self._spec.digest:
            raise UpdateError("not a release of this run")
        if answer.round_number != number:
            raise UpdateError(f"a release of round {answer.round_number}, expected {number}")
        if answer.mechanism != (site.mechanism and site.mechanism.of_steps(self._spec.local.steps)):
            raise UpdateError(f"mechanism {answer.mechanism} is not the one that was planned")
        check_update(
            answer.update, self._state.model.weights, self._spec.aggregation.max_update_norm
        )
        return answer.update

    def _ask(
        self, grid: Grid, kind: str, nodes: list[int], request: RecordDict, deadline: float
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Send `request` to `nodes` and yield each answer as it comes, until the deadline.

        A node whose message could not be sent, or that answers with an error, yields None. One
        reply is held at a time, as far as the Grid's own `pull_messages` goes.
        """
        started = self._clock.now()
        lifetime = max(1.0, deadline - started)
        messages = [
            grid.create_message(request, kind, node, group_id="", ttl=lifetime) for node in nodes
        ]
        identities = list(grid.push_messages(messages)) or [""] * len(nodes)
        sent = list(zip(identities, nodes, strict=True))
        yield from ((node, None) for identity, node in sent if not identity)
        waiting = {identity: node for identity, node in sent if identity}
        while waiting and self._clock.now() < deadline:
            before = len(waiting)
            for reply in grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, _content(reply)
            if len(waiting) == before:
                passed = self._clock.now() - started
                self._clock.sleep(min(_LONGEST_SLEEP, max(0.001, _SLEEP_SHARE * passed)))

    def _evaluate(self, number: int) -> dict[str, Any] | None:
        """Evaluate after this round if the spec says so, and keep the best model."""
        if number % self._spec.evaluation.every and number != self._spec.rounds:
            return None
        result = self._evaluator.evaluate(self._loaded(self._state.model.evaluated))
        self._state.stopping = self._state.stopping.after(number, result)
        if self._state.stopping.best_round == number:
            self._state.best = dict(self._state.model.evaluated)
        return result.to_json()

    def _conclude(self) -> None:
        """Write the final model and what it reaches: the best by validation, else the last."""
        arrays = (
            self._state.best
            if self._state.stopping.best_round is not None
            else self._state.model.evaluated
        )
        result = self._evaluator.evaluate(self._loaded(arrays))
        self._journal.conclude(arrays, result, self._state.stopping)

    def _loaded(self, arrays: Arrays) -> nn.Module:
        with torch.no_grad():
            for name, parameter in self._network.named_parameters():
                parameter.copy_(torch.from_numpy(np.asarray(arrays[name], order="C")))
        return self._network

    def _checkpoint(self) -> Checkpoint:
        groups = {
            "weights": self._state.model.weights,
            "best": self._state.best,
            **self._state.model.state,
        }
        return Checkpoint(
            spec_digest=self._spec.digest,
            round_number=len(self._state.history),
            groups=groups,
            history=tuple(self._state.history),
            notes={
                "stopping": self._state.stopping.to_json(),
                "sites": self._journal.sites_to_json(),
            },
        )


def _check_new(folder: Path) -> None:
    """Rounds without a checkpoint cannot be gone on from, and are not to be written over."""
    record = folder / "metrics.jsonl"
    if record.exists() and record.stat().st_size:
        raise RunError(
            f"{record}: holds rounds, but {folder / 'checkpoint'} holds no checkpoint; put it "
            "back, or start a new run"
        )


def _restored(spec: RunSpec, start: Arrays, found: Checkpoint | None) -> RunState:
    """The state that `found` holds, or the start of a run with the weights `start`."""
    if found is None:
        return RunState(GlobalModel(spec, start), start, EarlyStopping.of(spec), [])
    groups = dict(found.groups)
    weights, best = groups.pop("weights"), groups.pop("best")
    return RunState(
        model=GlobalModel(spec, weights, groups),
        best=best,
        stopping=EarlyStopping.from_json(found.notes["stopping"]),
        history=[dict(row) for row in found.history],
    )


def _content(reply: Message) -> RecordDict | None:
    return reply.content if reply.has_content() else None
