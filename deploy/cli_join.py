"""`cloister node request`, `join`, `renew`: how a node comes into a federation, and stays in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from common.errors import ConfigError
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from client.policy import Policy
    from common.enrolment import Bundle, Request

console = Console()

HomeArgument = Annotated[
    Path,
    typer.Argument(envvar="CLOISTER_NODE_HOME", help="The node's folder.", show_default="here"),
]
HomeOption = Annotated[
    Path,
    typer.Option("--home", "--node", envvar="CLOISTER_NODE_HOME", help="The node's folder."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="The file to write.", show_default="SITE.request.pem in this folder"),
]


def request(
    home: HomeArgument = Path(),
    *,
    out: OutOption = None,
    afresh: Annotated[
        bool,
        typer.Option(
            "--afresh",
            help="With a new key that nothing vouches for: after a revocation, or where the key "
            "may have been seen. What is in force stays so until the new bundle has come.",
        ),
    ] = False,
) -> None:
    """Ask to be enrolled in a federation: make the node's key, and a request to send.

    The key never leaves this machine. The request holds no secret: send it to the coordinator's
    operator, and read the fingerprint to them when they call.

    Example: `cloister node request north`
    """
    from client import credentials

    site = _policy(home).site
    make = credentials.request_afresh if afresh else credentials.request
    _hand_over(make(home, site), out)
    _say("Send the file to the coordinator's operator. When they call you, read them the")
    _say("fingerprint from this screen.")


def join(
    bundle: Annotated[Path, typer.Argument(help="The bundle that the coordinator has sent.")],
    home: HomeOption = Path(),
    fingerprint: Annotated[
        str,
        typer.Option(help="The authority's, as the operator has read it to you; else it is asked."),
    ] = "",
) -> None:
    """Join a federation, or take a renewed certificate: put a bundle in force.

    The first time the fingerprint of the federation's authority has to be compared on the phone.
    From then on it is pinned, with the coordinator's address: no other is believed. A node that
    runs takes the bundle by itself.

    Example: `cloister node join north.bundle.json --home north`
    """
    from client import credentials
    from common.clock import Clock

    policy = _policy(home)
    offered = credentials.offered(home, bundle, Clock().date())
    _check_fits(policy, offered.bundle)
    if not offered.known:
        from deploy.fingerprints import confirm

        what = f"The authority of the federation {offered.bundle.federation}"
        confirm(what, offered.bundle.authority_key, fingerprint, "its operator", console)
    offered.accept()
    _tell(offered.bundle)


def renew(
    home: HomeArgument = Path(),
    *,
    out: OutOption = None,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Take a new key as well; the present one signs it.")
    ] = False,
) -> None:
    """Ask for a new certificate before the present one ends; nobody has to be called.

    The present key signs the request, and stays in force until `cloister node join` has put the
    new bundle in its place. The node runs on meanwhile.

    Example: `cloister node renew north --new-key`
    """
    from client import credentials

    _hand_over(credentials.renew(home, new_key=new_key), out)


def _hand_over(made: Request, out: Path | None) -> None:
    """Write a request where a person finds it, and show its fingerprint."""
    from common.certificates import read_bounded
    from common.files import write_durably
    from deploy.fingerprints import show

    path = out or Path(f"{made.site}.request.pem")
    if path.exists() and b"CERTIFICATE REQUEST" not in read_bounded(path, "request"):
        raise ConfigError(f"{path}: is there already, and no request; name another with --out")
    try:
        write_durably(path, made.pem)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); name another with --out") from (
            error
        )
    _say(f"{path} asks for {made.site}. Its fingerprint:")
    show(made.key, console)


def _check_fits(policy: Policy, bundle: Bundle) -> None:
    """Compare what was enrolled with the hospital's own file."""
    offer = bundle.offer
    if offer.site != policy.site:
        raise ConfigError(
            f"the bundle is for the site {offer.site}, and node.toml says {policy.site}; put the "
            "file right, or ask anew"
        )
    if policy.declared_size > offer.greatest_declared_size:
        raise ConfigError(
            f"node.toml declares {policy.declared_size}, and the federation takes at most "
            f"{offer.greatest_declared_size} from this site; speak with the operator, or declare "
            "less"
        )


def _tell(bundle: Bundle) -> None:
    from common.certificates import shown

    offer = bundle.offer
    _say(f"{offer.site} is in the federation {bundle.federation}, at {offer.address},")
    _say(f"until {shown(bundle.certificate.not_valid_after_utc)}; renew it before.")


def _policy(home: Path) -> Policy:
    from client.folder import NodeFolder

    return NodeFolder.open(home).policy


def _say(text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)
