"""Records cross as few objects, whole; what is not a parcel is refused, and cannot grow."""

from __future__ import annotations

import hashlib
import resource
import struct
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import MessageError
from common.parcel import FEW, PIECE, Parcel, pieces_of

OBJECT = PIECE + 100
"""Of what the fleet's guard lets through (8 MiB) with room to spare."""


def records_of(*sizes: int, seed: int = 0) -> RecordDict:
    rng = np.random.default_rng(seed)
    arrays = {f"w{i}": Array(_floats(rng, n)) for i, n in enumerate(sizes)}
    return RecordDict({"task": ConfigRecord({"round": 3}), "weights": ArrayRecord(arrays)})


def _floats(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(size=size).astype(np.float32)


def packed(records: RecordDict) -> Parcel:
    parcel = Parcel.of(records)
    return Parcel(parcel.identity, dict(parcel.objects))


MEGABYTE = 2**18  # of numbers
LARGE = (3 * MEGABYTE, 1, 2 * MEGABYTE)


class TestWhatIsSentArrives:
    @pytest.mark.parametrize(
        ("sizes", "objects"),
        [((), 1), ((0,), 1), ((1, 7), 1), ((MEGABYTE - 100,), 1), ((MEGABYTE,), 2), (LARGE, 3)],
    )
    def test_in_one_object_and_more_only_for_many_numbers(
        self, sizes: tuple[int, ...], objects: int
    ):
        records = records_of(*sizes)
        parcel = packed(records)
        assert len(parcel.objects) == objects
        assert max(map(len, parcel.objects.values())) < max(OBJECT, FEW + OBJECT - PIECE)
        assert parcel.records() == records

    def test_numbers_that_are_all_the_same_too(self):
        zeros = Array(np.zeros(5 * MEGABYTE, dtype=np.float32))
        records = RecordDict({"weights": ArrayRecord({"a": zeros, "b": zeros})})
        assert packed(records).records() == records

    @given(
        st.dictionaries(
            st.text(max_size=5),
            st.builds(
                ArrayRecord,
                st.dictionaries(
                    st.text(max_size=5),
                    st.builds(
                        Array,
                        st.text(max_size=5),
                        st.tuples(st.integers(0, 9)),
                        st.text(max_size=5),
                        st.binary(max_size=9),
                    ),
                    max_size=3,
                ),
            )
            | st.builds(ConfigRecord, st.dictionaries(st.text(max_size=5), st.binary()))
            | st.builds(MetricRecord, st.dictionaries(st.text(max_size=5), st.floats(-1, 1))),
            max_size=4,
        )
    )
    def test_whatever_flower_can_carry(
        self, content: dict[str, ArrayRecord | ConfigRecord | MetricRecord]
    ):
        records = RecordDict(content)
        assert Parcel.of(records).records() == records

    def test_its_outline_has_all_but_the_numbers(self):
        for sizes in ((5,), LARGE):
            parcel = packed(records_of(*sizes))
            outline = parcel.outline()
            assert outline["task"] == {"round": 3}
            assert not any(array.data for array in outline.array_records["weights"].values())
            assert parcel.records() == records_of(*sizes)

    def test_packing_leaves_the_records_as_they_are(self):
        records = records_of(*LARGE)
        Parcel.of(records)
        assert records == records_of(*LARGE)

    def test_no_two_parcels_are_one_and_the_same_numbers_are_the_same_pieces(self):
        """A message that is sent twice is two; the weights for all sites are stored once."""
        records = records_of(*LARGE)
        one, other = Parcel.of(records), Parcel.of(records, pieces_of(records))
        assert one.identity != other.identity
        assert one.objects.keys() - {one.identity} == other.objects.keys() - {other.identity}

    def test_flowers_store_takes_every_object_under_its_name(self):
        parcel = Parcel.of(records_of(*LARGE))
        for name, content in parcel.objects.items():
            assert hashlib.sha256(content).hexdigest() == name
            validate_object_content(content)
        assert {part.object_id for part in iterate_object_tree(parcel.tree)} == set(parcel.objects)


def first_of(parcel: Parcel) -> tuple[bytes, int]:
    """The body of a parcel's first object, and where its lengths begin."""
    return parcel.objects[parcel.identity].partition(b"\0")[2], 24


def with_first(parcel: Parcel, body: bytes) -> Parcel:
    objects = parcel.objects | {parcel.identity: b"ArrayChunk  %d\0%b" % (len(body), body)}
    return Parcel(parcel.identity, objects)


def of_another_form(parcel: Parcel) -> Parcel:
    return with_first(parcel, b"parcel2\n" + first_of(parcel)[0][8:])


def cut_short(parcel: Parcel) -> Parcel:
    return with_first(parcel, first_of(parcel)[0][:60])


def with_lengths(parcel: Parcel, *lengths: int) -> Parcel:
    body, at = first_of(parcel)
    return with_first(parcel, body[:at] + struct.pack(">III", *lengths) + body[at + 12 :])


def with_endless_lists(parcel: Parcel) -> Parcel:
    return with_lengths(parcel, 2**32 - 1, 2**32 - 1, 2**32 - 1)


def with_an_array_too_many(parcel: Parcel) -> Parcel:
    body, at = first_of(parcel)
    outline, arrays, pieces = struct.unpack_from(">III", body, at)
    more = struct.pack(">IIIQ", outline, arrays + 1, pieces, 1)
    return with_first(parcel, body[:at] + more + body[at + 12 :])


def with_a_greater_array(parcel: Parcel) -> Parcel:
    body, at = first_of(parcel)
    return with_first(parcel, body[: at + 12] + struct.pack(">Q", 2**62) + body[at + 20 :])


def with_a_lesser_array(parcel: Parcel) -> Parcel:
    body, at = first_of(parcel)
    return with_first(parcel, body[: at + 12] + struct.pack(">Q", 8) + body[at + 20 :])


def without_a_piece(parcel: Parcel) -> Parcel:
    name = next(name for name in parcel.objects if name != parcel.identity)
    return Parcel(parcel.identity, {n: c for n, c in parcel.objects.items() if n != name})


def with_another_piece(parcel: Parcel) -> Parcel:
    return Parcel(parcel.identity, parcel.objects | {"a" * 64: b"ArrayChunk  1\0x"})


def with_pieces_changed_over(parcel: Parcel) -> Parcel:
    one, other = (name for name in parcel.objects if name != parcel.identity)
    objects = parcel.objects
    return Parcel(parcel.identity, objects | {one: objects[other], other: objects[one]})


def with_one_piece_named_twice(parcel: Parcel) -> Parcel:
    """With many names for one piece, few bytes would become many."""
    one, other = (bytes.fromhex(name) for name in parcel.objects if name != parcel.identity)
    made = with_first(parcel, first_of(parcel)[0].replace(other, one))
    return Parcel(made.identity, {n: c for n, c in made.objects.items() if n != other.hex()})


def without_its_first(parcel: Parcel) -> Parcel:
    return Parcel("b" * 64, parcel.objects)


def with_numbers_in_its_outline(parcel: Parcel) -> Parcel:
    from flwr.common.serde import recorddict_to_proto  # noqa: PLC0415

    content = recorddict_to_proto(records_of(1, 1, 1)).SerializeToString()
    body, at = first_of(parcel)
    _, arrays, pieces = struct.unpack_from(">III", body, at)
    names = at + 12 + 8 * arrays + 32 * pieces
    made = body[:at] + struct.pack(">III", len(content), arrays, pieces) + body[at + 12 : names]
    return with_first(parcel, made + content)


@pytest.mark.parametrize(
    "broken",
    [
        of_another_form,
        cut_short,
        with_endless_lists,
        with_an_array_too_many,
        with_a_greater_array,
        with_a_lesser_array,
        without_a_piece,
        with_another_piece,
        with_pieces_changed_over,
        with_one_piece_named_twice,
        without_its_first,
        with_numbers_in_its_outline,
    ],
)
def test_what_is_no_parcel_is_refused_and_takes_no_memory(broken: Callable[[Parcel], Parcel]):
    parcel = broken(Parcel.of(records_of(*LARGE)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MessageError):
        parcel.records()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_bytes_of_a_stranger_are_refused(content: bytes, headed: bool):
    if headed:
        content = b"ArrayChunk  9\0parcel1\n" + content
    with pytest.raises(MessageError):
        Parcel("a" * 64, {"a" * 64: content}).records()
