"""The Flower ServerApp: wiring only. It reads the run from the run's configuration and conducts it.

In the field ``server.app:app`` keeps its runs below ``CLOISTER_COORDINATOR_HOME``, evaluates on
the cohort that lies there, keeps the sites' witnesses there for all runs, and protects as the
sites do. The simulation wires the same function to a folder and an observer of its own
(`register`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.cohort import Cohort
from common.errors import ConfigError, RunError
from common.files import locked
from common.spec import RunSpec
from server.evaluation import CentralEvaluator
from server.rounds import Conduct, FederatedRun
from server.witness import WITNESS_FILE

app = ServerApp()


@dataclass(frozen=True)
class Station:
    """Where a run is kept, what it is evaluated on, and how it is conducted."""

    folder: Path
    evaluation: Path
    conduct: Conduct


def register(server_app: ServerApp, station_of: Callable[[Context, RunSpec], Station]) -> None:
    """Conduct the run that the context's configuration holds, at the station of the context."""

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        spec = RunSpec.from_json(str(context.run_config["spec"]), source="run configuration")
        station = station_of(context, spec)
        evaluator = CentralEvaluator(spec, Cohort.open(station.evaluation))
        with alone(station.folder):
            run = FederatedRun(spec, station.folder, evaluator=evaluator, conduct=station.conduct)
            run.run(grid)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two conductors would mix its rounds and charge the sites twice.

    Raises:
        RunError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except BlockingIOError:
            raise RunError(
                f"{folder}: another process conducts this run; wait for its end, or end it first"
            ) from None
        yield


def _installed_station(_: Context, spec: RunSpec) -> Station:
    home = os.environ.get("CLOISTER_COORDINATOR_HOME")
    if not home:
        raise ConfigError(
            "CLOISTER_COORDINATOR_HOME is not set: expected the folder that holds the evaluation "
            "cohort and the runs"
        )
    folder = Path(home) / "runs" / (spec.run_id or spec.name)
    conduct = Conduct(witnesses=Path(home) / WITNESS_FILE)
    return Station(folder, Path(home) / "evaluation", conduct)


register(app, _installed_station)
