"""The keystream: what its numbers look like, and that no two streams have anything in common.

A check returns a p-value: the probability of what it saw if the noise is as it should be. Keys
are fixed, so a test gives the same answer each time, and the right source passes at `UNLIKELY`.
A planted fault must be `IMPOSSIBLE`; streams with fresh keys must not be that, which they are by
chance once in 10^12 runs.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from scipy import stats

from common.noise import ForkedKeystreamError, Keystream, fresh_keystream

ROOT = Path(__file__).parents[2]
COUNT = 200_000
MANY = 1_000_000
UNLIKELY, IMPOSSIBLE = 1e-5, 1e-12
HALF_A_CHUNK = 1 << 17  # Box-Muller gives its cosines, then its sines, so far apart
LAGS = (1, 2, 3, 63, 64, 1000, HALF_A_CHUNK, 2 * HALF_A_CHUNK)

Floats = NDArray[np.float64]
Check = Callable[[Floats], float]


def shape_of(numbers: Floats) -> float:
    """Kolmogorov and Smirnov against the standard normal distribution."""
    return float(stats.kstest(numbers, "norm", method="asymp").pvalue)


def spread_of(numbers: Floats) -> float:
    """The sum of squares against its chi-squared distribution, two-sided."""
    total, freedom = float(np.square(numbers).sum()), len(numbers)
    return float(2 * min(stats.chi2.sf(total, freedom), stats.chi2.cdf(total, freedom)))


def tails_of(numbers: Floats) -> float:
    """How many lie beyond four deviations, which a noise cut short does not reach."""
    beyond = int((np.abs(numbers) > 4).sum())
    return float(stats.binomtest(beyond, len(numbers), 2 * stats.norm.sf(4)).pvalue)


def dependence_of(first: Floats, second: Floats) -> float:
    """The least p-value of the correlations of two samples, of their squares and signs.

    The correlation of squares sees noise that differs in its sign alone. Bonferroni for three.
    """
    pairs = [(first, second), (first**2, second**2), (np.sign(first), np.sign(second))]
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    scores = np.array(correlations) * np.sqrt(len(first))
    return float(min(1.0, 3 * (2 * stats.norm.sf(np.abs(scores))).min()))


def of_seed(*labels: str | int) -> Floats:
    return Keystream.seeded(1, *labels).gaussian(COUNT)


# --- what one stream's noise looks like ---------------------------------------------------


@pytest.mark.parametrize("check", [shape_of, spread_of, tails_of])
def test_noise_is_standard_normal(check: Check) -> None:
    assert check(Keystream.seeded(1, "shape").gaussian(MANY)) > UNLIKELY


def sum_of_three_uniforms(right: Floats) -> Floats:
    uniforms = np.random.default_rng(1).uniform(-1, 1, (3, len(right)))
    return np.asarray(uniforms.sum(axis=0))


def every_tenth_left_out(right: Floats) -> Floats:
    return np.where(np.arange(len(right)) % 10, right, 0)


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        pytest.param(shape_of, sum_of_three_uniforms, id="a sum of three uniforms"),
        pytest.param(shape_of, every_tenth_left_out, id="every tenth left out"),
        pytest.param(shape_of, lambda right: right + 0.01, id="moved by a hundredth"),
        pytest.param(spread_of, lambda right: 0.99 * right, id="one per cent too little"),
        pytest.param(spread_of, lambda right: 1.01 * right, id="one per cent too much"),
        pytest.param(tails_of, lambda right: np.clip(right, -4, 4), id="cut at four deviations"),
    ],
)
def test_the_checks_find_wrong_noise(check: Check, plant: Callable[[Floats], Floats]) -> None:
    assert check(plant(Keystream.seeded(1, "shape").gaussian(MANY))) < IMPOSSIBLE


@pytest.mark.parametrize("count", [0, 1, 2, 3, HALF_A_CHUNK * 2 - 1, HALF_A_CHUNK * 2 + 1])
def test_any_count_of_numbers_can_be_had(count: int) -> None:
    numbers = Keystream.seeded(1).gaussian(count)
    assert numbers.shape == (count,)
    assert np.isfinite(numbers).all()
    assert len(np.unique(numbers)) == count


def test_uniform_numbers_are_even_and_below_one() -> None:
    numbers = Keystream.seeded(1).uniform(COUNT)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.array_equal(numbers * 2.0**53, np.floor(numbers * 2.0**53))
    assert stats.kstest(numbers, "uniform").pvalue > UNLIKELY


def test_integers_below_a_bound_are_even() -> None:
    drawn = Keystream.seeded(1).below(np.full(COUNT, 7, dtype=np.int64))
    assert stats.chisquare(np.bincount(drawn, minlength=7)).pvalue > UNLIKELY
    bounds = np.array([1, 2, 1, 10**12] * 500)
    drawn = Keystream.seeded(2).below(bounds)
    assert ((drawn >= 0) & (drawn < bounds)).all()
    assert drawn[bounds == 10**12].max() > 9 * 10**11


# --- that nothing depends on anything else -------------------------------------------------


@pytest.mark.parametrize("lag", LAGS)
def test_a_number_says_nothing_of_those_that_follow(lag: int) -> None:
    numbers = Keystream.seeded(1, "lags").gaussian(COUNT + lag)
    assert dependence_of(numbers[:-lag], numbers[lag:]) > UNLIKELY


def test_consecutive_draws_of_one_stream_are_independent() -> None:
    stream = Keystream.seeded(1, "steps")
    steps = [stream.gaussian(COUNT) for _ in range(4)]
    for number, step in enumerate(steps):
        for later in steps[number + 1 :]:
            assert dependence_of(step, later) > UNLIKELY


def test_parameters_of_one_draw_are_independent() -> None:
    parts = np.split(Keystream.seeded(1, "parameters").gaussian(4 * COUNT), 4)
    for first, second in pairwise(parts):
        assert dependence_of(first, second) > UNLIKELY


RELATIVES: dict[str, Callable[[], Keystream]] = {
    "parent": lambda: Keystream.seeded(1, "north", 1),
    "noise": lambda: Keystream.seeded(1, "north", 1).derive("noise"),
    "sampling": lambda: Keystream.seeded(1, "north", 1).derive("sampling"),
    "the next round": lambda: Keystream.seeded(1, "north", 2).derive("noise"),
    "another site": lambda: Keystream.seeded(1, "south", 1).derive("noise"),
    "another seed": lambda: Keystream.seeded(2, "north", 1).derive("noise"),
    "a grandchild": lambda: Keystream.seeded(1, "north", 1).derive("noise").derive("noise"),
    "keys apart by one bit": lambda: Keystream(bytes(31) + b"\1"),
    "a key of zeros": lambda: Keystream(bytes(32)),
}


def test_streams_of_all_purposes_rounds_sites_and_seeds_are_independent() -> None:
    drawn = {name: make().gaussian(COUNT) for name, make in RELATIVES.items()}
    names = list(drawn)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            assert dependence_of(drawn[name], drawn[other]) > UNLIKELY / 50, (name, other)


def test_fresh_streams_are_independent_of_each_other_and_of_their_children() -> None:
    streams = [Keystream.fresh() for _ in range(3)]
    drawn = [s.gaussian(COUNT) for stream in streams for s in (stream, stream.derive("noise"))]
    for number, first in enumerate(drawn):
        for second in drawn[number + 1 :]:
            assert dependence_of(first, second) > IMPOSSIBLE


DEPENDENT: dict[str, Callable[[Floats], Floats]] = {
    "the same stream again": lambda first: first.copy(),
    "the negative, which cancels": lambda first: -first,
    "the same but for its sign": lambda first: first * np.sign(of_seed("signs")),
    "a twentieth in common": lambda first: 0.95 * of_seed("own") + 0.05 * first,
    "one in a hundred in common": lambda first: np.where(
        np.arange(COUNT) % 100, of_seed("own"), 10 * first
    ),
}


@pytest.mark.parametrize("fault", DEPENDENT)
def test_the_check_finds_streams_that_have_something_in_common(fault: str) -> None:
    first = of_seed("first")
    assert dependence_of(first, DEPENDENT[fault](first)) < IMPOSSIBLE


# --- keys ----------------------------------------------------------------------------------


def test_two_fresh_streams_have_different_bits() -> None:
    seen = {Keystream.fresh().words(4).tobytes() for _ in range(100)}
    seen |= {fresh_keystream(run_id="r", round_number=1).words(4).tobytes() for _ in range(100)}
    assert len(seen) == 200


def test_a_seeded_stream_is_the_same_in_every_process() -> None:
    text = (
        "from common.noise import Keystream\n"
        "print(Keystream.seeded(7, 'north', 3).derive('noise').words(4).tobytes().hex())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "3"}
    command = [sys.executable, "-c", text]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    here = Keystream.seeded(7, "north", 3).derive("noise").words(4).tobytes().hex()
    assert ran.stdout.strip() == here
    other = Keystream.seeded(8, "north", 3).derive("noise").words(4).tobytes().hex()
    assert other != here


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes; expected 32"):
        Keystream(bytes(length))


# RFC 8439, appendix A.1: keystreams of the nonce zero. (key, first block's number, bytes)
VECTORS = [
    (
        bytes(32),
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\1",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\0\xff" + bytes(30),
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


@pytest.mark.parametrize(("key", "block", "expected"), VECTORS)
def test_the_bits_are_chacha20_of_rfc_8439(key: bytes, block: int, expected: str) -> None:
    stream = Keystream(key)
    stream.words(8 * block)
    assert stream.words(8).tobytes().hex() == expected
    assert Keystream(key).words(8 * block + 8)[8 * block :].tobytes().hex() == expected


def test_a_stream_at_its_end_is_refused_and_does_not_begin_again() -> None:
    """After 2^32 blocks (256 GiB) the counter would wrap; what we build on refuses that."""
    last_block = b"\xff\xff\xff\xff" + bytes(12)
    cipher = Cipher(algorithms.ChaCha20(bytes(32), last_block), mode=None).encryptor()
    with pytest.raises(ValueError, match="counter"):
        cipher.update(bytes(65))


# --- processes -----------------------------------------------------------------------------


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception that it raises, in a forked child."""
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def child() -> None:
        try:
            sender.send(work())
        except Exception as error:  # noqa: BLE001 - the parent looks at it
            sender.send(error)

    process = get_context("fork").Process(target=child)
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


USES: dict[str, Callable[[Keystream], Any]] = {
    "words": lambda stream: stream.words(1),
    "uniform": lambda stream: stream.uniform(1),
    "gaussian": lambda stream: stream.gaussian(1),
    "below": lambda stream: stream.below(np.array([5])),
    "seed": lambda stream: stream.seed(),
    "derive": lambda stream: stream.derive("noise"),
}


@pytest.mark.parametrize("use", USES)
def test_a_stream_is_refused_in_a_forked_child(use: str) -> None:
    stream = Keystream.seeded(1)
    answer = in_a_fork(lambda: USES[use](stream))
    assert isinstance(answer, ForkedKeystreamError)
    assert f"made in process {os.getpid()}" in str(answer)
    assert "after the fork" in str(answer)
    USES[use](stream)  # here it goes on


def test_a_derived_stream_is_refused_in_a_forked_child_as_well() -> None:
    derived = Keystream.fresh().derive("noise")
    assert isinstance(in_a_fork(lambda: derived.gaussian(4)), ForkedKeystreamError)


def test_children_with_streams_of_their_own_share_nothing() -> None:
    first, second = (in_a_fork(lambda: Keystream.fresh().gaussian(COUNT)) for _ in range(2))
    assert dependence_of(first, second) > IMPOSSIBLE


def test_children_of_an_unguarded_source_cancel_each_other() -> None:
    """The negative control: this is what the guard is for."""
    source = np.random.default_rng(1)
    first, second = (in_a_fork(lambda: source.standard_normal(COUNT)) for _ in range(2))
    assert np.array_equal(first - second, np.zeros(COUNT))
    assert dependence_of(first, second) < IMPOSSIBLE


@pytest.mark.parametrize("carry", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_cannot_be_pickled_or_copied(carry: Callable[[Keystream], Any]) -> None:
    with pytest.raises(ForkedKeystreamError, match="cannot be pickled"):
        carry(Keystream.seeded(1))
