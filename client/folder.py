"""A node's folder: its policy, its key, its ledger, the runs that wait, and its cohort.

    node.toml        the policy (client.policy)
    node.key         the node's own secret, mode 0600; it never leaves
    ledger/          what was spent, and the kept releases, encrypted
    ledger.witness   how far the ledger went; better on another machine ([ledger] witness)
    requests/        runs that wait for a person
    runs/            losses and numbers of patients of each round; they never leave

Nothing but `create` makes a key or a ledger: one that is missing stops the node instead of
beginning anew with nothing spent. What trains stands in `client.home`: a person at the command
line does not wait for it to be imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from client.approval import Requests
from client.book import Limit
from client.intake.settings import cohort_key
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed
from client.policy import Policy, read_policy
from common.cohort import Cohort, index_file
from common.errors import CohortError, ConfigError

POLICY_FILE, KEY_FILE, LEDGER = "node.toml", "node.key", "ledger"


@dataclass(frozen=True)
class NodeFolder:
    """The folder of one node, and the policy in it."""

    path: Path
    policy: Policy

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the policy in `path`.

        Raises:
            ConfigError: if it is missing or wrong.
        """
        return cls(path, read_policy(path / POLICY_FILE))

    @cached_property
    def key(self) -> NodeKey:
        """The node's secret.

        Raises:
            ConfigError: if it is missing, or others may read it.
        """
        return NodeKey.read(self.path / KEY_FILE)

    @property
    def place(self) -> Place:
        """Where the ledger lies, and what seals it."""
        return Place(self.path / LEDGER, self.key, self.witness)

    @property
    def witness(self) -> Path:
        """The witness file."""
        return self.path / self.policy.ledger.witness

    @property
    def requests(self) -> Requests:
        """The runs that wait for a person."""
        return Requests(self.path / "requests")

    @property
    def cohort_path(self) -> Path:
        """Where the cohort lies."""
        return self.path / self.policy.cohort

    @cached_property
    def cohort_key(self) -> bytes | None:
        """What seals the cohort; None where ``[intake.encryption]`` is not set.

        Raises:
            ConfigError: if it cannot be had.
        """
        return cohort_key(self.path, self.policy.intake)

    def open_cohort(self) -> Cohort:
        """The cohort.

        Raises:
            CohortError: if there is none that can be used.
            ConfigError: if its key cannot be had.
        """
        return Cohort.open(self.cohort_path, self.cohort_key)

    def ledger(self) -> Ledger:
        """The ledger, checked whole.

        Raises:
            LedgerError: if it cannot be relied on.
            ConfigError: if the key is missing.
        """
        return Ledger(self.place)

    def create(self, *, by: str) -> Ledger:
        """Make the key and an empty ledger with this policy's budget.

        Raises:
            ConfigError: if one of them is there already, or was once; nothing has changed then.
        """
        self._check_new()
        NodeKey.create(self.path / KEY_FILE)
        ledger = Ledger.create(self.place, site=self.policy.site, by=by)
        budget = self.policy.budget
        if budget is not None:
            ledger.set_budget(budget.limit, Signed(by, "the node was set up"))
        return ledger

    def _check_new(self) -> None:
        """A budget that begins anew beside what another ledger spent would be no budget."""
        folder, key = self.path / LEDGER, self.path / KEY_FILE
        there = [path for path in (folder, key) if path.exists()]
        if self.witness.exists() and self.witness.stat().st_size:
            there.append(self.witness)
        if there:
            raise ConfigError(
                f"{', '.join(map(str, there))}: there already, of this node or of another; put "
                "back what is missing beside it, or sign for what was spent with `cloister node "
                "recover`; a new node takes a folder and a witness file of its own"
            )


def check_budget(policy: Policy, booked: Limit | None) -> None:
    """Stop where the file and the ledger do not say the same budget.

    Raises:
        ConfigError: naming both.
    """
    written = policy.budget and policy.budget.limit
    if written != booked:
        raise ConfigError(
            f"node.toml: the budget is {written}, but the ledger has {booked}; put the file "
            "right, or have a person book the new one with `cloister node set-budget`"
        )


def cohort_digest(path: Path) -> str:
    """SHA-256 of a cohort's index as it lies there, which holds the SHA-256 of every image.

    Raises:
        CohortError: if there is none.
    """
    try:
        return hashlib.sha256(index_file(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CohortError(f"{path}: not a cohort ({error}); make one with `cloister intake`") from (
            error
        )
