"""Partitions: each patient once, the same for the same seed, as unequal as asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import Cohort, CohortMeta
from common.errors import ConfigError
from common.spec import RunSpec, Task
from deploy import partition

Partitioner = Callable[[Cohort, int, int], partition.Partition]
PARTITIONERS: dict[str, Partitioner] = {
    "iid": partition.iid,
    "quantity": partition.quantity,
    "power law": partition.power_law,
    "dirichlet 0.1": partial(partition.dirichlet, alpha=0.1),
    "dirichlet 100": partial(partition.dirichlet, alpha=100.0),
}


@pytest.fixture
def cohort(write_cohort: Callable[..., Cohort], make_spec: Callable[..., RunSpec]) -> Cohort:
    """400 patients with 600 images; a third of the patients has the finding."""
    owners = [number % 400 for number in range(600)]
    labels = [int(owner % 3 == 0) for owner in owners]
    return write_cohort(make_spec(), owners, labels=labels)


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("sites", [1, 2, 7])
def test_each_patient_is_at_one_site(cohort: Cohort, name: str, sites: int) -> None:
    parts = PARTITIONERS[name](cohort, sites, 1)

    assert len(parts) == sites
    assert sorted(np.concatenate(parts).tolist()) == list(range(400))
    assert all(len(part) for part in parts)
    for part in parts:
        assert part.tolist() == sorted(part)
        assert len(cohort.subset(part).patients) == len(part)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_a_function_of_the_seed(cohort: Cohort, name: str) -> None:
    one, same, other = (PARTITIONERS[name](cohort, 4, seed) for seed in (1, 1, 2))

    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


def shares_of_finding(cohort: Cohort, parts: partition.Partition) -> list[float]:
    return [float(cohort.subset(part).labels.mean()) for part in parts]


def test_iid_sites_are_alike(cohort: Cohort) -> None:
    parts = partition.iid(cohort, 4, 1)

    assert [len(part) for part in parts] == [100] * 4
    assert np.ptp(shares_of_finding(cohort, parts)) < 0.25


def test_a_small_alpha_parts_the_labels_and_a_large_one_does_not(cohort: Cohort) -> None:
    spread = {
        alpha: np.mean(
            [
                np.ptp(shares_of_finding(cohort, partition.dirichlet(cohort, 4, seed, alpha=alpha)))
                for seed in range(10)
            ]
        )
        for alpha in (0.1, 100.0)
    }

    assert spread[0.1] > 0.7
    assert spread[100.0] < 0.2


def test_quantities_follow_the_law(cohort: Cohort) -> None:
    sizes = [len(part) for part in partition.power_law(cohort, 4, 1, exponent=1.0)]

    np.testing.assert_allclose(sizes, 400 / np.array([1, 2, 3, 4]) / (25 / 12), atol=1)
    drawn = [len(part) for part in partition.quantity(cohort, 4, 1, alpha=0.5)]
    assert max(drawn) > 2 * min(drawn)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_fewer_patients_than_sites(
    write_cohort: Callable[..., Cohort], make_spec: Callable[..., RunSpec], name: str
) -> None:
    few = write_cohort(make_spec(), [0, 1, 1, 2])
    none = write_cohort(make_spec(), [], name="none")

    assert sorted(map(len, PARTITIONERS[name](few, 5, 1))) == [0, 0, 1, 1, 1]
    assert list(map(len, PARTITIONERS[name](none, 3, 1))) == [0, 0, 0]


def test_refuses_numbers_without_meaning(cohort: Cohort) -> None:
    with pytest.raises(ConfigError, match="0 sites"):
        partition.iid(cohort, 0, 1)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="above 0"):
            partition.dirichlet(cohort, 2, 1, alpha=alpha)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_images_without_labels_are_dealt_out_too(
    tmp_path: Path, make_spec: Callable[..., RunSpec], name: str
) -> None:
    spec = make_spec()
    task = Task(name="test", kind="boxes", classes=("cell",))
    with CohortBuilder(tmp_path / "c", spec.input.shape, task=task) as builder:
        for number in range(40):
            boxes = ((0.1, 0.1, 0.2, 0.2, 0),) * (number % 3)
            record = ImageRecord(f"p{number:02d}", "", "", str(number), boxes, 9, 9)
            builder.add(record, np.zeros(spec.input.shape, dtype=np.uint16))
        meta = CohortMeta.of(spec, unit="patient", source="test", created="2026-01-01")
        builder.finish(replace(meta, kind="boxes", classes=("cell",)))

    parts = PARTITIONERS[name](Cohort.open(tmp_path / "c"), 4, 1)

    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    assert all(len(part) for part in parts)
