"""Health for probes: gRPC's own protocol, on loopback.

``live`` says that the service's loop goes round; ``ready``, and the empty name, that all is well;
each part (``roster``, ``disk``, ``certificate``) has its own. What is wrong is in the log; a probe
learns only that something is. A loop that hangs reports nothing, and is noticed by that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.errors import ConfigError

LIVE, READY = "live", "ready"
_STALE = 60.0


class Health:
    """Answers probes.

    Args:
        port: on loopback; 0 for none.
        stale: seconds without a report after which the service is not alive.
    """

    def __init__(self, port: int, stale: float = _STALE) -> None:
        self._port, self._stale = port, stale
        self._servicer = health.HealthServicer()
        self._said: dict[str, bool] = {}
        self._reported = time.monotonic()
        self._over = threading.Event()
        for part in ("", LIVE, READY):
            self._say(part, False)

    @contextmanager
    def serving(self) -> Iterator[Health]:
        """Answer as long as this lasts.

        Raises:
            ConfigError: if the port is taken.
        """
        if not self._port:
            yield self
            return
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        try:
            server.add_insecure_port(f"127.0.0.1:{self._port}")
        except RuntimeError:
            raise ConfigError(
                f"port {self._port} of loopback: cannot listen there for probes; name another "
                "with --health-port"
            ) from None
        server.start()
        watching = threading.Thread(target=self._watch, daemon=True)
        watching.start()
        try:
            yield self
        finally:
            self._over.set()
            server.stop(None)

    def report(self, ills: Mapping[str, str]) -> None:
        """The loop goes round; say what is wrong, by part: empty words where nothing is."""
        self._reported = time.monotonic()
        for part, ill in ills.items():
            self._say(part, not ill)
        self._say(LIVE, True)
        for whole in (READY, ""):
            self._say(whole, not any(ills.values()))

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._stale)):
            if time.monotonic() - self._reported > self._stale:
                for part in list(self._said):
                    self._say(part, False)

    def _say(self, part: str, well: bool) -> None:
        if self._said.get(part) is not well:
            self._said[part] = well
            serving = health_pb2.HealthCheckResponse
            self._servicer.set(part, serving.SERVING if well else serving.NOT_SERVING)
