"""`cloister predict`: a trained model on a hospital's new studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy.cli_model import AuthorityOption, UnsignedOption, believed_authority
from deploy.cli_take import Node, ProfileFile, Workers, text_of
from deploy.intake_words import console, progress_bar, reasons

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.intake.deid.profile import Profile
    from client.prediction.answering import Model
    from client.prediction.predict import Addition, Summary
    from common.certificates import Certificate
    from common.package import Package


def predict(
    model: Annotated[Path, typer.Argument(help="A model's package, or a finished run's folder.")],
    studies: Annotated[
        Path, typer.Argument(help="A folder of DICOM files at any depth, a ZIP, or a DICOMDIR.")
    ],
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    *,
    sr: Annotated[bool, typer.Option("--sr", help="A structured report of each study.")] = False,
    seg: Annotated[
        bool, typer.Option("--seg", help="Masks of each series as DICOM segmentations.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="A picture of what moved each answer.")
    ] = False,
    node: Node = None,
    profile: ProfileFile = None,
    authority: AuthorityOption = None,
    unsigned: UnsignedOption = False,
    workers: Workers = 0,
) -> None:
    """Let a trained model answer new studies, within the hospital.

    Every image goes the way of a cohort's (the profile, the blanking of text, the model's own
    preprocessing), so that the model sees what it was trained on. What it is not meant for (`[use]`
    of the run's file), cannot be decoded, or is no image of a scanner is refused by name, and costs
    no other image its answer.

    `OUT` holds `predictions.csv` (a line an image), `studies.csv`, `refused.csv`, and all of it as
    `predictions.json`. **They name patients by their true identifiers**, so that the hospital can
    act on them: they are readable by their owner alone, and must stay within its walls.

    `--sr` writes a DICOM structured report of each study (Comprehensive SR, unverified), `--seg`
    the masks of a segmentation as DICOM segmentations in the source's own pixels, `--explain` a
    picture of each image with what moved its answer: some hundred passes of the network each.

    A model is taken if its federation has signed it: `--node` knows the federation that the node
    has joined, `--authority` names one. What a simulation made is signed by nobody: `--unsigned`.

    Example: `cloister predict chest.package /archive/today answers --node north --sr`
    """
    from client.prediction.answering import Model
    from client.prediction.explained import explainer
    from client.prediction.output import check_target
    from client.prediction.predict import Order
    from client.prediction.predict import predict as answer
    from common.package import Package

    check_target(out)
    believed = _authority(node, authority, unsigned=unsigned)
    package = Package.open(model, authority=believed, unsigned=unsigned)
    opened = Model(package)
    found = _profile(node, profile)
    made = _additions(package, sr=sr, seg=seg)
    pictures = explainer(opened) if explain else None
    order = Order(opened, studies, out, found, workers, made, pictures)
    _print_model(opened)
    with progress_bar() as bar:
        tasks = {what: bar.add_task(what, total=None) for what in ("Looking", "Answering")}
        summary = answer(
            order,
            lambda what, done, total: bar.update(tasks[what], completed=done, total=total),
        )
    _print_summary(summary, out)


def _additions(package: Package, *, sr: bool, seg: bool) -> tuple[Addition, ...]:
    """What is made of each study beside the tables."""
    if not (sr or seg):
        return ()
    from client.prediction.dicom_objects import Reports, Segmentations
    from common.errors import ConfigError

    if seg and package.spec.task.kind != "mask":
        raise ConfigError(f"--seg: the model's task is {package.spec.task.name}, it has no masks")
    return (*[Reports(package)] * sr, *[Segmentations(package)] * seg)


def _authority(node: Path | None, authority: Path | None, *, unsigned: bool) -> Certificate | None:
    """The federation that is believed: the one named, or else the one that the node has joined."""
    from common.errors import ConfigError

    if authority is not None:
        return believed_authority(None, authority)
    try:
        return believed_authority(node, None)
    except ConfigError:
        if unsigned:
            return None  # a hospital that tries a model before it joins anybody
        raise


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
    from client.prediction.predict import head_of

    package, head = model.package, head_of(model)
    signer = package.signer
    said = (
        f"signed by {signer.coordinator} of the federation {signer.federation}"
        if signer
        else "signed by nobody: what it answers is only as good as where it comes from"
    )
    console.print(
        f"Model {escape(package.spec.name)}, {escape(said)}", highlight=False, soft_wrap=True
    )
    if head["warnings"]:
        console.print(f"[bold yellow]{escape(head['warnings'][0])}", highlight=False)
    if model.calibration is None and package.spec.task.name == "classification":
        console.print("Its probabilities are not calibrated.", highlight=False)


def _print_summary(summary: Summary, out: Path) -> None:
    if summary.refused:
        title = f"Refused: {len(summary.refused)}, all of them in {out / 'refused.csv'}"
        console.print(reasons(tuple(summary.refused), title, "in refused.csv"))
    table = Table(title="Answered", title_justify="left", show_header=False)
    table.add_row("images", str(summary.images))
    table.add_row("of studies", str(summary.studies))
    for name, count in summary.decisions.most_common():
        table.add_row(f"decided for {escape(name)}", str(count))
    console.print(table)
    console.print(
        f"[bold]{escape(str(out))}[/] names patients: it is readable by you alone, and must stay "
        "within the hospital",
        highlight=False,
        soft_wrap=True,
    )
