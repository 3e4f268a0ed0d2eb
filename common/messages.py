"""The closed list of what may cross between the coordinator and a node, in both directions.

    coordinator -> node                            node -> coordinator
    query.invite    Invitation (spec)              NodeCard or RefusalReply
    train.step      TrainTask (spec, round,        Release (update, mechanism)
                    witness, global weights)       or RefusalReply
    evaluate.count  EvaluationTask (spec,          Counts (noised table, mechanism)
                    witness, final weights)        or RefusalReply
    query.close     Closing (run's digest)         Closed or RefusalReply

Each becomes a Flower `RecordDict` of one record of scalars and at most one of arrays. Reading is
strict both ways: a missing or unknown field, a wrong type, another version or a digest that does
not fit is a `MessageError` that names it. A release is built from these fields and from nothing
else (law 1): there is no place in it for a loss, a count, a duration or a text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from common.accounting import SubsampledGaussian
from common.errors import MessageError, RefusalCode, SpecError, VersionError
from common.spec import Behind, Count, Positive, RunSpec, Section

PROTOCOL = 2
INVITE, TRAIN, COUNT, CLOSE = "query.invite", "train.step", "evaluate.count", "query.close"

Arrays = Mapping[str, NDArray[np.float32]]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]

_WITNESS = r"[0-9]{1,12}:[0-9a-f]{64}:[0-9a-f]{64}"
Witness = Annotated[str, Field(pattern=f"^{_WITNESS}$")]
"""How far a node's ledger went: entry, head of its chain, and the node's seal on both.

The head is keyed by the node: it says nothing to anybody else, and nobody else can make one. A
coordinator keeps the last one of each site and gives it back with each task; a node whose ledger
does not lead there was rolled back, and stops (docs/privacy.md 11).
"""

LARGEST_WEIGHT = 1e6
"""Of a global model in size; a node refuses to train from a larger one."""

_TABLE = "counts"
_MOST_ARRAYS, _LONGEST_NAME, _MOST_DIMENSIONS = 10_000, 200, 32
_NPY_1_0, _ALIGNMENT = b"\x93NUMPY\x01\x00", 16  # numpy.lib.format


class _Fields(Section):
    """The scalars of a message. `protocol` must be this side's."""

    protocol: Annotated[int, Field(ge=PROTOCOL, le=PROTOCOL)] = PROTOCOL


class _InvitationFields(_Fields):
    spec: Annotated[str, Field(max_length=200_000)]
    digest: Digest


class _EvaluationFields(_InvitationFields):
    witness: Annotated[str, Field(pattern=f"^({_WITNESS})?$")]


class _TaskFields(_EvaluationFields):
    round: Count


class _ClosingFields(_Fields):
    digest: Digest


class _ReleaseFields(_Fields):
    digest: Digest
    round: Count
    private: bool
    sampling_rate: Annotated[float, Field(ge=0, le=1)]
    noise_multiplier: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]
    unit: Literal["patient", "image"]


class _CountsFields(_Fields):
    digest: Digest
    noise_multiplier: Positive
    unit: Literal["patient", "image"]


class NodeCard(_Fields):
    """Yes: the node's public name, its software and the size that its hospital declares.

    ``paced``: whether its replies are held to a slot, so that how long training took says nothing.
    ``synthetic``: of a run that mixes in synthetic images, whose patients are behind them; on no
    other card, so that a coordinator from before it takes no card that it would not understand,
    and none of a node from before it passes for protected.
    """

    digest: Digest
    site: Name
    version: Annotated[str, Field(max_length=40)]
    declared_size: Count
    paced: bool
    witness: Witness
    synthetic: Behind | None = None

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        return _write("card", self)


class RefusalReply(_Fields):
    """No, with a code of the closed list; a random incident number where it was a failure."""

    code: Annotated[RefusalCode, Field(strict=False)]
    incident: Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$")] = ""

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        return _write("refusal", self)


class Closed(_Fields):
    """The run is over at this node too: what was set aside for it is free, its releases gone.

    With how far the ledger went: the coordinator keeps it until the site is invited again.
    """

    digest: Digest
    witness: Witness

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        return _write("closed", self)


@dataclass(frozen=True)
class Invitation:
    """Can you take part in this run?"""

    spec: RunSpec

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        spec = self.spec
        return _write("invitation", _InvitationFields(spec=spec.canonical_json, digest=spec.digest))


@dataclass(frozen=True)
class Closing:
    """The run with this digest is over; nothing more will be asked for it."""

    digest: str

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        return _write("closing", _ClosingFields(digest=self.digest))


@dataclass(frozen=True)
class TrainTask:
    """Train round `round_number` of the run `spec` from these global weights.

    `witness` is the last that the coordinator holds of the site's ledger, empty for none; it is
    no part of the task's identity.
    """

    spec: RunSpec
    round_number: int
    weights: Arrays
    witness: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over run, round and weights: what makes two tasks the same task."""
        return _task_digest(f"{self.spec.digest} {self.round_number}", self.weights)

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        text, digest = self.spec.canonical_json, self.spec.digest
        fields = _TaskFields(
            spec=text, digest=digest, round=self.round_number, witness=self.witness
        )
        return _write("task", fields, weights=self.weights)


@dataclass(frozen=True)
class EvaluationTask:
    """Count how the final model `weights` does on the site's own held-out patients, with noise.

    `witness` is as in a `TrainTask`.
    """

    spec: RunSpec
    weights: Arrays
    witness: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over run and weights: what makes two tasks the same task."""
        return _task_digest(f"{self.spec.digest} evaluation", self.weights)

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        text, digest = self.spec.canonical_json, self.spec.digest
        fields = _EvaluationFields(spec=text, digest=digest, witness=self.witness)
        return _write("evaluation", fields, weights=self.weights)


@dataclass(frozen=True)
class Counts:
    """The noised counts of a site (`common.tasks.counts`), and the mechanism that made them.

    `table` is (columns, 2, bins) float32; `digest` is the run's.
    """

    digest: str
    mechanism: SubsampledGaussian
    table: NDArray[np.float32]

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        fields = _CountsFields(
            digest=self.digest,
            noise_multiplier=self.mechanism.noise_multiplier,
            unit=self.mechanism.unit,
        )
        return _write("counts", fields, table={_TABLE: self.table})


@dataclass(frozen=True)
class Release:
    """The noised update of a round, and the mechanism that made it (None: no privacy).

    `digest` is the run's: with the round it says which task this answers.
    """

    digest: str
    round_number: int
    mechanism: SubsampledGaussian | None
    update: Arrays

    def to_records(self) -> RecordDict:
        """As Flower carries it."""
        made = self.mechanism
        fields = _ReleaseFields(
            digest=self.digest,
            round=self.round_number,
            private=made is not None,
            sampling_rate=made.sampling_rate if made else 0.0,
            noise_multiplier=made.noise_multiplier if made else 0.0,
            steps=made.steps if made else 0,
            unit=made.unit if made else "patient",
        )
        return _write("release", fields, update=self.update)


Request = Invitation | TrainTask | EvaluationTask | Closing
Reply = NodeCard | Release | Counts | Closed | RefusalReply


def read_request(records: RecordDict) -> Request:
    """What a coordinator asks of a node.

    Raises:
        MessageError: if it is not exactly one message of the list.
    """
    if "closing" in records:
        return Closing(_read(records, "closing", _ClosingFields).digest)
    if "evaluation" in records:
        asked = _read(records, "evaluation", _EvaluationFields, arrays="weights")
        return EvaluationTask(_spec_of(asked), _arrays(records["weights"]), asked.witness)
    if "task" not in records:
        return Invitation(_spec_of(_read(records, "invitation", _InvitationFields)))
    fields = _read(records, "task", _TaskFields, arrays="weights")
    spec = _spec_of(fields)
    if fields.round > spec.rounds:
        raise MessageError(f"task.round = {fields.round}: expected 1 to {spec.rounds}")
    return TrainTask(spec, fields.round, _arrays(records["weights"]), fields.witness)


def read_reply(records: RecordDict) -> Reply:
    """What a node answers.

    Raises:
        MessageError: if it is not exactly one message of the list.
    """
    if "card" in records:
        return _read(records, "card", NodeCard)
    if "closed" in records:
        return _read(records, "closed", Closed)
    if "refusal" in records:
        return _read(records, "refusal", RefusalReply)
    if "counts" in records:
        return _counts(records)
    fields = _read(records, "release", _ReleaseFields, arrays="update")
    update = _arrays(records["update"])
    return Release(fields.digest, fields.round, _mechanism(fields), update)


def _write(name: str, fields: _Fields, **arrays: Arrays) -> RecordDict:
    written = fields.model_dump(mode="json", exclude_none=True)
    records = RecordDict({name: ConfigRecord(written)})
    for key, named in arrays.items():
        records[key] = ArrayRecord(
            {name: Array(np.asarray(array, order="C")) for name, array in named.items()}
        )
    return records


_FieldsOf = TypeVar("_FieldsOf", bound=_Fields)


def _read(
    records: RecordDict, name: str, kind: type[_FieldsOf], arrays: str | None = None
) -> _FieldsOf:
    """The checked scalars of the one message that `records` must be."""
    expected = {name, arrays} if arrays else {name}
    if set(records) != expected:
        seen = f"{sorted(records)}"
        raise MessageError(f"records {seen:.200}: expected exactly {sorted(expected)}")
    record = records[name]
    if not isinstance(record, ConfigRecord):
        raise MessageError(f"{name}: a {type(record).__name__}, expected a record of scalars")
    spoken = record.get("protocol")
    if type(spoken) is int and spoken != PROTOCOL:
        raise VersionError(
            f"{name}.protocol = {spoken}: this side speaks {PROTOCOL}; both sides need the same "
            "version of Cloister"
        )
    left_out = {key for key, field in kind.model_fields.items() if field.default is None}
    if not set(kind.model_fields) - left_out <= set(record) <= set(kind.model_fields):
        odd = f"{sorted(set(record) ^ set(kind.model_fields))}"
        raise MessageError(f"{name}: fields missing or unknown: {odd:.200}")
    try:
        return kind.model_validate(dict(record))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise MessageError(f"{name}.{where} = {wrong['input']!r:.200}: {wrong['msg']}") from None


def _arrays(record: object) -> dict[str, NDArray[np.float32]]:
    if not isinstance(record, ArrayRecord) or not 0 < len(record) <= _MOST_ARRAYS:
        raise MessageError(f"expected one record of 1 to {_MOST_ARRAYS} arrays")
    return {_parameter(key): _float32(key, array) for key, array in record.items()}


def _parameter(key: str) -> str:
    if not 0 < len(key) <= _LONGEST_NAME or not key.isprintable():
        raise MessageError(f"an array's name of {len(key)} characters is not a parameter's")
    return key


def _float32(key: str, array: Array) -> NDArray[np.float32]:
    """The array, if its bytes are what NumPy writes for float32 of its shape, and nothing else.

    Its header is compared, not parsed: no pickle, no archive and no evaluated text can be in it,
    and no memory is taken for more numbers than came.
    """
    shape, content = tuple(array.shape), array.data
    if array.stype != "numpy.ndarray" or array.dtype != "float32":
        raise MessageError(f"{key}: {array.stype!r:.40} of {array.dtype!r:.40}, expected float32")
    if len(shape) > _MOST_DIMENSIONS or any(size < 1 for size in shape):
        raise MessageError(f"{key}: a shape that no parameter has: {shape!s:.200}")
    start = len(_NPY_1_0) + 2 + int.from_bytes(content[8:10], "little")
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    if (
        not content.startswith(_NPY_1_0)
        or content[10:start].rstrip(b" \n") != header.encode()
        or start % _ALIGNMENT
        or len(content) - start != 4 * math.prod(shape)
    ):
        raise MessageError(f"{key}: not the float32{list(shape)!s:.200} that it says it is")
    return np.frombuffer(content, "<f4", offset=start).reshape(shape).astype(np.float32)


def _counts(records: RecordDict) -> Counts:
    fields = _read(records, "counts", _CountsFields, arrays="table")
    arrays = _arrays(records["table"])
    if set(arrays) != {_TABLE}:
        raise MessageError(f"counts.table: arrays {sorted(arrays)!s:.200}, expected {_TABLE!r}")
    mechanism = SubsampledGaussian(1.0, fields.noise_multiplier, 1, fields.unit)
    return Counts(fields.digest, mechanism, arrays[_TABLE])


def _task_digest(what: str, weights: Arrays) -> str:
    seen = hashlib.sha256(what.encode())
    for name in sorted(weights):
        array = weights[name]
        seen.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        seen.update(np.ascontiguousarray(array).data)
    return seen.hexdigest()


def _spec_of(fields: _InvitationFields) -> RunSpec:
    try:
        spec = RunSpec.from_json(fields.spec, source="message")
    except SpecError as error:
        raise MessageError(str(error)) from error
    if spec.digest != fields.digest:
        raise MessageError("the digest does not fit the spec")
    return spec


def _mechanism(fields: _ReleaseFields) -> SubsampledGaussian | None:
    rate, noise = fields.sampling_rate, fields.noise_multiplier
    if not fields.private:
        if rate or noise or fields.steps:
            raise MessageError("release.private = False: a mechanism is described all the same")
        return None
    try:
        return SubsampledGaussian(rate, noise, fields.steps, fields.unit)
    except ValueError as error:
        raise MessageError(f"release: {error}") from error
