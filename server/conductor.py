"""The process that conducts one run: `python -m server.conductor HOME RUN`.

The service starts it, and starts it again when it dies. The run goes on after its last finished
round, as a new submission of Flower's, under the lock on the run's folder; what its sites have
done already they do not do again (a task that is asked twice is answered from what is kept).

From the service it hears by its standard input: a line ``stop`` asks it to end the run in order;
the end of the input says that the service is gone, and with it the way to the sites. How it went
is in ``standing.json`` before it ends.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common.cohort import Cohort
from common.errors import CloisterError, RunError
from server.allowance import BOUND
from server.app import alone
from server.evaluation import CentralEvaluator
from server.export import Signing, export
from server.link import Exchange, LinkGrid, bundle
from server.members import Enrolled
from server.record import MODEL_FILE
from server.roster import Roster
from server.rounds import Conduct, FederatedRun, LogObserver
from server.runs import OVER, CoordinatorHome, EventLog, Run, Standing

log = logging.getLogger("cloister.conductor")

PACKAGE = "package"
"""In a run's folder: its model, signed, as it may be handed on."""
ORDERLY, DIED = 0, 1
"""Exit codes: `standing.json` says how the run stands; or it does not, and a new process is due."""
_REPLY_OVERHEAD = 64 * 2**20
_PATIENCE = 30.0
_NOT_COUNTED = (
    "the model and the report are there, the sites' own counts are not: too few sites were there; "
    "resume the run when they are connected, or stop it, to have it without"
)


class _EndAskedError(Exception):
    """A person has asked for the run's end."""


class Orders:
    """What the service says.

    Args:
        source: a descriptor; its end ends this process: without the service no message comes or
            goes.
    """

    def __init__(self, source: int) -> None:
        self._stop = threading.Event()
        threading.Thread(target=self._listen, args=(source,), daemon=True).start()

    def check(self) -> None:
        """Raise `_EndAskedError` once, if the run is to end."""
        if self._stop.is_set():
            self._stop.clear()
            raise _EndAskedError

    def _listen(self, source: int) -> None:
        while said := os.read(source, 1024):  # a buffered file would be locked at the exit
            if b"stop" in said:
                self._stop.set()
        os._exit(DIED)  # whatever is on disk is whole; nothing more can be done


def conduct(home: CoordinatorHome, run: Run, orders: Orders) -> None:
    """Conduct a run to its end, or to where it cannot go on.

    Raises:
        CloisterError: saying why it cannot.
    """
    spec = run.spec
    evaluator = CentralEvaluator(spec, Cohort.open(home.evaluation))
    exchange = Exchange(home.database)
    members = Enrolled(Roster(home.path), exchange.left)
    observer = EventLog(run.path / "events.jsonl", LogObserver())
    how = Conduct(observer=observer, witnesses=home.witnesses, members=members)
    with _alone(run.path):
        federated = FederatedRun(spec, run.path, evaluator=evaluator, conduct=how)
        with _submitted(exchange, run, orders, federated.model_bytes) as grid:
            try:
                orders.check()
                over = federated.run(grid)
            except _EndAskedError:
                federated.end(grid)
                how_it_is = (Standing.STOPPED, "a person ended it")
            else:
                how_it_is = (Standing.FINISHED, "") if over else (Standing.FAILED, _NOT_COUNTED)
            run.write(*how_it_is)
        hand_out(home, run)


def hand_out(home: CoordinatorHome, run: Run) -> None:
    """Put the model of a run that is over into a signed package beside it.

    How the run stands is written before: nothing that happens here costs it its end, not even the
    death of this process. A run that failed may go on, so its model is not handed out.
    """
    out = run.path / PACKAGE
    if run.state.standing not in OVER or not (run.path / MODEL_FILE).exists():
        return  # without a model: it was stopped before its first round
    shutil.rmtree(out, ignore_errors=True)
    try:
        export(run.path, out, "package", signing=Signing.open(home.path))
    except Exception:
        log.exception("the model has no package; `cloister export --sign` makes one")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the conductor of a service that was killed lets go of it in a moment."""
    last = time.monotonic() + _PATIENCE
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(alone(folder))
                break
            except RunError:
                if time.monotonic() > last:
                    raise
                time.sleep(0.1)
        yield


@contextmanager
def _submitted(
    exchange: Exchange, run: Run, orders: Orders, model_bytes: int
) -> Iterator[LinkGrid]:
    """Submit the run to Flower, in place of the submission that an earlier process has made."""
    state = run.state
    if state.submission:
        exchange.stop(state.submission)
    largest = 2 * model_bytes + _REPLY_OVERHEAD
    number = exchange.submit(bundle(), {BOUND: largest})
    run.write(Standing.RUNNING, submission=number)
    with exchange.conducting(number, check=orders.check, largest_reply=largest) as grid:
        yield grid


def main(home: Path, name: str) -> int:
    """Conduct the run `name`; the exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("flwr").setLevel(logging.WARNING)  # else: a line for each look for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the service says what to do
    place = CoordinatorHome(home)
    run = place.run(name)
    try:
        conduct(place, run, Orders(sys.stdin.fileno()))
        return ORDERLY
    except CloisterError as error:
        log.error("%s", error)
        run.write(Standing.FAILED, str(error))
        return ORDERLY
    except OSError as error:
        log.exception("the run cannot go on now")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            log.error("the disk of %s is full", home)
        return DIED


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
