"""Asks a gRPC health service whether it serves: what a container's health check runs.

    python -m deploy.probe 127.0.0.1:9094 live gpu

Ends with 0 if all parts that are named serve, and with 1 if not. It imports nothing of Cloister, so
that asking every few seconds costs a container little: `cloister node status` says more, to people.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0
_USAGE = "usage: python -m deploy.probe HOST:PORT SERVICE …, such as 127.0.0.1:9094 live"


def fault(address: str, service: str, seconds: float = SECONDS) -> str:
    """What is wrong with a health service; empty if nothing.

    Args:
        address: ``HOST:PORT``, in plain text; a proxy of the environment is not used.
        service: the part that has to serve.
        seconds: for the answer.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        try:
            said = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=seconds)
        except grpc.RpcError as error:
            return f"{address}, {service}: {error.code().name}"
    if said.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address}, {service}: does not serve"


def main(arguments: list[str]) -> str | None:
    """What `sys.exit` is given: None is 0, a text is shown and is 1."""
    match arguments:
        case [address, *services] if services:
            return next(filter(None, (fault(address, service) for service in services)), None)
    return _USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
