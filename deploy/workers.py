"""Where worker processes come from: a server that has imported everything and computed nothing.

This module imports nothing heavy, so that a command can start the server first and go on with its
own imports while the server does its.
"""

from __future__ import annotations

import os
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext

ROOMY_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
"""For the environment of processes that train. By default glibc maps each large tensor afresh
and gives it back at once, and half of the training time goes into page faults (mallopt(3);
``benchmarks/train.py``). Elsewhere the variables mean nothing."""

SIMULATION = "deploy.simulation"
_LATE = "torch._dynamo"  # torch imports it at an optimiser's first step: in every worker anew


def fork_server(module: str = SIMULATION) -> ForkServerContext:
    """The context whose processes are forked from a server that has imported `module`.

    The first call starts the server and does not wait for it. A fork of it shares no thread pool
    and no device with anybody: nothing was computed in it.
    """
    os.environ.update({k: v for k, v in ROOMY_MALLOC.items() if k not in os.environ})
    context = get_context("forkserver")
    context.set_forkserver_preload([module, _LATE])
    forkserver.ensure_running()
    return context
