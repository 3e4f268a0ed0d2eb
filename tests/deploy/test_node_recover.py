"""A node whose ledger was lost, damaged or put back: it stops, and a person lets it go on."""

from __future__ import annotations

import gc
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from client.app import answer
from client.folder import NodeFolder
from client.gate import Gate
from client.home import NodeHome
from client.ledger import Signed
from client.recovery import recover
from common import accounting
from common.errors import ConfigError, RefusalCode
from common.messages import (
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    Reply,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec

Cloister = Callable[..., Any]
Weights = Callable[[RunSpec], Any]
ADA = ("--by", "Ada", "--reason", "the disk was lost")
AUTOMATIC = [('approval = "ask"', 'approval = "automatic"')]


class Lost:
    """A node that has trained one round of three before a copy of it was made, and one after.

    Attributes:
        last: the witness of its last entry, as the coordinator keeps it.
    """

    def __init__(self, home: Path, spec: RunSpec, weights: Any) -> None:
        self.home, self.spec, self.weights = home, spec, weights
        self.copy = home.with_name("copy")
        self.last = ""

    def live(self) -> None:
        served = self.gate()
        assert isinstance(served.invite(Invitation(self.spec)), NodeCard)
        assert isinstance(self.trained(1, served), Release)
        shutil.copytree(self.home, self.copy)
        assert isinstance(self.trained(2, served), Release)
        del served
        gc.collect()  # the node has ended: no connection is left that writes when it is closed

    def gate(self) -> Gate:
        return NodeHome.open(self.home).gate()

    def trained(self, number: int, served: Gate | None = None, witness: str = "") -> Reply:
        task = TrainTask(self.spec, number, self.weights, witness)
        return read_reply(answer(task.to_records(), lambda: served or self.gate()))

    @property
    def database(self) -> Path:
        return self.home / "ledger" / "ledger.sqlite"

    def run(self, statement: str) -> None:
        """Somebody with access to the disk, and without the key, who leaves it as it was."""
        with closing(sqlite3.connect(self.database)) as database:
            triggers = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
            found = database.execute(triggers).fetchall()
            for name, _ in found:
                database.execute(f"DROP TRIGGER {name}")
            database.execute(statement)
            for _, sql in found:
                database.execute(sql)
            database.commit()

    def counted(self) -> float:
        """The epsilon that counts against the budget, at the filter's order."""
        folder = NodeFolder.open(self.home)
        assert folder.policy.budget is not None
        book = folder.ledger().book
        return folder.policy.budget.epsilon_of(book.divergence(folder.policy.budget.at_order))


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what `Lost` has lived through is kept, once the first of them has."""
    return tmp_path_factory.mktemp("lost") / "lived"


@pytest.fixture
def lost(
    lived: Path, tmp_path: Path, make_node: Any, node_run: Any, global_weights: Weights
) -> Lost:
    """`Lost`, before anything happened to it."""
    spec = node_run()
    node = Lost(tmp_path / "north", spec, global_weights(spec))
    if not lived.exists():
        make_node(AUTOMATIC)
        node.live()
        shutil.copytree(tmp_path, lived)
        says(lived, tmp_path, lived)
    else:
        shutil.copytree(lived, tmp_path, dirs_exist_ok=True)
        says(tmp_path, lived, tmp_path)
    ledger = NodeFolder.open(node.home).ledger()
    node.last = ledger.witness
    ledger.disconnect()
    return node


def says(folder: Path, old: Path, new: Path) -> None:
    """Have the node in `folder` find its cohort in another folder than before."""
    file = folder / "north" / "node.toml"
    file.write_text(file.read_text().replace(str(old), str(new)))


def missing(node: Lost) -> None:
    shutil.rmtree(node.home / "ledger")


def garbage(node: Lost) -> None:
    node.database.write_bytes(b"not a database at all" * 1000)


def cut_short(node: Lost) -> None:
    with closing(sqlite3.connect(node.database)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = node.database.read_bytes()
    node.database.write_bytes(content[: len(content) // 2])


def altered(node: Lost) -> None:
    node.run("UPDATE entry SET noise_multiplier = 9.0 WHERE number = 5")


def cut_off(node: Lost) -> None:
    node.run("DELETE FROM entry WHERE number > 6")


def rules_gone(node: Lost) -> None:
    with closing(sqlite3.connect(node.database)) as database:
        database.execute("DROP TRIGGER entry_stays")
        database.commit()


def put_back(node: Lost) -> None:
    shutil.rmtree(node.home / "ledger")
    shutil.copytree(node.copy / "ledger", node.home / "ledger")


def witness_lost(node: Lost) -> None:
    (node.home / "ledger.witness").unlink()


def machine_put_back(node: Lost) -> None:
    """All of it; only the coordinator still knows, and says so with its next task."""
    put_back(node)
    shutil.copy(node.copy / "ledger.witness", node.home / "ledger.witness")
    assert isinstance(node.trained(2, witness=node.last), RefusalReply)


def forked(node: Lost) -> None:
    """Put back, and grown beyond where it was before somebody noticed."""
    put_back(node)
    shutil.copy(node.copy / "ledger.witness", node.home / "ledger.witness")
    weights = node.weights
    node.weights = {name: array * 0.5 for name, array in weights.items()}
    for number in (2, 3):
        assert isinstance(node.trained(number), Release)
    reply = node.trained(3, witness=node.last)
    assert isinstance(reply, RefusalReply)


WHOLE = [put_back, cut_off, witness_lost, machine_put_back, forked]
BROKEN = [missing, garbage, cut_short, altered, rules_gone]
GOES_ON = [put_back, witness_lost, machine_put_back, forked]


@pytest.mark.parametrize("loss", [*WHOLE, *BROKEN], ids=lambda loss: loss.__name__)
def test_a_node_stops_and_goes_on_with_nothing_left(
    cloister: Cloister, lost: Lost, node_run: Any, loss: Callable[[Lost], None]
):
    loss(lost)
    reply = lost.trained(3)
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.LEDGER
    audit = cloister("node", "audit", lost.home)
    assert audit.code == 1
    assert "cannot be relied on" in audit.words
    assert "cloister node recover" in audit.words

    done = cloister("node", "recover", lost.home, *ADA)
    assert done.code == 0, done
    assert "ε 20.000 counts as spent, of 20" in done.words
    assert lost.counted() == pytest.approx(20.0)
    assert cloister("node", "audit", lost.home).code == 0
    assert cloister("node", "audit", lost.home, "--witness", lost.last).code == 0
    cloister("node", "admit", lost.home, *ADA)
    lost.gate().invite(Invitation(lost.spec))
    lost.trained(3, witness=lost.last)  # at best the same bytes again
    reply = lost.gate().invite(Invitation(node_run("another")))
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.BUDGET
    assert lost.counted() == pytest.approx(20.0)


@pytest.mark.parametrize("loss", [*WHOLE, *BROKEN], ids=lambda loss: loss.__name__)
def test_a_person_may_sign_for_less_and_the_node_works_again(
    cloister: Cloister, lost: Lost, node_run: Any, loss: Callable[[Lost], None]
):
    loss(lost)
    done = cloister("node", "recover", lost.home, *ADA, "--spent", 12)
    assert done.code == 0, done
    assert lost.counted() == pytest.approx(12.0)
    signed = [e for e in NodeFolder.open(lost.home).ledger().entries() if e.kind == "carried"]
    assert [entry.said["by"] for entry in signed] == ["Ada"]
    assert cloister("node", "admit", lost.home, *ADA).code == 0
    again = node_run("another")
    card = lost.gate().invite(Invitation(again))
    assert isinstance(card, NodeCard)
    number = int(card.witness.partition(":")[0])
    assert number > int(lost.last.partition(":")[0])  # so older witnesses are no contradiction
    lost.spec = again
    assert isinstance(lost.trained(1, witness=lost.last), Release)
    assert isinstance(lost.trained(2, witness=card.witness), Release)


@pytest.mark.parametrize("loss", BROKEN[1:], ids=lambda loss: loss.__name__)
def test_what_is_damaged_is_moved_aside_with_its_releases_and_not_changed(
    cloister: Cloister, lost: Lost, loss: Callable[[Lost], None]
):
    loss(lost)
    before = {p.name: p.read_bytes() for p in (lost.home / "ledger" / "releases").iterdir()}
    database = lost.database.read_bytes()
    assert before
    done = cloister("node", "recover", lost.home, *ADA)
    assert done.code == 0, done
    (aside,) = lost.home.glob("ledger.aside-*")
    assert aside.name in "".join(done.out.split())
    assert {p.name: p.read_bytes() for p in (aside / "releases").iterdir()} == before
    assert (aside / "ledger.sqlite").read_bytes() == database
    assert list(lost.home.glob("*.new-*")) == []


@pytest.mark.parametrize("loss", GOES_ON, ids=lambda loss: loss.__name__)
def test_a_whole_chain_goes_on_with_its_history(
    cloister: Cloister, lost: Lost, loss: Callable[[Lost], None]
):
    loss(lost)
    assert cloister("node", "recover", lost.home, *ADA).code == 0
    assert list(lost.home.glob("ledger.aside-*")) == []
    book = NodeFolder.open(lost.home).ledger().book
    assert book.run(lost.spec.digest).attempts
    assert book.open_runs() == []
    assert "small" in cloister("node", "budget", lost.home).out


def test_nobody_signs_for_less_than_can_be_read(cloister: Cloister, lost: Lost):
    (share,) = accounting.shares(lost.spec, 40)
    budget = NodeFolder.open(lost.home).policy.budget
    assert budget is not None
    read = budget.epsilon_of(2 * accounting.divergence(share.mechanism, budget.at_order))
    witness_lost(lost)
    content = lost.database.read_bytes()
    for spent in (0, read * 0.99):
        said = cloister("node", "recover", lost.home, *ADA, "--spent", spent)
        assert said.code == 2
        assert f"{read:.4f}" in said.err
    assert lost.database.read_bytes() == content
    assert cloister("node", "recover", lost.home, *ADA, "--spent", read * 1.0001).code == 0
    assert lost.counted() == pytest.approx(read, rel=1e-3)


def test_what_lies_behind_an_altered_entry_still_counts(cloister: Cloister, lost: Lost):
    (share,) = accounting.shares(lost.spec, 40)
    budget = NodeFolder.open(lost.home).policy.budget
    assert budget is not None
    spent = budget.epsilon_of(2 * accounting.divergence(share.mechanism, budget.at_order))
    lost.run("UPDATE entry SET note = '{}' WHERE number = 3")  # before every attempt
    for less in (0, spent * 0.99):
        said = cloister("node", "recover", lost.home, *ADA, "--spent", less)
        assert said.code == 2
        assert f"{spent:.4f}" in said.err
    assert cloister("node", "recover", lost.home, *ADA, "--spent", spent * 1.0001).code == 0
    assert lost.counted() == pytest.approx(spent, rel=1e-3)


def test_who_signed_for_what_can_be_read_back(cloister: Cloister, lost: Lost):
    shutil.rmtree(lost.home / "ledger")
    assert cloister("node", "recover", lost.home, *ADA, "--spent", 10).code == 0
    said = cloister("node", "audit", lost.home, "--decisions")
    assert "carried" in said.words
    assert "Ada" in said.words
    assert "the disk was lost" in said.words


def test_a_figure_that_no_filter_gives_is_not_taken_for_nothing(cloister: Cloister, lost: Lost):
    """PLD may say 1.1 where the filter's figure begins at 2: that must not be booked as none."""
    missing(lost)
    said = cloister("node", "recover", lost.home, *ADA, "--spent", 1.1)
    assert said.code == 2
    assert "the filter's figure" in said.err
    assert not (lost.home / "ledger").exists()
    done = cloister("node", "recover", lost.home, *ADA, "--spent", 0)
    assert done.code == 0
    assert "admit the cohort again" in done.words
    assert lost.counted() == 0.0


@pytest.mark.parametrize("spent", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize("more", [(), ("--new-key",)])
def test_only_a_number_can_be_signed_for(
    cloister: Cloister, lost: Lost, spent: str, more: tuple[str, ...]
):
    missing(lost)
    before = sorted(path.name for path in lost.home.iterdir())
    said = cloister("node", "recover", lost.home, *ADA, f"--spent={spent}", *more)
    assert said.code == 2
    assert "spent" in said.err
    with pytest.raises(ConfigError, match="finite"):
        recover(NodeFolder.open(lost.home), Signed("Ada", "why"), spent=float(spent))
    assert sorted(path.name for path in lost.home.iterdir()) == before


def test_a_recovery_that_fails_leaves_nothing_behind(lost: Lost, monkeypatch: pytest.MonkeyPatch):
    garbage(lost)
    rename = Path.rename
    before = {path: path.read_bytes() for path in lost.home.rglob("*") if path.is_file()}

    def refused(path: Path, target: Path) -> Path:
        if path.name.startswith("ledger.new-"):
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ConfigError, match="the disk is gone"):
        recover(NodeFolder.open(lost.home), Signed("Ada", "why"), new_key=True)
    after = {path: path.read_bytes() for path in lost.home.rglob("*") if path.is_file()}
    assert after == before


def test_a_ledger_that_can_be_relied_on_is_not_recovered(cloister: Cloister, lost: Lost):
    before = NodeFolder.open(lost.home).ledger().witness
    said = cloister("node", "recover", lost.home, *ADA, "--spent", 0)
    assert said.code == 2
    assert "nothing to recover" in said.err
    assert NodeFolder.open(lost.home).ledger().witness == before


def test_a_witness_from_elsewhere_finds_what_the_node_cannot(cloister: Cloister, lost: Lost):
    put_back(lost)
    shutil.copy(lost.copy / "ledger.witness", lost.home / "ledger.witness")
    assert cloister("node", "audit", lost.home).code == 0
    said = cloister("node", "audit", lost.home, "--witness", lost.last)
    assert said.code == 1
    assert "cut off or put back" in said.words
    done = cloister("node", "recover", lost.home, *ADA, "--witness", lost.last)
    assert done.code == 0
    assert cloister("node", "audit", lost.home, "--witness", lost.last).code == 0


def test_without_its_key_a_node_says_plainly_what_cannot_be_read_any_more(
    cloister: Cloister, lost: Lost
):
    (lost.home / "node.key").unlink()
    audit = cloister("node", "audit", lost.home)
    assert audit.code == 1
    assert "nobody can verify the chain or read the kept releases" in audit.words
    said = cloister("node", "recover", lost.home, *ADA)
    assert said.code == 2
    assert "--new-key" in said.err
    assert not (lost.home / "node.key").exists()
    done = cloister("node", "recover", lost.home, *ADA, "--new-key")
    assert done.code == 0
    assert stat.S_IMODE((lost.home / "node.key").stat().st_mode) == 0o600
    assert lost.counted() == pytest.approx(20.0)
    assert len(list(lost.home.glob("ledger.aside-*"))) == 1
    first = min(entry.number for entry in NodeFolder.open(lost.home).ledger().entries())
    assert first == int(lost.last.partition(":")[0]) + 1
    assert cloister("node", "audit", lost.home).code == 0


def test_a_key_that_others_have_read_is_replaced_and_kept_aside(cloister: Cloister, lost: Lost):
    old = (lost.home / "node.key").read_bytes()
    done = cloister("node", "recover", lost.home, *ADA, "--new-key", "--spent", 10)
    assert done.code == 0, done
    (aside,) = lost.home.glob("node.key.aside-*")
    assert aside.read_bytes() == old
    assert (lost.home / "node.key").read_bytes() != old
    assert lost.counted() == pytest.approx(10.0)


@pytest.mark.parametrize("loss", [altered, rules_gone], ids=lambda loss: loss.__name__)
def test_a_node_that_still_runs_does_not_go_on_with_the_old_ledger(
    cloister: Cloister, lost: Lost, loss: Callable[[Lost], None]
):
    served = lost.gate()
    loss(lost)
    assert cloister("node", "recover", lost.home, *ADA).code == 0
    for number in (2, 3):
        reply = lost.trained(number, served)
        assert isinstance(reply, RefusalReply)
        assert reply.code is RefusalCode.LEDGER


@pytest.mark.parametrize("loss", [witness_lost, missing], ids=lambda loss: loss.__name__)
def test_a_recovery_that_cannot_tell_a_witness_changes_nothing(
    cloister: Cloister, lost: Lost, loss: Callable[[Lost], None]
):
    file = lost.home / "node.toml"
    file.write_text(file.read_text().replace('"ledger.witness"', '"gone/ledger.witness"'))
    loss(lost)
    before = sorted(path.name for path in lost.home.iterdir())
    said = cloister("node", "recover", lost.home, *ADA)
    assert said.code == 2
    assert "gone" in said.err
    assert sorted(path.name for path in lost.home.iterdir()) == before


def test_a_new_ledger_may_count_at_another_order_where_nothing_that_was_spent_can_be_read(
    cloister: Cloister, lost: Lost
):
    altered(lost)
    file = lost.home / "node.toml"
    text = file.read_text()
    file.write_text(re.sub(r"order = [\d.]+", "order = 2.0", text))
    assert cloister("node", "recover", lost.home, *ADA).code == 0
    assert lost.counted() == pytest.approx(20.0)


def test_what_was_carried_keeps_its_order(cloister: Cloister, lost: Lost):
    NodeFolder.open(lost.home).ledger().carry(0.1, Signed("Ada", "before"))
    witness_lost(lost)
    file = lost.home / "node.toml"
    file.write_text(re.sub(r"order = [\d.]+", "order = 2.0", file.read_text()))
    said = cloister("node", "recover", lost.home, *ADA)
    assert said.code == 2
    assert "order" in said.err
