"""The global model and the run's state on disk: replaced atomically, resumable.

A checkpoint is two files: ``round-NNNNNN.safetensors`` with all arrays, and ``state.json``, which
names it with its SHA-256 and holds the history. The second is renamed into place last, so at any
moment the folder holds one whole checkpoint, whatever was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from common.errors import RunError
from common.files import write_durably
from common.messages import Arrays

VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round needs.

    Attributes:
        spec_digest: of the run it belongs to.
        round_number: the last finished round.
        groups: arrays by group ("weights", "best", slots of the optimiser), then by parameter.
        history: one JSON object a round, as in ``metrics.jsonl``.
        notes: other JSON state: early stopping, what each site was asked.
    """

    spec_digest: str
    round_number: int
    groups: Mapping[str, Arrays]
    history: tuple[Mapping[str, Any], ...]
    notes: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write durably, then drop the checkpoint before."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{group}/{name}": array
        for group, named in checkpoint.groups.items()
        for name, array in named.items()
    }
    content = save(arrays)
    file = folder / f"round-{checkpoint.round_number:06d}.safetensors"
    write_durably(file, content)
    state = {
        "version": VERSION,
        "spec_digest": checkpoint.spec_digest,
        "round": checkpoint.round_number,
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "history": list(checkpoint.history),
        "notes": checkpoint.notes,
    }
    write_durably(folder / "state.json", json.dumps(state).encode())
    for old in folder.glob("round-*.safetensors"):
        if old != file:
            old.unlink()


def load_checkpoint(folder: Path, spec_digest: str) -> Checkpoint | None:
    """The last whole checkpoint in `folder`, or None if there is none.

    Raises:
        RunError: if it belongs to another run, is damaged or of another version.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        seen = state["spec_digest"]
        if state["version"] != VERSION or seen != spec_digest:
            raise RunError(
                f"{path}: a checkpoint of version {state['version']} of the run {seen[:12]}; "
                f"expected version {VERSION} of {spec_digest[:12]}: the spec was changed, or the "
                "folder is another run's; start a new run"
            )
        content = (folder / state["file"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise ValueError(f"the SHA-256 of {state['file']} is not the one that it names")
        number, history = int(state["round"]), tuple(state["history"])
        if len(history) != number:
            raise ValueError(f"a history of {len(history)} rounds after round {number}")
        return Checkpoint(seen, number, _grouped(load(content)), history, state["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged checkpoint ({error}); start a new run") from error


def _grouped(arrays: Arrays) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = array
    return groups
