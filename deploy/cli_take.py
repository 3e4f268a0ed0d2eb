"""`cloister intake run`: DICOM of any origin into a cohort, with the evidence."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from deploy.intake_words import (
    check_listing,
    console,
    print_not_used,
    print_summary,
    progress_bar,
    write_listing,
)

if TYPE_CHECKING:
    from client.intake.annotated import Marking
    from client.intake.deid.profile import Profile
    from client.intake.keys import SiteKey
    from client.intake.labels import LabelTable
    from client.intake.registry import Registry
    from client.intake.run import IntakeSummary
    from client.intake.take import Order
    from common.spec import RunSpec

KEY_FILE = "site.key"


class WithoutMask(StrEnum):
    """What becomes of images without a segmentation."""

    REFUSE = "refuse"
    EMPTY = "empty"


class WithoutClass(StrEnum):
    """What becomes of series in which no segment is of a class."""

    REFUSE = "refuse"
    EMPTY = "empty"


class Overlap(StrEnum):
    """What becomes of a pixel of two classes."""

    REFUSE = "refuse"
    HIGHEST = "highest"


class Splits(StrEnum):
    """The splits that an image can be put into."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


Node = Annotated[
    Path | None,
    typer.Option(
        "--node",
        "--home",
        help="A node's folder: its node.toml names profile, site key and encryption.",
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", help="A TOML file with the profile, where there is no node."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--site-key",
        help="File of the site's pseudonym key, made on first use. With it, a patient has the "
        "same pseudonym in every cohort; without it, each cohort has a key of its own.",
    ),
]
CohortKeyFile = Annotated[
    Path | None,
    typer.Option("--cohort-key", help="File of the key that seals the cohort at rest."),
]
Source = Annotated[
    Path, typer.Argument(help="A folder of DICOM files at any depth, a ZIP, or a DICOMDIR.")
]
Spec = Annotated[
    Path,
    typer.Option(help="The run's TOML file: its [task] names the classes, its [input] the shape."),
]
Labels = Annotated[Path, typer.Option(help="A CSV with the labels; see above.")]
SegmentsFile = Annotated[
    Path | None, typer.Option(help="For a run of masks, a CSV of segments; see above.")
]
WithoutMaskChoice = Annotated[
    WithoutMask, typer.Option(help="What becomes of images that no segmentation speaks of.")
]
WithoutClassChoice = Annotated[
    WithoutClass, typer.Option(help="What becomes of series in which no segment is of a class.")
]
OverlapChoice = Annotated[
    Overlap, typer.Option(help="What becomes of pixels that are of two classes.")
]
Split = Annotated[Splits | None, typer.Option(help="Put every image into this split.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read; 0: one for each core.")]
NotUsed = Annotated[
    Path | None,
    typer.Option(help="Write everything that was not used, with its reason, to this CSV."),
]


@dataclass(frozen=True)
class Means:
    """With what a hospital takes in: its key, its profile, and the key of sealed cohorts."""

    key: SiteKey
    profile: Profile
    cohort_key: bytes | None
    registry: Registry | None = None
    options: tuple[str, ...] = ()
    """Those by which the review of what waits finds the same keys."""


def means_of(
    desk: Path,
    node: Path | None,
    profile: Path | None,
    site_key: Path | None,
    cohort_key: Path | None = None,
) -> Means:
    """What the options say; a key that is nowhere yet is made.

    Args:
        desk: of the intake: its own key lies there, unless another is named.
        node: a node's folder.
        profile: a TOML file.
        site_key: a file.
        cohort_key: a file.

    Raises:
        ConfigError: if a file is missing or wrong, a node and one of the others are given, or
            the intake was begun with a key that is not where one is looked for.
    """
    from client.intake.deid.profile import Profile, parse_profile
    from client.intake.registry import Registry
    from client.policy import read_policy
    from common.errors import ConfigError

    named = (("--node", node), ("--site-key", site_key), ("--cohort-key", cohort_key))
    options = tuple(word for name, path in named if path for word in (name, str(path)))
    if node is not None:
        if profile or site_key or cohort_key:
            raise ConfigError(
                "--node together with --profile, --site-key or --cohort-key: the node's "
                "node.toml says all of that in [intake]; expected one or the other"
            )
        settings = read_policy(node / "node.toml").intake
        key = _site_key(desk, node / settings.site_key)
        asked = settings.reidentification
        registry = Registry(node / asked.table, node / asked.public_key) if asked else None
        return Means(key, settings.profile, sealing_key(node, None), registry, options)
    chosen = parse_profile(text_of(profile), source=str(profile)) if profile else Profile()
    key = _site_key(desk, site_key or desk / KEY_FILE)
    return Means(key, chosen, sealing_key(None, cohort_key), options=options)


def sealing_key(node: Path | None, cohort_key: Path | None) -> bytes | None:
    """The key of sealed cohorts, as a node's file or a file of its own has it; None without any.

    Raises:
        ConfigError: if it cannot be had, or both are given.
    """
    from client.intake.settings import cohort_key as key_of_cohorts
    from client.keyfile import read_key
    from client.policy import read_policy
    from common.errors import ConfigError

    if node is None:
        return None if cohort_key is None else read_key(cohort_key, "cohort key")
    if cohort_key is not None:
        raise ConfigError(
            "--node together with --cohort-key: the node's node.toml says it in "
            "[intake.encryption]; expected one or the other"
        )
    return key_of_cohorts(node, read_policy(node / "node.toml").intake)


def _site_key(desk: Path, file: Path) -> SiteKey:
    """The key in a file, made on first use; one that was used is somewhere, and none is made."""
    from client.intake.desk import JOURNAL
    from client.intake.keys import SiteKey
    from common.errors import ConfigError

    if (desk / JOURNAL).is_file() and not file.is_file():
        raise ConfigError(
            f"{file}: no site key, and {desk} was begun with one; name that one with --site-key, "
            "or the node's folder with --node"
        )
    return SiteKey.from_file(file)


def text_of(file: Path) -> str:
    """A file that a person wrote, in UTF-8.

    Raises:
        ConfigError: if it is none.
    """
    from common.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text in UTF-8 ({error})") from error


def run(
    source: Source,
    cohort: Annotated[Path, typer.Argument(help="The cohort's directory.")],
    *,
    spec: Spec,
    labels: Annotated[Path | None, typer.Option(help="A CSV with the labels; see above.")] = None,
    segments: SegmentsFile = None,
    without_mask: WithoutMaskChoice = WithoutMask.REFUSE,
    without_class: WithoutClassChoice = WithoutClass.REFUSE,
    overlap: OverlapChoice = Overlap.REFUSE,
    node: Node = None,
    profile: ProfileFile = None,
    site_key: KeyFile = None,
    cohort_key: CohortKeyFile = None,
    split: Split = None,
    workers: Workers = 0,
    not_used: NotUsed = None,
) -> None:
    """Take DICOM in: every object de-identified, the images into a cohort, and a report.

    Killed or interrupted, it goes on where it was when it is started again. Started again when it
    was complete, it takes in what is new in the source and what a person has released since
    (`cloister intake review`). What waits, what was done and what was blanked is in the folder
    `COHORT.intake`; its `report.html` holds no identity and can be shown.

    The CSV has one column that says what a line is about (`PatientID`, `StudyInstanceUID`,
    `AccessionNumber` or `SOPInstanceUID`) and one named `label` with the name of a class. A
    multilabel task has a column of 0 and 1 for each class; `split` is optional; `modality` stands
    for a file's own. A run of masks takes `--segments` instead, and DICOM segmentations (SEG)
    beside the images: a CSV with `segment`, a code (`SCT:10200004`) or a label, and `class`.

    Example: `cloister intake run /archive/chest north.cohort --spec run.toml
    --labels labels.csv --node north`
    """
    from client.intake.items import check_source
    from client.intake.take import Order, check_target, desk_of
    from common.spec import read_run_file

    check_source(source)
    check_target(cohort, source)
    check_listing(not_used)
    described = read_run_file(spec).spec
    table = _table(labels, segments, described)
    means = means_of(desk_of(cohort), node, profile, site_key, cohort_key)
    order = Order(source, cohort, described, table, means.key, means.profile, split or "")
    order = replace(order, cohort_key=means.cohort_key, workers=workers, registry=means.registry)
    order = replace(order, marking=_marking(without_mask, overlap, without_class))
    summary = take_in_shown(order, means.options)
    if not_used is not None:
        write_listing(not_used, summary.not_used)


def _marking(without_mask: WithoutMask, overlap: Overlap, without_class: WithoutClass) -> Marking:
    from client.intake.annotated import Marking

    return Marking(without_mask.value, overlap.value, without_class.value)


def _table(labels: Path | None, segments: Path | None, run: RunSpec) -> LabelTable:
    """The table that the run's target asks for.

    Raises:
        ConfigError: if it is not given, the other one is, or it cannot be used.
    """
    from client.intake.labels import read_labels
    from client.intake.segments import read_segments
    from common.errors import ConfigError

    option, given, other = ("--segments", segments, labels)
    if run.task.kind != "mask":
        option, given, other = ("--labels", labels, segments)
    if given is None or other is not None:
        raise ConfigError(
            f"a run of {run.task.kind} takes {option}, and not the other of --labels and --segments"
        )
    return read_segments(given, run.task) if given is segments else read_labels(given, run.task)


def take_in_shown(order: Order, options: tuple[str, ...] = ()) -> IntakeSummary:
    """Take in under a progress bar, and show what became of it.

    Args:
        order: what and how.
        options: those by which the review of what waits finds the same keys.

    Raises:
        CohortError, ConfigError, IntakeError: as `client.intake.take.take_in` does.
    """
    from client.intake.take import take_in

    with _shown("Taking in") as show:
        summary = take_in(order, progress=show)
    print_summary(summary)
    _print_desk(order.cohort, Means(order.key, order.profile, order.cohort_key, options=options))
    return summary


def _print_desk(target: Path, means: Means) -> None:
    """Write the report, and say where it is and what waits for a person."""
    from client.intake.desk import Desk, State
    from client.intake.take import desk_of
    from deploy.intake_report import write_report

    with Desk(desk_of(target), means.key, means.cohort_key) as desk:
        report = write_report(desk, means.profile)
        waiting = desk.totals().get(State.WAITS, 0)
    if waiting:
        review = shlex.join(("cloister", "intake", "review", str(target), *means.options))
        console.print(
            f"[bold yellow]{waiting} wait for a person:[/] {escape(review)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"What was done, without any identity: [bold]{escape(str(report))}[/]",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; interrupted, it says how to go on."""
    try:
        with progress_bar() as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was")
        raise


def export(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="Where the de-identified files are put.")],
    *,
    node: Node = None,
    profile: ProfileFile = None,
    site_key: KeyFile = None,
    workers: Workers = 0,
    not_used: NotUsed = None,
) -> None:
    """Write de-identified DICOM files, for annotation or publication.

    Each object that the profile lets through is written anew as
    `FOLDER/patient/study/series/instance.dcm`, in keyed pseudonyms and new UIDs. Like `cloister
    intake run` it goes on where it was killed, adds what has come since, lets a person review what
    waits (`cloister intake review FOLDER`), and writes a report into `FOLDER.intake`.

    Publishing is another step: look at a sample, and let `cloister intake verify` search it.

    Example: `cloister intake export /archive/chest chest-deidentified --node north`
    """
    from client.intake.export import ExportOrder
    from client.intake.export import export as write
    from client.intake.items import check_source
    from client.intake.take import check_target, desk_of

    check_source(source)
    check_target(folder, source)
    check_listing(not_used)
    means = means_of(desk_of(folder), node, profile, site_key)
    order = ExportOrder(source, folder, means.key, means.profile, workers, registry=means.registry)
    with _shown("Exporting") as show:
        summary = write(order, progress=show)
    print_not_used(summary.not_used)
    console.print(
        f"{summary.files} files of {summary.patients} patients are in [bold]{folder}[/]",
        highlight=False,
    )
    _print_desk(folder, means)
    if not_used is not None:
        write_listing(not_used, summary.not_used)
