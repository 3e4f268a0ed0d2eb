"""Two newcomers: what the operator's and the hospital's page say is typed, and nothing else.

Every `$ cloister …` line of both pages, in the order in which two people come to them. Coordinator,
node and whatever is watched are processes of their own, over TLS; the other commands run in this
one, as they import what a process would import anew each time. What the pages show is compared
with what is printed, but for figures, names of runs, and what stands behind an `…`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.folder import NodeFolder
from client.health import last_report
from deploy.cli import app
from deploy.hospitals import make_hospitals
from server.runs import OPEN, Run, Standing, open_home

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from deploy.cli import main; main()"]
PATIENCE = 300.0
WORDS = "five words drawn by lot"

ORDER = """
operator: coordinator init, spec explain, intake run
hospital: intake run, node init, node check, node admit, node check, node request
operator: coordinator enrol, coordinator start
hospital: node join, node doctor, node start, node status
operator: coordinator doctor, coordinator status, coordinator launch
hospital: node requests, node show, node approve
operator: coordinator runs, coordinator watch
hospital: node deny, node budget, node page, node audit, node audit, node audit
hospital: node close, node set-budget, node audit, node recover
operator: coordinator resume, coordinator report, coordinator stop
hospital: predict chest.model
"""
"""Whose turn it is, and what stands there next on their page."""

SERVING = ("coordinator start", "node start", "coordinator launch", "coordinator resume")
"""Commands that stay on a terminal of their own."""

TYPED = {
    "coordinator init": f"{WORDS}\n{WORDS}\n",
    "coordinator enrol": f"y\n{WORDS}\n",
    "node join": "y\n",
}
ENDS_WITH = {"node check north": 1, "node audit north": (0, 1)}


# --- The pages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A command of a page, and what stands below it."""

    words: list[str]
    shown: list[str]

    @property
    def head(self) -> str:
        return " ".join(self.words[:2])


def lines(page: str) -> list[Line]:
    """The commands of a page, in its order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = part.splitlines()
            program, *words = shlex.split(command)
            assert program == "cloister", command
            found.append(Line(words, shown))
    return found


def here(text: str) -> str:
    """What a page says, with the names of this machine."""
    return text.replace("coordinator.example.org", "localhost").replace("192.0.2.7", "127.0.0.1")


def plain(text: str) -> list[str]:
    """Sentences without figures, bars, digests and names of runs, wherever they were broken."""
    text = re.sub(r"^(?:[│┃] *|[┌├└┏┡].*)", "", text, flags=re.MULTILINE)  # a row is no sentence
    text = re.sub(r"[│┃━█▒░▓]", " ", text)
    text = re.sub(r"\b(?:open|closed)\b(?= +\d+/)", "#", text)
    text = re.sub(r"^(Passphrase|Repeat for).*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\[y/N\]:).*", r"\1", text)
    text = re.sub(r"chest-\d{8}-\d{6}-[0-9a-f]{4}", "RUN", text)
    text = re.sub(r"\b\d+:[0-9a-f]{64}:[0-9a-f]{64}\b", "WITNESS", text)
    text = re.sub(r"\b[0-9a-f]{8,}\b|[+-]?\d[\d.:e/-]*%?", "#", text)
    joined = re.sub(r"\n[ \t]+(?=[^\s✓✗•!])", " ", text)
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def missing(shown: list[str], printed: str) -> list[str]:
    """What a page shows and a command does not print."""
    said = " ".join(" ".join(plain(printed)).split())
    parts = "\n".join(shown).split("…")  # nothing is claimed of the lines of an ellipsis
    wanted: list[str] = []
    for number, part in enumerate(parts):
        whole = part.splitlines()
        begin, end = int(number > 0), len(whole) - int(number < len(parts) - 1)
        wanted += plain("\n".join(whole[begin:end] if "\n" in part else []))
    return [line for line in wanted if line not in said]


# --- The walk -----------------------------------------------------------------------------------


@dataclass
class Walk:
    """Two folders, one for each person, and what runs on their terminals."""

    folder: Path
    port: int
    terminals: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def node(self) -> Path:
        return self.folder / "hospital" / "north"

    def take(self, who: str, line: Line) -> None:
        """Type a line, and compare what comes."""
        words = [self.filled(line.head, word) for word in line.words]
        if line.head == "coordinator init":
            words += ["--port", str(self.port)]
        if line.head in SERVING:
            self.start(who, line.head, words)
            return
        printed = self.type(who, *words)
        assert missing(list(map(here, line.shown)), printed) == [], (
            f"{shlex.join(words)}:\n{printed}"
        )

    def type(self, who: str, *words: object) -> str:
        """What a person types, and reads."""
        os.chdir(self.folder / who)
        typed = [str(word) for word in words]
        done = CliRunner().invoke(app, typed, input=TYPED.get(" ".join(typed[:2]), ""))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise AssertionError(f"{shlex.join(typed)}: {done.exception!r}{self.tails()}")
        expected = ENDS_WITH.get(" ".join(typed), 0)
        accepted = expected if isinstance(expected, tuple) else (expected,)
        assert done.exit_code in accepted, f"{shlex.join(typed)}: {done.output}{self.tails()}"
        return done.output

    def start(self, who: str, head: str, words: list[str]) -> None:
        with self.screen(head).open("ab") as screen:
            self.terminals[head] = subprocess.Popen(
                [*PROGRAM, *words],
                cwd=self.folder / who,
                env=os.environ | {"PYTHONPATH": str(ROOT), "CLOISTER_NODE_HEALTH": "none"},
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
            )

    def screen(self, head: str) -> Path:
        return self.folder / f"{head}.txt"

    def ended(self, head: str) -> str:
        """Wait until a command on another terminal is over; all that it has printed."""
        assert self.terminals[head].wait(PATIENCE) == 0, self.tails()
        return self.screen(head).read_text()

    def close(self) -> None:
        for process in self.terminals.values():
            process.terminate()
        for process in self.terminals.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- What is another thing each time

    def filled(self, head: str, word: str) -> str:
        if re.fullmatch(r"chest-\d{8}-\d{6}-[0-9a-f]{4}", word):
            other = head in ("coordinator resume", "coordinator stop")
            return self.runs["closed" if other else "first"].name
        if re.fullmatch(r"[0-9a-f]{8}", word):
            name = {"node deny": "denied", "node close": "closed"}.get(head, "first")
            return self.runs[name].spec.digest[:8]
        if word == "/archive/today":
            return "films"
        if word == "TOKEN":
            return NodeFolder.open(self.node).ledger().witness
        return here(word)

    # --- What people do between the lines

    def mail(self, name: str, sender: str, receiver: str) -> None:
        shutil.copy(self.folder / sender / name, self.folder / receiver / name)

    def edit(self, *pairs: tuple[str, str]) -> None:
        text = (self.node / "node.toml").read_text()
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        (self.node / "node.toml").write_text(text)

    def launched(self, name: str) -> Run:
        """The newest run, which is called by its part from now on."""
        before = {run.name for run in self.runs.values()}
        home = open_home(self.folder / "operator" / "federation")
        self.wait(lambda: {run.name for run in home.all_runs()} - before, "a run in the queue")
        self.runs[name] = next(run for run in home.all_runs() if run.name not in before)
        return self.runs[name]

    def another(self, name: str) -> Run:
        """The operator launches the same file again; the run waits for a person."""
        self.type(
            "operator", "coordinator", "launch", "run.toml", "--detach", "--home", "federation"
        )
        run = self.launched(name)
        self.wait(lambda: self.asks(run), f"{run.name} to wait for a person")
        return run

    def asks(self, run: Run) -> bool:
        return run.spec.digest[:12] in self.type("hospital", "node", "requests", "north")

    def ready(self) -> bool:
        found = last_report(self.node)
        return found is not None and found.ready and found.pid == self.terminals["node start"].pid

    def wait(self, true: Callable[[], object], what: str) -> None:
        last = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < last, f"waited in vain for {what}{self.tails()}"
            time.sleep(0.1)

    def tails(self) -> str:
        screens = [self.screen(head) for head in self.terminals]
        return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in screens)


def operator_does(walk: Walk, head: str) -> None:
    """What the operator's page says in words before a line."""
    match head:
        case "coordinator enrol":
            walk.mail("north.request.pem", "hospital", "operator")
        case "coordinator watch":
            said = walk.ended("coordinator launch")
            assert "waits for north (a person's approval)" in said
            assert re.search(r"round +2 ", said), said
            assert "is finished" in said
        case "coordinator resume":
            walk.start("hospital", "node start", ["node", "start", "north"])
            walk.type("hospital", "node", "admit", "north", "--reason", "again")
            walk.wait(walk.ready, "the node to be back")
        case "coordinator report":
            package = walk.runs["first"].path / "package"
            walk.wait((package / "manifest.sig").exists, "the model to be signed")
            shutil.copytree(package, walk.folder / "hospital" / "chest.model")
        case "coordinator stop":
            walk.wait(lambda: walk.asks(walk.runs["closed"]), "it to wait for a person again")


def hospital_does(walk: Walk, head: str, times: int) -> None:
    """What the hospital's page says in words before a line that comes for the n-th time."""
    match head, times:
        case "node join", _:
            walk.mail("north.bundle.json", "operator", "hospital")
            screen = walk.screen("coordinator start")
            walk.wait(lambda: "Nodes are heard" in screen.read_text(), "the coordinator")
        case "node check", 1:
            (walk.folder / "hospital" / "site.key").rename(walk.node / "site.key")
            walk.edit(("operators = []", 'operators = ["trial-office"]'))
            walk.edit(("\nmodels = []", '\nmodels = ["compact-cnn"]'))
            walk.edit(("pace = 0.5", "pace = 0.0"))  # nobody waits for a test
        case "node status", _:
            walk.wait(walk.ready, "the node")
        case "node requests", _:
            run = walk.launched("first")
            walk.wait(lambda: walk.asks(run), "the run to wait for a person")
        case "node deny", _:
            walk.another("denied")
        case "node close", _:
            run = walk.another("closed")
            approve = ("node", "approve", run.spec.digest[:8], "--home", "north")
            walk.type("hospital", *approve, "--reason", "again", "--yes")
        case "node set-budget", _:
            closed = walk.runs["closed"]
            walk.wait(
                lambda: closed.state.standing not in OPEN, "the end of the run that is closed"
            )
            walk.edit(("epsilon = 8.0", "epsilon = 10.0"))
        case "node audit", 4:
            shutil.rmtree(walk.node / "ledger")
        case "node recover", _:
            walk.terminals["node start"].terminate()
            walk.terminals["node start"].wait(PATIENCE)


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    hospitals = {each.name: each for each in make_hospitals(tmp_path / "made", seed=1, size=0.2)}
    run = re.search(r"```toml\n(name = .*?)```", (ROOT / "docs/operator.md").read_text(), re.DOTALL)
    assert run
    text = run[1].replace("rounds = 15", "rounds = 2").replace("quorum = 2", "quorum = 1")
    for who, name in (("operator", "evaluation"), ("hospital", "north")):
        (tmp_path / who).mkdir()
        hospitals[name].folder.rename(tmp_path / who / "films")
        hospitals[name].labels.rename(tmp_path / who / "labels.csv")
        (tmp_path / who / "run.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name, value in {"LOGNAME": "ada", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    made = Walk(tmp_path, port)
    try:
        yield made
    finally:
        made.close()


def test_two_people_get_from_nothing_to_a_result_by_what_the_pages_say(walk: Walk):
    pages = {who: lines((ROOT / f"docs/{who}.md").read_text()) for who in ("operator", "hospital")}
    counts: dict[str, int] = {}
    for turn in ORDER.strip().splitlines():
        who, _, heads = turn.partition(": ")
        for head in heads.split(", "):
            line = pages[who].pop(0)
            assert line.head == head, f"docs/{who}.md has another order now"
            counts[f"{who} {head}"] = counts.get(f"{who} {head}", 0) + 1
            if who == "operator":
                operator_does(walk, head)
            else:
                hospital_does(walk, head, counts[f"{who} {head}"])
            walk.take(who, line)
    assert pages == {"operator": [], "hospital": []}, "lines that nobody comes to"
    assert "is stopped" in walk.ended("coordinator resume")
    standing = {name: run.state.standing for name, run in walk.runs.items()}
    assert standing["first"] is Standing.FINISHED
    assert standing["closed"] is Standing.STOPPED
    assert (walk.runs["first"].path / "report.html").exists()
    assert (walk.folder / "hospital" / "run.html").exists()
