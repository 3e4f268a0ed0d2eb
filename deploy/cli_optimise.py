"""`cloister optimise`: a trained model made smaller, with what that changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError, RunError
from deploy.cli_model import (
    HomeOption,
    ModelArgument,
    NewFolder,
    SignOption,
    StrangerOption,
    say_what_stays,
)
from deploy.cli_take import CohortKeyFile, sealing_key

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from common.spec import RunSpec
    from common.tasks.estimates import Estimate
    from server.export import Signing
    from server.optimise import Optimised

console = Console()


NodeOption = Annotated[  # beside it --home is the coordinator's
    Path | None, typer.Option("--node", help="A node's folder, whose key opens its cohort.")
]
PruneOption = Annotated[
    float, typer.Option(min=0.0, max=0.99, help="Part of the weights that become zero, as 0.5.")
]
StructuredOption = Annotated[
    bool, typer.Option("--structured", help="Prune whole filters, this part of each layer's.")
]
QuantiseOption = Annotated[
    bool, typer.Option("--quantise", help="Weights in 8 bits, as ONNX for onnxruntime.")
]
CohortOption = Annotated[
    Path | None,
    typer.Option(help="What it is measured on. Default: the run's own evaluation cohort."),
]


def optimise(
    model: ModelArgument,
    out: NewFolder,
    *,
    prune: PruneOption = 0.0,
    structured: StructuredOption = False,
    quantise: QuantiseOption = False,
    cohort: CohortOption = None,
    node: NodeOption = None,
    cohort_key: CohortKeyFile = None,
    sign: SignOption = False,
    home: HomeOption = Path(),
    unsigned: StrangerOption = False,
) -> None:
    """Make a trained model smaller, and say what that costs: size, speed, and each metric.

    `--prune` sets the smallest weights to zero, or whole filters with `--structured`. What comes
    out is a package, OUT/pruned: a run can start from it and train what is left. Zeros make a file
    smaller only where it is compressed, and no network faster. `--quantise` writes OUT/quantised,
    an ONNX model with weights in 8 bits: about a quarter of the size where weights are most of the
    file. It takes one image at a time. Whether it is faster is in the table.

    Both may be asked for at once: what was pruned is quantised. A difference is that on the same
    images, with its 95 % interval; one that holds zero says that no loss was seen, not that there
    is none.

    Example: `cloister optimise runs/chest-20260101-120000-ab12 smaller --prune 0.5 --quantise`
    """
    if not prune and not quantise:
        raise ConfigError("nothing to do: give --prune 0.5, or --quantise, or both")
    if structured and not prune:
        raise ConfigError("--structured: says what is pruned; give --prune as well")
    from common.cohort import Cohort
    from common.files import refuse_what_is_there
    from server.export import Described, Signing
    from server.optimise import optimise as optimised

    refuse_what_is_there(out)
    signing = Signing.open(home, unsigned=unsigned) if sign else None
    measured_on = Cohort.open(cohort or _evaluation_cohort(model), sealing_key(node, cohort_key))
    described = Described.of(model, signing=signing)
    with console.status("Measuring …"):
        made = optimised(
            described, measured_on, prune=prune, structured=structured, quantise=quantise
        )
    _write(out, made, signing)
    _print(made, described.package.spec)
    _tell_the_rest(out, prune if structured else 0)


def _tell_the_rest(out: Path, filters: float) -> None:
    if filters:
        console.print(
            f"--structured took {filters:.0%} of the filters of every layer but the last, which "
            "gives the answers and stays whole: of all weights fewer are zero.",
            highlight=False,
        )
    console.print(f"It lies in {out}", highlight=False, markup=False, soft_wrap=True)
    for name in ("pruned", "quantised"):
        if (out / name).exists():
            say_what_stays(out / name)


def _evaluation_cohort(model: Path) -> Path:
    """Where the cohort lies on which a run was evaluated; of a package nobody knows."""
    table = model / "simulation.json"
    try:
        told = json.loads(table.read_bytes())["evaluation"]
    except FileNotFoundError:
        told = model.resolve().parent.parent / "evaluation"  # of a coordinator's run
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{table}: cannot be read ({error!r}); name the cohort: --cohort") from None
    found = Path(str(told))
    if not found.is_dir():
        raise ConfigError(f"{model}: does not say on what it was evaluated; name it: --cohort")
    return found


def _write(out: Path, made: Optimised, signing: Signing | None) -> None:
    """Everything into the new folder `out`, or nothing."""
    from common.files import new_folder, write_durably
    from server.export import write_folder

    with new_folder(out) as work:
        if made.pruned is not None:
            write_folder(work / "pruned", "package", made.pruned, signing=signing)
        if made.quantised is not None:
            write_folder(work / "quantised", "onnx", made.quantised, signing=signing)
        write_durably(work / "optimise.json", made.table())


def _print(made: Optimised, spec: RunSpec) -> None:
    from common.tasks.words import estimate

    sizes = Table("", "KB", "KB compressed", "zero weights", "ms an image", box=None)
    for name, one in made.measured.items():
        kilobytes = (f"{number / 1000:,.1f}" for number in (one.size, one.compressed))
        sizes.add_row(name, *kilobytes, f"{one.zeros:.0%}", f"{one.milliseconds:.2f}")
    console.print(sizes)
    if made.pruned is not None:
        console.print(
            "Pruned weights are zeros, whole filters as well: the file has the size that it had "
            "until it is compressed, and the network is no faster. Its form stays, so that a run "
            "can go on from it.",
            highlight=False,
        )
    for name, one in made.measured.items():
        test = None if one.result is None else one.result.test
        if test is None:
            continue
        console.print(f"\n{name}, on {test.images} images of the test part:", highlight=False)
        table = Table("metric", "value", *(["difference"] if one.differences else []), box=None)
        for metric, about in spec.metrics.items():
            title = f"{about.title} ({about.unit})" if about.unit else about.title
            row = [title, estimate(test.metrics[metric])]
            if one.differences:
                row.append(_signed(one.differences, metric))
            table.add_row(*row)
        console.print(table)


def _signed(differences: Mapping[str, Estimate], metric: str) -> str:
    found = differences.get(metric)
    if found is None or found.value is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.value:+.4f}"
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
