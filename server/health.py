"""Health for probes: gRPC's own protocol, on loopback.

Each part is asked for by its name, and the whole by the empty one. What is wrong is in the log,
and in `cloister coordinator status`; a probe learns only that something is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.errors import ConfigError


class Health:
    """Answers probes.

    Args:
        port: on loopback; 0 for none.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._servicer = health.HealthServicer()
        self._servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self.ills: Mapping[str, str] = {}

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
        try:
            yield self
        finally:
            server.stop(None)

    def report(self, ills: Mapping[str, str]) -> None:
        """Say what is wrong, by part; empty words where nothing is."""
        self.ills = dict(ills)
        for part, ill in {**ills, "": "".join(ills.values())}.items():
            serving = health_pb2.HealthCheckResponse.ServingStatus
            status = serving.NOT_SERVING if ill else serving.SERVING
            self._servicer.set(part, status)
