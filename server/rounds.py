"""One run: invite, collect, aggregate, evaluate, checkpoint; round after round, resumable.

This is our own loop on Flower's public `Grid`, and the same in the simulation and in the field.
What it promises:

- **Waiting is bounded.** A round closes when every invited site has answered, or at the deadline
  with at least the quorum of updates. Without the quorum the run stops with a `RunError`; its
  last round is on disk and it can be resumed. A site where a person has yet to say yes is asked
  again until the deadline of the invitation, and the others wait for it.
- **Nobody is dropped in silence.** Each round's record names every site with what became of it:
  ``ok``, ``late``, ``failed``, ``refused`` (the node said no) or ``rejected`` (the update is not
  one). Every site that took part is asked again in the next round.
- **One model in memory.** Updates are folded in as they come (robust rules excepted).
- **Killed at any point**, a run goes on after its last finished round with the same weights.
- **A ledger that was put back is noticed**, here or at its own node (`server.witness`).
- **What ended is said.** After the result is on disk and nothing is left to ask, the sites are
  told that the run is over, so that nothing stays set aside for it there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn

from common import accounting, models
from common.accounting import SubsampledGaussian
from common.clock import Clock
from common.errors import (
    LedgerError,
    MessageError,
    PeerError,
    RefusalCode,
    RunError,
    SpecError,
    UpdateError,
)
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    LARGEST_WEIGHT,
    TRAIN,
    Arrays,
    Closed,
    Closing,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    TrainTask,
    read_reply,
)
from common.spec import DpSgd, RunSpec
from server.aggregation import GlobalModel, aggregator_for, check_still, check_update
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.evaluation import CentralEvaluator, EarlyStopping
from server.federated import result_of, table_of
from server.journal import RunJournal, SiteEntry
from server.members import Anybody, Members
from server.post import Post, names_of
from server.start import starting_weights
from server.witness import WITNESS_FILE, WitnessBook

log = logging.getLogger("cloister.rounds")

_LONGEST_SLEEP = 0.25
_ASK_AGAIN, _ASK_AGAIN_SHARE = 15.0, 0.1  # seconds, and of the deadline
_PATIENCE = 60.0  # with a node that is asked again: it may have been restarted meanwhile
_CLOSING_SECONDS = 10.0
_GATHERING_SECONDS = 20.0  # for sites that are expected, when there is a quorum without them
_WELCOME_SECONDS, _WELCOME_AGAIN = 10.0, 300.0

_WAY_OUT = {
    RefusalCode.APPROVAL: (
        "nobody at the site has approved the run before the deadline: have it approved there "
        "with `cloister node approve {digest}`, then resume the run"
    ),
    RefusalCode.LATER: (
        "the site said `later` until the deadline (as many runs are open there as may be, or it "
        "is not its time): resume the run later, or have a run that is over closed there"
    ),
}
"""What to do where a node has said neither yes nor no, by its code: it is asked again."""


class Observer(Protocol):
    """Watches a run; a terminal's live table, a log."""

    def run_opened(self, spec: RunSpec, sites: list[str], finished_rounds: int) -> None:
        """The sites that said yes, and how many rounds an earlier process finished."""

    def sites_wait(self, waiting: Mapping[str, str]) -> None:
        """Before the run opens: who has yet to say yes or no -> ``approval`` or ``later``.

        Told whenever it changes; nobody at the end.
        """

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

    def sites_wait(self, waiting: Mapping[str, str]) -> None:
        """See `Observer`."""
        for name, code in sorted(waiting.items()):
            log.info("the run waits for %s: %s", name, code)

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
        witnesses: the file of the sites' witnesses, where several runs share one; None: one in
            the run's folder.
        members: who is enrolled.
    """

    engine: str = "field"
    seeded: bool = False
    observer: Observer = field(default_factory=LogObserver)
    clock: Clock = field(default_factory=Clock)
    witnesses: Path | None = None
    members: Members = field(default_factory=Anybody)


@dataclass(frozen=True)
class Site:
    """A site that said yes: what it declared, and what a round costs there."""

    node_id: int
    card: NodeCard
    mechanism: SubsampledGaussian | None


@dataclass
class Guests:
    """An invitation in the making.

    Attributes:
        kept: the sites' witnesses when they were asked.
        sites: who said yes, by name.
        waiting: nodes that said neither yes nor no, and the code that they gave for it.
        due: when those are to be asked again that have answered.
        names: how people call a node.
    """

    kept: Mapping[str, str]
    names: Callable[[int], str] = str
    sites: dict[str, Site] = field(default_factory=dict)
    waiting: dict[int, RefusalCode] = field(default_factory=dict)
    due: dict[int, float] = field(default_factory=dict)


@dataclass
class Round:
    """A round in the making: what came of each site, and the sum so far.

    `witnesses` are those that the sites' tasks carry.
    """

    number: int
    witnesses: Mapping[str, str] = field(default_factory=dict)
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
        self._members = conduct.members
        self._witnesses = WitnessBook(conduct.witnesses or folder / WITNESS_FILE)
        self._nodes: set[int] = set()
        self._faced: dict[int, str] = {}
        self._turned_away: dict[int, float] = {}
        self._called: dict[int, str] = {}
        self._network = models.build(spec)
        start = starting_weights(spec, folder, self._network)
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

    def run(self, grid: Grid) -> bool:
        """Conduct the run to its end, from the round after the last finished one.

        Returns:
            Whether it is over; False if the result stands, and the sites' counts are still to be
            asked for, of which too few were there: the run can be resumed.

        Raises:
            RunError: if fewer sites than the quorum say yes, or answer a round before its
                deadline; or if the sites' witnesses cannot be read or kept.
        """
        sites: dict[str, Site] = {}
        if not self._finished:
            sites = self._invite(grid)
            self._observer.run_opened(self._spec, sorted(sites), len(self._state.history))
            for number in range(len(self._state.history) + 1, self._spec.rounds + 1):
                self._welcome(grid, sites)
                self._round(grid, number, sites)
                if self._finished:
                    break
        weights = self._conclude()
        over = self._evaluated_at_sites(grid, sites, weights)
        if over:
            self._close(grid)
        return over

    @property
    def model_bytes(self) -> int:
        """The size of the global model."""
        return sum(array.nbytes for array in self._state.model.weights.values())

    def end(self, grid: Grid) -> None:
        """End the run where it stands: its result is that of its last finished round, if any.

        The sites are told, and none of them takes part in it any more.
        """
        if self._state.history:
            self._conclude()
        self._close(grid)

    @property
    def _finished(self) -> bool:
        return len(self._state.history) >= self._spec.rounds or self._state.stopping.stop

    def _invite(self, grid: Grid) -> dict[str, Site]:
        """The sites that said yes, by name; at least the quorum."""
        deadline = self._clock.now() + self._spec.federation.deadline_seconds
        nodes = self._wait_for_nodes(grid, deadline)
        if 0 < len(nodes) < self._spec.federation.quorum:
            self._note_who_is_missing(grid)
            raise RunError(
                f"{len(nodes)} connected at the deadline of the invitation, the quorum is "
                f"{self._spec.federation.quorum}; {self._who_declined()}"
            )
        guests = Guests(self._witnesses.read())
        self._ask_guests(grid, guests, nodes, deadline)
        again = self._clock.now() + _WELCOME_AGAIN
        for node_id, code in guests.waiting.items():
            reason = _WAY_OUT[code].format(digest=self._spec.digest[:12])
            self._decline(node_id, reason, until=again)
        sites = guests.sites
        self._nodes = {site.node_id for site in sites.values()}
        for node_id in set(nodes) - self._nodes - self._turned_away.keys():
            reason = "no answer to the invitation before the deadline"
            self._decline(node_id, reason, until=again)
        self._note_who_is_missing(grid)
        if len(sites) < self._spec.federation.quorum:
            raise RunError(
                f"{len(sites)} of {len(nodes)} nodes take part, the quorum is "
                f"{self._spec.federation.quorum}; {self._who_declined() or 'none is connected'}"
            )
        self._enter(sites)
        return sites

    def _who_declined(self) -> str:
        """Each reason once; with the name where a site that is expected was not there."""
        declined = self._journal.declined.items()
        return "; ".join(
            sorted({why if who.isdigit() else f"{who}: {why}" for who, why in declined})
        )

    def _enter(self, sites: Mapping[str, Site]) -> None:
        for name, site in sites.items():
            card = site.card
            self._called[site.node_id] = name
            self._journal.enter(name, SiteEntry.of_card(card, site.mechanism))

    def _note_who_is_missing(self, grid: Grid) -> None:
        """Whoever is expected and not there is in the record."""
        here = {node.name for node in grid.get_nodes()}
        for name in sorted(self._members.names() - here):
            self._journal.declined[name] = self._members.absent(name) or "it was not there"

    def _welcome(self, grid: Grid, sites: dict[str, Site]) -> None:
        """Invite members that have come since; a site that has come back by another key goes on."""
        names, expected, now = names_of(grid), self._members.names(), self._clock.now()
        here = set(grid.get_node_ids())
        come = [
            node_id
            for node_id in sorted(here - {site.node_id for site in sites.values()})
            if names(node_id) in expected and self._turned_away.get(node_id, 0.0) <= now
        ]
        if not come:
            return
        guests = Guests(self._witnesses.read())
        wait = min(_WELCOME_SECONDS, self._spec.federation.deadline_seconds)
        self._ask_guests(grid, guests, come, now + wait)
        self._turned_away |= dict.fromkeys(guests.waiting, now + _WELCOME_AGAIN)
        for name, site in guests.sites.items():
            if name in sites and sites[name].node_id in here:
                self._decline(site.node_id, f"a second node calls itself {name!r}")
            else:
                sites[name] = site
                self._nodes.add(site.node_id)
                self._journal.declined.pop(name, None)
                self._journal.declined.pop(str(site.node_id), None)
        answered = {site.node_id for site in guests.sites.values()} | self._turned_away.keys()
        self._turned_away |= dict.fromkeys(set(come) - answered, now + _WELCOME_AGAIN)
        self._enter(guests.sites)

    def _ask_guests(
        self, grid: Grid, guests: Guests, nodes: Iterable[int], deadline: float
    ) -> None:
        """Ask all `nodes`, and those that wait for a person again and again until the deadline."""
        post, told = Post(grid, self._clock, deadline), dict(guests.waiting)
        guests.names = names_of(grid)
        request = Invitation(self._spec).to_records()
        post.send(INVITE, dict.fromkeys(nodes, request))
        while post.open or (guests.waiting and self._clock.now() < deadline):
            for node_id, reply in post.answers():
                self._hear(guests, node_id, reply)
            if guests.waiting != told:
                told = dict(guests.waiting)
                names = names_of(grid)
                self._observer.sites_wait({names(node): code for node, code in told.items()})
            now = self._clock.now()
            due = [node_id for node_id, time in guests.due.items() if time <= now]
            for node_id in due:
                del guests.due[node_id]
            post.send(INVITE, dict.fromkeys(due, request), patience=_PATIENCE)
            if post.open:
                post.rest()
            elif guests.due:
                self._clock.sleep(max(0.0, min(deadline, *guests.due.values()) - now))

    def _hear(self, guests: Guests, node_id: int, reply: RecordDict | None) -> None:
        """One node's answer to the invitation: yes, no, or to be asked again."""
        try:
            answer = None if reply is None else read_reply(reply)
            code = answer.code if isinstance(answer, RefusalReply) else None
            if answer is None:  # that a node which waits for a person is away is no answer
                code = guests.waiting.get(node_id)
            if code is not None and code in _WAY_OUT:
                share = _ASK_AGAIN_SHARE * self._spec.federation.deadline_seconds
                guests.waiting[node_id] = code
                guests.due[node_id] = self._clock.now() + min(_ASK_AGAIN, share)
                return
            guests.waiting.pop(node_id, None)
            site = self._accepted(node_id, answer)
            self._members.check(guests.names(node_id), site.card)
            if site.card.site in guests.sites:
                raise MessageError(f"a second node calls itself {site.card.site!r}")
            self._witnesses.check(site.card.site, site.card.witness, guests.kept)
            guests.sites[site.card.site] = site
        except (PeerError, SpecError, LedgerError) as error:
            guests.waiting.pop(node_id, None)
            self._decline(node_id, error)

    def _decline(self, node_id: int, reason: object, *, until: float = math.inf) -> None:
        """Note that a node takes no part; it is not asked again before `until`."""
        log.warning("node %d does not take part: %s", node_id, reason)
        self._turned_away[node_id] = until
        self._journal.declined[str(node_id)] = str(reason)

    def _accepted(self, node_id: int, answer: Reply | None) -> Site:
        if answer is None:
            raise MessageError("no answer to the invitation")
        if isinstance(answer, RefusalReply):
            raise MessageError(f"it refused: {answer.code.value} {answer.incident}".rstrip())
        if not isinstance(answer, NodeCard) or answer.digest != self._spec.digest:
            raise MessageError("the answer to the invitation is no card for this run")
        _check_synthetic(self._spec, answer)
        return Site(node_id, answer, accounting.planned(self._spec, answer.declared_size))

    def _wait_for_nodes(self, grid: Grid, deadline: float) -> list[int]:
        """All connected nodes, once all are there that are expected, or there is a quorum.

        With a quorum, the others are waited for a little.
        """
        gathered = self._clock.now() + _GATHERING_SECONDS
        while True:
            nodes, now = {node.node_id: node.name for node in grid.get_nodes()}, self._clock.now()
            missing = self._members.names() - set(nodes.values())
            enough = len(nodes) >= self._spec.federation.quorum
            if (enough and (not missing or now >= gathered)) or now >= deadline:
                return sorted(nodes)
            self._clock.sleep(_LONGEST_SLEEP)

    def _round(self, grid: Grid, number: int, sites: Mapping[str, Site]) -> None:
        opened = self._clock.now()
        self._observer.round_opened(number)
        made = Round(number, self._witnesses.read())
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
        sites = self._without_barred(made, sites)
        by_node = {site.node_id: site for site in sites.values()}
        tasks = self._tasks(made, sites)
        deadline = self._clock.now() + self._spec.federation.deadline_seconds
        self._journal.ask(made.number, sites)
        for node_id, reply in self._ask(grid, TRAIN, tasks, deadline):
            site = by_node[node_id]
            status, reason = self._fold(aggregator, site, made, reply)
            made.sites[site.card.site] = {"status": status, "reason": reason}
            self._observer.site_answered(made.number, site.card.site, status)
        for name in sites.keys() - made.sites.keys():
            reason = self._members.absent(name) or "no answer before the deadline"
            made.sites[name] = {"status": "late", "reason": reason}
            self._observer.site_answered(made.number, name, "late")
        faced = {n: s for n, s in sites.items() if made.sites[n]["status"] == "ok"}
        self._witnesses.keep({name: site.card.witness for name, site in faced.items()})
        self._faced |= {site.node_id: name for name, site in faced.items()}
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

    def _without_barred(self, made: Round, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The sites that may take part; of the others the record says why, and nothing is sent."""
        barred = {name: self._members.barred(name) for name in sites}
        made.sites |= {n: {"status": "failed", "reason": why} for n, why in barred.items() if why}
        return {name: site for name, site in sites.items() if not barred[name]}

    def _tasks(self, made: Round, sites: Mapping[str, Site]) -> dict[int, RecordDict]:
        """A task for each node with its site's witness; all share one record of the weights."""
        weights = self._state.model.weights
        shared = TrainTask(self._spec, made.number, weights).to_records()["weights"]
        tasks = {}
        for name, site in sites.items():
            task = TrainTask(self._spec, made.number, {}, made.witnesses.get(name, ""))
            tasks[site.node_id] = task.to_records()
            tasks[site.node_id]["weights"] = shared
        return tasks

    def _fold(
        self, aggregator: Any, site: Site, made: Round, reply: RecordDict | None
    ) -> tuple[str, str]:
        """Fold one reply in; its status and, unless it is ``ok``, the reason."""
        if reply is None:
            reason = self._members.absent(site.card.site)
            return "failed", reason or "the node answered with an error, or not at all"
        try:
            answer = read_reply(reply)
            if isinstance(answer, RefusalReply):
                return "refused", self._reason(answer, made.witnesses.get(site.card.site, ""))
            update = self._checked(answer, site, made.number)
        except PeerError as error:
            return "rejected", str(error)
        uniform = self._spec.aggregation.weighting == "uniform"
        aggregator.fold(site.card.site, update, 1.0 if uniform else site.card.declared_size)
        made.updates += 1
        return "ok", ""

    def _reason(self, refusal: RefusalReply, witness: str) -> str:
        """Why a site refused a round; its node calls a witness ``malformed`` that it never made."""
        if refusal.code == RefusalCode.MALFORMED and witness:
            return (
                "malformed: its node may not know the witness of its ledger that is kept here, as "
                f"after it was set up anew; then take the site out of {self._witnesses.path}"
            )
        return f"{refusal.code.value} {refusal.incident}".rstrip()

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
        check_still(answer.update, self._state.model.weights, self._spec)
        return answer.update

    def _ask(
        self, grid: Grid, kind: str, requests: Mapping[int, RecordDict], deadline: float
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Send each node its request and yield each answer as it comes, until the deadline."""
        post = Post(grid, self._clock, deadline, least=self._spec.federation.quorum)
        post.send(kind, requests)
        while post.open:
            yield from post.answers()
            for node_id in [node for node in post.waits if self._is_barred(node)]:
                post.forget(node_id)
                yield node_id, None
            post.rest()

    def _is_barred(self, node_id: int) -> bool:
        name = self._called.get(node_id)
        return name is not None and bool(self._members.barred(name))

    def _evaluated_at_sites(self, grid: Grid, sites: Mapping[str, Site], weights: Arrays) -> bool:
        """Ask for counts of the sites' held-out patients, if the run does and they are not here.

        A site that gives none is in the result by name with the reason.

        Returns:
            Whether nothing is left to ask; False if too few sites are there: the result stands
            without their counts, and resuming the run asks again.
        """
        if self._spec.evaluation.federated is None or self._journal.has_federated:
            return True
        try:
            sites = sites or self._invite(grid)
        except RunError as error:
            log.warning("no federated evaluation: %s; resume the run to ask again", error)
            return False
        names = {site.node_id: name for name, site in sites.items()}
        tables: dict[str, NDArray[np.float64]] = {}
        refused = dict.fromkeys(sites, "no answer before the deadline")
        deadline = self._clock.now() + self._spec.federation.deadline_seconds
        self._journal.ask_counts(sites)
        for node_id, reply in self._ask(grid, COUNT, self._counting(sites, weights), deadline):
            try:
                tables[names[node_id]] = self._table(reply)
                del refused[names[node_id]]
            except PeerError as error:
                refused[names[node_id]] = str(error)
        self._journal.federate(result_of(self._spec, tables, refused))
        return True

    def _counting(self, sites: Mapping[str, Site], weights: Arrays) -> dict[int, RecordDict]:
        """The task of each node, with its site's witness; all share one record of the weights."""
        kept = self._witnesses.read()
        shared = EvaluationTask(self._spec, weights).to_records()["weights"]
        tasks = {}
        for name, site in sites.items():
            records = EvaluationTask(self._spec, {}, kept.get(name, "")).to_records()
            records["weights"] = shared
            tasks[site.node_id] = records
        return tasks

    def _table(self, reply: RecordDict | None) -> NDArray[np.float64]:
        """One site's counts.

        Raises:
            PeerError: saying why there are none.
        """
        if reply is None:
            raise PeerError("failed: the node answered with an error, or not at all")
        answer = read_reply(reply)
        if isinstance(answer, RefusalReply):
            raise PeerError(f"refused: {answer.code.value} {answer.incident}".rstrip())
        return table_of(answer, self._spec)

    def _close(self, grid: Grid) -> None:
        """Tell all who are there that the run is over, and wait a moment for them.

        A site that does not hear it still has what it set aside for the run, until the site's own
        policy lets it lapse, or a simulation that is finished is resumed.
        """
        names = names_of(grid)
        there = {*grid.get_node_ids(), *self._nodes}
        nodes = {node_id for node_id in there if not self._is_barred(node_id)}
        request = Closing(self._spec.digest).to_records()
        wait = min(_CLOSING_SECONDS, self._spec.federation.deadline_seconds)
        deadline = self._clock.now() + wait
        for node_id, reply in self._ask(grid, CLOSE, dict.fromkeys(nodes, request), deadline):
            closed = _closed(reply, self._spec.digest)
            if closed is not None:
                nodes.remove(node_id)
                self._part_from(node_id, closed)
        for node_id in sorted(nodes):
            log.warning("%s has not confirmed that the run is over", names(node_id))

    def _part_from(self, node_id: int, closed: Closed) -> None:
        """Keep how far a site's ledger went, if it has faced what was kept of it in this run."""
        name = self._faced.get(node_id)
        if name is not None:
            self._witnesses.keep({name: closed.witness})

    def _evaluate(self, number: int) -> dict[str, Any] | None:
        """Evaluate after this round if the spec says so, and keep the best model."""
        if number % self._spec.evaluation.every and number != self._spec.rounds:
            return None
        result = self._evaluator.evaluate(self._loaded(self._state.model.evaluated))
        self._state.stopping = self._state.stopping.after(number, result)
        if self._state.stopping.best_round == number:
            self._state.best = dict(self._state.model.evaluated)
        return result.to_json()

    def _conclude(self) -> Arrays:
        """Write the final model and what it reaches: the best by validation, else the last."""
        arrays = (
            self._state.best
            if self._state.stopping.best_round is not None
            else self._state.model.evaluated
        )
        result = self._evaluator.evaluate(self._loaded(arrays), pictures=True)
        self._journal.conclude(arrays, result, self._state.stopping)
        return arrays

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


def _closed(reply: RecordDict | None, digest: str) -> Closed | None:
    """The node's word that this run is over there; None for anything else."""
    try:
        answer = None if reply is None else read_reply(reply)
    except MessageError:
        return None
    return answer if isinstance(answer, Closed) and answer.digest == digest else None


def _check_synthetic(spec: RunSpec, card: NodeCard) -> None:
    """Whether a site says who is behind its synthetic images, and the run takes such.

    A node that is older than the question mixes in what nobody knows.

    Raises:
        MessageError: naming the field.
    """
    if (card.synthetic is not None) != bool(spec.augmentation.synthetic):
        raise MessageError(
            f"card.synthetic = {card.synthetic!r}: the run expects "
            f"{spec.augmentation.synthetic} synthetic images in a batch; both sides need the same "
            "version of Cloister"
        )
    taken = not isinstance(spec.privacy, DpSgd) or spec.augmentation.synthetic_without_privacy
    if card.synthetic == "unprotected" and not taken:
        raise MessageError(
            "card.synthetic = 'unprotected': the run takes no synthetic images whose patients are "
            "not known to be protected"
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
        stopping=EarlyStopping.from_json(found.notes["stopping"], spec),
        history=[dict(row) for row in found.history],
    )
