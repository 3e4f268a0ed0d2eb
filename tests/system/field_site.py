"""A hospital's node for tests of the coordinator: the shipped one, but for its randomness.

`python field_site.py HOME SEED TOLD [ANOTHER]` is `cloister node start` with a keystream handed to
the node's constructor, which is drawn from a seed as in a simulation; so two runs can be compared.
It is told by files in the folder TOLD: while ``hold`` is there, the round that it names is booked
and begun, and not gone on with. Each way to the coordinator that it opens is a line in ``opened``,
each request one in ``heard``, before it is answered, and each round that is begun one in ``begun``.
ANOTHER: as `Pace.another`.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

from client.folder import NodeFolder
from client.health import Watch
from client.link import FleetLink, Letter
from client.node import Enrolled, NodeService, Pace, exit_code
from client.worker import log_to_stderr
from common.errors import CloisterError
from common.noise import Keystream
from deploy.workers import fork_server


def seeded(site: str, seed: int, told: Path, *, run_id: str, round_number: int) -> Keystream:
    """What the simulation draws from; it is called in the worker, once the round is booked."""
    note(told / "begun", str(round_number))
    while held(told) == str(round_number):
        time.sleep(0.02)
    return Keystream.seeded(seed, site, round_number)


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def held(told: Path) -> str:
    try:
        return (told / "hold").read_text()
    except FileNotFoundError:
        return ""


class Attended(Enrolled):
    """The way to the coordinator; what comes on it is written down."""

    def __init__(self, home: Path, told: Path) -> None:
        super().__init__(home)
        self._told = told

    def open(self, most_bytes: int) -> FleetLink:
        note(self._told / "opened", "once more")
        link = super().open(most_bytes)
        receive = link.receive

        def noted() -> Letter | None:
            letter = receive()
            if letter is not None:
                note(self._told / "heard", letter.kind)
            return letter

        vars(link)["receive"] = noted
        return link


def main(home: Path, seed: int, told: Path, another: float = Pace.another) -> None:
    fork_server("client.answering")
    log_to_stderr()
    pace = Pace(idle=0.5, retry=2.0, another=another)
    keystream = partial(seeded, NodeFolder.open(home).policy.site, seed, told)
    try:
        service = NodeService(home, Attended(home, told), pace, keystream)
        service.run(Watch(service, None).watching())
    except CloisterError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(exit_code(error)) from None


if __name__ == "__main__":
    if os.getppid() == 1:
        raise SystemExit("nobody waits for this")
    _, where, seed, told, *another = sys.argv
    main(Path(where), int(seed), Path(told), *map(float, another))
