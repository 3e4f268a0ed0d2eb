"""A trained model leaves the house: as a package of its own, for ONNX's runtimes, or for MONAI.

Whatever the format, the folder holds the run's file, the model card and a manifest of every file
(`common.package`), which the coordinator signs with the key of its certificate. The folder has its
name when all of it is there and has been checked as a stranger would check it.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from common import certificates, package
from common.calibration import Calibration, calibrate
from common.certificates import Certificate, PrivateKey, Use
from common.clock import Clock
from common.errors import ConfigError, PackageError, RunError
from common.files import new_folder, refuse_what_is_there, write_durably
from common.package import Checked, Kind, Manifest, Package, Signature
from server.authority import TLS
from server.card import to_markdown
from server.evaluation import EvaluationResult
from server.record import EVALUATION_FILE, RunRecord
from server.roster import read_authority

FORMATS: Mapping[Kind, str] = {
    "package": "server.export:Described.files",
    "onnx": "server.graph:onnx_files",
    "monai": "server.monai_bundle:monai_files",
}
"""What makes the files of each kind of export. Named, not imported: who signs needs no ONNX."""


@dataclass(frozen=True)
class Signing:
    """With what a coordinator signs.

    Attributes:
        key: of its certificate.
        certificate: by which the authority vouches for it.
        authority: the federation's.
        unsigned: whether a package that nobody has signed is signed.
    """

    key: PrivateKey = field(repr=False)
    certificate: Certificate
    authority: Certificate
    unsigned: bool = False

    @classmethod
    def open(cls, home: Path, clock: Clock | None = None, *, unsigned: bool = False) -> Self:
        """What lies in the folder of a coordinator.

        Raises:
            ConfigError: if there is none, or its key is not its certificate's.
            IdentityError: if its certificate is not this authority's, or not in force.
        """
        path = home / TLS
        content = certificates.read_secret(path, "coordinator's key")
        own = certificates.certificate(content, str(path))
        key = certificates.private_key(content, path)
        if certificates.key_bytes(key) != certificates.key_bytes(certificates.key_of(own, TLS)):
            raise ConfigError(f"{path}: its key is not that of its certificate; renew it")
        authority, now = read_authority(home), (clock or Clock()).date()
        certificates.check_authority(authority, now)
        certificates.check_certificate(own, authority, Use.COORDINATOR, now)
        return cls(key, own, authority, unsigned)

    def sign(self, manifest: bytes) -> bytes:
        """``manifest.sig`` of a manifest."""
        made = Signature(
            signature=certificates.sign(self.key, package.PURPOSE, manifest),
            certificate=certificates.certificate_pem(self.certificate).decode(),
        )
        return made.model_dump_json(indent=1).encode()


@dataclass(frozen=True)
class Described:
    """A trained model that is about to be exported.

    Attributes:
        package: a package, or a finished run's folder.
        card: with what its calibration changes, if it has one.
        calibration: None where it has none.
    """

    package: Package
    card: Mapping[str, Any]
    calibration: Calibration | None

    @classmethod
    def of(
        cls, folder: Path, *, signing: Signing | None = None, clock: Clock | None = None
    ) -> Self:
        """What lies in the folder of a package or of a finished run; of a run it is calibrated.

        Args:
            folder: whoever has it in hand may export it unsigned.
            signing: what will be signed has to be this federation's already: signed by it, or a
                run with its record. So nothing becomes ours by being exported.
            clock: gives the date.

        Raises:
            IdentityError: as `Package.open`, with the authority of `signing`.
            PackageError: likewise; or nobody vouches for what is to be signed, or it is personal;
                or a run has no model card.
            RunError: if a run's record cannot be read.
        """
        authority = signing.authority if signing else None
        found = Package.open(folder, authority=authority, unsigned=True, clock=clock)
        if signing is not None:
            _refuse_personal(folder, personal=found.is_personal())
        if signing is not None and not signing.unsigned:
            _check_ours(found)
        if not found.card:
            raise PackageError(
                f"{folder}: has no {package.CARD}; `cloister report` writes it from the record"
            )
        if found.calibration is not None or not (folder / EVALUATION_FILE).exists():
            return cls(found, dict(found.card), found.calibration)
        parts = RunRecord.read(folder).final
        arrays = EvaluationResult(parts.get("validation"), parts.get("test")).arrays()
        made = calibrate(found.spec, arrays)
        return cls(found, {**found.card, "calibration": made.to_json()}, made.calibration)

    def papers(self) -> dict[str, bytes]:
        """The files that every export holds: the run's file and the card.

        Raises:
            PackageError: if the card is not as this version writes it.
        """
        try:
            text = json.dumps(self.card, indent=2, ensure_ascii=False, allow_nan=False)
            page = to_markdown(self.card)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(
                f"{self.package.path / package.CARD}: not as this version writes it ({error!r}); "
                "`cloister report` writes that of a run again"
            ) from None
        return {
            package.SPEC: self.package.spec.canonical_json.encode(),
            package.CARD: f"{text}\n".encode(),
            package.CARD_TEXT: page.encode(),
        }

    def files(self) -> dict[str, bytes]:
        """The files of a package."""
        made = self.papers() | {package.MODEL: self.package.weights()}
        if self.calibration is not None:
            made[package.CALIBRATION] = self.calibration.model_dump_json(indent=1).encode()
        return made


def _check_ours(found: Package) -> None:
    if found.signer is not None:
        return
    stranger = (found.path / package.MANIFEST).exists()
    if not stranger:  # a package whose manifest was taken away has no record of a run
        try:
            RunRecord.read(found.path)
        except RunError:
            stranger = True
    if stranger:
        raise PackageError(
            f"{found.path}: nobody has signed it, and this federation would vouch for it; expected "
            "a package that it has signed, or a run's folder; if you know where it comes from, say "
            "--unsigned"
        )


def export(
    source: Path, out: Path, kind: Kind, *, signing: Signing | None, clock: Clock | None = None
) -> Checked:
    """Export a model into the new folder `out`.

    Args:
        source: a finished run's folder, or a package.
        out: is made.
        kind: of the export.
        signing: None leaves it unsigned.
        clock: gives the date.

    Raises:
        ConfigError: if `out` is there.
        IdentityError: as `Described.of`.
        ModelError: if such a network cannot be exported so.
        PackageError: as `Described.of` and `write_folder`.
        RunError: likewise.
    """
    refuse_what_is_there(out)
    described = Described.of(source, signing=signing, clock=clock)
    files = pkgutil.resolve_name(FORMATS[kind])(described)
    return write_folder(out, kind, files, signing=signing, clock=clock)


def _refuse_personal(where: Path, *, personal: bool) -> None:
    if personal:
        raise PackageError(
            f"{where}: a personal model, trained on the patients of one site for that site; no "
            "federation signs it"
        )


def write_folder(
    out: Path,
    kind: Kind,
    files: Mapping[str, bytes],
    *,
    signing: Signing | None = None,
    clock: Clock | None = None,
) -> Checked:
    """Write files and their manifest into the new folder `out`: all of it, or nothing.

    Args:
        out: is made; only its owner may read in it.
        kind: of the export.
        files: by path in the folder.
        signing: None leaves it unsigned.
        clock: gives the date.

    Raises:
        ConfigError: if `out` is there.
        PackageError: if a personal model would be signed.
        RunError: if it cannot be written.
    """
    refuse_what_is_there(out)
    if signing is not None:
        _refuse_personal(out, personal=package.is_personal(files.get(package.CARD, b"{}")))
    clock = clock or Clock()
    with new_folder(out) as work:
        for name, content in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            write_durably(work / name, content)
        entries = {name: package.entry_of(work / name) for name in sorted(files)}
        made = clock.date().replace(microsecond=0)
        manifest = Manifest(kind=kind, made=made, files=entries).model_dump_json(indent=1).encode()
        write_durably(work / package.MANIFEST, manifest)
        if signing is not None:
            write_durably(work / package.SIGNATURE, signing.sign(manifest))
        authority = signing.authority if signing else None
        checked = package.check_folder(
            work, authority=authority, unsigned=signing is None, clock=clock
        )
    return checked
