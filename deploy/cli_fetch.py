"""`cloister intake fetch`: studies of a DICOMweb server into an inbox."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from deploy.intake_words import console, progress_bar

if TYPE_CHECKING:  # the command imports what it needs: --help answers at once
    from client.intake.dicomweb import Fetched


UrlArgument = Annotated[
    str, typer.Argument(help="The service, such as https://pacs.example.org/dicom-web.")
]
InboxArgument = Annotated[Path, typer.Argument(help="Folder for what is fetched; made if need be.")]
StudyOption = Annotated[
    list[str] | None, typer.Option(help="A Study Instance UID; may be given again.")
]
ModalityOption = Annotated[str, typer.Option(help="Only series of this modality, such as CR.")]
DateOption = Annotated[
    str, typer.Option(help="20260131, or 20260101-20260331, 20260101- or -20260331.")
]
DescriptionOption = Annotated[
    str, typer.Option(help="Study description; * and ? stand for letters.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File of mode 0600 with a bearer token, or with Basic and what follows it."),
]
TokenVariableOption = Annotated[
    str | None, typer.Option(help="Name of the environment variable with the token.")
]
AuthorityOption = Annotated[
    Path | None, typer.Option(help="PEM of the authority of the server's certificate.")
]
CertificateOption = Annotated[
    Path | None, typer.Option(help="PEM of our own certificate, if the server asks for one.")
]
KeyOption = Annotated[Path | None, typer.Option(help="PEM of its key.")]
RoomOption = Annotated[
    float, typer.Option(min=0.0, help="What has to stay free on the inbox's disk.")
]


def fetch(
    url: UrlArgument,
    inbox: InboxArgument,
    *,
    study: StudyOption = None,
    modality: ModalityOption = "",
    study_date: DateOption = "",
    description: DescriptionOption = "",
    token_file: TokenFileOption = None,
    token_env: TokenVariableOption = None,
    ca: AuthorityOption = None,
    cert: CertificateOption = None,
    key: KeyOption = None,
    least_free_gib: RoomOption = 10.0,
) -> None:
    """Fetch studies from a DICOMweb server (QIDO-RS, WADO-RS), into an inbox.

    Broken off, it goes on where it was: what is there is not fetched again. A study that is whole
    is in INBOX/complete, and `cloister intake run INBOX/complete COHORT` takes it in. Nothing is
    sent to another host than the one of the URL, and no proxy is used.

    **These are originals, with every identity in them.** Only the names of the files say nothing.
    Keep the inbox on an encrypted disk, let this user alone read it, take it out of the backups,
    and remove what was taken in.

    Example: `cloister intake fetch https://pacs.example.org/dicom-web chest.inbox --modality CR
    --study-date 20260101-20260331 --token-file pacs.token --ca hospital.pem`
    """
    from client.intake import dicomweb
    from client.intake.inbox import Bounds, Inbox

    query = dicomweb.Query(tuple(study or ()), modality, study_date, description)
    token = dicomweb.token_from(token_file, token_env)
    server = dicomweb.Server(dicomweb.Access(url, token, ca, cert, key))
    bounds = Bounds(least_free=int(least_free_gib * 2**30))
    with Inbox.opened(inbox, bounds, silence=0.0) as opened, progress_bar() as progress:
        task = progress.add_task("Fetching", total=None)

        def show(studies: int, found: int, objects: int) -> None:
            said = f"Fetching, {objects} objects; studies"
            progress.update(task, completed=studies, total=found, description=said)

        done = dicomweb.fetch(server, query, opened, show)
    _say(done, inbox)


def _say(done: Fetched, inbox: Path) -> None:
    counts = ", ".join(f"{number} {what}" for what, number in done.counts.items())
    lines = [f"studies: {done.studies}; objects: {counts or 'none'}"]
    if done.unfinished:
        lines.append(
            f"{done.unfinished} studies are not whole: fetch again; what is there is not fetched "
            "twice"
        )
    lines.append(f"Originals with identities are in {inbox / 'complete'}.")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    if done.unfinished:
        raise typer.Exit(1)
