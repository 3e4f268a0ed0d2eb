"""The Flower ServerApp: wiring only. It reads the run from the run's configuration and conducts it.

The simulation wires `register` to a folder and an observer of its own. In the field
`server.conductor` conducts, with the roster; ``server.app:app``, which a bundle has to name,
refuses.
"""

from __future__ import annotations

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


@app.main()
def _refuse(_: Grid, __: Context) -> None:
    """A bundle has to name a server app; under Flower's own server a run would have no roster."""
    raise ConfigError(
        "a run is conducted by `cloister coordinator`, which knows who is enrolled, or by "
        "`cloister simulate`; Flower's own server knows no roster"
    )
