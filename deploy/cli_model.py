"""`cloister export` and `cloister verify-model`: a trained model leaves, and is looked at."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from common.errors import ConfigError, PackageError
from deploy.cli_coordinator import HOME_VARIABLE
from deploy.screen import printable

if TYPE_CHECKING:  # each command imports what it needs: --help answers at once
    from common.certificates import Certificate
    from common.package import Package, Signer

console = Console()


class Formats(StrEnum):
    """What a model can be exported as."""

    PACKAGE = "package"
    ONNX = "onnx"
    MONAI = "monai"


ModelArgument = Annotated[Path, typer.Argument(help="A finished run's folder, or a package.")]
NewFolder = Annotated[Path, typer.Argument(help="A folder that is not there yet.")]
SignOption = Annotated[bool, typer.Option("--sign", help="Sign with this coordinator's key.")]
HomeOption = Annotated[
    Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The coordinator's folder.")
]
NodeOption = Annotated[
    Path | None,
    typer.Option(
        "--node", "--home", help="A node's folder: the federation that it has joined is believed."
    ),
]
AuthorityOption = Annotated[
    Path | None,
    typer.Option(help="A federation's certificate (ca.pem) that is believed, where no node is."),
]
UnsignedOption = Annotated[
    bool, typer.Option("--unsigned", help="Take one that nobody has signed, as of a simulation.")
]


def _sha256(value: str | None) -> str | None:
    """`--expect` in small letters; an empty one, as of a variable that is not set, is refused."""
    if value is None:
        return None
    if not re.fullmatch("[0-9a-f]{64}", found := value.strip().lower()):
        raise typer.BadParameter(f"{printable(value)!r}: expected the 64 hex digits of a SHA-256")
    return found


ExpectOption = Annotated[
    str | None,
    typer.Option(
        callback=_sha256,
        help="The SHA-256 of model.safetensors that it has to have: one model alone.",
    ),
]
StrangerOption = Annotated[
    bool, typer.Option("--unsigned", help="With --sign: sign a package that nobody has signed.")
]


def export(
    model: ModelArgument,
    out: NewFolder,
    *,
    format: Annotated[
        Formats, typer.Option(help="package: for Cloister. onnx: any runtime. monai: a bundle.")
    ] = Formats.PACKAGE,
    sign: SignOption = False,
    home: HomeOption = Path(),
    unsigned: StrangerOption = False,
) -> None:
    """Export a trained model: as a package, as ONNX, or as a MONAI bundle.

    A **package** is what `cloister predict` takes and what a run may start from: the weights
    (safetensors), the run's file, the model card, the calibration. **onnx** is one file for any
    runtime, compared with the model by onnxruntime before it is written. **monai** is a bundle of
    the network in TorchScript with MONAI's description of what goes in and comes out. The last two
    take brightness in 0..1; mean, deviation and calibration are inside.

    Every folder has a manifest with the SHA-256 of each file. `--sign` signs it with the key of the
    coordinator whose folder is HOME, so that a hospital can tell whose model it is and that nobody
    has changed it. What is signed has to be a run's folder, or signed by the same federation
    already, or be taken by `--unsigned`. A run that a coordinator has conducted has a signed
    package in its folder.

    Example: `cloister export runs/chest-20260101-120000-ab12 chest.model`

    Example: `cloister export runs/chest-20260101-120000-ab12 chest.onnx --format onnx --sign`
    """
    from common.files import refuse_what_is_there
    from server.export import Signing
    from server.export import export as exported

    refuse_what_is_there(out)
    signing = Signing.open(home, unsigned=unsigned) if sign else None
    with console.status("Exporting …"):
        made = exported(model, out, format.value, signing=signing)
    _say(f"{out} holds the model as {format.value}: {len(made.manifest.files)} files.")
    _say(_signed_by(made.signer))
    say_what_stays(out)


def verify_model(
    folder: Annotated[Path, typer.Argument(help="A package, or another export, as it came.")],
    *,
    node: NodeOption = None,
    authority: AuthorityOption = None,
    unsigned: UnsignedOption = False,
    expect: ExpectOption = None,
) -> None:
    """Check a model's folder: every file against the manifest, the manifest against its signature.

    `--node` believes the federation that the node has joined; without a node `--authority` names
    its certificate. A signature says whose model it is, not that there is no newer one: for that,
    have the coordinator name the model's SHA-256 and give it as `--expect`.

    Example: `cloister verify-model chest.model --node /srv/cloister`
    """
    from common.package import Package, check_folder, origins_in

    believed = believed_authority(node, authority)
    checked = check_folder(folder, authority=believed, unsigned=unsigned)
    if checked.manifest.kind != "package":
        if expect is not None:
            raise ConfigError(
                f"--expect {expect}: is of packages; this is an export as {checked.manifest.kind}"
            )
        _check_withdrawn(folder, node, origins_in(folder, checked))
        _say(f"{folder} is whole: a model as {checked.manifest.kind}.")
    else:
        model = Package.open(folder, authority=believed, unsigned=unsigned)
        _check_expected(model, expect)
        _check_withdrawn(folder, node, model.origins())
        model.network()
        _say(f"{folder} is whole: the model of the run {model.spec.run_id or model.spec.name}.")
        _say(f"SHA-256 of its weights: {model.model_sha256}")
    _say(_signed_by(checked.signer))


def opened_model(
    path: Path,
    node: Path | None,
    authority: Path | None,
    *,
    unsigned: bool,
    expect: str | None = None,
) -> Package:
    """A model that a hospital trusts: its federation is the one named, or else that of its node.

    With `unsigned` one that nobody has signed is taken as well. A signature that is there is
    checked all the same, but where the node has joined no federation.

    Raises:
        ConfigError: if the authority or the node's bundle cannot be read.
        IdentityError: if the bundle is damaged, or a stranger signed the model.
        PackageError: as `Package.open`, or it is not the one expected, or withdrawn at the node.
    """
    from client.credentials import NotJoinedError
    from common.package import Package

    try:
        believed = believed_authority(None if authority else node, authority)
    except NotJoinedError:
        if not unsigned:
            raise
        believed = None  # a hospital that tries a model before it joins anybody
    package = Package.open(path, authority=believed, unsigned=unsigned)
    _check_expected(package, expect)
    _check_withdrawn(path, node, package.origins())
    return package


def _check_expected(package: Package, expect: str | None) -> None:
    if expect is not None and package.model_sha256 != expect:
        raise PackageError(
            f"{package.path}: its model is {package.model_sha256}, expected {expect}; it may be an "
            "older one of the same federation: ask the coordinator"
        )


def _check_withdrawn(model: Path, node: Path | None, origins: frozenset[str]) -> None:
    """A signature stays valid for ever; what a site no longer uses stands in its own file."""
    from client.folder import POLICY_FILE
    from client.policy import read_policy

    if node is None or not (node / POLICY_FILE).exists():  # one that has only joined, so far
        return
    for sha256 in sorted(origins & set(read_policy(node / POLICY_FILE).limits.withdrawn)):
        raise PackageError(
            f"{model}: it is, or was made of, the model {sha256}, which this site has withdrawn "
            f"({node / POLICY_FILE}: limits.withdrawn); ask the coordinator for another"
        )


def who_signed(package: Package) -> str:
    """Who vouches for a model, or that nobody does."""
    from common.package import SIGNATURE

    if signer := package.signer:
        return f"signed by {signer.coordinator} of the federation {signer.federation}"
    if (package.path / SIGNATURE).exists():
        return "its signature was not checked: no federation is known that could be believed"
    return "signed by nobody: what it answers is only as good as where it comes from"


def believed_authority(node: Path | None, authority: Path | None) -> Certificate | None:
    """The federation's certificate that a person has named; None if nobody is believed.

    Raises:
        ConfigError: if two were named, or one cannot be read.
    """
    if node is not None and authority is not None:
        raise ConfigError("--node and --authority: expected one of them")
    if node is not None:
        from client.credentials import pinned_authority

        return pinned_authority(node)
    if authority is not None:
        from common import certificates

        content = certificates.read_bounded(authority, "federation's certificate")
        return certificates.certificate(content, str(authority))
    return None


def say_what_stays(folder: Path) -> None:
    """Say of an export that is a site's own that it must not leave the site."""
    from common.package import CARD, is_personal
    from deploy.fine_tune import MUST_NOT_LEAVE

    if is_personal((folder / CARD).read_bytes()):
        _say(f"{folder}: {MUST_NOT_LEAVE}")


def _signed_by(signer: Signer | None) -> str:
    if signer is None:
        return (
            "Nobody vouches for it: it is unsigned, or no federation was named to believe. A "
            "hospital takes it only with --unsigned."
        )
    return (
        f"Signed on {signer.signed:%Y-%m-%d %H:%M} UTC by the coordinator {signer.coordinator} of "
        f"the federation {signer.federation}, whose fingerprint is {signer.fingerprint}."
    )


def _say(text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
