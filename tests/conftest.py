"""What tests of more than one room share: real data, small runs, small cohorts."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from numpy.typing import NDArray
from torch import nn

from client.intake.builder import CohortBuilder, ImageRecord
from client.keyfile import NodeKey
from client.ledger import Ledger, Place, Signed
from client.policy import Policy
from common import models
from common.clock import Clock
from common.cohort import Cohort, CohortMeta
from common.noise import Keystream
from common.spec import RunSpec, parse_run_text
from server import passphrase

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"

SPEC = """\
name = "small"
rounds = 3

[task]
classes = ["normal", "finding"]

[model]
name = "small-cnn"
width = 4

[input]
height = 16
width = 16

[optimizer]
name = "sgd"
learning_rate = 0.1

[local]
batch_size = 4

[privacy]
mechanism = "dp-sgd"
noise_multiplier = 1.0
delta = 1e-4
"""

KINDS = {"mechanism", "strategy", "name"}
"""Keys by which a table of a run says what kind it is."""


@pytest.fixture(scope="session", autouse=True)
def _heard_ctrl_c() -> None:
    """A shell without job control has what it starts with `&` ignore Ctrl-C, and so would every
    process of a test that is ended by it: it would be waited for in vain."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cost_of_a_guess() -> Iterator[int]:
    """What a guess at a passphrase costs as shipped; to these tests it costs an eighth."""
    shipped = passphrase._COST
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passphrase, "_COST", 14)
        yield shipped


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images beside the checkout: skipped where they are not, but never so in CI."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED_DATA} is missing, and CI must not skip the real images")
        pytest.skip(f"{SHARED_DATA} is not there; this test looks at real images")
    return SHARED_DATA


@pytest.fixture(scope="session")
def spec_text() -> str:
    """The TOML of a small valid run under DP-SGD."""
    return SPEC


@pytest.fixture(scope="session")
def make_spec(spec_text: str) -> Callable[..., RunSpec]:
    """Build the small run with changes: `make_spec(rounds=5, local={"steps": 2})`.

    A table is changed key by key, where None takes a key out; one that says of what kind it is
    (`model={"name": "resnet18"}`) stands for itself.
    """
    plain = json.loads(parse_run_text(spec_text, source="small.toml").spec.canonical_json)

    def make(**changes: Any) -> RunSpec:
        return RunSpec.from_json(json.dumps(_changed(plain, changes)))

    return make


@pytest.fixture
def write_cohort(tmp_path: Path) -> Callable[..., Cohort]:
    """Write and open a real cohort that fits a spec.

    Called with the spec, `owners` (a patient's number for each image), and if wished `labels`
    and `pixels`, which are drawn where they are not given, `studies` (a name for each image; one
    of each patient if not given), `splits` and `modalities`.
    """

    def write(  # noqa: PLR0913 - what a test may want of a cohort
        spec: RunSpec,
        owners: Sequence[int],
        *,
        labels: Sequence[Any] | None = None,
        pixels: NDArray[np.uint16] | None = None,
        name: str = "cohort",
        studies: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        modalities: Sequence[str] | None = None,
    ) -> Cohort:
        rng = np.random.default_rng(len(owners))
        classes, shape = len(spec.task.classes), spec.input.shape
        chosen = rng.integers(0, classes, len(owners)).tolist() if labels is None else labels
        drawn = rng.integers(0, 65536, (len(owners), *shape), dtype=np.uint16)
        path = tmp_path / name
        with CohortBuilder(path, shape) as builder:
            for row, (owner, label) in enumerate(zip(owners, chosen, strict=True)):
                image = (drawn if pixels is None else pixels)[row]
                patient = f"p{owner:05d}"
                study = "st" if studies is None else studies[row]
                split = "" if splits is None else splits[row]
                kept = tuple(label) if isinstance(label, list | tuple) else int(label)
                made = "" if modalities is None else modalities[row]
                record = ImageRecord(patient, study, "se", str(row), kept, 20, 20, split, made)
                builder.add(record, image)
            unit = spec.privacy.unit
            builder.finish(CohortMeta.of(spec, unit=unit, source="test", created="2026-01-01"))
        return Cohort.open(path)

    return write


@pytest.fixture(scope="session")
def make_policy(make_spec: Callable[..., RunSpec]) -> Callable[..., Policy]:
    """A hospital's policy that lets the small run through, unless changed by key or table."""
    small = make_spec()
    plain = {
        "site": "north",
        "declared_size": 40,
        "cohort": "cohort",
        "approval": "automatic",
        "budget": {"epsilon": 20.0, "delta": 1e-4},
        "limits": {"operators": "any", "models": "any", "least_patients": 1},
        "data": {
            "unit": "patient",
            "kind": small.task.kind,
            "classes": list(small.task.classes),
            "shape": list(small.input.shape),
            "preprocessing": small.input.preprocessing_digest,
        },
        "release": {"pace": 0.0},
    }

    def make(**changes: Any) -> Policy:
        budgetless = {"budget": None} if changes.get("budget", {}) is None else {}
        return Policy.model_validate_json(json.dumps(_changed(plain, changes) | budgetless))

    return make


NODE_KEY = NodeKey(bytes(range(32)))
COHORT = "c" * 64


@pytest.fixture
def make_ledger(tmp_path: Path) -> Callable[..., Ledger]:
    """A new ledger with a policy's budget, in which the cohort `COHORT` is admitted."""

    def make(policy: Policy, *, name: str = "ledger", clock: Clock | None = None) -> Ledger:
        place = Place(tmp_path / name, NODE_KEY, tmp_path / f"{name}.witness", clock or Clock())
        ledger = Ledger.create(place, site=policy.site)
        if policy.budget is not None:
            ledger.set_budget(policy.budget.limit, Signed("a test", "to begin with"))
        ledger.admit(COHORT, Signed("a test", "it is one"))
        return ledger

    return make


@pytest.fixture
def open_ledger(tmp_path: Path) -> Callable[..., Ledger]:
    """What `make_ledger` made, opened again: as by another process, or after a restart."""

    def opened(kind: type[Ledger] = Ledger, *, name: str = "ledger") -> Ledger:
        return kind(Place(tmp_path / name, NODE_KEY, tmp_path / f"{name}.witness"))

    return opened


class ArrayCohort(Cohort):
    """A cohort in memory, for what no file can hold: an infinite pixel, an order of patients.

    Its `labels` are its targets, whatever they are: numbers, masks, boxes.

    Attributes:
        reads: the image numbers of every call of `images`, in order.
    """

    def __init__(
        self,
        images: NDArray[np.float32],
        labels: NDArray[Any],
        rows_by_patient: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._pixels = images
        self.labels = labels
        self.show(
            [[row] for row in range(len(images))] if rows_by_patient is None else rows_by_patient
        )
        self.reads: list[list[int]] = []

    def show(self, rows_by_patient: Sequence[Sequence[int]]) -> None:
        """From now on, hold these patients in this order, by the numbers of their images."""
        self.patients = tuple(f"p{number}" for number in range(len(rows_by_patient)))
        self._owned = rows_by_patient

    def __len__(self) -> int:
        return len(self._pixels)

    def __repr__(self) -> str:
        return f"ArrayCohort({len(self)} images of {len(self.patients)} patients)"

    def images(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        self.reads.append([int(row) for row in rows])
        return self._pixels[np.asarray(rows, dtype=np.int64)]

    def targets(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = self.labels[np.asarray(rows, dtype=np.int64)]
        return found

    def rows_of(self, patient: int) -> NDArray[np.int64]:
        return np.array(self._owned[patient], dtype=np.int64)


@pytest.fixture(scope="session")
def array_cohort() -> type[ArrayCohort]:
    """`array_cohort(images, labels, rows_by_patient)`: one image a patient if not said."""
    return ArrayCohort


@pytest.fixture(scope="session")
def global_weights() -> Callable[[RunSpec], dict[str, NDArray[np.float32]]]:
    """The weights with which a run starts, as a coordinator sends them."""

    def weights(spec: RunSpec) -> dict[str, NDArray[np.float32]]:
        named = models.build(spec).named_parameters()
        return {name: parameter.detach().numpy().copy() for name, parameter in named}

    return weights


def linear(spec: RunSpec) -> nn.Module:
    """One layer without a bias: the gradient of an image is a multiple of its pixels."""
    pixels = int(np.prod(spec.input.shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, spec.task.outputs, bias=False))


@pytest.fixture
def linear_network(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network of one linear layer, in the registry while the test lasts."""
    line = models.Network(f"{__name__}:linear", smallest_side=8)
    monkeypatch.setitem(models.NETWORKS, "linear", line)
    return "linear"


class Quiet(Keystream):
    """A keystream whose noise is zero: what a release would be without it."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._own = key

    def derive(self, purpose: str) -> Keystream:
        return Quiet(hashlib.sha256(self._own + purpose.encode()).digest())

    def gaussian(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)


@pytest.fixture
def quiet_keystream() -> Callable[[], Keystream]:
    """The same keystream at every call, without noise."""
    return lambda: Quiet(bytes(32))


def _changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = dict(document)
    for key, value in changes.items():
        if value is None:
            changed.pop(key, None)
        elif isinstance(value, dict) and not KINDS & value.keys():
            changed[key] = _changed(changed.get(key) or {}, value)
        else:
            changed[key] = value
    return changed


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program("storescu")`: where a peer is; skipped where it is not, but never so in CI."""

    def find(name: str) -> str:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        return missing(name) if found is None else found

    return find


def missing(peer: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{peer} is missing, and CI must not skip a real peer")
    pytest.skip(f"{peer} is not installed; this test speaks with it")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A TCP port that nobody listens at now."""
    return unused_port


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, each a PEM file."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority of a test; `file` is its own certificate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.file = folder / "authority.pem"
        made = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.file.write_bytes(self._signed(made))

    def issue(self, name: str) -> Issued:
        """A certificate for the loopback address, for servers and clients."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        made = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        )
        issued = Issued(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        issued.certificate.write_bytes(self._signed(made))
        issued.key.touch(mode=0o600)
        issued.key.write_bytes(secret)
        return issued

    def _builder(self, subject: x509.Name, key: rsa.RSAPrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        made = builder.sign(self._key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Authority]:
    """`authority("hospital")`: one of that name, the same each time."""
    made: dict[str, Authority] = {}

    def make(name: str) -> Authority:
        if name not in made:
            folder = tmp_path_factory.mktemp("authority") / name
            folder.mkdir()
            made[name] = Authority(folder)
        return made[name]

    return make


class Orthanc:
    """A running Orthanc: a PACS with REST, DICOM over TLS and DICOMweb."""

    def __init__(self, port: int, user: str) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.basic = f"Basic {base64.b64encode(user.encode()).decode()}"

    def rest(self, path: str, data: bytes | None = None, method: str = "") -> Any:
        """One request to its REST interface; what it answers as JSON."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/{path}", data, method=method or ("POST" if data is not None else "GET")
        )
        request.add_header("Authorization", self.basic)
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.loads(answer.read() or b"null")

    def upload(self, file: Path) -> str:
        """Give it a file; its own identifier of the instance."""
        return str(self.rest("instances", file.read_bytes())["ID"])

    def send(self, port: int, identifiers: Sequence[str], *, tls: bool) -> Any:
        """Have it send instances to a C-STORE service on this machine."""
        peer = {"AET": "CLOISTER", "Host": "127.0.0.1", "Port": port, "UseDicomTls": tls}
        self.rest("modalities/cloister", json.dumps(peer).encode(), "PUT")
        asked = {"Resources": list(identifiers), "Synchronous": True}
        return self.rest("modalities/cloister/store", json.dumps(asked).encode())


ORTHANC_USER = "intake:a-password-of-a-test"
ORTHANC_PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc")


@pytest.fixture(scope="session")
def start_orthanc(
    program: Callable[[str], str],
    authority: Callable[[str], Authority],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Orthanc]]:
    """`start_orthanc()`: a PACS of its own."""
    running: list[subprocess.Popen[bytes]] = []
    found = program("Orthanc")
    plugins = [place for place in ORTHANC_PLUGINS if list(Path(place).glob("*DicomWeb*"))]
    if not plugins:
        missing("Orthanc's DICOMweb plugin")

    def start() -> Orthanc:
        folder = tmp_path_factory.mktemp("orthanc")
        issued = authority("hospital").issue(f"orthanc-{folder.name}")
        http = unused_port()
        settings = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "HttpPort": http,
            "DicomPort": unused_port(),
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": dict([ORTHANC_USER.split(":")]),
            "Plugins": plugins[:1],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(issued.certificate),
            "DicomTlsPrivateKey": str(issued.key),
            "DicomTlsTrustedCertificates": str(authority("hospital").file),
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        with (folder / "log").open("wb") as log:
            command = [found, str(folder / "orthanc.json")]
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        until = time.monotonic() + 60
        while not _answers(http):
            if running[-1].poll() is not None or time.monotonic() > until:
                pytest.fail((folder / "log").read_text())
            time.sleep(0.1)
        return Orthanc(http, ORTHANC_USER)

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(60)


@pytest.fixture(scope="session")
def orthanc(start_orthanc: Callable[..., Orthanc]) -> Orthanc:
    """One PACS for all tests."""
    return start_orthanc()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
