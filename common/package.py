"""A trained model that can be handed on: a folder whose every byte is accounted for.

    manifest.json       kind, time, and SHA-256 and size of every other file
    manifest.sig        the coordinator's signature over manifest.json, and its certificate
    spec.json           the run, canonical JSON
    model.safetensors   the weights
    model_card.md, model_card.json
    calibration.json    only where the model's probabilities were calibrated

A signature says which federation made the model. It is believed where the federation's authority
is known beforehand: a node has it pinned. It does not say that there is no newer model: who wants
one certain model names its SHA-256. A simulation has no coordinator, so what comes of it is
unsigned, and whoever opens that says so. A finished run's folder is read here as well, as what it
is: unsigned. So a package whose manifest was taken away is not taken for something better.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import AwareDatetime, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load
from torch import nn

from common import certificates, models
from common.calibration import Calibration
from common.certificates import BACKDATED, Certificate, Use, fingerprint, name_of, shown
from common.clock import Clock
from common.errors import IdentityError, PackageError, RunError, SpecError
from common.spec import RunSpec, Section

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SPEC, MODEL = "spec.json", "model.safetensors"
CARD, CARD_TEXT = "model_card.json", "model_card.md"
CALIBRATION = "calibration.json"
REQUIRED = (SPEC, MODEL, CARD, CARD_TEXT)
PERSONAL = "personal"
"""The key of a card by which a model says that it must not leave the site that made it."""
MADE_OF = "made_of"
"""The key of a card with the SHA-256 of all weights, sorted, that went before the model's own."""
PURPOSE = "model package"
"""What the coordinator's key signs a manifest as; its signatures on other things do not fit."""

_MOST_FILES, _DEEPEST = 64, 3
_LARGEST_TEXT = 2**20
_MOST_ORIGINS = 256
_LARGEST_FILE = 2**34
_LARGEST_HEADER = 2**24  # of a model's file, before its weights
_CHUNK = 2**20
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_SHA256 = re.compile("[0-9a-f]{64}")
Kind = Literal["package", "onnx", "monai"]


class Entry(Section):
    """One file of a folder."""

    sha256: _Hash
    size: Annotated[int, Field(ge=0, le=_LARGEST_FILE)]


class Manifest(Section):
    """Every file of a folder but the manifest and its signature, by its path in it."""

    format: Literal["cloister package 1"] = "cloister package 1"
    kind: Kind = "package"
    made: AwareDatetime
    files: Annotated[
        dict[Annotated[str, Field(pattern=rf"^{_PART}(/{_PART}){{0,{_DEEPEST - 1}}}$")], Entry],
        Field(min_length=1, max_length=_MOST_FILES),
    ]


class Signature(Section):
    """``manifest.sig``."""

    format: Literal["cloister signature 1"] = "cloister signature 1"
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,200}$")]
    certificate: Annotated[str, Field(max_length=5000)]


@dataclass(frozen=True)
class Signer:
    """Who signed a package, of whom the pinned authority says so.

    Attributes:
        federation: its name.
        fingerprint: of the authority's key.
        coordinator: the name in the coordinator's certificate.
        signed: when, as the coordinator says.
    """

    federation: str
    fingerprint: str
    coordinator: str
    signed: datetime


@dataclass(frozen=True)
class Package:
    """A trained model, with what it is and what it may be used for.

    Attributes:
        path: its folder.
        spec: the run that it is of.
        card: the model card; empty if a run's folder has none.
        model_sha256: of the weights' file, in hex.
        calibration: None where probabilities are the network's own.
        signer: None if it is unsigned, or no authority was given to believe.
    """

    path: Path
    spec: RunSpec
    card: Mapping[str, Any]
    model_sha256: str
    calibration: Calibration | None
    signer: Signer | None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        authority: Certificate | None = None,
        unsigned: bool = False,
        clock: Clock | None = None,
    ) -> Self:
        """Open a package's folder, or a finished run's.

        Args:
            path: the folder.
            authority: of the federation that is believed; the caller knows it beforehand.
            unsigned: whether one without a signature, or whose signature cannot be checked for
                want of an authority, is taken. A signature that does not fit `authority` never is.
            clock: gives the date.

        Raises:
            PackageError: naming the file that is altered, missing, additional, too large, or of
                another model; or that nobody vouches for it.
            IdentityError: if it is signed by somebody else, or with a certificate that was not in
                force.
            ModelError: if this version does not have its network.
        """
        if _is_there(path / MANIFEST):
            checked = check_folder(path, authority=authority, unsigned=unsigned, clock=clock)
            if checked.manifest.kind != "package":
                raise PackageError(
                    f"{path}: an export of the kind {checked.manifest.kind!r}, for other programs; "
                    "expected a package, as `cloister export` makes without --format"
                )
            return cls._read(path, checked)
        if said := unfinished(path):
            raise PackageError(said)
        if not (_is_there(path / SPEC) and _is_there(path / MODEL)):
            raise PackageError(
                f"{path}: not the folder of a finished run, nor a model's package; expected "
                f"{MANIFEST}, or {SPEC} and {MODEL}"
            )
        if not unsigned:
            raise PackageError(f"{path}: a run's folder, which nobody has signed; {_UNSIGNED}")
        return cls._read(path, None)

    @classmethod
    def _read(cls, path: Path, checked: Checked | None) -> Self:
        there = _Reader(path, checked)
        spec = there.spec()
        sha256 = there.digest(MODEL, _largest_model(spec))
        card = there.card() if checked or _is_there(path / CARD) else {}
        _check_card(path, card, spec, sha256)
        signer = checked.signer if checked else None
        return cls(path, spec, MappingProxyType(card), sha256, there.calibration(spec), signer)

    def weights(self) -> bytes:
        """The content of ``model.safetensors``, as it was when the package was opened.

        Raises:
            PackageError: if it has changed since.
        """
        path = self.path / MODEL
        content = _content(path, _largest_model(self.spec))
        if hashlib.sha256(content).hexdigest() != self.model_sha256:
            raise PackageError(f"{path}: changed while it was being used; open it again")
        return content

    def origins(self) -> frozenset[str]:
        """SHA-256 of its weights, and of what spec and card say that it was made of."""
        return frozenset({self.model_sha256, *origins_of(self.spec, self.card)})

    def is_personal(self) -> bool:
        """Whether it is of one site alone: by its card, or by the mark in the weights' own file.

        Raises:
            PackageError: if that file cannot be read.
        """
        path = self.path / MODEL
        try:
            with safe_open(path, "np") as file:
                marks = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise PackageError(f"{path}: no safetensors file ({error}); copy it anew") from None
        return PERSONAL in self.card or PERSONAL in marks

    def network(self) -> nn.Module:
        """The network with its weights, in evaluation mode, on the CPU.

        Raises:
            PackageError: if the weights are not its network's, are not finite numbers, or have
                changed since the package was opened.
        """
        content, path = self.weights(), self.path / MODEL
        try:
            weights = load(content)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise PackageError(f"{path}: no safetensors file ({error}); copy it anew") from None
        expected = {
            name: (shape, np.dtype("f4")) for name, shape in models.shapes(self.spec).items()
        }
        if {name: (array.shape, array.dtype) for name, array in weights.items()} != expected:
            raise PackageError(
                f"{path}: its weights are not those of {self.spec.model.name}; the folder holds "
                "parts of two runs: copy it anew"
            )
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise PackageError(f"{path}: holds weights that are no finite numbers; it cannot work")
        network = models.build(self.spec)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return network.eval()


_UNSIGNED = (
    "expected one that a federation's coordinator has signed (`cloister export --sign`); "
    "--unsigned takes one that nobody has signed"
)


# --- Folders of runs that are not over ------------------------------------------------------------


def unfinished(folder: Path) -> str | None:
    """How far a run is that has no model yet, and how it goes on; None of any other folder."""
    simulated = _is_there(folder / "simulation.json")
    if _is_there(folder / MODEL) or not (simulated or _is_there(folder / "standing.json")):
        return None
    way = f"cloister coordinator resume {folder.resolve().name}"
    if simulated:
        way = f"cloister simulate --resume {shlex.quote(str(folder))}"
    try:
        rounds = json.loads((folder / SPEC).read_bytes())["rounds"]
        done = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        rounds, done = "its", 0
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return f"{folder}: not finished, after {done} of {rounds} rounds; go on with `{way}`"


def refuse_unfinished(folder: Path) -> None:
    """Raise RunError if a run's folder is of one that is not over."""
    if said := unfinished(folder):
        raise RunError(said)


# --- Folders with a manifest ----------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A folder that is as its manifest says.

    Attributes:
        manifest: whose every file has been read and compared.
        signer: as in `Package`.
    """

    manifest: Manifest
    signer: Signer | None


def check_folder(
    path: Path,
    *,
    authority: Certificate | None = None,
    unsigned: bool = False,
    clock: Clock | None = None,
) -> Checked:
    """Check a folder of any kind against its manifest, and the manifest against its signature.

    The signature is looked at first, so that the rest is read as far as a known federation
    vouches for it. Arguments and errors are those of `Package.open`.
    """
    found = dict(_files(path))
    content = _content(path / MANIFEST, _LARGEST_TEXT)
    manifest = _parsed(Manifest, content, path / MANIFEST)
    signer = None
    if SIGNATURE not in found:
        if not unsigned:
            raise PackageError(f"{path}: nobody has signed it; {_UNSIGNED}")
    elif authority is not None:
        signer = _signer(path, content, manifest, authority, (clock or Clock()).date())
    elif not unsigned:
        raise PackageError(
            f"{path}: it is signed, and no authority is known that could say by whom; name the "
            "federation's certificate or a node's folder"
        )
    _check_names(path, set(manifest.files), set(found) - {MANIFEST, SIGNATURE})
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, found[name])
    return Checked(manifest, signer)


def origins_in(path: Path, checked: Checked) -> frozenset[str]:
    """`origins_of` the spec and the card in a checked folder of any kind.

    Raises:
        PackageError: if one of them is missing, cannot be read, or is no longer what was checked.
    """
    there = _Reader(path, checked)
    return origins_of(there.spec(), there.card())


def origins_of(spec: RunSpec, card: Mapping[str, Any]) -> frozenset[str]:
    """SHA-256 of the weights that a card is of, and of all those that it says went before them.

    That is where its run began, what it was pruned or quantised of, what was fine-tuned, and the
    list of all of these that a card hands on (`MADE_OF`). Cards of earlier versions have no list:
    of them it is one step. What is no SHA-256 is passed over.

    Raises:
        PackageError: if the list is longer than any model's past.
    """
    said = (
        ("model", "safetensors_sha256"),
        ("smaller", "of_model_sha256"),
        (PERSONAL, "began_with"),
    )
    parts = ((card.get(key), name) for key, name in said)
    found = [part.get(name) for part, name in parts if isinstance(part, Mapping)]
    handed_on = card.get(MADE_OF)
    if isinstance(handed_on, list):
        if len(handed_on) > _MOST_ORIGINS:  # cut short, it would let a withdrawn one through
            raise PackageError(
                f"{CARD}: {MADE_OF} names {len(handed_on)} models; expected at most "
                f"{_MOST_ORIGINS}: take a model with a shorter past"
            )
        found += handed_on
    if spec.start is not None:
        found.append(spec.start.model_sha256)
    return frozenset(one for one in found if isinstance(one, str) and _SHA256.fullmatch(one))


def is_personal(card: bytes) -> bool:
    """Whether a model card says that its model must not leave the site that made it."""
    return PERSONAL in json.loads(card)


def entry_of(path: Path) -> Entry:
    """What a manifest says of a file that lies at `path`.

    Raises:
        PackageError: if it cannot be read.
    """
    sha256, size = _digest(path, _LARGEST_FILE)
    return Entry(sha256=sha256, size=size)


def _signer(
    path: Path, content: bytes, manifest: Manifest, authority: Certificate, now: datetime
) -> Signer:
    """Who signed a manifest: a coordinator of this authority, when its certificate was in force."""
    source = path / SIGNATURE
    signed = _parsed(Signature, _content(source, certificates.LARGEST_FILE), source)
    if manifest.made > now + BACKDATED:
        raise IdentityError(
            f"{source}: signed at {shown(manifest.made)}, and this machine's clock says "
            f"{shown(now)}; set the clock right"
        )
    try:
        own = certificates.certificate(signed.certificate.encode(), "its certificate")
        for each in (own, authority):
            _check_in_force(each, manifest.made)
        certificates.check_certificate(own, authority, Use.COORDINATOR, manifest.made)
        key = certificates.key_of(own, "its certificate")
        certificates.check_signature(key, PURPOSE, content, signed.signature)
    except IdentityError as error:
        raise IdentityError(f"{source}: {error}") from None
    authority_key = certificates.key_bytes(certificates.key_of(authority, "the authority"))
    return Signer(name_of(authority), fingerprint(authority_key), name_of(own), manifest.made)


def _check_in_force(certificate: Certificate, made: datetime) -> None:
    """What counts is the time of signing: a model outlives the certificate of its coordinator."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins <= made <= ends:
        raise IdentityError(
            f"signed at {shown(made)}, when the certificate of {name_of(certificate)!a} was not in "
            f"force (from {shown(begins)} to {shown(ends)}); the coordinator signs it anew"
        )


def _files(path: Path) -> Iterator[tuple[str, int]]:
    """Path and size of every file beneath `path`; whatever is no plain file is refused."""
    folders, seen = [path], 0
    while folders:
        folder = folders.pop()
        for entry in _entries(folder):
            name = Path(entry.path).relative_to(path)
            seen += 1
            if seen > 2 * _MOST_FILES or len(name.parts) > _DEEPEST:
                raise PackageError(f"{path}: more files or folders in it than any model's package")
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield name.as_posix(), entry.stat(follow_symlinks=False).st_size
            else:
                raise PackageError(f"{entry.path}: a link, or no plain file; copy the package anew")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise PackageError(f"{folder}: cannot be read ({error})") from None


def _check_names(path: Path, listed: set[str], found: set[str]) -> None:
    for name in sorted(listed - found):
        raise PackageError(f"{path / name}: is missing; {MANIFEST} names it: copy the package anew")
    for name in sorted(found - listed):
        raise PackageError(
            f"{path}: holds {name!a}, which {MANIFEST} does not name; a package holds nothing "
            "else: take it out if you know it, or copy the package anew"
        )


def _check_file(path: Path, entry: Entry, size: int) -> None:
    if size != entry.size or _digest(path, entry.size) != (entry.sha256, entry.size):
        raise PackageError(
            f"{path}: altered since the package was made (its size or SHA-256 is another); copy "
            "the package anew"
        )


# --- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads the files of a model; those of a package once more against what was checked."""

    path: Path
    checked: Checked | None

    def text(self, name: str) -> bytes:
        content = _content(self.path / name, _LARGEST_TEXT)
        self._same(name, hashlib.sha256(content).hexdigest())
        return content

    def digest(self, name: str, largest: int) -> str:
        sha256, _ = _digest(self.path / name, largest)
        self._same(name, sha256)
        return sha256

    def _same(self, name: str, sha256: str) -> None:
        if self.checked is None:
            return
        entry = self.checked.manifest.files.get(name)
        if entry is None or entry.sha256 != sha256:
            raise PackageError(f"{self.path / name}: not as {MANIFEST} says; copy it anew")

    def spec(self) -> RunSpec:
        try:
            return RunSpec.from_json(self.text(SPEC).decode(), source=str(self.path / SPEC))
        except (UnicodeDecodeError, SpecError) as error:
            raise PackageError(
                f"{self.path}: not the folder of a finished run or of its package ({error})"
            ) from None

    def card(self) -> dict[str, Any]:
        source = self.path / CARD
        try:
            card = json.loads(self.text(CARD))
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{source}: no JSON ({error}); expected a model card") from None
        if not isinstance(card, dict):
            raise PackageError(f"{source}: expected a model card, a JSON object")
        return card

    def calibration(self, spec: RunSpec) -> Calibration | None:
        source = self.path / CALIBRATION
        if not _is_there(source):
            return None
        found = _parsed(Calibration, self.text(CALIBRATION), source)
        if problem := found.problem_with(spec):
            raise PackageError(f"{source}: {problem}; copy the package anew")
        return found


def _check_card(path: Path, card: Mapping[str, Any], spec: RunSpec, model_sha256: str) -> None:
    """The card of another model would promise what this one does not hold."""
    model = card.get("model")
    said = (
        card.get("spec_sha256"),
        model.get("safetensors_sha256") if isinstance(model, dict) else None,
    )
    if card and said != (spec.digest, model_sha256):
        raise PackageError(
            f"{path / CARD}: the card of another model (by its spec_sha256 and "
            "safetensors_sha256); of a run, `cloister report` writes it again"
        )


def _largest_model(spec: RunSpec) -> int:
    """Bytes that a file of this network's weights can have."""
    return _LARGEST_HEADER + 4 * sum(map(prod, models.shapes(spec).values()))


_Read = TypeVar("_Read", bound=Section)


def _parsed(kind: type[_Read], content: bytes, source: Path) -> _Read:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise PackageError(
            f"{source}: not as this version writes it ({where:.200}: {first['msg']:.200})"
        ) from None


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def _content(path: Path, largest: int) -> bytes:
    """The content of a plain file that is not larger than it can be."""
    with _opened(path, largest) as file:
        return b"".join(_chunks(file, path, largest))


def _digest(path: Path, largest: int) -> tuple[str, int]:
    """SHA-256 in hex, and size, of a plain file that is not larger than it can be."""
    digest, size = hashlib.sha256(), 0
    with _opened(path, largest) as file:
        for chunk in _chunks(file, path, largest):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _chunks(file: BinaryIO, path: Path, largest: int) -> Iterator[bytes]:
    size = 0
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        if size > largest:
            raise PackageError(f"{path}: grows while it is read; copy it anew")
        yield chunk


@contextmanager
def _opened(path: Path, largest: int) -> Iterator[BinaryIO]:
    """A plain file; neither a link nor a pipe, by which a name could lead elsewhere or wait."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PackageError(f"{path}: no plain file; copy it anew")
            if status.st_size > largest:
                raise PackageError(
                    f"{path}: {status.st_size:,} bytes; expected at most {largest:,}"
                )
            yield file
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error}); copy it anew") from None
