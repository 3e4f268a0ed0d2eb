"""The same federation through Flower's own runtime on Ray: the same weights, the same record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.keyfile import NodeKey
from client.ledger import Ledger, Place
from common.errors import RunError
from deploy.simulation import load, prepare, simulate

pytestmark = pytest.mark.slow


@pytest.fixture
def ray() -> None:
    """Ray is an extra of its own."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ray")
def test_ray_gives_the_weights_of_the_local_engine(
    write_run: Callable[..., Path], tmp_path: Path, watching: Any
):
    run_file = write_run(changes=[("batch_size = 4", "batch_size = 4\nsteps = 2")])
    local, on_ray = (prepare(run_file, tmp_path / "runs") for _ in range(2))
    observer = watching()
    simulate(local, workers=0, observer=watching())
    simulate(on_ray, engine="ray", observer=observer)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (local, on_ray))
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-6)
    for one, other in zip(rows_of(local), rows_of(on_ray), strict=True):
        assert one["sites"] == other["sites"]
        assert one["update_norm"] == pytest.approx(other["update_norm"], rel=1e-5)
    assert [row["round"] for row in observer.rows] == [1, 2, 3]
    environment = json.loads((on_ray / "environment.json").read_text())
    assert (environment["engine"], environment["seeded"]) == ("ray", True)
    assert (on_ray / "report.html").stat().st_size > 0
    assert json.loads((local / "privacy.json").read_text()) == json.loads(
        (on_ray / "privacy.json").read_text()
    )
    for folder in (local, on_ray):  # and the sites have heard the end
        for site in ("north", "south"):
            place = folder / "sites" / site
            ledger = Ledger(Place(place, NodeKey.read(place / "node.key")))
            assert ledger.book.run(load(folder)[0].digest).state == "closed"


@pytest.mark.usefixtures("ray")
def test_a_run_that_fails_on_ray_names_its_log(
    write_run: Callable[..., Path], tmp_path: Path, watching: Any
):
    folder = prepare(write_run(), tmp_path / "runs")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"the run ended without a result; .*flower\.log"):
        simulate(folder, engine="ray", observer=watching())
