"""The same federation through Flower's own simulation runtime on Ray, for a cluster.

A SuperLink in simulation mode is started on loopback for the length of the run, and given a
bundle without code: its components are ``deploy.simulation:server_app`` and ``:client_app``, which
are imported from what is installed. On a cluster, set ``RAY_ADDRESS`` and keep the cohorts and
the runs on storage that every machine sees.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.spec import RunSpec
from deploy.workers import ROOMY_MALLOC
from server.rounds import Observer

log = logging.getLogger("cloister.simulation")

_START_SECONDS, _POLL_SECONDS, _STOP_SECONDS = 60.0, 0.05, 10.0
_CONNECTION = "cloister"

_BUNDLE = """\
[project]
name = "cloister-simulation"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "cloister"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "deploy.simulation:server_app"
clientapp = "deploy.simulation:client_app"

[tool.flwr.app.config]
spec = ""
simulation = ""
"""


def run_on_ray(folder: Path, spec: RunSpec, *, sites: int, observer: Observer) -> None:
    """Conduct the run in `folder` on Ray, from its last finished round to its end.

    Raises:
        RunError: if Flower's runtime does not start, or the run ends without its result; the
            message names the log.
    """
    result = folder / "environment.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="cloister-ray-") as scratch:
        home = Path(scratch)
        with _superlink(home, folder / "superlink.log") as environment:
            command = _submission(home, folder, spec, sites)
            with (folder / "flower.log").open("wb") as output:
                submitted = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
                try:
                    _follow(folder, spec, submitted, observer)
                finally:
                    _stop(submitted)
    if not result.exists():
        raise RunError(
            f"the run ended without a result; {folder / 'flower.log'} ends with: "
            f"{_last_lines(folder / 'flower.log')}"
        )


@contextmanager
def _superlink(home: Path, log_file: Path) -> Iterator[dict[str, str]]:
    """A SuperLink on a free loopback port; yields the environment that finds it."""
    port = _free_port()
    environment = (
        os.environ
        | ROOMY_MALLOC
        | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = [
        *_program("flower-superlink"),
        "--simulation",
        "--insecure",
        "--disable-runtime-dependency-installation",
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _await_port(port, process, log_file)
            yield environment
        finally:
            _stop(process)


def _submission(home: Path, folder: Path, spec: RunSpec, sites: int) -> list[str]:
    """The bundle, the run's configuration, and the command that submits them."""
    bundle = home / "cloister-simulation"
    bundle.mkdir()
    (bundle / "pyproject.toml").write_text(_BUNDLE)
    (bundle / "LICENSE").write_text("Apache-2.0\n")
    config = home / "run.toml"
    quoted = {"spec": spec.canonical_json, "simulation": str(folder.resolve())}
    config.write_text("".join(f"{key} = {json.dumps(text)}\n" for key, text in quoted.items()))
    federation = f"num-supernodes={sites} client-resources-num-cpus=1"
    return [
        *_program("flwr"),
        *("run", str(bundle), _CONNECTION, "--stream"),
        *("--run-config", str(config), "--federation-config", federation),
    ]


def _follow(
    folder: Path, spec: RunSpec, submitted: subprocess.Popen[bytes], observer: Observer
) -> None:
    """Show the run's record as it grows, until the run has its result or is over."""
    shown = 0
    while True:
        over = submitted.poll() is not None or (folder / "environment.json").exists()
        rows = _rows(folder / "metrics.jsonl")
        for number, row in enumerate(rows[shown:], start=shown + 1):
            if number == 1:
                observer.run_opened(spec, sorted(row["sites"]), 0)
            observer.round_closed(row)
        shown = max(shown, len(rows))
        if over:
            break
        time.sleep(_POLL_SECONDS)
    _await_report(folder, submitted)


def _await_report(folder: Path, submitted: subprocess.Popen[bytes]) -> None:
    """The report is the last thing written; give the ServerApp a moment for it."""
    deadline = time.monotonic() + _STOP_SECONDS
    while submitted.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    log.debug("run in %s is over", folder)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the record; one that is being written comes next time."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _await_port(port: int, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(_POLL_SECONDS)
    raise RunError(f"Flower's SuperLink did not start: {_last_lines(log_file)} (see {log_file})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that came of it: Flower's simulation and Ray outlive its SuperLink."""
    with ExitStack() as held:
        family = [process.pid, *_descendants(process.pid)] if process.poll() is None else []
        handles = []
        for pid in family:
            with suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))  # which no later process can take
                held.callback(os.close, handles[-1])
        _send(handles, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while (handles := _alive(handles)) and time.monotonic() < deadline:
            process.poll()
            time.sleep(_POLL_SECONDS)
        _send(handles, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they did (proc(5))."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, thread.read_text().split())
    return children + [later for child in children for later in _descendants(child)]


def _alive(handles: list[int]) -> list[int]:
    """Those whose process has not ended: a pidfd is readable when it has."""
    ended = select.select(handles, [], [], 0)[0] if handles else []
    return [handle for handle in handles if handle not in ended]


def _send(handles: list[int], number: signal.Signals) -> None:
    for handle in handles:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)


def _program(name: str) -> list[str]:
    """A console script of this environment."""
    return [str(Path(sys.executable).parent / name)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_lines(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return " / ".join(line.strip() for line in lines[-12:] if line.strip())[-1200:]
