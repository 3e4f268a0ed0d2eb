"""Asks a gRPC health service whether it serves: what a container's health check runs.

    python -m deploy.probe 127.0.0.1:9094 ready

Ends with 0 for yes and 1 for no. It imports nothing of Cloister, so that asking every few seconds
costs a container little: `cloister node status` says more, to people.
"""

from __future__ import annotations

import sys

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

SECONDS = 5.0
WHOLE = "whole"
_USAGE = "usage: python -m deploy.probe HOST:PORT [SERVICE]; 'whole' is the server as a whole"


def fault(address: str, service: str | None, seconds: float = SECONDS) -> str:
    """What is wrong with a health service; empty if nothing.

    Args:
        address: ``HOST:PORT``, in plain text; a proxy of the environment is not used.
        service: the part that has to serve; None if any answer will do.
        seconds: for the answer.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        part = "" if service in (None, WHOLE) else service
        asked = health_pb2.HealthCheckRequest(service=part)
        try:
            said = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=seconds)
        except grpc.RpcError as error:
            return f"{address}, {service or 'any'}: {error.code().name}"
    if service is None or said.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"{address}, {service}: does not serve"


def main(arguments: list[str]) -> str | None:
    """What `sys.exit` is given: None is 0, a text is shown and is 1."""
    if len(arguments) not in (1, 2):
        return _USAGE
    return fault(arguments[0], arguments[1] if len(arguments) > 1 else None) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
