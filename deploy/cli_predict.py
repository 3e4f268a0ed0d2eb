"""`cloister predict`: a trained model on a hospital's new studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli_model import (
    AuthorityOption,
    ExpectOption,
    UnsignedOption,
    opened_model,
    who_signed,
)
from deploy.cli_take import CohortKeyFile, Node, ProfileFile, Workers, sealing_key, text_of
from deploy.intake_words import console, progress_bar
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.intake.deid.profile import Profile
    from client.intake.source import NotUsed
    from client.prediction.answering import Model
    from client.prediction.predict import Addition, Order, Summary
    from common.cohort import Cohort

_REASONS_SHOWN, _WARNINGS_SHOWN = 25, 2

ModelFolder = Annotated[Path, typer.Argument(help="A model's package, or a finished run's folder.")]
Studies = Annotated[
    Path, typer.Argument(help="A folder of DICOM files, a ZIP, a DICOMDIR; or a cohort.")
]
Out = Annotated[Path, typer.Argument(help="A folder that is not there yet.")]
Sr = Annotated[bool, typer.Option("--sr", help="A structured report of each study.")]
Seg = Annotated[bool, typer.Option("--seg", help="Masks of each series as DICOM segmentations.")]
Explain = Annotated[bool, typer.Option("--explain", help="A picture of what moved each answer.")]


def predict(
    model: ModelFolder,
    studies: Studies,
    out: Out,
    *,
    sr: Sr = False,
    seg: Seg = False,
    explain: Explain = False,
    node: Node = None,
    profile: ProfileFile = None,
    authority: AuthorityOption = None,
    unsigned: UnsignedOption = False,
    expect: ExpectOption = None,
    cohort_key: CohortKeyFile = None,
    workers: Workers = 0,
) -> None:
    """Let a trained model answer new studies, within the hospital. Not for clinical use.

    Every image goes the way of a cohort's (the profile, the blanking of text, the model's own
    preprocessing), so that the model sees what it was trained on. What it is not meant for (`[use]`
    of the run's file), cannot be decoded, or is no image of a scanner is refused by name, and costs
    no other image its answer.

    `OUT` holds `predictions.csv` (a line an image or volume), `studies.csv`, `refused.csv`, and all
    of it as `predictions.json`. **They name patients**, so that the hospital can act on them: they
    are readable by their owner alone, and must stay within its walls. Ended in the middle, the same
    command goes on where it was.

    `--sr` writes a structured report of each study (unverified), `--seg` masks in the source's own
    pixels, `--explain` what moved each answer: some hundred passes of the network each.

    A model is taken if its federation has signed it: `--node` knows the federation that the node
    has joined, `--authority` names one. What a simulation made is signed by nobody: `--unsigned`.
    A signature does not say that there is no newer model: `--expect` takes one model alone. It
    exits with 1 if nothing was answered.

    Example: `cloister predict chest.package /archive/today answers --node north --sr`
    """
    from client.prediction.answering import Model

    _check_places(studies, out)
    package = opened_model(model, node, authority, unsigned=unsigned, expect=expect)
    opened = Model(package)
    made = _additions(opened, sr=sr, seg=seg)
    order = _order(opened, studies, out, explain=explain)
    order = replace(order, profile=_profile(node, profile), workers=workers, additions=made)
    cohort = _cohort(studies, node, cohort_key)
    _print_model(opened)
    _conclude(_shown(order, cohort), out, _thing(opened))


def _check_places(studies: Path, out: Path) -> None:
    """Before the model is looked at, of which a lot is said."""
    from client.intake.items import check_source
    from client.prediction.output import check_target

    check_target(out)
    check_source(studies)


def _order(model: Model, studies: Path, out: Path, *, explain: bool) -> Order:
    from client.prediction.explained import Explainer
    from client.prediction.predict import Order

    return Order(model, studies, out, pictures=Explainer(model) if explain else None)


def _cohort(studies: Path, node: Path | None, cohort_key: Path | None) -> Cohort | None:
    """The studies, if they are a cohort."""
    from common.cohort import Cohort, index_file
    from common.errors import CohortError

    try:
        index_file(studies)
    except CohortError:
        return None
    return Cohort.open(studies, sealing_key(node, cohort_key))


def _shown(order: Order, cohort: Cohort | None) -> Summary:
    """Answer under a progress bar."""
    from client.prediction.predict import predict as answer
    from client.prediction.predict import predict_cohort

    try:
        with progress_bar() as bar:
            steps = ("Looking", "Answering") if cohort is None else ("Answering",)
            tasks = {what: bar.add_task(what, total=None) for what in steps}

            def show(what: str, done: int, total: int) -> None:
                bar.update(tasks[what], completed=done, total=total)

            return answer(order, show) if cohort is None else predict_cohort(order, cohort, show)
    except KeyboardInterrupt:
        _print_waiting(order.target)
        raise


def _print_waiting(target: Path) -> None:
    """Say how to go on with what was interrupted, if anything was answered."""
    from client.prediction.output import working_folder

    place = working_folder(target)
    if place.exists():
        said = f"interrupted; the same command goes on. What was answered waits in {place}"
        console.print(f"{said}, and names patients", highlight=False, markup=False, soft_wrap=True)


def _additions(model: Model, *, sr: bool, seg: bool) -> tuple[Addition, ...]:
    """What is made of each study beside the tables."""
    if not (sr or seg):
        return ()
    from client.prediction.dicom_objects import Reports, Segmentations
    from common.errors import ConfigError

    package = model.package
    if seg and package.spec.task.kind != "mask":
        raise ConfigError(f"--seg: the model's task is {package.spec.task.name}, it has no masks")
    return (*[Reports(package)] * sr, *[Segmentations(package)] * seg)


def _profile(node: Path | None, profile: Path | None) -> Profile:
    """By which a cohort's pixels are made."""
    from client.intake.deid.profile import Profile, parse_profile
    from client.policy import read_policy
    from common.errors import ConfigError

    if node is None:
        return parse_profile(text_of(profile), source=str(profile)) if profile else Profile()
    if profile is not None:
        raise ConfigError(
            "--node together with --profile: the node's node.toml has the profile in [intake]; "
            "expected one or the other"
        )
    return read_policy(node / "node.toml").intake.profile


def _print_model(model: Model) -> None:
    """Whose model it is, and what must be borne in mind of it."""
    from client.prediction.tables import head_of

    package = model.package
    said = f"Model {package.spec.name}, {who_signed(package)}"
    console.print(escape(said), highlight=False, soft_wrap=True)
    for warning in head_of(model)["warnings"][:_WARNINGS_SHOWN]:
        shown = f"[bold yellow]{escape(printable(warning))}"
        console.print(shown, highlight=False, soft_wrap=True)
    if model.calibration is None and package.spec.task.name == "classification":
        console.print("Its probabilities are not calibrated.", highlight=False)


def _thing(model: Model) -> str:
    """What is counted."""
    from client.prediction.rows import asked_of

    seen = {"volume": "volumes", "study": "images seen"}
    return seen.get(asked_of(model.package.spec), "images")


def _print_reasons(title: str, refused: Sequence[NotUsed], where: Path) -> None:
    """How many for each reason; which ones is in the folder, for their names may be patients'."""
    if refused:
        title = f"{title}: {len(refused)}, named in {where}"
        counts = Counter(each.reason for each in refused).most_common()
        _print_counts(title, ("reason", "how many"), counts)


def _print_caveats(summary: Summary, thing: str) -> None:
    """Of how many answers each caveat must be borne in mind."""
    images, studies = summary.caveats["images"], summary.caveats["studies"]
    if studies:
        order = (images + studies).most_common()
        counts = [(text, images[text], studies[text]) for text, _ in order]
        _print_counts("To be borne in mind", ("caveat", thing, "studies"), counts)


def _print_counts(
    title: str, headings: tuple[str, ...], counts: Sequence[tuple[str | int, ...]]
) -> None:
    """A table of texts with numbers beside them, as long as a screen has."""
    table = Table(*headings, title=escape(title), title_justify="left")
    for text, *numbers in counts[:_REASONS_SHOWN]:
        table.add_row(escape(printable(str(text))), *map(str, numbers))
    if len(counts) > _REASONS_SHOWN:
        table.add_row(f"{len(counts) - _REASONS_SHOWN} more {headings[0]}s")
    console.print(table)


def _conclude(summary: Summary, out: Path, thing: str) -> None:
    """Show what became of the studies; it is a failure if none was answered."""
    _print_reasons("Refused", summary.refused, out / "refused.csv")
    _print_reasons("Could not be made", summary.not_made, out / "not_made.csv")
    table = Table(title="Answered", title_justify="left", show_header=False)
    table.add_row(thing, str(summary.images))
    table.add_row("of studies", str(summary.studies))
    if summary.before:
        table.add_row("of these by an earlier start", str(summary.before))
    for name, count in summary.decisions.most_common():
        table.add_row(f"decided for {escape(printable(name))}", str(count))
    console.print(table)
    _print_caveats(summary, thing)
    console.print(
        f"[bold]{escape(str(out))}[/] names patients: it is readable by you alone, and must stay "
        "within the hospital",
        highlight=False,
        soft_wrap=True,
    )
    if not summary.images:
        console.print("[bold red]Nothing was answered.[/]", highlight=False)
        raise typer.Exit(1)
