"""A node at work: its folder (`client.folder`), and the gate that answers from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from client.counting import noised_counts
from client.diary import Diary
from client.folder import KEY_FILE, LEDGER, POLICY_FILE, NodeFolder, check_budget, cohort_digest
from client.gate import Counter, Gate, Site
from client.policy import Policy
from client.synthetic import Synthetic, fitting, synthetic_of
from client.training import Compute, LocalTrainer, best_device
from common.accounting import SubsampledGaussian
from common.cohort import Cohort
from common.errors import CohortError
from common.messages import Arrays
from common.noise import Keystream, KeystreamSource, fresh_keystream
from common.spec import RunSpec

__all__ = [
    "KEY_FILE",
    "LEDGER",
    "POLICY_FILE",
    "NodeHome",
    "check_budget",
    "cohort_digest",
    "compute_of",
    "counter_of",
]


class NodeHome(NodeFolder):
    """The folder of one node, and what answers from it."""

    @property
    def diary(self) -> Diary:
        """What happened in each round, for the hospital itself."""
        return Diary(self.path / "runs")

    def check_cohort(self, digest: str, mixed_in: Synthetic | None = None) -> None:
        """Check that the cohorts on the disk, where pixels are read, are those that were opened.

        Raises:
            CohortError: if one of them is another.
        """
        if mixed_in is not None:
            mixed_in.check_same()
        if cohort_digest(self.cohort_path) != digest:
            raise CohortError(
                f"{self.cohort_path}: another cohort lies there than when the node was started; "
                "look at it with `cloister node check`, admit it, and start the node again"
            )

    def gate(self, keystream: KeystreamSource = fresh_keystream) -> Gate:
        """The gate of this node, for its worker process.

        Args:
            keystream: as `Gate`; a node leaves it at its default.

        Raises:
            ConfigError: if node.toml's budget is not the one that a person booked, or the
                cohort's key cannot be had.
            LedgerError: if the ledger cannot be relied on.
            CohortError: if there is no cohort; what is wrong with it shows when it is used.
        """
        ledger, policy = self.ledger(), self.policy
        check_budget(policy, ledger.book.limit)
        compute, admitted = compute_of(policy), cohort_digest(self.cohort_path)
        key = self.cohort_key  # one that cannot be had stops the node now, not in a round
        if admitted != ledger.book.admitted:
            Cohort.open(self.cohort_path, key)  # damaged, it opens no gate that would be kept

        mixed_in = synthetic_of(self)

        @cache
        def whole() -> Cohort:  # read within a reply's slot: how long it takes tells its size
            return Cohort.open(self.cohort_path, key)

        def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
            cohort = whole().with_split("", "train")
            cohort.check_fits(spec)
            return LocalTrainer(
                spec,
                cohort,
                declared_size=policy.declared_size,
                mechanism=mechanism,
                compute=compute,
            ).mix_in(fitting(spec, mixed_in))

        site = Site(
            policy,
            ledger,
            admitted,
            self.requests,
            self.diary,
            check_cohort=lambda: self.check_cohort(admitted, mixed_in),
            synthetic=mixed_in,
        )
        counter = counter_of(lambda: whole().with_split("test"), compute)
        return Gate(site, trainer_for=trainer_for, counter=counter, keystream=keystream)


def counter_of(held_out: Callable[[], Cohort], compute: Compute) -> Counter:
    """What makes a site's counts of the patients that `held_out` gives."""

    def counter(spec: RunSpec, weights: Arrays, keystream: Keystream) -> NDArray[np.float32]:
        patients = held_out()
        patients.check_fits(spec)
        return noised_counts(spec, weights, patients, keystream=keystream, compute=compute)

    return counter


def compute_of(policy: Policy) -> Compute:
    """Where this node trains, and with how much memory."""
    wanted = policy.machine.device
    device = best_device() if wanted == "auto" else torch.device(wanted)
    return Compute(device, gradient_memory=policy.machine.gradient_memory * 2**20)
