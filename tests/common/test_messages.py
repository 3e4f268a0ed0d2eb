"""The closed list: what is on it crosses unchanged, what is not is refused and never run."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import SubsampledGaussian
from common.errors import MessageError, RefusalCode, VersionError
from common.messages import (
    PROTOCOL,
    Arrays,
    Closed,
    Closing,
    Counts,
    EvaluationTask,
    Invitation,
    NodeCard,
    RefusalReply,
    Release,
    TrainTask,
    read_reply,
    read_request,
)
from common.spec import RunSpec

Message = (
    Invitation
    | TrainTask
    | EvaluationTask
    | Closing
    | NodeCard
    | Release
    | Counts
    | Closed
    | RefusalReply
)
Spec = Callable[..., RunSpec]

MECHANISM = SubsampledGaussian(0.1, 1.5, 3, "image")
COUNTING = SubsampledGaussian(1.0, 7.5, 1, "patient")
WITNESS = f"17:{'ab' * 32}:{'0c' * 32}"
TABLE = np.arange(-6, 6, dtype=np.float32).reshape(1, 2, 6)


def card_of(spec: RunSpec, **changes: Any) -> NodeCard:
    said: dict[str, Any] = {
        "digest": spec.digest,
        "site": "north",
        "version": "0.1",
        "declared_size": 400,
        "paced": True,
        "witness": WITNESS,
    }
    return NodeCard(**(said | changes))


@pytest.fixture
def spec(make_spec: Spec) -> RunSpec:
    return make_spec()


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layer.weight": rng.normal(size=(3, 2, 1)).astype(np.float32),
        "layer.bias": np.array([np.nan, np.inf, -0.0], dtype=np.float32),
        "temperature": np.array(0.5, dtype=np.float32),
    }


def through_protobuf(records: RecordDict) -> RecordDict:
    content = recorddict_to_proto(records).SerializeToString()
    return recorddict_from_proto(RecordDictProto.FromString(content))


def through_objects(records: RecordDict) -> RecordDict:
    contents = {name: part.deflate() for name, part in get_all_nested_objects(records).items()}
    inflated = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(inflated, RecordDict)
    return inflated


def read(records: RecordDict) -> Message:
    request = {"task", "invitation", "evaluation", "closing"} & set(records)
    return read_request(records) if request else read_reply(records)


def same_arrays(one: Arrays, other: Arrays) -> None:
    assert list(one) == list(other)
    for name, array in one.items():
        assert other[name].dtype == np.float32
        assert other[name].shape == array.shape
        assert other[name].tobytes() == array.tobytes()


# --- What is on the list ----------------------------------------------------------------------


@pytest.mark.parametrize("carry", [through_protobuf, through_objects])
class TestEveryMessageCrossesUnchanged:
    """By both ways in which Flower takes records apart and puts them together."""

    def test_invitation(self, carry: Any, spec: RunSpec):
        assert read_request(carry(Invitation(spec).to_records())) == Invitation(spec)

    def test_task(self, carry: Any, spec: RunSpec, weights: Arrays):
        task = TrainTask(spec, 2, weights, WITNESS)
        seen = read_request(carry(task.to_records()))
        assert isinstance(seen, TrainTask)
        assert (seen.spec, seen.round_number, seen.digest) == (spec, 2, task.digest)
        assert seen.witness == WITNESS
        same_arrays(weights, seen.weights)

    def test_evaluation(self, carry: Any, spec: RunSpec, weights: Arrays):
        task = EvaluationTask(spec, weights, WITNESS)
        seen = read_request(carry(task.to_records()))
        assert isinstance(seen, EvaluationTask)
        assert (seen.spec, seen.digest, seen.witness) == (spec, task.digest, WITNESS)
        same_arrays(weights, seen.weights)

    @pytest.mark.parametrize("kind", [TrainTask, EvaluationTask])
    def test_a_task_for_a_site_of_which_no_witness_is_kept(
        self, carry: Any, spec: RunSpec, weights: Arrays, kind: Any
    ):
        task = TrainTask(spec, 1, weights) if kind is TrainTask else EvaluationTask(spec, weights)
        seen = read_request(carry(task.to_records()))
        assert isinstance(seen, kind)
        assert seen.witness == ""

    def test_closing(self, carry: Any, spec: RunSpec):
        assert read_request(carry(Closing(spec.digest).to_records())) == Closing(spec.digest)

    def test_closed(self, carry: Any, spec: RunSpec):
        closed = Closed(digest=spec.digest, witness=WITNESS)
        assert read_reply(carry(closed.to_records())) == closed

    def test_counts(self, carry: Any, spec: RunSpec):
        seen = read_reply(carry(Counts(spec.digest, COUNTING, TABLE).to_records()))
        assert isinstance(seen, Counts)
        assert (seen.digest, seen.mechanism) == (spec.digest, COUNTING)
        same_arrays({"table": TABLE}, {"table": seen.table})

    @pytest.mark.parametrize("mechanism", [MECHANISM, None])
    def test_release(self, carry: Any, spec: RunSpec, weights: Arrays, mechanism: Any):
        release = Release(spec.digest, 3, mechanism, weights)
        seen = read_reply(carry(release.to_records()))
        assert isinstance(seen, Release)
        assert (seen.digest, seen.round_number, seen.mechanism) == (spec.digest, 3, mechanism)
        same_arrays(weights, seen.update)

    @pytest.mark.parametrize("paced", [True, False])
    def test_card(self, carry: Any, spec: RunSpec, paced: bool):
        card = card_of(spec, site="North_1.a-b", paced=paced)
        assert read_reply(carry(card.to_records())) == card

    @pytest.mark.parametrize("code", RefusalCode)
    def test_refusal(self, carry: Any, code: RefusalCode):
        refusal = RefusalReply(code=code, incident="0a" * 8)
        assert read_reply(carry(refusal.to_records())) == refusal


def test_what_arrives_can_be_written_to_and_is_the_readers_own(spec: RunSpec, weights: Arrays):
    records = TrainTask(spec, 1, weights).to_records()
    first, second = read_request(records), read_request(records)
    assert isinstance(first, TrainTask)
    assert isinstance(second, TrainTask)
    first.weights["layer.weight"][:] = 7
    assert not (second.weights["layer.weight"] == 7).any()


@pytest.mark.parametrize(
    "laid_out",
    [np.asfortranarray, lambda a: np.ascontiguousarray(a.T).T, lambda a: np.repeat(a, 2, 0)[::2]],
    ids=["fortran", "transposed", "strided"],
)
def test_the_layout_in_memory_is_no_part_of_a_message(spec: RunSpec, laid_out: Any):
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    odd = laid_out(plain)
    assert TrainTask(spec, 1, {"w": odd}).digest == TrainTask(spec, 1, {"w": plain}).digest
    seen = read_reply(Release(spec.digest, 1, None, {"w": odd}).to_records())
    assert isinstance(seen, Release)
    same_arrays({"w": plain}, seen.update)


class TestTwoTasksAreTheSameTask:
    """If, and only if, run, round and weights are."""

    def test_in_whatever_order_the_weights_stand(self, spec: RunSpec, weights: Arrays):
        turned = {name: weights[name] for name in sorted(weights, reverse=True)}
        assert TrainTask(spec, 1, turned).digest == TrainTask(spec, 1, weights).digest

    @pytest.mark.parametrize(
        "change",
        [
            lambda s, w: TrainTask(s.identified("other"), 1, w),
            lambda s, w: TrainTask(s, 2, w),
            lambda s, w: TrainTask(s, 1, w | {"temperature": w["temperature"].reshape(1)}),
            lambda s, w: TrainTask(s, 1, {("t" if n == "temperature" else n): w[n] for n in w}),
            lambda s, w: TrainTask(s, 1, w | {"layer.bias": np.abs(w["layer.bias"])}),
            lambda s, w: TrainTask(s, 1, w | {"layer.weight": w["layer.weight"].reshape(2, 3, 1)}),
        ],
        ids=["run", "round", "dimension", "name", "sign of a zero", "shape"],
    )
    def test_not_if_anything_differs(self, spec: RunSpec, weights: Arrays, change: Any):
        assert change(spec, weights).digest != TrainTask(spec, 1, weights).digest

    def test_whatever_the_coordinator_holds_of_the_sites_ledger(
        self, spec: RunSpec, weights: Arrays
    ):
        """A resumed coordinator may hold a later one: the stored release answers all the same."""
        assert TrainTask(spec, 1, weights, WITNESS).digest == TrainTask(spec, 1, weights).digest
        evaluation = EvaluationTask(spec, weights)
        assert EvaluationTask(spec, weights, WITNESS).digest == evaluation.digest

    def test_not_if_one_of_them_is_an_evaluation(self, spec: RunSpec, weights: Arrays):
        evaluated = EvaluationTask(spec, weights).digest
        assert evaluated not in {
            TrainTask(spec, number, weights).digest for number in range(spec.rounds + 2)
        }
        assert evaluated != EvaluationTask(spec.identified("other"), weights).digest
        assert evaluated != EvaluationTask(spec, {**weights, "temperature": TABLE}).digest


# --- What is not ------------------------------------------------------------------------------


@pytest.fixture
def messages(spec: RunSpec, weights: Arrays) -> dict[str, RecordDict]:
    """A valid message of every kind, by the name of its record of scalars."""
    made = every_message(spec, weights)
    return {kind: message.to_records() for kind, message in made.items()}


def every_message(spec: RunSpec, weights: Arrays) -> dict[str, Message]:
    return {
        "invitation": Invitation(spec),
        "task": TrainTask(spec, 1, weights),
        "evaluation": EvaluationTask(spec, weights),
        "closing": Closing(spec.digest),
        "card": card_of(spec),
        "release": Release(spec.digest, 1, MECHANISM, weights),
        "counts": Counts(spec.digest, COUNTING, TABLE),
        "closed": Closed(digest=spec.digest, witness=WITNESS),
        "refusal": RefusalReply(code=RefusalCode.BUDGET),
    }


KINDS = (
    "invitation",
    "task",
    "evaluation",
    "closing",
    "card",
    "release",
    "counts",
    "closed",
    "refusal",
)
ARRAYS = {"task": "weights", "evaluation": "weights", "release": "update", "counts": "table"}
TASKS = ("task", "evaluation")
PARAMETER = {kind: "counts" if kind == "counts" else "layer.weight" for kind in ARRAYS}
"""The name of one array of each kind."""


def refusal_of(records: RecordDict) -> str:
    with pytest.raises(MessageError) as caught:
        read(through_objects(records))
    assert len(str(caught.value)) < 1_000
    return str(caught.value)


def with_array(messages: dict[str, RecordDict], kind: str, array: Array) -> RecordDict:
    records = messages[kind]
    records[ARRAYS[kind]] = ArrayRecord({PARAMETER[kind]: array})
    return records


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=allow_pickle)
    return content.getvalue()


def test_the_messages_that_the_illegal_ones_are_made_from_are_legal(
    messages: dict[str, RecordDict],
):
    assert tuple(messages) == KINDS
    assert {kind: type(read(records)) for kind, records in messages.items()} == {
        "invitation": Invitation,
        "task": TrainTask,
        "evaluation": EvaluationTask,
        "closing": Closing,
        "card": NodeCard,
        "release": Release,
        "counts": Counts,
        "closed": Closed,
        "refusal": RefusalReply,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_read_in_its_own_direction_alone(messages: Any, kind: str):
    asked = kind in {"invitation", "closing", *TASKS}
    with pytest.raises(MessageError, match="expected exactly"):
        (read_reply if asked else read_request)(messages[kind])


def test_nothing_is_not_a_message():
    assert "expected exactly" in refusal_of(RecordDict())
    with pytest.raises(MessageError, match="expected exactly"):
        read_request(RecordDict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", [ConfigRecord({"loss": 0.3}), MetricRecord({"num-examples": 7})])
def test_a_record_too_many_is_named(messages: Any, kind: str, extra: Any):
    messages[kind]["metrics"] = extra
    assert "metrics" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_record_too_few_is_named(messages: Any, kind: str):
    del messages[kind][ARRAYS[kind]]
    assert ARRAYS[kind] in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(ARRAYS)))
def test_arrays_have_no_place_where_none_belong(messages: Any, kind: str):
    messages[kind]["weights"] = messages["task"]["weights"]
    assert "weights" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_another_kind_is_named(messages: Any, kind: str):
    messages[kind][kind] = MetricRecord({"protocol": 1})
    assert f"{kind}: a MetricRecord, expected a record of scalars" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", ARRAYS)
def test_scalars_in_the_place_of_arrays(messages: Any, kind: str):
    messages[kind][ARRAYS[kind]] = ConfigRecord({"a": 1})
    assert "arrays" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_named(messages: Any, kind: str):
    messages[kind][kind]["num-examples"] = 1234
    assert "num-examples" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_each_missing_field_is_named(messages: Any, kind: str):
    for field in list(messages[kind][kind]):
        value = messages[kind][kind].pop(field)
        assert field in refusal_of(messages[kind])
        messages[kind][kind][field] = value


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_of_another_type_is_named(messages: Any, kind: str):
    for field, value in list(messages[kind][kind].items()):
        odd: list[Any] = [b"bytes", [1], ["a"], [], not isinstance(value, bool) or 1]
        odd.append(0.5 if isinstance(value, str | int) else "0.5")
        for other in odd:
            messages[kind][kind][field] = other
            assert f"{kind}.{field} = " in refusal_of(messages[kind]), (field, other)
        messages[kind][kind][field] = value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [0, PROTOCOL - 1, PROTOCOL + 1, -1])
def test_another_protocol_is_named(messages: Any, kind: str, protocol: int):
    messages[kind][kind]["protocol"] = protocol
    assert f"{kind}.protocol = {protocol}" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", ["invitation", "card"])
def test_another_protocol_is_told_from_a_broken_message(messages: Any, kind: str):
    """A peer of the first protocol lacks fields as well; what it is told is that it is old."""
    messages[kind][kind]["protocol"] = PROTOCOL - 1
    messages[kind][kind].pop("digest")
    with pytest.raises(VersionError, match="both sides need the same version"):
        read(messages[kind])


@pytest.mark.parametrize("kind", ["invitation", *TASKS])
def test_a_digest_that_does_not_fit_the_spec(messages: Any, kind: str):
    messages[kind][kind]["digest"] = "0" * 64
    assert "the digest does not fit the spec" in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", ["closing", "closed", "card", "release", "counts"])
@pytest.mark.parametrize("digest", ["", "0" * 63, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_a_digest_that_is_none(messages: Any, kind: str, digest: str):
    messages[kind][kind]["digest"] = digest
    assert f"{kind}.digest = " in refusal_of(messages[kind])


HEAD = "0" * 64
NO_WITNESSES = (
    f":{HEAD}:{HEAD}",
    f"-1:{HEAD}:{HEAD}",
    f"1.0:{HEAD}:{HEAD}",
    f"{10**12}:{HEAD}:{HEAD}",
    f"\u0661:{HEAD}:{HEAD}",
    f"1:{HEAD}",
    f"1:{HEAD}:{HEAD}:{HEAD}",
    f"1:{HEAD[1:]}:{HEAD}",
    f"1:{HEAD}:{HEAD[1:]}",
    f"1:{HEAD}:{'A' * 64}",
    f"1:{HEAD}:{'g' * 64}",
    f" 1:{HEAD}:{HEAD}",
    f"1:{HEAD}:{HEAD}\n",
    f"1:{HEAD}:{HEAD} john doe",
    f"1:{HEAD}:{HEAD}\n2:{HEAD}:{HEAD}",
)


@pytest.mark.parametrize("kind", ["card", *TASKS])
@pytest.mark.parametrize("witness", NO_WITNESSES)
def test_a_witness_that_is_none(messages: Any, kind: str, witness: str):
    messages[kind][kind]["witness"] = witness
    assert f"{kind}.witness = " in refusal_of(messages[kind])


@pytest.mark.parametrize("kind", ["card", *TASKS])
@pytest.mark.parametrize("number", [0, 1, 10**12 - 1])
def test_the_witness_that_the_illegal_ones_are_made_from_is_legal(
    messages: Any, kind: str, number: int
):
    witness = f"{number}:{HEAD}:{HEAD}"
    messages[kind][kind]["witness"] = witness
    seen = read(messages[kind])
    assert isinstance(seen, NodeCard | TrainTask | EvaluationTask)
    assert seen.witness == witness


def test_a_card_has_a_witness_where_a_task_may_have_none(messages: Any):
    messages["card"]["card"]["witness"] = ""
    assert "card.witness = ''" in refusal_of(messages["card"])
    assert messages["task"]["task"]["witness"] == ""


@pytest.mark.parametrize("paced", [0, 1, "true", "yes", 0.5])
def test_paced_is_yes_or_no(messages: Any, paced: Any):
    messages["card"]["card"]["paced"] = paced
    assert "card.paced = " in refusal_of(messages["card"])


@pytest.mark.parametrize("said", ["protected", "unprotected"])
def test_who_is_behind_synthetic_images_is_on_a_card_where_it_is_asked(
    spec: RunSpec, messages: Any, said: Any
):
    assert "synthetic" not in messages["card"]["card"]  # as before there were any
    told = through_protobuf(card_of(spec, synthetic=said).to_records())
    assert read_reply(told) == card_of(spec, synthetic=said)
    messages["card"]["card"]["synthetic"] = "yes"
    assert "card.synthetic = 'yes'" in refusal_of(messages["card"])


@pytest.mark.parametrize("text", ["", "{}", "null", "[" * 5_000, "x" * 300_000])
def test_a_spec_that_is_none(messages: Any, text: str):
    messages["task"]["task"]["spec"] = text
    assert refusal_of(messages["task"])


@pytest.mark.parametrize("number", [0, -1, 4, 2**62])
def test_a_round_beyond_the_run(messages: Any, number: int):
    messages["task"]["task"]["round"] = number
    assert f"task.round = {number}" in refusal_of(messages["task"])


@pytest.mark.parametrize("code", ["", "because", "INCIDENT", "incident\n"])
def test_a_code_that_is_not_on_the_list(messages: Any, code: str):
    messages["refusal"]["refusal"]["code"] = code
    assert "refusal.code = " in refusal_of(messages["refusal"])


@pytest.mark.parametrize("incident", ["john-doe", "0" * 33, "AB", "12 "])
def test_an_incident_is_a_number_and_nothing_else(messages: Any, incident: str):
    messages["refusal"]["refusal"]["incident"] = incident
    assert "refusal.incident = " in refusal_of(messages["refusal"])


@pytest.mark.parametrize("site", ["", "a b", "../etc", "x" * 64, ".", "a\n", "é"])
def test_a_name_that_is_none(messages: Any, site: str):
    messages["card"]["card"]["site"] = site
    assert "card.site = " in refusal_of(messages["card"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("sampling_rate", float("nan")),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("inf")),
        ("steps", 0),
        ("steps", -3),
        ("unit", "study"),
    ],
)
def test_a_mechanism_that_is_none(messages: Any, field: str, value: Any):
    messages["release"]["release"][field] = value
    assert field in refusal_of(messages["release"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", float("nan")),
        ("noise_multiplier", float("inf")),
        ("unit", "study"),
    ],
)
def test_a_mechanism_of_counts_that_is_none(messages: Any, field: str, value: Any):
    messages["counts"]["counts"][field] = value
    assert f"counts.{field} = " in refusal_of(messages["counts"])


@pytest.mark.parametrize("names", [["table"], ["counts", "patients"]])
def test_counts_are_one_table_and_nothing_else(messages: Any, names: list[str]):
    messages["counts"]["table"] = ArrayRecord({name: declared(ONES) for name in names})
    assert "counts.table" in refusal_of(messages["counts"])


@pytest.mark.parametrize(
    ("field", "value"), [("sampling_rate", 0.1), ("noise_multiplier", 1.0), ("steps", 1)]
)
def test_no_privacy_leaves_no_room_for_numbers(
    messages: Any, spec: RunSpec, weights: Arrays, field: str, value: Any
):
    records = Release(spec.digest, 1, None, weights).to_records()
    records["release"][field] = value
    assert "private" in refusal_of(records)


# --- Arrays -----------------------------------------------------------------------------------


def declared(array: np.ndarray, **lies: Any) -> Array:
    """A Flower array that may say something else of itself than its bytes do."""
    said: dict[str, Any] = {"dtype": "float32", "shape": array.shape, "stype": "numpy.ndarray"}
    said["data"] = saved(array)
    return Array(**(said | lies))


ONES = np.ones((2, 3), dtype=np.float32)

ILLEGAL = {
    "float64": Array(np.ones(3)),
    "float16": Array(np.ones(3, dtype=np.float16)),
    "int64": Array(np.ones(3, dtype=np.int64)),
    "complex64": Array(np.ones(3, dtype=np.complex64)),
    "big-endian": Array(np.ones(3, dtype=">f4")),
    "text": Array(np.array(["john doe"])),
    "structured": Array(np.zeros(2, dtype=[("a", "<f4"), ("b", "<f4")])),
    "float64 that says float32": declared(np.ones((2, 3))),
    "big-endian that says float32": declared(ONES.astype(">f4")),
    "fortran order": declared(np.asfortranarray(ONES)),
    "another serialisation": declared(ONES, stype="torch"),
    "a lying shape": declared(ONES, shape=(3, 2)),
    "a flat lie": declared(ONES, shape=(6,)),
    "no shape": declared(ONES, shape=()),
    "a negative shape": declared(ONES, shape=(-2, -3)),
    "truth values for a shape": declared(np.ones(1, dtype=np.float32), shape=(True,)),
    "nothing in it": Array(np.ones((0, 3), dtype=np.float32)),
    "more dimensions than any network": declared(ONES.reshape((1,) * 58 + (2, 3))),
    "no bytes": declared(ONES, data=b""),
    "half the bytes": declared(ONES, data=saved(ONES)[:-12]),
    "bytes behind": declared(ONES, data=saved(ONES) + b"john doe"),
    "another magic": declared(ONES, data=b"\x94" + saved(ONES)[1:]),
    "another version": declared(ONES, data=saved(ONES).replace(b"NUMPY\x01", b"NUMPY\x02")),
    "a header without end": declared(ONES, data=b"\x93NUMPY\x01\x00\xff\xff" + saved(ONES)[10:]),
    "a header that is no header": declared(
        ONES, data=saved(ONES).replace(b"'fortran_order'", b"(((((((((((((((")
    ),
    "more than any memory": declared(
        ONES, shape=(2**40, 3), data=saved(ONES).replace(b"(2, 3)", b"(1099511627776, 3)")
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("array", ILLEGAL.values(), ids=ILLEGAL)
def test_an_array_that_is_not_what_it_has_to_be_is_named(messages: Any, kind: str, array: Array):
    assert PARAMETER[kind] in refusal_of(with_array(messages, kind, array))


@pytest.mark.parametrize("kind", ARRAYS)
def test_the_array_that_the_illegal_ones_are_made_from_is_legal(messages: Any, kind: str):
    assert read(with_array(messages, kind, declared(ONES)))


def test_a_mapping_of_arrays_is_no_array(messages: Any):
    content = io.BytesIO()
    np.savez(content, weight=ONES)
    records = with_array(messages, "task", declared(ONES, data=content.getvalue()))
    assert "layer.weight" in refusal_of(records)


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_pickle_in_the_bytes_is_not_run(messages: Any, kind: str, tmp_path: Path):
    marker = tmp_path / "run"
    pickled = saved(np.array([Marker(marker)], dtype=object), allow_pickle=True)
    raw = pickled[pickled.index(b"\x80") :]
    for content in (pickled, raw):
        refusal_of(with_array(messages, kind, declared(ONES, data=content)))
        refusal_of(with_array(messages, kind, declared(ONES, dtype="object", data=content)))
    assert not marker.exists()
    np.load(io.BytesIO(pickled), allow_pickle=True)
    assert marker.exists()  # the control: these bytes do run where somebody lets them


def test_no_arrays_at_all(messages: Any):
    messages["task"]["weights"] = ArrayRecord()
    assert "1 to" in refusal_of(messages["task"])


def test_arrays_without_number(messages: Any):
    one = Array(np.ones(1, dtype=np.float32))
    messages["task"]["weights"] = ArrayRecord({str(n): one for n in range(10_001)})
    with pytest.raises(MessageError, match="1 to 10000 arrays"):
        read(messages["task"])


@pytest.mark.parametrize("name", ["", "w" * 201, "w" * 1_000_000, "a\nb", "\x1b[2J", "a\0b"])
def test_a_name_that_is_no_parameters(messages: Any, name: str):
    messages["task"]["weights"] = ArrayRecord({name: declared(ONES)})
    assert "name" in refusal_of(messages["task"])


@pytest.mark.parametrize("where", ["record", "field", "value"])
def test_what_a_peer_wrote_is_not_repeated_without_end(messages: Any, where: str):
    long = "x" * 1_000_000
    if where == "record":
        messages["card"][long] = ConfigRecord({})
    elif where == "field":
        messages["card"]["card"][long] = 1
    else:
        messages["card"]["card"]["site"] = long
    refusal_of(messages["card"])  # which looks at its length


# --- Whatever comes, nothing but a MessageError comes out ---------------------------------------

scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
    | st.lists(st.integers(0, 9), max_size=3)
)
headers = st.sampled_from(
    [
        saved(ONES)[:128],
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }",
        b"\x93NUMPY\x01\x00\x10\x00{'descr':'|O'}\n",
        b"\x93NUMPY\x02\x00\x10\x00\x00\x00",
        b"\x93NUMPY\x03\x00",
        b"PK\x03\x04",
        b"\x80\x04",
        b"",
    ]
)
contents = (
    st.builds(bytes.__add__, headers, st.binary(max_size=64))
    | st.builds(lambda cut: saved(ONES)[:cut], st.integers(0, 152))
    | st.builds(
        lambda at, new: saved(ONES)[:at] + new + saved(ONES)[at + len(new) :],
        st.integers(0, 151),
        st.binary(min_size=1, max_size=4),
    )
)
arrays = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float32", "float64", "object", ""]),
    shape=st.lists(st.integers(-3, 2**40), max_size=4).map(tuple) | st.just((2, 3)),
    stype=st.sampled_from(["numpy.ndarray", "numpy.ndarray", "pickle", ""]),
    data=contents,
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
records_of_any_kind = (
    st.builds(ConfigRecord, st.dictionaries(names, scalars, max_size=3))
    | st.builds(ArrayRecord, st.dictionaries(names, arrays, max_size=3))
    | st.builds(MetricRecord, st.dictionaries(names, st.floats(), max_size=3))
)


def mutate(records: RecordDict, kind: str, data: st.DataObject) -> None:
    """One random change: a record, a scalar, an array, or one that need not change anything."""
    scalars_of: Any = records[kind]
    arrays_of = ARRAYS.get(kind)
    what = data.draw(st.sampled_from(["record", "drop", "scalar", "field", "array"]))
    if what == "record":
        name = data.draw(st.sampled_from([kind, arrays_of or "weights", "other"]))
        records[name] = data.draw(records_of_any_kind)
    elif what == "drop":
        del records[data.draw(st.sampled_from(sorted(records)))]
    elif what == "array" and arrays_of:
        named: Any = records[arrays_of]
        named[data.draw(st.just(PARAMETER[kind]) | names)] = data.draw(arrays)
    else:
        known = st.sampled_from(sorted(scalars_of))
        scalars_of[data.draw(known if what == "scalar" else names)] = data.draw(scalars)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_changed_message_is_read_or_refused(data: st.DataObject, kind: str, fresh: Any):
    records = fresh(kind)
    mutate(records, kind, data)
    try:
        read(through_objects(records))
    except MessageError as error:
        shown = str(error)
        assert 0 < len(shown) < 1_000


@settings(deadline=None, max_examples=150)
@given(array=arrays)
def test_an_array_is_read_as_it_says_or_refused(array: Array, fresh: Any):
    records = fresh("release")
    records["update"] = ArrayRecord({"w": array})
    try:
        release = read_reply(records)
    except MessageError:
        return
    assert isinstance(release, Release)
    assert release.update["w"].shape == tuple(array.shape)
    assert release.update["w"].tobytes() == array.data[-release.update["w"].nbytes :]


@pytest.fixture(scope="module")
def fresh(make_spec: Spec) -> Callable[[str], RecordDict]:
    """A new valid message of a kind, for each example of a property."""
    spec, update = make_spec(), {"layer.weight": ONES}

    def make(kind: str) -> RecordDict:
        return every_message(spec, update)[kind].to_records()

    return make
