"""`cloister node listen` and `cloister intake fetch` as programs: watched, stopped, killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from client.intake.reception import Caller, Listen
from common.cohort import Cohort

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAM = (sys.executable, "-c", "from deploy.cli import main; main()")


class Node:
    """A node's folder with a table [listen], and the program that listens for it."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port
        self.inbox = home / "inbox"
        self.said = home / "said"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
        with self.said.open("wb") as said:
            self._process = subprocess.Popen(
                [*PROGRAM, "node", "listen", str(self.home), *options],
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        assert self.says("listens at"), self.said.read_text()
        return self._process

    def says(self, words: str, seconds: float = 60.0) -> bool:
        """Whether it says so within a time."""
        until = time.monotonic() + seconds
        while not re.search(words, self.said.read_text()):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    @property
    def complete(self) -> list[Path]:
        return list((self.inbox / "complete").rglob("*.dcm"))

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)


SETTINGS = """
[listen]
callers = [{{ ae_title = "PACS", addresses = ["127.0.0.1"] }}]
port = {port}
host = "127.0.0.1"
silence_seconds = 0.5
least_free_gib = 0.01
"""


@pytest.fixture
def node(make_node: Callable[..., Path], free_port: Callable[[], int]) -> Iterator[Node]:
    made = Node(make_node(admitted=False), free_port())
    text = SETTINGS.format(port=made.port) + 'transport = "plain"\n'
    with (made.home / "node.toml").open("a") as file:
        file.write(text)
    yield made
    made.end()


@pytest.fixture
def films(shared_data: Path) -> list[Path]:
    found = sorted((shared_data / "dicom" / "flywheel-tcia-pseudophi").rglob("*"))
    return [path for path in found if path.is_file()]


def send(storescu: str, node: Node, *what: Path, options: tuple[object, ...] = ()) -> str:
    done = subprocess.run(
        [
            *(storescu, "-v", "-xe", "-aet", "PACS", "-aec", "CLOISTER", *map(str, options)),
            *("127.0.0.1", str(node.port), *map(str, what)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_what_is_sent_is_counted_completed_and_said_when_it_ends(
    node: Node, program: Callable[[str], str], films: list[Path]
):
    process = node.start()
    assert node.says("PLAIN TCP: whoever is on the way can read")
    assert node.says("Originals with identities come to")
    send(program("storescu"), node, *films)
    assert node.says(f"0 arriving, [0-9]+ complete; objects: {len(films)} taken")
    send(program("storescu"), node, films[0])
    assert node.says("1 sent again")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    said = node.said.read_text()
    assert f"Stopped. studies: 0 arriving, {len(list((node.inbox / 'complete').iterdir()))}" in said
    assert len(node.complete) == len(films)
    for path in films:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert str(header.PatientName) not in said
        assert str(header.StudyInstanceUID) not in said


def test_over_tls_it_hears_who_has_a_certificate(
    make_node: Callable[..., Path],
    free_port: Callable[[], int],
    authority: Callable[..., Any],
    program: Callable[[str], str],
    films: list[Path],
):
    node, known = Node(make_node(admitted=False), free_port()), authority("hospital")
    own, mine = known.issue("listener"), known.issue("sender")
    for name, path in (("listen.crt", own.certificate), ("callers.crt", known.file)):
        (node.home / name).write_bytes(path.read_bytes())
    (node.home / "listen.key").touch(mode=0o600)
    (node.home / "listen.key").write_bytes(own.key.read_bytes())
    files = 'certificate = "listen.crt"\nkey = "listen.key"\ncallers_certificates = "callers.crt"\n'
    with (node.home / "node.toml").open("a") as file:
        file.write(SETTINGS.format(port=node.port) + files)
    try:
        process = node.start()
        assert node.says("TLS with a certificate of the caller")
        tls = ("+tls", mine.key, mine.certificate, "+cf", known.file)
        assert "Success" in send(program("storescu"), node, films[0], options=tls)
        assert "Success" not in send(program("storescu"), node, films[1])
        assert node.says("turned away: 127.0.0.1, no TLS")
        assert node.says("objects: 1 taken")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        node.end()


@pytest.mark.slow
def test_killed_while_a_pacs_sends_it_has_whatever_it_acknowledged(
    node: Node, program: Callable[[str], str], films: list[Path]
):
    storescu, acknowledged = program("storescu"), set()
    for moment in (0.05, 0.2):
        process = node.start()
        killer = subprocess.Popen(["/bin/sh", "-c", f"sleep {moment}; kill -9 {process.pid}"])
        said = send(storescu, node, *films)
        killer.wait(30)
        process.wait(30)
        for sent in re.split(r"Sending file: ", said)[1:]:
            if "Received Store Response (Success)" in sent:
                acknowledged.add(sent.splitlines()[0].strip())
    process = node.start()
    assert list((node.inbox / "incoming").iterdir()) == []
    assert node.says("0 arriving")
    there = {tail(path) for path in node.complete}
    assert {tail(Path(name)) for name in acknowledged} <= there
    assert there <= {tail(path) for path in films}
    assert acknowledged
    assert "Success" in send(storescu, node, *films)
    assert node.says(f"{len(films)} taken|sent again")


@pytest.fixture
def take_in(
    films: list[Path], spec_text: str, cloister: Callable[..., Any], tmp_path: Path
) -> Callable[[Path, str], list[bytes]]:
    """`take_in(source, name)`: the images of the cohort of that name, after `intake run`."""
    numbers = {str(pydicom.dcmread(path, stop_before_pixels=True).PatientID) for path in films}
    lines = [f"{number},{'normal' if at % 2 else 'finding'}" for at, number in enumerate(numbers)]
    spec, labels = tmp_path / "run.toml", tmp_path / "labels.csv"
    spec.write_text(spec_text)
    labels.write_text("\n".join(["PatientID,label", *lines]))

    def taken(source: Path, name: str) -> list[bytes]:
        cohort = tmp_path / name
        said = cloister("intake", "run", source, cohort, "--spec", spec, "--labels", labels)
        assert said.code == 0, said
        opened = Cohort.open(cohort)
        return sorted(image.tobytes() for image in opened.images(range(len(opened))))

    return taken


@pytest.mark.slow
def test_what_a_pacs_has_sent_is_taken_in_and_later_what_it_sends_later(
    node: Node,
    program: Callable[[str], str],
    films: list[Path],
    take_in: Callable[[Path, str], list[bytes]],
):
    node.start()
    send(program("storescu"), node, *films[:10])
    assert node.says("0 arriving, [1-9]")
    assert len(take_in(node.inbox / "complete", "sent")) == 10
    send(program("storescu"), node, *films)
    assert node.says(f"0 arriving, [1-9][0-9]* complete; objects: {len(films)} taken")
    sent = take_in(node.inbox / "complete", "sent")
    assert sent == take_in(films[0].parent, "direct")
    assert len(sent) == len(films)


def tail(path: Path) -> bytes:
    """All of a file behind its file meta information, which each sender writes anew."""
    meta = pydicom.filereader.read_file_meta_info(path)
    return path.read_bytes()[128 + 4 + 12 + int(meta.FileMetaInformationGroupLength) :]


def test_without_a_table_listen_it_says_what_to_write(
    make_node: Callable[..., Path], cloister: Callable[..., Any]
):
    said = cloister("node", "listen", make_node(admitted=False))
    assert said.code == 2
    assert "there is no table [listen]" in said.words
    assert "docs/pacs.md" in said.words


def test_a_folder_that_another_process_fills_is_left_alone(
    node: Node, cloister: Callable[..., Any]
):
    node.start()
    said = cloister("node", "listen", node.home)
    assert said.code == 2
    assert "another process takes objects in there" in said.words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("https://pacs.example.org/",), "which studies?"),
        (("http://pacs.example.org/", "--modality", "CR"), "expected https"),
        (("https://u:pw-of-a-test@pacs.example.org/", "--modality", "CR"), "holds a password"),
        (("https://pacs.example.org/", "--modality", "CR", "--token-env", "NONE"), "is not set"),
        (("https://pacs.example.org/", "--modality", "CR", "--ca", "none.pem"), "no such file"),
    ],
)
def test_a_fetch_that_cannot_be_meant_is_refused_before_anything_is_made(
    cloister: Callable[..., Any], tmp_path: Path, words: tuple[str, ...], message: str
):
    said = cloister("intake", "fetch", words[0], tmp_path / "inbox", *words[1:])
    assert said.code == 2
    assert message in said.words
    assert "pw-of-a-test" not in said.words
    assert not (tmp_path / "inbox").exists()


def test_a_fetch_brings_studies_and_says_how_many(
    cloister: Callable[..., Any],
    start_orthanc: Callable[..., Any],
    films: list[Path],
    tmp_path: Path,
):
    pacs, inbox = start_orthanc(), tmp_path / "inbox"
    for path in films:
        pacs.upload(path)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(pacs.basic)
    asked = ("intake", "fetch", f"{pacs.url}/dicom-web", inbox, "--modality", "MR")
    room = ("--least-free-gib", "0.01")
    denied = cloister(*asked, *room)
    assert (denied.code, "denies access" in denied.words) == (2, True)
    first = cloister(*asked, *room, "--token-file", token)
    assert first.code == 0, first
    assert f"objects: {len(films)} taken" in first.words
    second = cloister(*asked, *room, "--token-file", token)
    assert f"objects: {len(films)} there already" in second.words
    assert {tail(path) for path in (inbox / "complete").rglob("*.dcm")} == set(map(tail, films))
    full = cloister(*asked[:3], tmp_path / "full", *asked[4:], "--least-free-gib", "1e9",
                    "--token-file", token)  # fmt: skip
    assert (full.code, "disk is full" in full.words) == (2, True)


def example(page: str) -> dict[str, Any]:
    found = re.search(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found
    table: dict[str, Any] = tomllib.loads(found[1])["listen"]
    return table


@pytest.mark.parametrize("page", ["node-file.md", "pacs.md"])
def test_the_pages_show_a_table_listen_that_can_be_read(page: str):
    shown = example(page)
    callers = tuple(
        Caller(**(each | {"addresses": tuple(each.get("addresses", ()))}))
        for each in shown["callers"]
    )
    Listen(**(shown | {"callers": callers}))


def test_the_page_of_the_nodes_file_shows_every_key_with_its_default():
    shown = example("node-file.md")
    assert set(shown) == set(Listen.model_fields)
    chosen = {"callers", "host", "certificate", "key", "callers_certificates", "keep_days"}
    for name in set(shown) - chosen:
        assert shown[name] == Listen.model_fields[name].get_default(), name
