"""`cloister coordinator`: what an operator does with a federation."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from common.errors import ConfigError
from deploy import cli_coordinator_service
from deploy.screen import asking, printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from common.enrolment import Bundle
    from server.authority import Authority, Signed

HOME_VARIABLE = "CLOISTER_COORDINATOR_HOME"
PORT = 9092
_IN_A_FILE = "give the passphrase with --passphrase-file"
NODE_DAYS, TLS_DAYS, AUTHORITY_DAYS = 365, 365, 3650

coordinator_app = typer.Typer(
    name="coordinator",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Begin a federation, enrol its sites, and keep it.",
    epilog="In this order: `init`; then for each site `enrol`; `renew`, `revoke` and `roster` at "
    "any time. A coordinator's folder is HOME: `--home`, or the variable "
    f"{HOME_VARIABLE}, or the current folder.",
)
console = Console()

HomeOption = Annotated[
    Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's folder.")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        help="A file whose first line is the passphrase, readable by its owner alone; or a pipe, "
        "such as /dev/fd/3. Without it the passphrase is asked for."
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(help="The authority's sealed key, where it does not lie in the folder."),
]
ByOption = Annotated[
    str, typer.Option(help="Who decides.", show_default="the user who is logged in")
]
ReasonOption = Annotated[str, typer.Option(help="Why; it stays in the record.")]
DaysOption = Annotated[int, typer.Option(min=1, max=3650, help="The certificate's lifetime.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="The bundle to write.", show_default="SITE.bundle.json in this folder"),
]


@coordinator_app.command()
def init(
    home: Annotated[Path, typer.Argument(help="The coordinator's new folder.")],
    *,
    host: Annotated[
        list[str],
        typer.Option(
            help="The name or address at which nodes find this machine; may be given again, and "
            "the first is what they are told. This machine's loopback is always added."
        ),
    ],
    name: Annotated[str, typer.Option(help="The federation's public name.")] = "federation",
    port: Annotated[int, typer.Option(min=1, max=65535, help="On which nodes connect.")] = PORT,
    authority_days: DaysOption = AUTHORITY_DAYS,
    days: DaysOption = TLS_DAYS,
    passphrase_file: PassphraseOption = None,
    by: ByOption = "",
) -> None:
    """Begin a federation: its authority, this machine's certificate, an empty roster.

    The authority's key is sealed under a passphrase, which is asked for twice. Nobody can bring
    it back: without it no site is enrolled, renewed or revoked any more.

    Example: `cloister coordinator init federation --name chest --host coordinator.example.org`
    """
    from common.clock import Clock
    from deploy.fingerprints import show
    from server.authority import Authority, Lifetimes, NewFederation

    new = NewFederation(name, host, port, Lifetimes(authority_days, days))
    passphrase = _new_passphrase(passphrase_file)
    made = Authority.create(home, new, passphrase, _signed(by, ""), Clock())
    _say(f"{home} is the coordinator of {name} now, at {made.roster().address}.")
    _say("Keep a copy of ca.key and the passphrase apart from this machine, and from each other.")
    _say("The authority's fingerprint, which each site will ask you for on the phone:")
    show(made.authority_key, console)
    _say("Next, for each site: `cloister coordinator enrol REQUEST`")


@coordinator_app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="The site's request.")],
    *,
    site: Annotated[str, typer.Option(help="The name under which the site takes part.")],
    declared_size_limit: Annotated[
        int,
        typer.Option(min=1, help="The greatest size that the site may declare: its weight."),
    ],
    fingerprint: Annotated[
        str,
        typer.Option(help="The request's fingerprint as the site has read it to you; else asked."),
    ] = "",
    out: OutOption = None,
    days: DaysOption = NODE_DAYS,
    home: HomeOption = Path(),
    passphrase_file: PassphraseOption = None,
    ca_key: KeyOption = None,
    by: ByOption = "",
    reason: ReasonOption = "",
) -> None:
    """Take a site into the federation, and write the bundle that it joins with.

    Call the site at a number that you know, and have it read the fingerprint of its request. Who
    enrols a request without that may enrol whoever has put another one in its place.

    Example: `cloister coordinator enrol north.request.pem --site north --declared-size-limit 500`
    """
    from common.enrolment import Request
    from deploy.fingerprints import confirm, show
    from server.roster import Roster

    asked = Request.read(request)
    if asked.site != site:
        raise ConfigError(
            f"{request}: asks to be enrolled as {asked.site}, and --site is {site}; they have to "
            "agree: the node answers under the name in its node.toml"
        )
    path = _place_for(out, site)
    Roster(home)  # what is wrong there shows before anybody is called
    confirm(f"The request of {site}", asked.key, fingerprint, "the site", console)
    authority = _authority(home, passphrase_file, ca_key)
    bundle = authority.enrol(asked, declared_size_limit, days, _signed(by, reason))
    _handed_out(bundle, path)
    _say("Its officer will ask you for the authority's fingerprint:")
    show(authority.authority_key, console)


@coordinator_app.command()
def renew(
    request: Annotated[
        Path | None,
        typer.Argument(help="A site's request; without one the coordinator's own is renewed."),
    ] = None,
    *,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Names and addresses from now on, without a request.", show_default=""),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Likewise.")] = None,
    declared_size_limit: Annotated[
        int | None,
        typer.Option(min=1, help="The greatest size that the site may declare from now on."),
    ] = None,
    out: OutOption = None,
    days: DaysOption = NODE_DAYS,
    home: HomeOption = Path(),
    passphrase_file: PassphraseOption = None,
    ca_key: KeyOption = None,
    by: ByOption = "",
    reason: ReasonOption = "",
) -> None:
    """Renew a certificate, while everything runs: a site's by its request, or the coordinator's.

    A site's request is signed by the key that is enrolled, so nobody has to be called. A key that
    is replaced is good for 14 days more. Sites learn of a new host or port by their next bundle.

    Example: `cloister coordinator renew north.request.pem`, and once a year
    `cloister coordinator renew`
    """
    from common.enrolment import Request

    if request is not None and (host or port):
        raise ConfigError("--host and --port: the coordinator's own; expected no request with them")
    if request is None and (out or declared_size_limit):
        raise ConfigError("--out and --declared-size-limit: a site's; expected its request")
    if request is None:
        signed = _signed(by, reason)
        _authority(home, passphrase_file, ca_key).renew_tls(host or (), port, days, signed)
        _say("The coordinator has a new key and certificate. What serves takes them by itself.")
        return
    asked = Request.read(request)
    path = _place_for(out, asked.site)
    authority = _authority(home, passphrase_file, ca_key)
    signed = _signed(by, reason)
    limit = declared_size_limit
    _handed_out(authority.renew(asked, days, signed, greatest_declared_size=limit), path)


@coordinator_app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    *,
    reason: ReasonOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: HomeOption = Path(),
    passphrase_file: PassphraseOption = None,
    ca_key: KeyOption = None,
    by: ByOption = "",
) -> None:
    """Put a site out of the federation, at once; its keys are refused for ever.

    Coming back takes a new key, and enrolment. Its updates of rounds that are over stay in them.

    Example: `cloister coordinator revoke north --reason "its machine was stolen on 3 March"`
    """
    if not reason.strip():
        raise ConfigError("--reason is empty; it is what the record will say in ten years")
    if not yes:
        with asking("give --yes"):
            sure = typer.confirm(f"Revoke {printable(site)} for good?")
        if not sure:
            raise typer.Abort
    authority = _authority(home, passphrase_file, ca_key)
    keys = authority.revoke(site, _signed(by, reason))
    told = "1 key is" if len(keys) == 1 else f"{len(keys)} keys are"
    _say(f"{site} is revoked; {told} refused from now on.")


@coordinator_app.command()
def roster(
    *,
    home: HomeOption = Path(),
    history: Annotated[
        bool, typer.Option("--history", help="List every change: when, what, by whom, why.")
    ] = False,
    go_on: Annotated[
        bool,
        typer.Option(
            "--go-on",
            help="Go on from the roster that is there, though the record knows a newer one or is "
            "lost. Keys that the newer one revoked have to be revoked again.",
        ),
    ] = False,
    passphrase_file: PassphraseOption = None,
    ca_key: KeyOption = None,
    by: ByOption = "",
    reason: ReasonOption = "",
) -> None:
    """List the sites, and until when each may speak.

    Example: `cloister coordinator roster --home federation`
    """
    from common.certificates import shown
    from common.clock import Clock
    from deploy import roster_pages
    from server.authority import tls_certificate
    from server.roster import Roster, lines

    if go_on:
        _authority(home, passphrase_file, ca_key).go_on(_signed(by, reason))
    found = Roster(home)
    console.print(roster_pages.sites(found.sites(), Clock().date()))
    if history:
        console.print(roster_pages.changes(lines(home)))
    ends = [each.not_valid_after_utc for each in (tls_certificate(home), found.authority)]
    _say(f"The coordinator's certificate ends {shown(ends[0])}, the authority's {shown(ends[1])}.")
    content = found.content()
    _say(f"Roster {content.number}, {content.digest[:16]}: note it elsewhere, and an older one")
    _say("that is put back can be told.")


# --- What the commands share --------------------------------------------------------------------


def _say(text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


def _signed(by: str, reason: str) -> Signed:
    from server.authority import Signed

    try:
        return Signed(by.strip() or getpass.getuser(), reason.strip())
    except (OSError, KeyError) as error:
        raise ConfigError("nobody is logged in here; say who decides with --by") from error


def _authority(home: Path, passphrase_file: Path | None, ca_key: Path | None) -> Authority:
    from server.authority import Authority

    if passphrase_file is None:
        with asking(_IN_A_FILE):
            passphrase = str(typer.prompt("Passphrase", hide_input=True))
    else:
        passphrase = _passphrase_in(passphrase_file)
    with console.status("Opening the authority's key …"):
        return Authority.open(home, passphrase, sealed_key=ca_key)


def _new_passphrase(file: Path | None) -> str:
    from server.passphrase import LEAST_PASSPHRASE

    if file is not None:
        return _passphrase_in(file)
    asked = f"Passphrase of the authority's key, {LEAST_PASSPHRASE} characters or more"
    with asking(_IN_A_FILE):
        return str(typer.prompt(asked, hide_input=True, confirmation_prompt=True))


def _passphrase_in(file: Path) -> str:
    """The first line of a file that others cannot read, or of a pipe."""
    from common.certificates import read_bounded, read_secret

    read = read_secret if file.is_file() else read_bounded
    try:
        return read(file, "passphrase").decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: expected a passphrase in UTF-8") from None


def _place_for(out: Path | None, site: str) -> Path:
    """Where a bundle goes: to a new file, or over an older bundle of the site."""
    from common.enrolment import Bundle
    from common.errors import CloisterError

    path = out or Path(f"{site}.bundle.json")
    if path.exists():
        try:
            older = Bundle.read(path).offer.site
        except CloisterError:
            older = ""
        if older != site:
            raise ConfigError(
                f"{path}: is there already, and no bundle of {site}; name another with --out"
            )
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")
    return path


def _handed_out(bundle: Bundle, path: Path) -> None:
    from common.certificates import shown
    from common.files import write_durably

    try:
        write_durably(path, bundle.content)
    except OSError as error:
        raise ConfigError(
            f"{path}: the bundle cannot be written ({error}), though the roster has the site; "
            "`cloister coordinator renew` with the same request writes another"
        ) from error
    ends = bundle.certificate.not_valid_after_utc
    _say(f"{bundle.offer.site} is in the roster until {shown(ends)}.")
    _say(f"Send {path} to the site; it holds no secret.")


cli_coordinator_service.register(coordinator_app)
