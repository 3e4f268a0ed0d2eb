"""A round in the field, beyond training: this stack and stock Flower, side by side in one run.

    python benchmarks/field.py
    python benchmarks/field.py --weights-mib 1024

Two nodes, a tiny network, ten rounds, TLS, all processes on this machine, both federations up at
once and quiet while the other works. Ours is `cloister coordinator start` and `cloister node start`
upon enrolled nodes. Stock is `flower-superlink`, two `flower-supernode` and `flwr run`, with
subprocess isolation, and an app that trains with torch and Opacus under FedAvg; without node
authentication, evaluation or a checkpoint, which are in our figures.

Training is the slowest site's own time for its steps. The first round warms up and is left out.

With ``--weights-mib``: ours alone, one round of one step with weights of about that size, and the
greatest resident memory of each process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table
from synthetic import write_cohort

from client import credentials
from client.diary import Diary
from client.folder import NodeFolder, cohort_digest
from client.ledger import Signed as SignedAtNode
from common.clock import Clock
from common.spec import parse_run_text
from server.authority import Authority, NewFederation, Signed
from server.launch import launch
from server.runs import OPEN, CoordinatorHome, Run

SITES = ("north", "south")
ROUNDS = 10
PATIENCE = 1800.0
ADA = Signed("Ada", "a benchmark")
BIN = Path(sys.executable).parent
CLOISTER = (sys.executable, "-c", "from deploy.cli import main; main()")

RUN = f"""
name = "field"
rounds = {ROUNDS}
[task]
classes = ["no", "yes"]
[model]
name = "small-cnn"
width = 4
[input]
height = 16
width = 16
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 16
steps = 1
[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
[federation]
quorum = 2
[evaluation]
bootstrap = 100
"""

HEAVY = """
name = "heavy"
rounds = 1
[task]
classes = ["no", "yes"]
[model]
name = "reference-cnn"
[input]
height = {side}
width = {side}
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 1
steps = 1
[privacy]
mechanism = "none"
[federation]
quorum = 2
deadline_seconds = 1800
[evaluation]
bootstrap = 100
"""

NODE = """
site = "{site}"
declared_size = 200
cohort = "cohort"
approval = "automatic"
allow_no_privacy = true
[budget]
epsilon = 1000.0
delta = 1e-4
[limits]
operators = "any"
models = "any"
greatest_parameters = 1000000000
[data]
unit = "patient"
kind = "binary"
classes = ["no", "yes"]
shape = [1, {side}, {side}]
preprocessing = "{preprocessing}"
[release]
pace = 0.0
[machine]
device = "cpu"
"""

PROJECT = """
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
"""

STOCK_SERVER = f"""
import json, os, time
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from stock.network import Network

app = ServerApp()

def note(number, arrays):
    with open(os.environ["BENCH_ROUNDS"], "a") as file:
        file.write(json.dumps({{"round": number, "time": time.time()}}) + "\\n")
    return MetricRecord({{}})

@app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes={len(SITES)},
                      min_available_nodes={len(SITES)})
    arrays = ArrayRecord(Network().state_dict())
    strategy.start(grid, arrays, num_rounds={ROUNDS}, evaluate_fn=note)
"""

STOCK_NETWORK = """
from torch import nn

def Network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 1)
    )
"""

STOCK_CLIENT = """
import json, os, time
HERTZ = os.sysconf("SC_CLK_TCK")
UPTIME = float(open("/proc/uptime").read().split()[0])
TICKS = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
BORN = time.time() - UPTIME + TICKS / HERTZ
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from stock.network import Network

app = ClientApp()

@app.train()
def train(message, context):
    began = time.time()
    network = Network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = torch.utils.data.TensorDataset(
        torch.rand(200, 1, 16, 16), torch.randint(0, 2, (200, 1)).float()
    )
    network, optimizer, loader = PrivacyEngine().make_private(
        module=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=16),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )
    images, labels = next(iter(loader))
    torch.nn.functional.binary_cross_entropy_with_logits(network(images), labels).backward()
    optimizer.step()
    ended = time.time()
    with open(os.environ["BENCH_CLIENT"], "a") as file:
        file.write(json.dumps({"born": BORN, "began": began, "ended": ended}) + "\\n")
    weights = ArrayRecord(network._module.state_dict())
    numbers = MetricRecord({"num-examples": 200})
    return Message(RecordDict({"arrays": weights, "metrics": numbers}), reply_to=message)
"""


def main() -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights-mib", type=int, metavar="N", help="one round of N MiB, and memory"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "logs").mkdir()
        table = (
            side_by_side(folder) if asked.weights_mib is None else heavy(folder, asked.weights_mib)
        )
    Console().print(table)


def side_by_side(folder: Path) -> Table:
    """Both stacks, in turn."""
    with ExitStack() as held:
        ours = Ours(folder / "ours", folder / "logs", RUN, images=200)
        stock = Stock(folder / "stock", ours.home.path, folder / "logs")
        held.enter_context(ours.up())
        held.enter_context(stock.up())
        return report({"Flower": stock.rounds(), "Cloister": ours.rounds()})


def heavy(folder: Path, mebibytes: int) -> Table:
    """One round with large weights: 512 units on a map whose size follows the image's."""
    side = 16 * math.ceil(math.sqrt(mebibytes * 2**20 / (4 * 512 * 128))) + 30
    ours = Ours(folder / "ours", folder / "logs", HEAVY.format(side=side), images=4)
    with ours.up(), Memory() as memory:
        (parts,) = ours.rounds()
    table = Table(title=f"one round, {mebibytes} MiB of weights, {len(SITES)} nodes")
    for column in ("", "seconds", "greatest resident memory, MiB"):
        table.add_column(column, justify="right" if column else "left")
    for part, seconds in parts.items():
        table.add_row(part, f"{seconds:.1f}", "")
    table.add_section()
    for name, peak in sorted(memory.peaks.items()):
        table.add_row(name, "", f"{peak / 1024:.0f}")
    return table


class Memory:
    """Watches the memory of the processes that this one has started.

    Attributes:
        peaks: the greatest resident memory of each, in KiB; and of all at one time.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            now = 0
            for pid, name in descendants(os.getpid()):
                with suppress(OSError, KeyError):
                    said = status(pid)
                    now += int(said["VmRSS"].split()[0])
                    peak = int(said["VmHWM"].split()[0])
                    self.peaks[name] = max(self.peaks.get(name, 0), peak)
            self.peaks["all together"] = max(self.peaks.get("all together", 0), now)


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Processes and what they are; a node's worker is the child of its fork server."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            yield int(child), name_of(int(child))
            yield from descendants(int(child))


def name_of(pid: int) -> str:
    """What a process of ours is."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    if "server.conductor" in words:
        return "the run's conductor"
    if "forkserver" in " ".join(words):
        return "a node's worker"
    return "the coordinator's service" if "coordinator" in words else "a node's service"


def status(pid: int) -> dict[str, str]:
    """What the system says of a process (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


# --- Ours ---------------------------------------------------------------------------------------


class Ours:
    """A coordinator and enrolled nodes, for the run `text`."""

    def __init__(self, folder: Path, logs: Path, text: str, *, images: int) -> None:
        self._folder, self._logs, self._images = folder, logs, images
        self._spec = parse_run_text(text, source="field").spec
        folder.mkdir()
        (folder / "run.toml").write_text(text)
        new = NewFederation("bench", ["127.0.0.1"], unused_port())
        words = "a passphrase of a benchmark"
        self._authority = Authority.create(folder / "home", new, words, ADA, Clock())
        self.home = CoordinatorHome(folder / "home")
        write_cohort(self.home.evaluation, self._spec, images=images, seed=0)
        for number, site in enumerate(SITES, start=1):
            self._enrolled(site, number)

    def _enrolled(self, site: str, seed: int) -> None:
        home = self._folder / site
        home.mkdir(mode=0o700)
        write_cohort(home / "cohort", self._spec, images=self._images, seed=seed)
        digest = self._spec.input.preprocessing_digest
        side = self._spec.input.height
        (home / "node.toml").write_text(NODE.format(site=site, preprocessing=digest, side=side))
        ledger = NodeFolder.open(home).create(by="Ada")
        ledger.admit(cohort_digest(home / "cohort"), SignedAtNode("Ada", "a benchmark"))
        ledger.disconnect()
        bundle = self._authority.enrol(credentials.request(home, site), 500, 30, ADA)
        path = home / "bundle.json"
        path.write_bytes(bundle.content)
        credentials.offered(home, path, Clock().date()).accept()

    @contextmanager
    def up(self) -> Iterator[None]:
        """All of it at work."""
        start = (*CLOISTER, "coordinator", "start", str(self.home.path), "--listen", "127.0.0.1")
        with ExitStack() as held:
            held.enter_context(process(self._logs / "coordinator", *start))
            for site in SITES:
                home = str(self._folder / site)
                words = (*CLOISTER, "node", "start", home, "--health", "none")
                held.enter_context(process(self._logs / site, *words))
            yield

    def rounds(self) -> list[Mapping[str, float]]:
        """Where the seconds of each round went."""
        run = launch(self.home, self._folder / "run.toml")
        wait_until(lambda: run.state.standing not in OPEN)
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").open()]
        if len(rows) != self._spec.rounds:
            raise RuntimeError(f"{run.state}\n{tails(self._logs)}")
        return [self._parts(run, row) for row in rows]

    def _parts(self, run: Run, row: Mapping[str, Any]) -> Mapping[str, float]:
        number = row["round"]
        events = [json.loads(line) for line in (run.path / "events.jsonl").open()]
        times = {
            event["event"]: datetime.fromisoformat(event["time"]).timestamp()
            for event in events
            if event.get("number", event.get("row", {}).get("round")) == number
        }
        diaries = [Diary(self._folder / site / "runs").read(run.spec.digest) for site in SITES]
        pages = [page for pages in diaries for page in pages if page.round_number == number]
        training = max(page.seconds for page in pages)
        waited = float(row["waited_seconds"])
        whole = times["round_closed"] - times["round_opened"]
        return {
            "a round": whole,
            "training": training,
            "to the nodes and back": waited - training,
            "evaluation, checkpoint, record": whole - waited,
        }


# --- Stock --------------------------------------------------------------------------------------


class Stock:
    """Flower's own programs, with the certificates of our coordinator."""

    def __init__(self, folder: Path, certificates: Path, logs: Path) -> None:
        self._folder, self._authority, self._logs = folder, certificates / "ca.pem", logs
        self._tls = certificates / "tls.pem"
        self._port = unused_port()
        app = folder / "app" / "stock"
        app.mkdir(parents=True)
        (app.parent / "pyproject.toml").write_text(PROJECT)
        files = {"network": STOCK_NETWORK, "server": STOCK_SERVER, "client": STOCK_CLIENT}
        for name, text in files.items():
            (app / f"{name}.py").write_text(text)
        (app / "__init__.py").touch()
        for name in ("link", "cli", *SITES):
            (folder / name).mkdir()
        (folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{self._address}"\n'
            f'root-certificates = "{self._authority}"\n'
        )

    @property
    def _address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def _environment(self, name: str) -> dict[str, str]:
        return {
            "FLWR_HOME": str(self._folder / name),
            "BENCH_ROUNDS": str(self._folder / "rounds.jsonl"),
            "BENCH_CLIENT": str(self._folder / f"{name}.jsonl"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    @contextmanager
    def up(self) -> Iterator[None]:
        """SuperLink and SuperNodes."""
        link = (
            *(str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(self._port)),
            *("--ssl-ca-certfile", str(self._authority), "--ssl-certfile", str(self._tls)),
            *("--ssl-keyfile", str(self._tls), "--disable-runtime-dependency-installation"),
        )
        with ExitStack() as held:
            log = self._logs / "superlink"
            held.enter_context(process(log, *link, **self._environment("link")))
            for site in SITES:
                words = (
                    *(str(BIN / "flower-supernode"), "--superlink", self._address),
                    *("--root-certificates", str(self._authority), "--port", str(unused_port())),
                )
                log = self._logs / f"supernode-{site}"
                held.enter_context(process(log, *words, **self._environment(site)))
            wait_until(lambda: reachable(self._port))
            yield

    def rounds(self) -> list[Mapping[str, float]]:
        """Where the seconds of each round went."""
        words = (str(BIN / "flwr"), "run", str(self._folder / "app"), "bench")
        log = self._logs / "run"
        with process(log, *words, **self._environment("cli")) as started:
            if started.wait(PATIENCE):
                raise RuntimeError(tails(self._logs))
        path = self._folder / "rounds.jsonl"
        wait_until(lambda: path.exists() and len(lines(path)) == ROUNDS + 1, self._logs)
        ends = [line["time"] for line in lines(path)]
        clients = [lines(self._folder / f"{site}.jsonl") for site in SITES]
        return [
            self._parts(ends[number], ends[number + 1], [each[number] for each in clients])
            for number in range(ROUNDS)
        ]

    def _parts(
        self, opened: float, closed: float, clients: list[dict[str, float]]
    ) -> Mapping[str, float]:
        last = max(clients, key=lambda client: client["ended"])
        return {
            "a round": closed - opened,
            "training": last["ended"] - last["began"],
            "until the node's process is born": last["born"] - opened,
            "until it trains (imports, message)": last["began"] - last["born"],
            "from its end to the round's": closed - last["ended"],
        }


# --- What both use ------------------------------------------------------------------------------


@contextmanager
def process(log: Path, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its children, ended on leaving."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    here = {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    with log.open("wb") as output:
        started = subprocess.Popen(
            words,
            env=os.environ | quiet | here | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def unused_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def reachable(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lines(path: Path) -> list[dict[str, float]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_until(true: Callable[[], bool], logs: Path | None = None) -> None:
    """Wait until something is true."""
    last = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > last:
            raise TimeoutError("" if logs is None else tails(logs))
        time.sleep(0.1)


def tails(logs: Path) -> str:
    """The ends of all logs."""
    return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in logs.iterdir())


def report(found: Mapping[str, list[Mapping[str, float]]]) -> Table:
    """The median of each part, in seconds; the first round is left out."""
    table = Table(title=f"{len(SITES)} nodes, {ROUNDS} rounds, {os.cpu_count()} cores")
    for column in ("", "seconds (median)", "from", "to"):
        table.add_column(column, justify="right" if column else "left")
    beyond = {}
    for name, rounds in found.items():
        whole = [each["a round"] - each["training"] for each in rounds[1:]]
        beyond[name] = float(np.median(whole))
        table.add_row(f"[bold]{name}: a round beyond training", *spread(whole))
        for part in rounds[0]:
            table.add_row(f"  {part}", *spread([each[part] for each in rounds[1:]]))
        table.add_section()
    table.add_row("Flower / Cloister", f"{beyond['Flower'] / beyond['Cloister']:.1f}", "", "")
    return table


def spread(values: list[float]) -> tuple[str, str, str]:
    """Median, least and greatest."""
    return f"{np.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"


if __name__ == "__main__":
    main()
