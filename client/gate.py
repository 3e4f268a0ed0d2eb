"""The only way out of a hospital: policy, ledger, training, release, in that order.

A request is read (closed list), judged by the policy, booked in the ledger, trained, committed,
and only then answered. What comes back is built from the fields of `messages`; what training
returned beside the update goes to the node's own log. Every failure becomes a code, or an
incident number whose text stays here. What is answered before an attempt is booked depends on
policy, spec, ledger and task alone; what is answered after it is held to its slot (`Releases`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from threading import RLock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from client.approval import Asked, Requests
from client.book import Book
from client.counting import memory_of
from client.diary import Diary, Page
from client.incident import REFUSED, incident_reply
from client.ledger import Ledger, Signed, TaskKey, stamp
from client.policy import Policy
from client.rules import check_open, check_sound
from client.synthetic import Synthetic, check_synthetic
from client.training import LocalResult, LocalTrainer, check_weights
from common import accounting, models
from common.accounting import Share, SubsampledGaussian
from common.clock import Clock
from common.errors import (
    LedgerError,
    MessageError,
    ModelError,
    Refusal,
    RefusalCode,
)
from common.messages import (
    Arrays,
    Closed,
    Closing,
    Counts,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
)
from common.noise import Keystream, KeystreamSource, fresh_keystream
from common.spec import RunSpec

log = logging.getLogger("cloister.gate")

Answer = TypeVar("Answer")
TrainerFactory = Callable[[RunSpec, SubsampledGaussian | None], LocalTrainer]
Counter = Callable[[RunSpec, Arrays, Keystream], NDArray[np.float32]]
"""Makes the noised counts of the site's held-out patients under some weights."""
Make = Callable[[Keystream], Arrays]
_COUNTS = "counts"
_KEPT = 2  # releases of a run: of the round that is asked for, and of the one before


@dataclass(frozen=True)
class Site:
    """What stands behind a gate, none of which a message can change.

    Attributes:
        policy: the hospital's limits.
        ledger: what was spent, and the releases that can be asked for again.
        cohort: digest of the cohort's index; the ledger says whether a person admitted it.
        requests: where runs wait for a person; needed where the policy says ``ask``.
        check_cohort: raises if the cohort on the disk is not the one with that digest any more;
            called before each attempt.
        synthetic: images that runs may mix in, if the site has some.
        diary: where losses and numbers of patients are written for the hospital itself.
    """

    policy: Policy
    ledger: Ledger
    cohort: str
    requests: Requests | None = None
    diary: Diary | None = None
    check_cohort: Callable[[], None] = lambda: None
    synthetic: Synthetic | None = None

    def mixed_in(self, spec: RunSpec) -> Synthetic | None:
        """The synthetic images, for a run that mixes some in."""
        return self.synthetic if spec.augmentation.synthetic else None


class Gate:
    """Answers requests for one site, one at a time.

    Args:
        site: what stands behind it.
        trainer_for: makes the trainer of a run; kept until another run is asked for. It is given
            the mechanism of the whole run.
        counter: makes the site's part in a federated evaluation; None: it takes none.
        keystream: randomness of each attempt; a node leaves it at its default.
        clock: date and time.
    """

    def __init__(
        self,
        site: Site,
        *,
        trainer_for: TrainerFactory,
        counter: Counter | None = None,
        keystream: KeystreamSource = fresh_keystream,
        clock: Clock | None = None,
    ) -> None:
        self._site, self._policy, self._ledger = site, site.policy, site.ledger
        self._trainer_for, self._counter = trainer_for, counter
        self._keystream = keystream
        self._clock = clock or Clock()
        self._warm: tuple[str, LocalTrainer] | None = None
        self._turn = RLock()  # two threads in one network would mix two rounds' gradients

    def invite(self, invitation: Invitation) -> NodeCard | RefusalReply:
        """Whether this node takes part in the whole run, which is then set aside for it."""
        return self._answered(lambda: self._card(invitation.spec))

    def train(self, task: TrainTask) -> Release | RefusalReply:
        """The release of one round, or a refusal; the same task gets the same release again."""
        return self._answered(lambda: self._release(task))

    def count(self, task: EvaluationTask) -> Counts | RefusalReply:
        """Noised counts of the site's held-out patients, or a refusal; booked like a round."""
        return self._answered(lambda: self._counted(task))

    def close(self, closing: Closing) -> Closed | RefusalReply:
        """The run is over: nothing is set aside for it any more, and no release of it is kept."""
        return self._answered(lambda: self._closed(closing.digest))

    def _answered(self, answer: Callable[[], Answer]) -> Answer | RefusalReply:
        with self._turn:
            return _answered(answer)

    def _card(self, spec: RunSpec) -> NodeCard:
        policy, asked = self._policy, self._clock.date()
        self._check_room(spec, asked)
        shares = self._judged(spec)
        self._check_approved(spec, shares)
        lapse(self._ledger, policy, self._clock)

        def allow(book: Book) -> None:
            policy.check_booked(book)
            policy.check_new_run(book, asked, spec.digest)
            policy.check_earmark(book, spec.digest, shares)

        mixed_in = self._site.mixed_in(spec)
        said = self._asked(spec, shares).said
        self._ledger.earmark(spec.digest, shares, allow=allow, **said)
        return NodeCard(
            digest=spec.digest,
            site=policy.site,
            version=version("cloister"),
            declared_size=policy.declared_size,
            paced=policy.release.pace > 0,
            witness=self._ledger.witness,
            synthetic=None if mixed_in is None else mixed_in.behind(spec),
        )

    def _release(self, task: TrainTask) -> Release:
        spec, number = task.spec, task.round_number

        def prepare(share: Share | None) -> Make:
            trainer = self._trainer(spec, share and share.whole)
            return lambda keystream: self._trained(trainer, task, keystream)

        key = TaskKey(spec.digest, "training", number, task.digest)
        mechanism, update = self._once(task, key, prepare)
        self._ledger.prune(spec.digest, keep=_KEPT)
        return Release(spec.digest, number, mechanism, update)

    def _trained(self, trainer: LocalTrainer, task: TrainTask, keystream: Keystream) -> Arrays:
        self._warm = None  # what a failure leaves in a trainer would spoil the next attempt
        started = self._clock.now()
        result = trainer.train(task.weights, task.round_number, keystream)
        self._warm = task.spec.digest, trainer
        self._log(task, result, self._clock.now() - started)
        return _releasable(result.update, models.shapes(task.spec))

    def _counted(self, task: EvaluationTask) -> Counts:
        spec, counter = task.spec, self._counter
        mechanism = accounting.evaluation_of(spec)
        if mechanism is None or counter is None:
            raise Refusal(RefusalCode.SPEC, "the run asks for no federated evaluation")
        key = TaskKey(spec.digest, "evaluation", 1, task.digest)
        _, arrays = self._once(
            task, key, lambda _: lambda stream: {_COUNTS: counter(spec, task.weights, stream)}
        )
        return Counts(spec.digest, mechanism, arrays[_COUNTS])

    def _once(
        self,
        task: TrainTask | EvaluationTask,
        key: TaskKey,
        prepare: Callable[[Share | None], Make],
    ) -> tuple[SubsampledGaussian | None, Arrays]:
        """The task's stored release, or that of a new attempt: checked, booked, made, kept.

        With the mechanism that was booked for it, which today's policy may no longer plan.
        """
        spec = task.spec
        self._ledger.check_witness(task.witness)
        shares = self._judged(spec)
        share = next((share for share in shares if share.part == key.part), None)
        self._check_no_denial(spec)
        stored = self._ledger.released(key)
        if stored is not None:
            return self._ledger.mechanism_of(key), _arrays(stored)
        self._check_approved(spec, shares)
        check_weights(task.weights, models.shapes(spec))

        asked = self._clock.date()  # how long preparing takes decides nothing

        def allow(book: Book) -> None:
            self._policy.check_booked(book)
            check_open(book, key.run)
            if book.run(key.run).shares.get(key.part) != share:
                raise Refusal(RefusalCode.APPROVAL, "not what was set aside; invite again")
            self._policy.check_attempt(book, asked, key.run, key.part, key.round_number)

        allow(self._ledger.book)  # and again when it is booked: another node may be quicker
        with self._paced(spec):
            self._site.check_cohort()
            make = prepare(share)
            attempt = self._ledger.reserve(
                key,
                share and share.mechanism,
                cohort=self._site.cohort,
                asked=asked,
                allow=allow,
            )
            number = key.round_number if key.part == "training" else spec.rounds + 1
            release = save(dict(make(self._keystream(run_id=spec.run_id, round_number=number))))
            self._ledger.commit(attempt, release)
        return share and share.mechanism, _arrays(release)

    def _closed(self, run: str) -> Closed:
        check_sound(self._ledger.book)
        self._ledger.close(run, Signed("the coordinator", "the run is over"))
        if self._warm is not None and self._warm[0] == run:
            self._warm = None
        return Closed(digest=run, witness=self._ledger.witness)

    def _check_room(self, spec: RunSpec, asked: datetime) -> None:
        """Refuse one run too many before anything is worked out for it, which takes seconds."""
        if self._policy.approval == "automatic":
            self._policy.check_new_run(self._ledger.book, asked, spec.digest)
        elif self._site.requests is not None and not self._ledger.book.run(spec.digest).decision:
            self._site.requests.check_room(spec)

    def _judged(self, spec: RunSpec) -> tuple[Share, ...]:
        """What the run does here, if the policy allows it and this node may answer at all."""
        book = self._ledger.book
        check_sound(book)
        self._policy.check_booked(book)
        try:
            shapes = models.shapes(spec)
        except ModelError as error:
            raise Refusal(RefusalCode.SPEC, str(error)) from error
        shares = self._policy.judge(spec, sum(map(math.prod, shapes.values())))
        self._check_memory(spec)
        check_synthetic(spec, self._site.synthetic, book.run(spec.digest))
        if book.admitted != self._site.cohort:
            raise Refusal(
                RefusalCode.POLICY,
                "the cohort is not the one that a person admitted; look at it with `cloister "
                "node check`, then `cloister node admit`",
            )
        return shares

    def _check_memory(self, spec: RunSpec) -> None:
        """Refuse what would run out of memory after its budget is booked."""
        try:
            objections = list(self._policy.objections_to_memory(memory_of(spec)))
        except ModelError as error:
            raise Refusal(RefusalCode.SPEC, str(error)) from error
        if objections:
            raise Refusal(RefusalCode.POLICY, "; ".join(objections))

    def _check_approved(self, spec: RunSpec, shares: tuple[Share, ...]) -> None:
        """Whether a person said no; and in ``ask`` mode, whether one said yes to just this.

        Raises:
            Refusal: ``approval`` if it waits, ``denied`` if the answer was no.
        """
        self._check_no_denial(spec)
        decision = self._ledger.book.run(spec.digest).decision
        if self._policy.approval == "automatic":
            return
        if decision is None or decision.approval != self._asked(spec, shares).digest:
            if self._site.requests is not None:
                self._site.requests.put(spec)
            raise Refusal(RefusalCode.APPROVAL, f"run {spec.name!r} waits for a person")

    def _asked(self, spec: RunSpec, shares: tuple[Share, ...]) -> Asked:
        mixed_in = self._site.mixed_in(spec)
        return Asked(spec, self._site.cohort, shares, str(mixed_in) if mixed_in else "")

    def _check_no_denial(self, spec: RunSpec) -> None:
        decision = self._ledger.book.run(spec.digest).decision
        if decision is not None and not decision.approved:
            raise Refusal(RefusalCode.DENIED, f"{decision.by} said no: {decision.reason}")

    def _trainer(self, spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        if self._warm is None or self._warm[0] != spec.digest:
            self._warm = None  # let go of one network before the next is made
            self._warm = spec.digest, self._trainer_for(spec, mechanism)
        return self._warm[1]

    @contextmanager
    def _paced(self, spec: RunSpec) -> Iterator[None]:
        """Leave at a whole slot after coming in, whatever fails in between.

        A person who stops the node is not made to wait: nothing is answered then.
        """
        slot = self._policy.release.slot(spec)
        started = self._clock.now()
        try:
            yield
        except Exception:
            self._wait(started, slot)
            raise
        self._wait(started, slot)

    def _wait(self, started: float, slot: float) -> None:
        if slot > 0:
            passed = self._clock.now() - started
            self._clock.sleep(max(1, math.ceil(passed / slot)) * slot - passed)

    def _log(self, task: TrainTask, result: LocalResult, seconds: float) -> None:
        """For the hospital's own eyes: neither the record nor the page ever leaves the node."""
        log.info(
            "site %s, run %s, round %d: mean loss %.4f, patients by step %s, zeroed %d",
            self._policy.site,
            task.spec.run_id or task.spec.name,
            task.round_number,
            result.mean_loss,
            result.sampled,
            result.zeroed,
        )
        if self._site.diary is None:
            return
        page = Page.of(task.round_number, stamp(self._clock.date()), seconds, result)
        try:
            self._site.diary.add(task.spec.digest, page)
        except OSError:
            log.exception("the diary cannot be written; the round goes on")


def lapse(ledger: Ledger, policy: Policy, clock: Clock) -> None:
    """Take back what is set aside for runs that nobody has asked for in a long time."""
    for run in policy.lapsed(ledger.book, clock.date()):
        ledger.lapse(run)


def _releasable(update: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The update, if it is the network's and nothing beside it.

    Raises:
        ModelError: naming what is not.
    """
    seen = {name: (array.shape, array.dtype) for name, array in update.items()}
    expected = {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    if seen != expected:
        raise ModelError(f"training gave {seen}, expected {expected}: nothing is released")
    if not all(np.isfinite(array).all() for array in update.values()):
        raise ModelError("training gave an update that is not finite: nothing is released")
    return update


def _arrays(release: bytes) -> Arrays:
    """What was kept, in one order: safetensors gives it back in any."""
    return dict(sorted(load(release).items()))


def _answered(answer: Callable[[], Answer]) -> Answer | RefusalReply:
    try:
        return answer()
    except Refusal as refusal:
        log.warning(REFUSED, refusal)
        return RefusalReply(code=refusal.code)
    except LedgerError as error:
        log.error("this node answers nothing more: %s", error)
        return RefusalReply(code=RefusalCode.LEDGER)
    except MessageError as error:
        log.warning(REFUSED, error)
        return RefusalReply(code=RefusalCode.MALFORMED)
    except Exception:  # noqa: BLE001 - the edge of the node: no text may leave it
        return incident_reply()
