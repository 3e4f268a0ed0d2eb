"""The only way out of a hospital: policy, ledger, training, release, in that order.

A request is read (closed list), judged by the policy, booked in the ledger, trained, committed,
and only then answered. What comes back is built from the fields of `messages.Release`; what
training returned beside the update goes to the node's own log. Every failure becomes a code, or
an incident number whose text stays here.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from importlib.metadata import version
from typing import TypeVar

from safetensors.numpy import load, save

from client.ledger import Ledger
from client.policy import Policy
from client.training import LocalResult, LocalTrainer
from common.accounting import SubsampledGaussian
from common.errors import MessageError, Refusal, RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply, Release, TrainTask
from common.noise import KeystreamSource, fresh_keystream
from common.spec import RunSpec

log = logging.getLogger("cloister.gate")

Answer = TypeVar("Answer")
TrainerFactory = Callable[[RunSpec, SubsampledGaussian | None], LocalTrainer]


class Gate:
    """Answers requests for one site.

    Args:
        policy: the hospital's limits.
        ledger: what was spent, and the releases that can be asked for again.
        trainer_for: makes the trainer of a run; kept until another run is asked for.
        keystream: randomness of each attempt; a node leaves it at its default.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        ledger: Ledger,
        trainer_for: TrainerFactory,
        keystream: KeystreamSource = fresh_keystream,
    ) -> None:
        self._policy = policy
        self._ledger = ledger
        self._trainer_for = trainer_for
        self._keystream = keystream
        self._warm: tuple[str, LocalTrainer] | None = None

    def invite(self, invitation: Invitation) -> NodeCard | RefusalReply:
        """Whether this node takes part in the whole run; nothing is spent by asking."""
        return _answered(lambda: self._card(invitation.spec))

    def train(self, task: TrainTask) -> Release | RefusalReply:
        """The release of one round, or a refusal; the same task gets the same release again."""
        return _answered(lambda: self._release(task))

    def _card(self, spec: RunSpec) -> NodeCard:
        mechanism = self._policy.plan(spec)
        if mechanism is not None:
            self._policy.check_budget(self._ledger.spent(), mechanism)
        return NodeCard(
            digest=spec.digest,
            site=self._policy.site,
            version=version("cloister"),
            declared_size=self._policy.declared_size,
        )

    def _release(self, task: TrainTask) -> Release:
        spec, number, digest = task.spec, task.round_number, task.digest
        planned = self._policy.plan(spec)
        mechanism = planned and planned.of_steps(spec.local.steps)
        stored = self._ledger.released(spec.digest, number, digest)
        if stored is not None:
            return Release(spec.digest, number, mechanism, load(stored))

        def allow(spent: list[SubsampledGaussian]) -> None:
            if mechanism is not None:
                self._policy.check_budget(spent, mechanism)

        allow(self._ledger.spent())  # and again when it is booked: another node may be quicker
        trainer = self._trainer(spec, planned)
        trainer.check(task.weights)
        attempt = self._ledger.reserve(spec.digest, number, digest, mechanism, allow=allow)
        keystream = self._keystream(run_id=spec.run_id, round_number=number)
        self._warm = None  # what a failure leaves in a trainer would spoil the next attempt
        result = trainer.train(task.weights, number, keystream)
        self._warm = spec.digest, trainer
        self._log(task, result)
        self._ledger.commit(attempt, save(result.update))
        self._ledger.prune(spec.digest, number - 1)
        return Release(spec.digest, number, mechanism, result.update)

    def _trainer(self, spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        if self._warm is None or self._warm[0] != spec.digest:
            self._warm = spec.digest, self._trainer_for(spec, mechanism)
        return self._warm[1]

    def _log(self, task: TrainTask, result: LocalResult) -> None:
        """For the hospital's own eyes: this record never leaves the node."""
        log.info(
            "site %s, run %s, round %d: mean loss %.4f, patients by step %s, zeroed %d",
            self._policy.site,
            task.spec.run_id or task.spec.name,
            task.round_number,
            result.mean_loss,
            result.sampled,
            result.zeroed,
        )


def incident_reply() -> RefusalReply:
    """A failure, to be called while an exception is handled: its text goes to the log alone."""
    number = secrets.token_hex(8)
    log.exception("incident %s", number)
    return RefusalReply(code=RefusalCode.INCIDENT, incident=number)


def _answered(answer: Callable[[], Answer]) -> Answer | RefusalReply:
    try:
        return answer()
    except Refusal as refusal:
        log.warning("refused: %s", refusal)
        return RefusalReply(code=refusal.code)
    except MessageError as error:
        log.warning("refused: %s", error)
        return RefusalReply(code=RefusalCode.MALFORMED)
    except Exception:  # noqa: BLE001 - the edge of the node: no text may leave it
        return incident_reply()
