"""A node's folder as it lies on a disk, and the app that answers from it on every path."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity

from client import app as node_app
from client.folder import KEY_FILE, POLICY_FILE, cohort_digest
from client.home import NodeHome, compute_of
from client.ledger import Signed
from client.training import patient_bytes
from common import accounting
from common.errors import CohortError, ConfigError, LedgerError, RefusalCode
from common.files import locked
from common.messages import (
    CLOSE,
    COUNT,
    INVITE,
    TRAIN,
    Closed,
    Closing,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    Request,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from common.tasks.generation import Drawn
from deploy.synthetic import write_cohort as write_drawn

Spec = Callable[..., RunSpec]

NODE = """\
site = "north"
declared_size = 40
cohort = "../cohort"
approval = "automatic"

[budget]
epsilon = 20.0
delta = 1e-4

[limits]
operators = "any"
models = "any"

[data]
unit = "patient"
kind = "binary"
classes = ["normal", "finding"]
shape = [1, 16, 16]
preprocessing = "PREPROCESSING"

[release]
pace = 0.0

[machine]
device = "cpu"
gradient_memory = 16
"""
PERSON = Signed("Ada", "looked at")


@dataclass
class Folder:
    """A node's folder, made and unmade by a test."""

    path: Path
    text: str

    def write(self, old: str = "", new: str = "") -> None:
        assert not old or self.text.count(old) == 1
        (self.path / POLICY_FILE).write_text(self.text.replace(old, new))

    @property
    def home(self) -> NodeHome:
        return NodeHome.open(self.path)

    def admit(self) -> None:
        ledger = self.home.ledger()
        ledger.admit(cohort_digest(self.home.cohort_path), PERSON)
        ledger.disconnect()

    @property
    def files(self) -> dict[str, bytes]:
        found = (path for path in self.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)): path.read_bytes() for path in found}


@pytest.fixture
def bare(tmp_path: Path, make_spec: Spec, write_cohort: Any) -> Folder:
    """A cohort, and beside it a folder with a policy alone."""
    write_cohort(make_spec(), range(23))
    digest = make_spec().input.preprocessing_digest
    folder = Folder(tmp_path / "north", NODE.replace("PREPROCESSING", digest))
    folder.path.mkdir(mode=0o700)
    folder.write()
    return folder


@pytest.fixture
def folder(bare: Folder) -> Folder:
    """A whole node, whose cohort a person admitted."""
    bare.home.create(by="Ada").disconnect()
    bare.admit()
    return bare


@pytest.fixture
def spec(make_spec: Spec) -> RunSpec:
    return make_spec().identified("a-run")


@pytest.fixture
def task(spec: RunSpec, global_weights: Any) -> TrainTask:
    return TrainTask(spec, 1, global_weights(spec))


# --- What makes a node ------------------------------------------------------------------------


def test_a_new_node_has_a_key_a_ledger_and_the_budget_of_its_file(bare: Folder):
    ledger = bare.home.create(by="Ada")
    assert ledger.book.site == "north"
    budget = bare.home.policy.budget
    assert budget is not None
    assert ledger.book.limit == budget.limit
    assert [(entry.kind, entry.said["by"]) for entry in ledger.entries()] == [
        ("opened", "Ada"),
        ("budget", "Ada"),
    ]
    assert oct((bare.path / KEY_FILE).stat().st_mode)[-3:] == "600"
    assert bare.home.witness.read_text().splitlines()[-1] == ledger.witness


@pytest.mark.parametrize("left", ["node.key", "ledger", "ledger.witness"])
def test_a_node_that_was_there_once_is_not_made_anew(folder: Folder, left: str):
    """A ledger that begins with nothing spent is what nobody may have by deleting a file."""
    for name in {"node.key", "ledger", "ledger.witness"} - {left}:
        lost = folder.path / name
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    before = folder.files
    with pytest.raises(ConfigError, match=f"{left}: there already.*cloister node recover"):
        folder.home.create(by="Ada")
    assert folder.files == before


def test_a_folder_without_a_policy_is_no_node(bare: Folder):
    (bare.path / POLICY_FILE).unlink()
    with pytest.raises(ConfigError, match=r"node\.toml"):
        NodeHome.open(bare.path)


# --- What stops a node ------------------------------------------------------------------------


def lose(name: str) -> Callable[[Folder], None]:
    def lost(folder: Folder) -> None:
        path = folder.home.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return lost


def another_key(folder: Folder) -> None:
    (folder.path / KEY_FILE).write_text("ab" * 32 + "\n")


def put_back(folder: Folder) -> None:
    before = folder.path / "before"
    shutil.copytree(folder.path / "ledger", before)
    folder.admit()
    shutil.rmtree(folder.path / "ledger")
    before.rename(folder.path / "ledger")


STOPS: dict[str, tuple[Callable[[Folder], None], type[Exception], str]] = {
    "no key": (lose("node.key"), ConfigError, r"node\.key: the node key cannot be read"),
    "a key that others read": (
        lambda folder: (folder.path / KEY_FILE).chmod(0o640),
        ConfigError,
        "mode 0640, others may reach it",
    ),
    "another key": (another_key, LedgerError, "cloister node audit"),
    "no ledger": (lose("ledger/ledger.sqlite"), LedgerError, "the ledger is missing"),
    "no ledger's folder": (lose("ledger"), LedgerError, "the ledger is missing"),
    "no witness": (lose("ledger.witness"), LedgerError, "holds no witness of this ledger"),
    "an older ledger": (put_back, LedgerError, "a witness has seen entry"),
    "more budget than was booked": (
        lambda folder: folder.write("epsilon = 20.0", "epsilon = 21.0"),
        ConfigError,
        r"budget is .*epsilon=21\.0.*but the ledger has .*epsilon=20\.0",
    ),
    "another order": (
        lambda folder: folder.write("delta = 1e-4", "delta = 1e-4\norder = 4.0"),
        ConfigError,
        "cloister node set-budget",
    ),
    "no cohort": (lose("../cohort"), CohortError, "not a cohort"),
    "a mistake in the policy": (
        lambda folder: folder.write("declared_size = 40", 'declared_size = "40"'),
        ConfigError,
        "declared_size",
    ),
}


@pytest.mark.parametrize("why", STOPS)
def test_a_node_that_is_not_whole_does_not_open_and_says_why(folder: Folder, why: str):
    befalls, error, says = STOPS[why]
    folder.home.gate()
    befalls(folder)
    before = folder.files.keys()
    with pytest.raises(error, match=says):
        folder.home.gate()
    assert folder.files.keys() <= before  # nothing is made anew in its place


def test_a_cohort_that_nobody_admitted_is_not_trained_on(bare: Folder, task: TrainTask):
    bare.home.create(by="Ada").disconnect()
    for message in (bare.home.gate().invite(Invitation(task.spec)), bare.home.gate().train(task)):
        assert message == RefusalReply(code=RefusalCode.POLICY)


def test_a_cohort_that_changed_since_a_person_admitted_it_waits_for_one(
    folder: Folder, task: TrainTask, write_cohort: Any, caplog: pytest.LogCaptureFixture
):
    running = folder.home.gate()
    assert isinstance(running.invite(Invitation(task.spec)), NodeCard)
    lose("../cohort")(folder)
    write_cohort(task.spec, range(24))
    assert running.train(task).code is RefusalCode.INCIDENT  # type: ignore[union-attr]
    assert "another cohort lies there" in caplog.text
    started = folder.home.gate()
    for reply in (started.invite(Invitation(task.spec)), started.train(task)):
        assert reply == RefusalReply(code=RefusalCode.POLICY)
    assert folder.home.ledger().book.spent() == []
    folder.admit()
    assert isinstance(started.train(task), Release)


# --- What answers -----------------------------------------------------------------------------


def test_two_gates_of_one_home_keep_one_account(folder: Folder, task: TrainTask):
    one, other = folder.home.gate(), folder.home.gate()
    assert isinstance(one.invite(Invitation(task.spec)), NodeCard)
    first = other.train(task)
    assert isinstance(first, Release)
    again = one.train(task)
    assert isinstance(again, Release)
    assert {name: array.tobytes() for name, array in again.update.items()} == {
        name: array.tobytes() for name, array in first.update.items()
    }
    assert isinstance(other.close(Closing(task.spec.digest)), Closed)
    assert one.train(task) == RefusalReply(code=RefusalCode.REPLAY)
    assert [mechanism.steps for mechanism in folder.home.ledger().book.spent()] == [1]


def test_the_device_and_the_memory_of_the_file_reach_the_trainer(folder: Folder, make_spec: Spec):
    spec = make_spec(model={"name": "small-cnn", "width": 64})
    (share,) = accounting.shares(spec, 40)
    batches = []
    for memory in (16, 64):
        folder.write("gradient_memory = 16", f"gradient_memory = {memory}")
        trainer = folder.home.gate()._trainer_for(spec, share.whole)
        assert trainer._device == torch.device("cpu")
        assert trainer._physical_patients == memory * 2**20 // patient_bytes(spec)
        batches.append(trainer._physical_patients)
    assert batches[0] < batches[1]
    folder.write('device = "cpu"', 'device = "cuda:1"')
    assert compute_of(folder.home.policy).device == torch.device("cuda", 1)


def test_losses_and_numbers_of_patients_stay_in_the_folder(folder: Folder, task: TrainTask):
    gate = folder.home.gate()
    gate.invite(Invitation(task.spec))
    gate.train(task)
    (page,) = folder.home.diary.read(task.spec.digest)
    assert page.round_number == 1
    assert 0 <= sum(page.patients) <= 23


# --- The app ----------------------------------------------------------------------------------


class App:
    """What a hospital installs, asked as Flower asks it."""

    def send(self, kind: str, content: RecordDict) -> RecordDict:
        reply: Message = node_app.app(Message(content, 1, kind), context())
        assert not reply.has_error()
        return reply.content

    def ask(self, request: Request) -> Reply:
        kinds = {Invitation: INVITE, TrainTask: TRAIN, Closing: CLOSE}
        return read_reply(self.send(kinds[type(request)], request.to_records()))


def context() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


@pytest.fixture
def app(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    monkeypatch.setenv("CLOISTER_NODE_HOME", str(folder.path))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
    node_app.open_node.cache_clear()
    yield App()
    node_app.open_node.cache_clear()


def test_half_a_cohort_shows_when_it_is_used_and_costs_nothing(
    app: App, folder: Folder, task: TrainTask, caplog: pytest.LogCaptureFixture
):
    """Opening it takes as long as it is large, so it is opened where a slot hides that."""
    lose("../cohort/images.u16")(folder)
    assert isinstance(app.ask(Invitation(task.spec)), NodeCard)
    reply = app.ask(task)
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.INCIDENT
    assert "images.u16 is missing" in caplog.text
    assert folder.home.ledger().book.spent() == []


def test_one_process_answers_for_a_node(app: App, folder: Folder, task: TrainTask):
    with locked(folder.path):  # as another worker holds it
        with pytest.raises(ConfigError, match="another process answers for this node"):
            node_app.open_node(folder.path)
        refused = app.ask(Invitation(task.spec))
        assert isinstance(refused, RefusalReply)
        assert refused.code is RefusalCode.INCIDENT
    assert isinstance(app.ask(Invitation(task.spec)), NodeCard)
    with pytest.raises(BlockingIOError), locked(folder.path):
        pass


def test_a_request_under_another_kind_of_message_is_malformed(
    app: App, folder: Folder, task: TrainTask
):
    assert isinstance(app.ask(Invitation(task.spec)), NodeCard)
    for kind in (INVITE, CLOSE, COUNT):
        reply = read_reply(app.send(kind, task.to_records()))
        assert reply == RefusalReply(code=RefusalCode.MALFORMED)
    assert isinstance(app.ask(task), Release)


def test_the_app_answers_a_whole_run(app: App, folder: Folder, task: TrainTask):
    card = app.ask(Invitation(task.spec))
    assert isinstance(card, NodeCard)
    assert (card.site, card.declared_size, card.paced) == ("north", 40, False)
    for number in (1, 2, 3):
        release = app.ask(TrainTask(task.spec, number, task.weights, card.witness))
        assert isinstance(release, Release)
        assert (release.round_number, release.digest) == (number, task.spec.digest)
    closed = app.ask(Closing(task.spec.digest))
    assert closed == Closed(digest=task.spec.digest, witness=folder.home.ledger().witness)
    assert app.ask(task) == RefusalReply(code=RefusalCode.REPLAY)
    assert [mechanism.steps for mechanism in folder.home.ledger().book.spent()] == [3]


def test_the_app_refuses_what_is_no_message_on_every_path(app: App, folder: Folder):
    before = list(folder.home.ledger().entries())
    for kind in (INVITE, TRAIN, CLOSE, "evaluate.count"):
        assert read_reply(app.send(kind, RecordDict())) == RefusalReply(code=RefusalCode.MALFORMED)
    assert list(folder.home.ledger().entries()) == before


def test_the_app_answers_a_message_that_carries_an_error_instead_of_content(app: App):
    asked = Message(RecordDict(), 1, TRAIN)
    broken = object.__new__(Message)
    broken.__dict__.update(_metadata=asked.metadata, _content=None, _error=Error(0, "odd"))
    assert isinstance(broken.metadata, Metadata)
    reply = node_app.app(broken, context())
    assert read_reply(reply.content) == RefusalReply(code=RefusalCode.MALFORMED)


@pytest.mark.parametrize("why", STOPS)
def test_the_app_of_a_node_that_does_not_open_gives_a_code_and_goes_on_when_it_is_mended(
    app: App, folder: Folder, task: TrainTask, tmp_path: Path, why: str
):
    befalls, error, _ = STOPS[why]
    whole = tmp_path / "whole"
    for name in ("north", "cohort"):
        shutil.copytree(tmp_path / name, whole / name)
    befalls(folder)
    for request in (Invitation(task.spec), task, Closing(task.spec.digest)):
        reply = app.ask(request)
        assert isinstance(reply, RefusalReply)
        known = RefusalCode.LEDGER if error is LedgerError else RefusalCode.INCIDENT
        assert reply.code is known
    for name in ("north", "cohort"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.move(whole / name, tmp_path / name)
    assert isinstance(app.ask(Invitation(task.spec)), NodeCard)


def test_an_app_without_a_home_answers_that_too(
    app: App, task: TrainTask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delenv("CLOISTER_NODE_HOME")
    reply = app.ask(Invitation(task.spec))
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.INCIDENT
    assert "CLOISTER_NODE_HOME is not set" in caplog.text


def test_importing_the_app_opens_nothing(folder: Folder):
    before = folder.files
    assert node_app.open_node.cache_info().currsize == 0
    assert folder.files == before


def test_synthetic_images_are_looked_at_when_a_run_asks_for_them(folder: Folder, make_spec: Spec):
    few = Drawn(torch.zeros(3, *make_spec().input.shape), torch.tensor([0, 1, 0]))
    (folder.path / "made").mkdir()
    write_drawn(folder.path / "made" / "cohort", few, make_spec())
    named = 'synthetic = "made/cohort"\nsynthetic_without_privacy = true\n'
    folder.write("[release]", f"{named}\n[release]")
    gate, answers = folder.home.gate(), list[Any]()
    asked = {"synthetic_without_privacy": True}
    for wanted in ({"synthetic": 3} | asked, {"synthetic": 4} | asked, {"synthetic": 3}, {}):
        run = make_spec(augmentation=wanted).identified(f"run-{len(answers)}")
        answers.append(gate.invite(Invitation(run)))
    refused = RefusalReply(code=RefusalCode.POLICY)
    assert answers[1:3] == [refused, refused]  # too few; and not taken by the run
    said = [answer.synthetic for answer in answers if isinstance(answer, NodeCard)]
    assert said == ["unprotected", None]
