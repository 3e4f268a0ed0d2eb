"""`cloister node page`: one run as its own hospital sees it."""

from __future__ import annotations

import base64
import re
import stat
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from client.home import NodeHome
from common.messages import Invitation, NodeCard, Release, TrainTask


@pytest.fixture
def trained(make_node: Any, node_run: Any, global_weights: Any) -> tuple[Path, Any]:
    """A node that trained two rounds of a run, without asking a person.

    In a round of one step, it happens that no patient is sampled, and then there is no loss.
    """
    home = make_node([('approval = "ask"', 'approval = "automatic"')])
    spec = node_run(local={"steps": 12}, privacy={"noise_multiplier": 4.0})
    gate = NodeHome.open(home).gate()
    assert isinstance(gate.invite(Invitation(spec)), NodeCard)
    for number in (1, 2):
        assert isinstance(gate.train(TrainTask(spec, number, global_weights(spec))), Release)
    return home, spec


def test_the_page_shows_what_never_left(cloister: Any, trained: Any, tmp_path: Path):
    home, spec = trained
    file = tmp_path / "run.html"
    said = cloister("node", "page", spec.digest[:8], file, "--home", home)
    assert said.code == 0, said
    assert file.as_uri() in said.out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    page = file.read_text()
    pages = NodeHome.open(home).diary.read(spec.digest)
    assert [one.round_number for one in pages] == [1, 2]
    for one in pages:
        assert f"{one.mean_loss:.4f}" in page
    assert "Do not send it" in page
    assert re.search(r"ε = \d+\.\d\d at δ = 0.0001", page)
    assert not re.search(r"<script|https?://", page.replace("http-equiv", ""))
    drawn = re.search(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert drawn
    assert ElementTree.fromstring(base64.b64decode(drawn[1])).tag.endswith("svg")  # noqa: S314


def test_a_run_that_was_never_trained_here_says_so(
    cloister: Any, make_node: Any, node_run: Any, tmp_path: Path
):
    home = make_node([('approval = "ask"', 'approval = "automatic"')])
    spec = node_run()
    assert isinstance(NodeHome.open(home).gate().invite(Invitation(spec)), NodeCard)
    file = tmp_path / "run.html"
    assert cloister("node", "page", spec.digest[:8], file, "--home", home).code == 0
    assert "No round of this run was trained here" in file.read_text()


def test_a_run_that_nobody_knows_and_a_place_that_cannot_be_written_are_named(
    cloister: Any, trained: Any, tmp_path: Path
):
    home, spec = trained
    unknown = cloister("node", "page", "ffffff", "--home", home)
    assert unknown.code == 2
    assert "0 runs begin with it" in unknown.words
    key = (home / "node.key").read_bytes()
    slip = cloister("node", "page", spec.digest[:8], home / "node.key", "--home", home)
    assert slip.code == 2
    assert "ends in .html" in slip.words
    assert (home / "node.key").read_bytes() == key
    nowhere = tmp_path / "no" / "run.html"
    lost = cloister("node", "page", spec.digest[:8], nowhere, "--home", home)
    assert lost.code == 2
    assert str(nowhere) in lost.words
