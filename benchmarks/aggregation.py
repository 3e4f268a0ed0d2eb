"""Memory of a round's aggregation against the number of sites, with the reference CNN's size.

    python benchmarks/aggregation.py

The mean is a running sum: its peak does not grow with the sites. The robust rules hold every
update of the round, and say so.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
from rich.console import Console
from rich.table import Table

from server.aggregation import Aggregator, CoordinateMedian, StreamingMean

PARAMETERS = 3_453_121
MIB = 2**20


def main() -> None:
    """Print peak memory and seconds for 2 to 64 sites."""
    table = Table(title=f"{PARAMETERS:,} parameters, {PARAMETERS * 4 / MIB:.1f} MiB an update")
    for column in ("sites", "mean: peak MiB", "mean: s a site", "median: peak MiB"):
        table.add_column(column, justify="right")
    for sites in (2, 8, 32, 64):
        peak, seconds = measure(StreamingMean(), sites)
        held = f"{measure(CoordinateMedian(), sites)[0]:.0f}" if sites <= 32 else "–"
        table.add_row(str(sites), f"{peak:.0f}", f"{seconds / sites:.3f}", held)
    Console().print(table)


def measure(aggregator: Aggregator, sites: int) -> tuple[float, float]:
    """Peak MiB and seconds of folding `sites` updates, each made when its turn comes."""
    generator = np.random.default_rng(1)
    tracemalloc.start()
    started = time.perf_counter()
    for number in range(sites):
        update = {"weights": generator.standard_normal(PARAMETERS, dtype=np.float32)}
        aggregator.fold(f"site-{number}", update, 100.0)
    aggregator.result()
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    return peak, seconds


if __name__ == "__main__":
    main()
