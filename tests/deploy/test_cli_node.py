"""`cloister node` as a security officer meets it, with real homes, real cohorts and real gates."""

from __future__ import annotations

import json
import re
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from client.app import answer
from client.approval import Asked
from client.book import Entry
from client.chain import Chain, _unreadable
from client.folder import NodeFolder, cohort_digest
from client.gate import Gate
from client.home import NodeHome
from client.intake.builder import CohortBuilder, ImageRecord
from client.ledger import Signed
from common import accounting
from common.cohort import CohortMeta
from common.errors import ConfigError, RefusalCode
from common.messages import (
    Closed,
    Closing,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
    read_reply,
)
from common.spec import RunSpec
from common.tasks.generation import Drawn
from deploy.synthetic import write_cohort as write_drawn

Cloister = Callable[..., Any]
MakeNode = Callable[..., Path]
Weights = Callable[[RunSpec], Any]
ADA = ("--by", "Ada", "--reason", "as agreed")


def gate(home: Path) -> Gate:
    return NodeHome.open(home).gate()


def invited(home: Path, spec: RunSpec) -> NodeCard | RefusalCode:
    reply = gate(home).invite(Invitation(spec))
    return reply.code if isinstance(reply, RefusalReply) else reply


def entries(home: Path) -> list[Entry]:
    return list(NodeFolder.open(home).ledger().entries())


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, but for what SQLite keeps beside a database."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if not path.name.endswith(("-wal", "-shm"))
    }


# --- Setting up ---------------------------------------------------------------------------------

NEW = ("--site", "north", "--declared-size", 400, "--epsilon", 8, "--delta", 1e-5)


def test_a_new_node_is_on_the_safe_side_and_takes_part_in_nothing(
    cloister: Cloister, tmp_path: Path
):
    home = tmp_path / "north"
    assert cloister("node", "init", home, *NEW, "--by", "Ada").code == 0
    policy = NodeFolder.open(home).policy
    assert (policy.site, policy.declared_size, policy.approval) == ("north", 400, "ask")
    assert policy.limits == type(policy.limits)()
    assert (policy.release, policy.machine) == (type(policy.release)(), type(policy.machine)())
    assert policy.budget is not None
    assert policy.budget.order == type(policy.budget)(epsilon=8, delta=1e-5).at_order
    assert stat.S_IMODE((home / "node.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert [entry.kind for entry in entries(home)] == ["opened", "budget"]
    assert cloister("node", "audit", home).code == 0
    said = cloister("node", "check", home)
    assert said.code == 1
    for text in ("No operator is allowed", "No network is allowed", "[data] is not filled in"):
        assert text in said.words


def test_a_new_node_learns_what_its_cohort_is_and_not_how_large(
    cloister: Cloister, tmp_path: Path, write_cohort: Any, node_run: Any
):
    texts = []
    for size in (12, 31):
        cohort = write_cohort(node_run(), range(size), name=f"of-{size}")
        home = tmp_path / f"home-{size}"
        assert cloister("node", "init", home, *NEW, "--cohort", cohort.path).code == 0
        data = NodeFolder.open(home).policy.data
        assert data is not None
        assert data.preprocessing == cohort.preprocessing_digest
        assert (data.classes, data.shape) == (cohort.classes, cohort.shape)
        texts.append((home / "node.toml").read_text().replace(str(cohort.path), "COHORT"))
    assert texts[0] == texts[1]


def test_a_cohort_inside_the_folder_moves_with_it(
    cloister: Cloister, tmp_path: Path, write_cohort: Any, node_run: Any
):
    cohort = write_cohort(node_run(), range(8), name="north/cohort")
    home = tmp_path / "north"
    assert cloister("node", "init", home, *NEW, "--cohort", cohort.path).code == 0
    home.rename(tmp_path / "moved")
    assert NodeFolder.open(tmp_path / "moved").cohort_path == tmp_path / "moved" / "cohort"
    assert (tmp_path / "moved" / "cohort").is_dir()


@pytest.mark.parametrize("name", ["node.toml", "node.key", "ledger", "ledger.witness"])
def test_nothing_that_is_there_is_written_over(cloister: Cloister, tmp_path: Path, name: str):
    home = tmp_path / "north"
    home.mkdir()
    (home / name).write_text("somebody's")
    before = tree(tmp_path)
    said = cloister("node", "init", home, *NEW)
    assert said.code == 2
    assert name in said.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--site": "no spaces please"}, "site"),
        ({"--delta": 0.01}, "0.0025"),
        ({"--delta": 0}, "--delta"),
        ({"--epsilon": -1}, "--epsilon"),
        ({"--epsilon": "nan"}, "--epsilon"),
        ({"--cohort": "missing"}, "missing"),
        ({"--epsilon": 0.001}, "epsilon"),
    ],
)
def test_a_node_that_cannot_be_made_leaves_nothing_behind(
    cloister: Cloister, tmp_path: Path, changes: dict[str, object], text: str
):
    options = dict(zip(NEW[::2], NEW[1::2], strict=True)) | changes
    for home in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        said = cloister("node", "init", home, *(word for pair in options.items() for word in pair))
        assert said.code == 2, said
        assert text in said.err
        assert ".partial" not in said.err
        assert tree(tmp_path) == {"there": b""}


# --- Checking -----------------------------------------------------------------------------------


def test_a_node_that_is_ready_is_told_so(cloister: Cloister, make_node: MakeNode):
    said = cloister("node", "check", make_node())
    assert said.code == 0, said.out
    assert "Only trial-office may launch a run here" in said.words
    assert "24 patients to train on, at least 5 of least_patients" in said.words
    assert "release.pace is 0" in said.words
    assert "lies on the ledger's own disk" in said.words
    assert "✗" not in said.out


def test_a_bare_file_is_explained_without_a_node(cloister: Cloister, make_node: MakeNode):
    home = make_node()
    bare = home.parent / "elsewhere.toml"
    bare.write_text((home / "node.toml").read_text())
    said = cloister("node", "check", bare)
    assert said.code == 0, said.out
    assert "Not set up" in said.words
    assert sorted(path.name for path in home.parent.glob("ledger*")) == []


NO = (RefusalCode.POLICY, RefusalCode.SPEC)
CASES: list[tuple[dict[str, Any], str]] = [
    ({"operator": "somebody"}, "operator 'somebody' is not on this site's list"),
    ({"rounds": 2000}, "rounds: 2000, at most 1000"),
    ({"local": {"steps": 300}}, "steps a round: 300, at most 200"),
    ({"local": {"batch_size": 20}}, "sampling rate: 0.5, at most 0.25"),
    ({"local": {"batch_size": 41}}, "sampling rate would be above 1"),
    ({"privacy": {"noise_multiplier": 0.3}}, "noise multiplier of training: 0.3"),
    ({"privacy": {"mechanism": "none"}}, "asks for no privacy"),
    ({"model": {"name": "resnet18"}}, "network 'resnet18' is not on this site's list"),
    ({"task": {"classes": ["no", "yes"]}}, "the run asks for ('no', 'yes')"),
]


@pytest.mark.parametrize(("changes", "text"), CASES, ids=[text for _, text in CASES])
def test_what_is_refused_here_is_what_the_gate_refuses(
    cloister: Cloister, make_node: MakeNode, make_spec: Any, changes: dict[str, Any], text: str
):
    home, spec = make_node(), make_spec(**{"operator": "trial-office"} | changes)
    (home.parent / "run.toml").write_text(toml(spec))
    said = cloister("node", "check", home, home.parent / "run.toml")
    assert said.code == 1
    assert text in said.words
    assert invited(home, spec) in NO


@pytest.mark.parametrize("mode", ["ask", "automatic"])
def test_what_is_allowed_here_waits_or_is_taken_as_at_the_gate(
    cloister: Cloister, make_node: MakeNode, node_run: Any, mode: str
):
    home = make_node([('approval = "ask"', f'approval = "{mode}"')])
    spec, great = node_run(), node_run("great", rounds=900)
    for run in (spec, great):
        (home.parent / f"{run.run_id}.toml").write_text(toml(run))
    said = cloister("node", "check", home, home.parent / f"{spec.run_id}.toml")
    assert said.code == 0
    beyond = cloister("node", "check", home, home.parent / "great.toml")
    assert beyond.code == 1
    assert "for life" in beyond.words
    if mode == "ask":
        assert "wait for a person" in said.words
        assert invited(home, spec) is RefusalCode.APPROVAL
    else:
        assert "Yes: this node would take part" in said.words
        assert isinstance(invited(home, spec), NodeCard)
        assert invited(home, great) is RefusalCode.BUDGET


def toml(spec: RunSpec) -> str:
    """A run's file that reads as `spec`."""
    lines = []

    def write(prefix: str, table: dict[str, Any]) -> None:
        plain = {k: v for k, v in table.items() if v is not None and not isinstance(v, dict)}
        lines.append(f"[{prefix}]" if prefix else "")
        for key, value in plain.items():
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            lines.append(f"{key} = {shown}")
        for key, value in table.items():
            if isinstance(value, dict):
                write(f"{prefix}.{key}" if prefix else key, value)

    write("", spec.model_dump(mode="json"))
    return "\n".join(lines)


def test_every_objection_is_named_at_once(cloister: Cloister, make_node: MakeNode, node_run: Any):
    home = make_node()
    run_file = home.parent / "run.toml"
    run_file.write_text(toml(node_run(rounds=2000, local={"steps": 300})))
    said = cloister("node", "check", home, run_file)
    assert "rounds: 2000" in said.words
    assert "steps a round: 300" in said.words


def test_a_run_is_priced_by_pld_and_by_the_filter(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node(), node_run(rounds=7)
    (home.parent / "run.toml").write_text(toml(spec))
    said = cloister("node", "check", home, home.parent / "run.toml").words
    (share,) = accounting.shares(spec, 40)
    budget = NodeFolder.open(home).policy.budget
    assert budget is not None
    assert f"ε {accounting.epsilon([share.whole], 1e-4):.3f} at δ 0.0001, by PLD" in said
    cost = accounting.divergence(share.whole, budget.at_order)
    whole = accounting.divergence_within(20.0, 1e-4, budget.at_order)
    assert f"{cost / whole:.1%} for life" in said
    assert f"{1 - cost / whole:.1%} of the budget" in said
    assert f"ε {budget.epsilon_of(cost):.3f}, with all that is set aside" in said
    assert "7 round(s) of 1 step(s), q 0.1, σ 1, per patient" in said


# --- Admitting a cohort -------------------------------------------------------------------------


def test_a_node_says_nothing_but_no_before_its_cohort_is_admitted(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home = make_node(admitted=False)
    assert invited(home, node_run()) is RefusalCode.POLICY
    said = cloister("node", "admit", home, *ADA)
    assert said.code == 0
    assert cohort_digest(home.parent / "cohort") in said.out.replace("\n", "")
    assert entries(home)[-1].said == {"by": "Ada", "reason": "as agreed"}
    assert invited(home, node_run()) is RefusalCode.APPROVAL


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ([("least_patients = 5", "least_patients = 25")], {}, "24 patients to train on"),
        ([], {"labels": [0] * 24}, "expected more"),
        ([("shape = [1, 16, 16]", "shape = [1, 64, 64]")], {}, "[data] shape"),
        ([('"finding"', '"pneumonia"')], {}, "[data] classes"),
        ([('unit = "patient"\nkind', 'unit = "image"\nkind')], {}, "[data] unit"),
    ],
    ids=["few", "one class", "shape", "classes", "unit"],
)
def test_a_cohort_that_is_not_as_it_should_be_is_refused_by_name(
    cloister: Cloister, make_node: MakeNode, changes: Any, options: Any, text: str
):
    home = make_node(changes, admitted=False, **options)
    before = entries(home)
    said = cloister("node", "admit", home, *ADA)
    assert said.code == 1
    assert text in said.words
    assert "[data] as the cohort has it" in said.words
    assert entries(home) == before
    assert cloister("node", "check", home).code == 1


def test_a_pixel_that_was_changed_is_found_before_anybody_signs(
    cloister: Cloister, make_node: MakeNode
):
    home = make_node(admitted=False)
    images = home.parent / "cohort" / "images.u16"
    images.chmod(0o600)
    content = bytearray(images.read_bytes())
    content[16 * 16 * 2 * 3] ^= 1
    images.write_bytes(content)
    before = entries(home)
    said = cloister("node", "admit", home, *ADA)
    assert said.code == 2
    assert "image 3 has SHA-256" in said.err
    assert entries(home) == before


# --- Runs ---------------------------------------------------------------------------------------


def test_a_run_is_asked_for_approved_trained_and_closed(
    cloister: Cloister, make_node: MakeNode, node_run: Any, global_weights: Weights
):
    home, spec = make_node(), node_run()
    assert cloister("node", "requests", home).out.strip() == "No run waits."
    assert invited(home, spec) is RefusalCode.APPROVAL
    asked = Asked(spec, cohort_digest(home.parent / "cohort"), accounting.shares(spec, 40))
    listed = cloister("node", "requests", home)
    assert spec.digest[:12] in listed.out
    assert "trial-office" in listed.out
    shown = cloister("node", "show", spec.digest[:6], "--home", home)
    for text in ("learns a binary classification", spec.digest, asked.digest, asked.cohort):
        assert text in shown.words
    done = cloister("node", "approve", spec.digest[:6], "--home", home, *ADA, "--yes")
    assert done.code == 0
    assert asked.digest in done.words
    assert [entry.kind for entry in entries(home)[-2:]] == ["approved", "earmarked"]
    assert cloister("node", "requests", home).out.strip() == "No run waits."

    served = gate(home)
    assert isinstance(served.invite(Invitation(spec)), NodeCard)
    for number in (1, 2):
        reply = served.train(TrainTask(spec, number, global_weights(spec)))
        assert isinstance(reply, Release)
    spent = cloister("node", "budget", home).words
    assert "2/3" in spent
    assert "yes" in cloister("node", "show", spec.digest[:6], "--home", home).words
    assert cloister("node", "close", spec.digest[:6], "--node", home, *ADA).code == 0
    reply = gate(home).train(TrainTask(spec, 3, global_weights(spec)))
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.REPLAY
    assert NodeFolder.open(home).ledger().book.set_aside() == []
    assert "set aside 0.0%" in cloister("node", "budget", home).words


def test_what_waits_is_the_run_that_is_shown_and_no_other(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home = make_node()
    for number in (1, 2):
        invited(home, node_run(f"small-{number}"))
    first, second = (node_run(f"small-{number}").digest for number in (1, 2))
    assert cloister("node", "approve", first[:10], "--home", home, *ADA, "--yes").code == 0
    assert isinstance(invited(home, node_run("small-1")), NodeCard)
    assert invited(home, node_run("small-2")) is RefusalCode.APPROVAL
    assert second[:12] in cloister("node", "requests", home).out
    assert first[:12] not in cloister("node", "requests", home).out


def test_a_changed_cohort_has_to_be_admitted_and_the_run_approved_again(
    cloister: Cloister, make_node: MakeNode, write_cohort: Any, node_run: Any
):
    home, spec = make_node(), node_run()
    invited(home, spec)
    assert cloister("node", "approve", spec.digest, "--home", home, *ADA, "--yes").code == 0
    assert isinstance(invited(home, spec), NodeCard)
    other = write_cohort(node_run(), range(30), name="other")
    (home.parent / "cohort").rename(home.parent / "old")
    other.path.rename(home.parent / "cohort")
    assert invited(home, spec) is RefusalCode.POLICY
    assert "changed since a person admitted it" in cloister("node", "check", home).words
    assert cloister("node", "admit", home, *ADA).code == 0
    assert invited(home, spec) is RefusalCode.APPROVAL
    assert cloister("node", "approve", spec.digest, "--home", home, *ADA, "--yes").code == 0
    assert isinstance(invited(home, spec), NodeCard)


def test_what_was_approved_under_another_version_is_asked_again(make_node: MakeNode, node_run: Any):
    home, spec = make_node(), node_run()
    ledger, shares = NodeFolder.open(home).ledger(), accounting.shares(spec, 40)
    cohort = cohort_digest(home.parent / "cohort")
    ledger.approve(Asked(spec, cohort, shares, version="0.0.9"), Signed("Ada", "an old yes"))
    assert invited(home, spec) is RefusalCode.APPROVAL
    ledger.approve(Asked(spec, cohort, shares), Signed("Ada", "the same with this version"))
    assert isinstance(invited(home, spec), NodeCard)


class Terminal(StringIO):
    """A person at a keyboard, who types this."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("typed", ["y\n", "n\n", "\n", ""])
def test_a_person_at_a_terminal_sees_the_page_and_is_asked(
    cloister: Cloister,
    make_node: MakeNode,
    node_run: Any,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
):
    home, spec = make_node(), node_run()
    invited(home, spec)
    before, page = entries(home), cloister("node", "show", spec.digest, "--home", home).out
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    said = cloister("node", "approve", spec.digest, "--home", home, *ADA)
    assert said.code == (0 if typed == "y\n" else 1)
    assert said.out.startswith(page)
    assert (entries(home) == before) is (typed != "y\n")


def test_where_nobody_can_be_asked_what_was_shown_has_to_be_named(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node(), node_run()
    invited(home, spec)
    before = entries(home)
    approve = ("node", "approve", spec.digest, "--home", home, *ADA)
    said = cloister(*approve)
    assert said.code == 2
    assert "--shown" in said.err
    assert "--yes" in said.err
    for short in ("a", "abcde", "xyzxyz"):
        assert cloister(*approve, "--shown", short).code == 2
    assert entries(home) == before


def test_a_file_among_the_requests_that_holds_no_run_is_named_and_blocks_nothing(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node(), node_run()
    invited(home, spec)
    (home / "requests" / "odd.json").write_bytes(b"\xff\xfe")
    for words in (
        ("requests", home),
        ("show", spec.digest, "--home", home),
        ("approve", spec.digest, "--home", home, *ADA, "--yes"),
    ):
        said = cloister("node", *words)
        assert said.code == 0
        assert "odd.json" in "".join(said.out.split())  # a path is broken where a line ends


def test_what_an_evaluation_books_is_shown_though_training_has_no_privacy(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home = make_node(
        [("allow_no_privacy = false", "allow_no_privacy = true"),
         ("federated_evaluation = false", "federated_evaluation = true")]
    )  # fmt: skip
    spec = node_run(
        privacy={"mechanism": "none"}, evaluation={"federated": {"noise_multiplier": 2.0}}
    )
    invited(home, spec)
    said = cloister("node", "show", spec.digest, "--home", home)
    assert "of training NOTHING is booked" in said.words
    assert re.search(r"evaluation +1 round\(s\) of 1 step\(s\), q 1, σ 2", said.words)
    assert re.search(r"of the budget +[0-9.]+% for life", said.words)


def test_whoever_approves_a_run_sees_what_is_known_of_the_synthetic_images_that_it_mixes_in(
    cloister: Cloister, make_node: MakeNode, node_run: Any, make_spec: Any
):
    home = make_node([("[data]", '[data]\nsynthetic = "made/cohort"')], admitted=False)
    (home / "made").mkdir()
    drawn = Drawn(torch.zeros(4, *make_spec().input.shape), torch.tensor([0, 1, 0, 1]))
    write_drawn(home / "made" / "cohort", drawn, make_spec())
    told = {"unit": "patient", "epsilon": 6.25, "delta": 1e-5}
    digest = cohort_digest(home / "made" / "cohort")
    for epsilon in (3.5, 6.25):
        about = {"cohort_sha256": digest, "differential_privacy": told | {"epsilon": epsilon}}
        (home / "made" / "about.json").write_text(json.dumps(about))
        assert cloister("node", "admit", home, *ADA).code == 0
        spec = node_run(f"small-{int(epsilon)}", augmentation={"synthetic": 2})
        assert invited(home, spec) is RefusalCode.APPROVAL
        shown = cloister("node", "show", spec.digest, "--home", home)
        assert f"{digest}, the patients" in shown.words
        assert f"protected by ε = {epsilon:.2f} at δ = 1e-05 for each patient" in shown.words
        done = cloister("node", "approve", spec.digest, "--home", home, *ADA, "--yes")
        assert done.code == 0, done
        assert isinstance(invited(home, spec), NodeCard)
        assert "ε = " in NodeFolder.open(home).ledger().book.run(spec.digest).synthetic
    (home / "made" / "about.json").unlink()
    waiting = node_run("small-9", augmentation={"synthetic": 2})
    NodeFolder.open(home).requests.put(waiting)
    said = cloister("node", "approve", waiting.digest, "--home", home, *ADA, "--yes")
    assert said.code == 1
    assert "does not say that the images of just this cohort" in said.words


def test_what_a_coordinator_wrote_does_not_steer_the_terminal(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node(), node_run()
    task = spec.task.model_copy(update={"classes": ("no\x1b[2J", "\u202eyes\r")})
    evil = spec.model_copy(update={"task": task})
    NodeFolder.open(home).requests.put(evil)
    shown = cloister("node", "show", evil.digest, "--home", home)
    listed = cloister("node", "requests", home)
    assert (shown.code, listed.code) == (2, 0)
    for said in (shown, listed):
        assert "\x1b" not in said.out + said.err
        assert "\u202e" not in said.out + said.err
        assert "expected names that can be printed" in said.words
    assert "No run waits." in listed.words


def test_a_path_that_holds_control_characters_is_no_path(make_node: MakeNode):
    home = make_node()
    text = (home / "node.toml").read_text()
    for key in ("cohort", "witness"):
        evil = re.sub(rf'^{key} = ".*"', rf'{key} = "a\\u001b[2J"', text, flags=re.MULTILINE)
        (home / "node.toml").write_text(evil)
        with pytest.raises(ConfigError, match=key):
            NodeFolder.open(home)


def test_a_site_that_is_no_text_is_one_message(cloister: Cloister, tmp_path: Path):
    words = ("--site", "n\udcff", *NEW[2:])
    said = cloister("node", "init", tmp_path / "north", *words, "--by", "Ada")
    assert said.code == 2
    assert "--site" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_no_reason_to_recover(
    cloister: Cloister, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
):
    home = make_node()
    monkeypatch.setattr(Chain, "check_rules", _read_only)
    for command in ("audit", "budget"):
        said = cloister("node", command, home)
        assert said.code in (1, 2)
        assert "cannot be written" in said.words
        assert "recover" not in said.words


def _read_only(_: Chain) -> None:
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DIRECTORY
    raise _unreadable(Path("ledger.sqlite"), "damaged", error)


def test_an_approval_of_something_else_than_was_shown_books_nothing(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node(), node_run()
    invited(home, spec)
    before = entries(home)
    said = cloister("node", "approve", spec.digest, "--home", home, *ADA, "--shown", "0" * 64)
    assert said.code == 1
    assert "nothing was booked" in said.words
    assert entries(home) == before
    page = cloister("node", "show", spec.digest, "--home", home).out
    found = re.search(r"approval\s+([0-9a-f]{64})", page)
    assert found
    shown = ("--shown", found[1])
    assert cloister("node", "approve", spec.digest, "--home", home, *ADA, *shown).code == 0


def test_a_run_beyond_the_budget_is_not_approved_and_nothing_is_booked(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, great, small = make_node(), node_run("great", rounds=900), node_run("small")
    for spec in (great, small):
        assert invited(home, spec) is RefusalCode.APPROVAL
    before = entries(home)
    assert "beyond" in cloister("node", "requests", home).out
    said = cloister("node", "approve", great.digest, "--home", home, *ADA, "--yes")
    assert said.code == 1
    assert "nothing was booked" in said.words
    assert "for life" in said.words
    assert entries(home) == before
    assert great.digest[:12] in cloister("node", "requests", home).out
    assert cloister("node", "approve", small.digest, "--home", home, *ADA, "--yes").code == 0


def test_two_runs_that_fit_alone_are_not_both_approved(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home = make_node()
    (share,) = accounting.shares(node_run(), 40)
    budget = NodeFolder.open(home).policy.budget
    assert budget is not None
    whole = accounting.divergence_within(20.0, 1e-4, budget.at_order)
    most = int(0.6 * whole / accounting.divergence(share.mechanism, budget.at_order))
    runs = [node_run(f"half-{number}", rounds=most) for number in (1, 2)]
    codes = []
    for spec in runs:
        assert invited(home, spec) is RefusalCode.APPROVAL
        codes.append(cloister("node", "approve", spec.digest, "--home", home, *ADA, "--yes").code)
    assert codes == [0, 1]
    assert cloister("node", "close", runs[0].digest, "--home", home, *ADA).code == 0
    assert cloister("node", "approve", runs[1].digest, "--home", home, *ADA, "--yes").code == 0


def test_a_run_that_is_denied_stays_denied(cloister: Cloister, make_node: MakeNode, node_run: Any):
    home, spec = make_node(), node_run()
    invited(home, spec)
    said = cloister("node", "deny", spec.digest[:8], "--home", home, *ADA)
    assert said.code == 0
    assert invited(home, spec) is RefusalCode.DENIED
    assert cloister("node", "requests", home).out.strip() == "No run waits."
    assert "Ada said no" in cloister("node", "show", spec.digest[:8], "--home", home).words


@pytest.mark.parametrize("mode", ["ask", "automatic"])
def test_a_run_that_is_denied_while_it_is_open_is_over(
    cloister: Cloister, make_node: MakeNode, node_run: Any, global_weights: Weights, mode: str
):
    home, spec = make_node([('approval = "ask"', f'approval = "{mode}"')]), node_run()
    if mode == "ask":
        invited(home, spec)
        cloister("node", "approve", spec.digest, "--home", home, *ADA, "--yes")
    served = gate(home)
    assert isinstance(served.invite(Invitation(spec)), NodeCard)
    assert isinstance(served.train(TrainTask(spec, 1, global_weights(spec))), Release)
    assert cloister("node", "deny", spec.digest, "--home", home, *ADA).code == 0
    for reply in (
        served.train(TrainTask(spec, 2, global_weights(spec))),
        gate(home).invite(Invitation(spec)),
    ):
        assert isinstance(reply, RefusalReply)
        assert reply.code is RefusalCode.DENIED
    assert NodeFolder.open(home).ledger().book.open_runs() == []
    assert list((home / "ledger" / "releases").iterdir()) == []


def test_a_run_that_its_coordinator_closed_cannot_be_closed_again(
    cloister: Cloister, make_node: MakeNode, node_run: Any
):
    home, spec = make_node([('approval = "ask"', 'approval = "automatic"')]), node_run()
    served = gate(home)
    assert isinstance(served.invite(Invitation(spec)), NodeCard)
    assert isinstance(served.close(Closing(spec.digest)), Closed)
    said = cloister("node", "close", spec.digest, "--home", home, *ADA)
    assert said.code == 2
    assert "nothing to end" in said.err


# --- Budget -------------------------------------------------------------------------------------


@pytest.fixture
def spent(make_node: MakeNode, node_run: Any, global_weights: Weights) -> tuple[Path, RunSpec]:
    """A node that has trained two of three rounds."""
    home, spec = make_node([('approval = "ask"', 'approval = "automatic"')]), node_run()
    served = gate(home)
    served.invite(Invitation(spec))
    for number in (1, 2):
        assert isinstance(served.train(TrainTask(spec, number, global_weights(spec))), Release)
    return home, spec


def percent(text: str, name: str) -> float:
    found = re.search(rf"{name} ([\d.]+)%", text)
    assert found, (name, text)
    return float(found[1])


def test_the_parts_of_the_budget_are_those_of_the_filter_and_add_up(
    cloister: Cloister, spent: tuple[Path, RunSpec]
):
    home, spec = spent
    said = cloister("node", "budget", home).words
    (share,) = accounting.shares(spec, 40)
    budget = NodeFolder.open(home).policy.budget
    assert budget is not None
    one = accounting.divergence(share.mechanism, budget.at_order)
    whole = accounting.divergence_within(20.0, 1e-4, budget.at_order)
    parts = {name: percent(said, name) for name in ("spent", "carried", "set aside", "left")}
    assert parts["spent"] == pytest.approx(100 * 2 * one / whole, abs=0.051)
    assert parts["set aside"] == pytest.approx(100 * one / whole, abs=0.051)
    assert parts["carried"] == 0
    assert sum(parts.values()) == pytest.approx(100, abs=0.21)
    assert f"ε {budget.epsilon_of(2 * one):.3f} at order" in said
    assert f"ε {budget.epsilon_of(3 * one):.3f} with what is set aside" in said
    fixed = accounting.epsilon([share.mechanism.of_steps(2)], 1e-4)
    assert f"ε {fixed:.3f}, what was spent, by PLD" in said


def test_pld_is_left_out_where_something_was_carried(
    cloister: Cloister, spent: tuple[Path, RunSpec]
):
    home, _ = spent
    NodeFolder.open(home).ledger().carry(0.5, Signed("Ada", "another ledger"))
    said = cloister("node", "budget", home).words
    assert "what was carried over has no mechanism" in said
    assert percent(said, "carried") > 0


def test_the_budget_is_drawn(cloister: Cloister, spent: tuple[Path, RunSpec], tmp_path: Path):
    home, _ = spent
    NodeFolder.open(home).ledger().carry(0.5, Signed("Ada", "another ledger"))
    for name in ("budget.svg", "budget.png"):
        assert cloister("node", "budget", home, "--picture", tmp_path / name).code == 0
    drawn = ElementTree.parse(tmp_path / "budget.svg")  # noqa: S314 - we wrote it
    texts = {node.text for node in drawn.iter() if node.text}
    assert any("small" in text for text in texts)
    assert {"carried over", "the budget", "over time"} <= texts
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
    said = cloister("node", "budget", home, "--picture", tmp_path / "budget.doc")
    assert said.code == 2
    assert ".svg or .png" in said.err
    assert not (tmp_path / "budget.doc").exists()


def test_only_epsilon_changes_once_something_is_spent(
    cloister: Cloister, spent: tuple[Path, RunSpec]
):
    home, _ = spent
    file = home / "node.toml"
    text = file.read_text()
    before = entries(home)
    file.write_text(text.replace("delta = 0.0001", "delta = 0.001"))
    said = cloister("node", "set-budget", home, *ADA)
    assert said.code == 2
    assert "only epsilon can still be changed" in said.err
    assert entries(home) == before
    file.write_text(text.replace("epsilon = 20.0", "epsilon = 30.0"))
    assert "set-budget" in cloister("node", "check", home).words
    assert cloister("node", "set-budget", home, *ADA).code == 0
    booked = NodeFolder.open(home).ledger().book.limit
    assert booked is not None
    assert booked.epsilon == 30.0
    assert cloister("node", "check", home).code == 0
    assert "nothing to do" in cloister("node", "set-budget", home, *ADA).words


# --- Audit --------------------------------------------------------------------------------------


def altered(home: Path, statement: str) -> None:
    """Somebody with access to the disk, and without the key."""
    with closing(sqlite3.connect(home / "ledger" / "ledger.sqlite")) as database:
        for name in ("entry_stays", "entry_kept", "entry_new"):
            database.execute(f"DROP TRIGGER {name}")
        database.execute(statement)
        database.commit()


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE entry SET noise_multiplier = 9.0 WHERE number = 5", "entry 5"),
        ("UPDATE entry SET steps = 0 WHERE number = 4", "entry 4"),
        ("DELETE FROM entry WHERE number = 6", "entry 6"),
        ('UPDATE entry SET note = \'{"by":"Bob"}\' WHERE number = 3', "entry 3"),
    ],
)
def test_a_row_that_was_altered_is_named_and_the_node_stops(
    cloister: Cloister,
    spent: tuple[Path, RunSpec],
    global_weights: Weights,
    statement: str,
    named: str,
):
    home, spec = spent
    assert cloister("node", "audit", home).code == 0
    altered(home, statement)
    said = cloister("node", "audit", home)
    assert said.code == 1
    assert named in said.words
    assert "recover" in said.words
    assert cloister("node", "check", home).code == 1
    assert cloister("node", "budget", home).code == 2
    records = TrainTask(spec, 3, global_weights(spec)).to_records()
    reply = read_reply(answer(records, lambda: gate(home)))
    assert isinstance(reply, RefusalReply)
    assert reply.code is RefusalCode.LEDGER


def test_an_audit_says_whether_anything_outside_was_compared(
    cloister: Cloister, spent: tuple[Path, RunSpec]
):
    home, _ = spent
    said = cloister("node", "audit", home)
    assert "No witness outside this machine was compared" in said.words
    token = NodeFolder.open(home).ledger().witness
    assert token in said.out.split()  # unbroken: it is to be copied
    said = cloister("node", "audit", home, "--witness", token)
    assert said.code == 0
    assert "A witness from outside was compared" in said.words
    forged = f"99:{'a' * 64}:{'b' * 64}"
    said = cloister("node", "audit", home, "--witness", forged)
    assert said.code == 2
    assert "not a witness that this node made" in said.err


# --- As a whole ---------------------------------------------------------------------------------


TOKEN = re.compile(r"\d+:[0-9a-f]{64}:[0-9a-f]{64}")


def test_everything_fits_on_eighty_columns(
    cloister: Cloister,
    spent: tuple[Path, RunSpec],
    node_run: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    home, spec = spent
    monkeypatch.setenv("COLUMNS", "80")
    other = node_run("waiting-for-a-person", rounds=40)
    NodeFolder.open(home).requests.put(other)
    (home.parent / "run.toml").write_text(toml(other))
    for words in (
        ("check", home),
        ("check", home, home.parent / "run.toml"),
        ("requests", home),
        ("show", other.digest, "--home", home),
        ("show", spec.digest, "--home", home),
        ("budget", home),
        ("audit", home),
        ("admit", home, *ADA),
    ):
        said = cloister("node", *words)
        assert said.code in (0, 1), said
        lines = [line for line in said.out.splitlines() if not TOKEN.fullmatch(line)]
        assert [line for line in lines if len(line) > 80] == [], words


def test_the_folder_may_be_named_by_the_environment(
    cloister: Cloister, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    home = make_node()
    assert cloister("node", "audit").code == 2
    monkeypatch.setenv("CLOISTER_NODE_HOME", str(home))
    assert cloister("node", "audit").code == 0
    monkeypatch.delenv("CLOISTER_NODE_HOME")
    monkeypatch.chdir(home)
    assert cloister("node", "audit").code == 0
    assert cloister("node", "requests").out.strip() == "No run waits."


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("show", "abcdef"), "0 runs begin with it"),
        (("approve", "abcdef", *ADA), "0 waiting runs begin with it"),
        (("deny", "abcdef", *ADA), "0 runs begin with it"),
        (("close", "abcdef", *ADA), "0 runs begin with it"),
        *(
            ((command, start, *more), "at least 6 hexadecimal digits")
            for command, more in (
                ("show", ()),
                ("approve", ADA),
                ("deny", ADA),
                ("close", ADA),
                ("page", ()),
            )
            for start in ("", "abcde", "zzzzzz")
        ),
        (("approve", "abcdef", "--reason", " "), "--reason is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_a_mistake_is_one_message(
    cloister: Cloister, make_node: MakeNode, words: tuple[str, ...], text: str
):
    home = make_node()
    before = entries(home)
    said = cloister("node", *words, "--home", home)
    assert said.code == 2
    assert text in said.err
    assert said.err.startswith("error: ")
    assert entries(home) == before


def test_the_version_is_told(cloister: Cloister):
    said = cloister("--version")
    assert said.code == 0
    assert re.fullmatch(r"cloister \d+\.\d+\.\d+\n", said.out)


@pytest.mark.parametrize(("second", "code"), [((1, 1, 0), 0), ((1, 0, 0), 1)])
def test_a_cohort_of_several_labels_needs_one_that_some_have_and_others_not(
    cloister: Cloister, tmp_path: Path, make_spec: Any, second: tuple[int, ...], code: int
):
    spec = make_spec(task={"kind": "multilabel", "classes": ["a", "b", "c"]})
    with CohortBuilder(tmp_path / "cohort", spec.input.shape) as builder:
        for row, label in enumerate([(1, 0, 0), second] * 4):
            image = np.full(spec.input.shape, row, dtype=np.uint16)
            builder.add(ImageRecord(f"p{row}", "st", "se", str(row), label, 16, 16), image)
        builder.finish(CohortMeta.of(spec, unit="patient", source="test", created="2026-01-01"))
    home = tmp_path / "north"
    assert cloister("node", "init", home, *NEW, "--cohort", tmp_path / "cohort").code == 0
    text = (home / "node.toml").read_text()
    (home / "node.toml").write_text(text.replace("least_patients = 50", "least_patients = 5"))
    assert cloister("node", "admit", home, *ADA).code == code
