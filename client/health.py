"""Whether the node is alive, whether it is ready, and what stands in the way.

Three services by the gRPC health protocol, for probes: ``live`` says that the loop goes round, so
that a dead one is started again; ``gpu`` that the GPU which the policy names is there (where it
names none, nothing can be missing); ``ready`` that the node could answer a task now. A node that
is connected may be anything but healthy, so both are worked out here and never assumed. The same
stands in ``status.json`` in the node's folder, for `cloister node status`: nothing of it is of the
cohort, nor of what was asked.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from grpc_health.v1 import (
    health,
    health_pb2,
    health_pb2_grpc,
)

from client.node import LARGEST_SKEW, NodeService, State, printable
from common.errors import ConfigError
from common.files import write_durably

log = logging.getLogger("cloister.node")

STATUS_FILE = "status.json"
LIVE, READY, GPU = "live", "ready", "gpu"
WHOLE = ""
"""The server as a whole: as `READY`."""

_STALE = 120.0
_SILENT = 60.0
_FEW_DAYS = 14.0
_LITTLE_DISK = 512 * 2**20
_EVERY = 2.0
_SERVERS = 4
_DRIVER_SECONDS = 10.0
_LOST = 15  # NVML_ERROR_GPU_IS_LOST


@dataclass(frozen=True)
class Report:
    """What is known of a node at one time.

    Attributes:
        site, pid, time: whose, and when.
        phase: what the loop is at.
        live: whether it goes round.
        faults: what stands in the way of answering; ready without any.
        warnings: what will, if nobody acts.
        contact_seconds: since the coordinator answered; None: it never did.
        skew_seconds: by which the clock is ahead of the coordinator's; within a second.
        certificate_days: until the node can connect no more.
        free_bytes: on the disk of the ledger.
        gpu: what is wrong with the GPU that the policy names; empty if nothing.
    """

    site: str
    pid: int
    time: str
    phase: str
    live: bool
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    contact_seconds: float | None
    skew_seconds: float | None
    certificate_days: float
    free_bytes: int
    gpu: str = ""

    @property
    def ready(self) -> bool:
        """Whether the node could answer now."""
        return self.live and not self.faults


@dataclass(frozen=True)
class Machine:
    """What is looked at outside the loop.

    Attributes:
        certificate_days: until the node can connect no more.
        free_bytes: on the disk of the ledger.
        gpu: what is wrong with the GPU that the policy names; empty if nothing.
    """

    certificate_days: float
    free_bytes: int
    gpu: str


def faults(state: State, machine: Machine, now: float) -> Iterator[str]:
    """What stands in the way of answering, with the way out."""
    if state.phase in ("starting", "stopping", "stopped"):
        yield f"the node is {state.phase}"
    if state.trouble:
        yield printable(state.trouble)
    elif state.contact is None:
        yield "the coordinator has not answered yet"
    elif state.phase != "working" and now - state.contact > _SILENT:
        yield f"the coordinator has not answered for {now - state.contact:.0f} s"
    if state.skew is not None and abs(state.skew) > LARGEST_SKEW:
        yield (
            f"the clock is {state.skew:+.0f} s off the coordinator's, at most {LARGEST_SKEW:g} s; "
            "let it be set over the network"
        )
    if machine.certificate_days < 0:
        yield "the certificate has ended, or there is none; see `cloister node renew`"
    if machine.free_bytes < _LITTLE_DISK:
        yield (
            f"{machine.free_bytes // 2**20} MiB are free where the ledger lies, at least "
            f"{_LITTLE_DISK // 2**20} MiB; without room nothing is answered"
        )
    yield from filter(None, (machine.gpu, state.ledger, state.worker))


def is_live(state: State, now: float) -> bool:
    """Whether the loop goes round, or is at a message whose time is not over."""
    return now < max(state.ticked + _STALE, state.until + _STALE)


def warnings(machine: Machine) -> Iterator[str]:
    """What will stand in the way soon."""
    if 0 <= machine.certificate_days < _FEW_DAYS:
        yield (
            f"the certificate ends in {machine.certificate_days:.0f} days; renew it now: "
            "`cloister node renew`"
        )


def gpu_fault(device: str, root: Path = Path("/")) -> str:
    """What is wrong with the GPU that a policy names; its driver is asked and nothing computed.

    A container loses its devices at `systemctl daemon-reload` where its engine uses systemd's
    cgroups: then they are there and cannot be opened. A GPU that has fallen off the bus can be
    opened, and its driver says that it is lost.

    Args:
        device: of the policy.
        root: below which ``dev`` lies.
    """
    if not device.startswith("cuda"):
        return ""
    nodes = sorted(root.glob("dev/nvidia[0-9]*"))
    fault = "" if nodes else "no /dev/nvidia0 is there"
    for node in (root / "dev/nvidiactl", *nodes):
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            fault = fault or str(error)
    fault = fault or _driver_fault()
    return fault and (
        f"the policy says {device}, and the driver cannot be reached ({fault}); start the "
        "node's container again, or see docs/node-service.md"
    )


def _driver_fault() -> str:
    """What NVML says (nvml.h); nothing where it is not installed."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    said = nvml.nvmlInit_v2()
    if said:
        return f"NVML error {said}"
    try:
        count = ctypes.c_uint()
        said = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for number in range(count.value):
            handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
            said = said or nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle))
            said = said or nvml.nvmlDeviceGetMemoryInfo(handle, memory)
    finally:
        nvml.nvmlShutdown()
    if said == _LOST:
        return "the GPU is lost: it has fallen off the bus"
    return f"NVML error {said}" if said else "" if count.value else "there is no GPU"


class Device:
    """Asks for a device in a thread of its own: of a GPU that hangs, the driver never answers.

    Args:
        probe: given the policy's device, says what is wrong with it.
        seconds: that it may take.
    """

    def __init__(
        self, probe: Callable[[str], str] = gpu_fault, seconds: float = _DRIVER_SECONDS
    ) -> None:
        self._probe, self._seconds = probe, seconds
        self._asking: threading.Thread | None = None
        self._said = ""

    def fault(self, device: str) -> str:
        """What is wrong with it; empty if nothing."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._ask, args=(device,), daemon=True)
            self._asking.start()
        self._asking.join(self._seconds)
        if self._asking.is_alive():
            return f"the driver of {device} has not answered within {self._seconds:g} s"
        return self._said

    def _ask(self, device: str) -> None:
        try:
            self._said = self._probe(device)
        except Exception as error:
            log.exception("the device cannot be asked for")
            self._said = f"{device} cannot be asked for ({type(error).__name__})"


class Watch:
    """Looks at a service now and then, and tells probes and the status file.

    Args:
        service: the node's.
        address: ``HOST:PORT`` for the gRPC health service; None: there is none.
        every: seconds between two looks.
        device: is asked for the GPU.
    """

    def __init__(
        self,
        service: NodeService,
        address: str | None,
        every: float = _EVERY,
        device: Device | None = None,
    ) -> None:
        self._service, self._address, self._every = service, address, every
        self._device = device or Device()
        self._over = threading.Event()
        self._servicer = health.HealthServicer()
        self._tell(dict.fromkeys((WHOLE, LIVE, READY, GPU), False))  # until the first look
        self.port = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """From here to the end of the block.

        Raises:
            ConfigError: if the address is taken.
        """
        server = self._started() if self._address else None
        thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self.look()
            if server is not None:
                server.stop(1.0).wait()

    def look(self) -> Report:
        """Look once, and tell."""
        found = report(self._service, self._device)
        states = {WHOLE: found.ready, LIVE: found.live, READY: found.ready, GPU: not found.gpu}
        self._tell(states)
        try:
            content = json.dumps(asdict(found), indent=1).encode() + b"\n"
            write_durably(self._service.home / STATUS_FILE, content, mode=0o600)
        except OSError as error:
            log.warning("the status cannot be written: %s", error)
        return found

    def _tell(self, states: Mapping[str, bool]) -> None:
        answers = health_pb2.HealthCheckResponse
        for name, good in states.items():
            self._servicer.set(name, answers.SERVING if good else answers.NOT_SERVING)

    def _look_on(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except Exception:  # the watchdog must outlive what it sees
                log.exception("the node could not be looked at")
            self._over.wait(self._every)

    def _started(self) -> grpc.Server:
        server = grpc.server(ThreadPoolExecutor(_SERVERS), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        try:
            self.port = server.add_insecure_port(self._address or "")
        except RuntimeError as error:
            raise ConfigError(
                f"--health {self._address}: cannot be listened at ({error}); name another"
            ) from None
        server.start()
        return server


def _free_bytes(folder: Path) -> int:
    """On the disk of a folder; none where it is gone, which a watch outlives."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def report(
    service: NodeService, device: Device, now: Callable[[], float] = time.monotonic
) -> Report:
    """A look at a service, and at the machine under it."""
    state, policy, date = service.state, service.folder.policy, datetime.now(UTC)
    days = service.approach.days_left(date)
    ledger = service.folder.place.folder
    machine = Machine(days, _free_bytes(ledger), device.fault(policy.machine.device))
    seen = now()
    return Report(
        site=policy.site,
        pid=os.getpid(),
        time=date.isoformat(timespec="seconds"),
        phase=state.phase,
        live=is_live(state, seen),
        faults=tuple(faults(state, machine, seen)),
        warnings=tuple(warnings(machine)),
        contact_seconds=None if state.contact is None else round(seen - state.contact, 1),
        skew_seconds=None if state.skew is None else round(state.skew, 1),
        certificate_days=round(days, 1),
        free_bytes=machine.free_bytes,
        gpu=machine.gpu,
    )


def last_report(home: Path) -> Report | None:
    """What the node in `home` said of itself last; None if it never did.

    Raises:
        ConfigError: if the file is not one of ours.
    """
    path = home / STATUS_FILE
    try:
        found = json.loads(path.read_bytes())
        found |= {key: tuple(found[key]) for key in ("faults", "warnings")}
        return Report(**found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); it is written anew") from error


def ask(address: str, service: str, seconds: float = 5.0) -> bool:
    """Whether a health service says that it serves.

    Raises:
        ConfigError: if it cannot be reached.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        try:
            said = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=seconds)
        except grpc.RpcError as error:
            raise ConfigError(f"{address}: no health service answers ({error.code()})") from None
    return bool(said.status == health_pb2.HealthCheckResponse.SERVING)
