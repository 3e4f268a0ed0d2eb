"""Who each pseudonym stands for, told by the workers to the sealed table, where one is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from client.intake.reidentify import ReidentificationTable


@dataclass
class Registry:
    """A sealed table that every process opens for itself, when it has something to add.

    Args:
        table: the file.
        public_key: of whoever may read it.
    """

    table: Path
    public_key: Path
    _opened: ReidentificationTable | None = field(default=None, init=False, repr=False)

    def add(self, pseudonym: str, issuer: str, patient: str) -> None:
        """Add a patient, durably, before anything of the patient is kept.

        Raises:
            ConfigError, IntakeError: as `ReidentificationTable.add` does.
        """
        if self._opened is None:
            self._opened = ReidentificationTable(self.table, self.public_key)
        self._opened.add(pseudonym, issuer, patient)
