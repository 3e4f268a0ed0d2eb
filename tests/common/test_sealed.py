"""Sealed pieces: opened by the key that closed them, whole, and as what they were."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.errors import SealError
from common.sealed import OVERHEAD, Seal

KEY = bytes(range(32))


@pytest.mark.parametrize("length", [0, 1, 100_000])
def test_what_was_sealed_comes_back(length: int) -> None:
    content = bytes(length)

    piece = Seal(KEY).close(content, "a label")

    assert len(piece) == length + OVERHEAD
    assert Seal(KEY).open(piece, "a label") == content
    assert AESGCM(KEY).decrypt(piece[:12], piece[12:], b"a label") == content


def test_no_two_pieces_are_alike() -> None:
    seal = Seal(KEY)

    assert len({seal.close(b"the same", "label") for _ in range(1000)}) == 1000
    assert len({seal.close(b"", "label")[:12] for _ in range(1000)}) == 1000


@pytest.mark.parametrize("at", range(36))
def test_a_changed_bit_anywhere_is_refused(at: int) -> None:
    piece = bytearray(Seal(KEY).close(b"12345678", "label"))
    assert len(piece) == 36
    piece[at] ^= 0x80

    with pytest.raises(SealError, match="cannot be opened"):
        Seal(KEY).open(bytes(piece), "label")


@pytest.mark.parametrize("length", [0, 1, 11, 12, 27, 28, 35])
def test_a_piece_that_was_cut_is_refused(length: int) -> None:
    piece = Seal(KEY).close(b"12345678", "label")

    with pytest.raises(SealError):
        Seal(KEY).open(piece[:length], "label")


def test_another_key_or_label_is_refused_and_nothing_tells_which() -> None:
    piece = Seal(KEY).close(b"secret", "image 1")
    said = set()

    for key, label in ((KEY[::-1], "image 1"), (KEY, "image 2"), (KEY, ""), (KEY, "image 1 ")):
        with pytest.raises(SealError) as refused:
            Seal(key).open(piece, label)
        said.add(str(refused.value).removeprefix(label))

    assert len(said) == 1
    assert Seal(KEY).open(piece, "image 1") == b"secret"


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes; expected 32"):
        Seal(bytes(length))
