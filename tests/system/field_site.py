"""A hospital's node for tests of the coordinator: enrolled, over TLS, answered by the shipped gate.

What a shipped node draws from the operating system comes from a seed here, so that two runs can be
compared. It is told by files in the node's folder: while ``hold`` is there, the round that it
names is not answered; each request is a line in ``heard``, before it is answered.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from flwr.app import RecordDict

from client.app import answer
from client.credentials import Credentials
from client.gate import Gate, Site
from client.home import NodeHome, cohort_digest, compute_of
from client.link import FleetLink
from client.training import LocalTrainer
from common.accounting import SubsampledGaussian
from common.cohort import Cohort
from common.errors import LinkError, MessageError
from common.messages import TrainTask, read_request
from common.noise import Keystream
from common.spec import RunSpec

SEED = 7


def seeded_gate(path: Path) -> Gate:
    home = NodeHome.open(path)
    cohort = Cohort.open(home.cohort_path)

    def trainer_for(spec: RunSpec, mechanism: SubsampledGaussian | None) -> LocalTrainer:
        size, compute = home.policy.declared_size, compute_of(home.policy)
        return LocalTrainer(spec, cohort, declared_size=size, mechanism=mechanism, compute=compute)

    def keystream(*, run_id: str, round_number: int) -> Keystream:
        return Keystream.seeded(SEED, home.policy.site, round_number)

    site = Site(home.policy, home.ledger(), cohort_digest(home.cohort_path), home.requests)
    return Gate(site, trainer_for=trainer_for, keystream=keystream)


def serve(home: Path, gate: Gate) -> None:
    who = Credentials.open(home)
    address = who.address.removeprefix("https://")
    with FleetLink(address, who.private_key, who.ssl_context(), most_bytes=2**26) as link:
        link.activate()
        over = threading.Event()
        threading.Thread(target=beat, args=(link, over), daemon=True).start()
        try:
            while True:
                letter = link.receive()
                if letter is None:
                    time.sleep(0.02)
                    continue
                content = letter.content
                with (home / "heard").open("a") as heard:
                    heard.write(f"{letter.kind}\n")
                while letter.kind == "train.step" and holds(home, content):
                    time.sleep(0.02)
                link.reply(letter, answer(content, lambda: gate))
        finally:
            over.set()


def holds(home: Path, content: RecordDict) -> bool:
    try:
        named = (home / "hold").read_text()
    except FileNotFoundError:
        return False
    task = read_request(content)
    return isinstance(task, TrainTask) and str(task.round_number) == named


def beat(link: FleetLink, over: threading.Event) -> None:
    while not over.wait(1.0):
        with suppress(LinkError):
            link.beat()


def main(home: Path) -> None:
    torch.set_num_threads(1)
    gate = cache(lambda: seeded_gate(home))()
    while True:
        try:
            serve(home, gate)
        except (LinkError, MessageError) as error:
            sys.stderr.write(f"{error}\n")
            time.sleep(0.2)


if __name__ == "__main__":
    if os.getppid() == 1:
        raise SystemExit("nobody waits for this")
    main(Path(sys.argv[1]))
