"""`cloister node fine-tune`: a site trains the federation's model further on its own patients."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.cli_model import (
    AuthorityOption,
    ExpectOption,
    UnsignedOption,
    opened_model,
    who_signed,
)
from deploy.cli_take import CohortKeyFile, Node, sealing_key

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.home import NodeHome
    from common.spec import RunSpec
    from deploy.fine_tune import FineTuned

console = Console()


Epochs = Annotated[
    int, typer.Option(min=1, max=1000, help="How often each patient is expected to be seen.")
]
HeadOnly = Annotated[
    bool, typer.Option("--head-only", help="Train the last layer alone, over the shared body.")
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        min=1e-9,
        max=1e6,
        help="Of the optimiser.",
        show_default="the run's own; AdamW's 0.001 where that was for training with noise",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="With noise, booked in the ledger of --node.")
]
Epsilon = Annotated[
    float | None,
    typer.Option(min=1e-3, help="With --private: what it may spend.", show_default="the run's"),
]
Name = Annotated[
    str, typer.Option(help="Of this training; with --private another one is booked anew.")
]


def fine_tune(
    model: Annotated[Path, typer.Argument(help="A model's package, or a finished run's folder.")],
    cohort: Annotated[Path, typer.Argument(help="The site's cohort, as intake made it.")],
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    *,
    epochs: Epochs = 5,
    head_only: HeadOnly = False,
    learning_rate: LearningRate = None,
    private: Private = False,
    epsilon: Epsilon = None,
    name: Name = "fine-tuned",
    node: Node = None,
    cohort_key: CohortKeyFile = None,
    authority: AuthorityOption = None,
    unsigned: UnsignedOption = False,
    expect: ExpectOption = None,
) -> None:
    """Train a model further on this site's own patients: a model of the site's own.

    Nothing leaves the site, nothing is added to protect its patients and nothing is booked: the
    model is **personal, and must not leave the site**. No run begins at it, nobody signs it. With
    `--private` it is trained with noise on the node's own cohort, if policy and a person say yes,
    and booked in its ledger for life: it may then be published. The node is stopped meanwhile.

    Patients marked `test` are held out; metrics are shown before and after. Where none is marked it
    is a quarter, on whom the model may have been trained already, and there is no verdict.

    Example: `cloister node fine-tune chest.package north/cohort ours --head-only --node north`
    """
    from common.cohort import Cohort
    from common.errors import ConfigError
    from deploy import fine_tune as work
    from server.export import write_folder

    _check_room(out)
    if epsilon is not None and not private:
        raise ConfigError("--epsilon: is of --private; without it nothing is spent")
    opened = opened_model(model, node, authority, unsigned=unsigned, expect=expect)
    console.print(f"It begins at a model {who_signed(opened)}", highlight=False, markup=False)
    wish = work.Wish(epochs, head_only, learning_rate, name)
    if private:
        home = _home(node, cohort)
        trained = work.fine_tuned_privately(opened, home, wish, epsilon)
        with console.status("Training …"), trained as found:
            write_folder(out, "package", found.files)  # before the release is let go of
    else:
        with console.status("Training …"):
            found = work.fine_tune(opened, Cohort.open(cohort, sealing_key(node, cohort_key)), wish)
        write_folder(out, "package", found.files)
    _show(found, opened.spec, out)


def _check_room(out: Path) -> None:
    """Whether a folder can be made there, before anything is spent for what goes into it."""
    from common.errors import ConfigError
    from common.files import refuse_what_is_there

    refuse_what_is_there(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be made ({error}); give a folder in one that can be written to"
        ) from error


def _home(node: Path | None, cohort: Path) -> NodeHome:
    from client.home import NodeHome
    from common.errors import ConfigError

    if node is None:
        raise ConfigError("--private: books in a node's ledger; name its folder with --node")
    home = NodeHome.open(node)
    if home.cohort_path.resolve() != cohort.resolve():
        raise ConfigError(
            f"{cohort}: --private trains on the node's own cohort, {home.cohort_path}, whose "
            "patients its ledger is of; expected that one"
        )
    return home


def _show(found: FineTuned, spec: RunSpec, out: Path) -> None:
    from common.tasks.words import estimate
    from deploy.fine_tune import FIGURES_STAY, MAYBE_SEEN, MUST_NOT_LEAVE

    table = Table("metric", "before", "after", "change")
    for metric, known in spec.metrics.items():
        if metric in found.differences:
            row = (found.before.metrics[metric], found.after.metrics[metric])
            change = found.differences[metric]
            table.add_row(known.title, *(estimate(each, 3) for each in (*row, change)))
    console.print(table)
    console.print(
        f"On {found.after.images} images of {found.after.patients} held-out {found.after.unit}s, "
        "with 95 % intervals; that of the change is of the same patients before and after.",
        highlight=False,
    )
    if not found.marked:
        console.print(f"[bold]{MAYBE_SEEN}[/]", highlight=False)
    if found.epsilon is None:
        console.print(f"[bold]{MUST_NOT_LEAVE}[/] Nothing was booked.", highlight=False)
    else:
        console.print(f"[bold]{FIGURES_STAY}[/]", highlight=False)
        published = "It may be published" if found.warning is None else found.warning
        console.print(
            f"Booked: epsilon {found.epsilon:.3f}, of this training alone. "
            f"{published.rstrip('.')}.",
            highlight=False,
        )
    if found.worse:
        named = ", ".join(spec.metrics[name].title for name in found.worse)
        badly = spec.evaluation.metric in found.worse
        what = "do not use it" if badly else "look at the table before you use it"
        console.print(
            f"[bold red]Worse than before: {named}; {what}.[/] Try a smaller --learning-rate or "
            "fewer --epochs, or keep the model where it began.",
            highlight=False,
        )
    console.print(f"The model: {out}", highlight=False, markup=False, soft_wrap=True)
