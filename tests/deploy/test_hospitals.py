"""The demo's hospitals: as described, the same for a seed, and nothing planted comes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from client.intake.keys import SiteKey
from client.intake.labels import read_labels
from client.intake.run import IntakeSummary
from client.intake.take import Order, take_in
from common.cohort import Cohort
from common.spec import RunSpec
from deploy.films import Anatomy, Opacity, draw
from deploy.hospitals import CLASSES, Hospital, make_hospitals

SIZE = 0.12
SMALL = 0.02


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    return make_hospitals(tmp_path_factory.mktemp("hospitals"), seed=1, size=SIZE)


@pytest.fixture(scope="module")
def taken_in(
    hospitals: list[Hospital],
    tmp_path_factory: pytest.TempPathFactory,
    make_spec: Callable[..., RunSpec],
) -> dict[str, tuple[IntakeSummary, Cohort]]:
    run = make_spec(task={"classes": list(CLASSES)}, input={"height": 64, "width": 64})
    folder = tmp_path_factory.mktemp("cohorts")
    taken = {}
    for hospital in hospitals:
        key = SiteKey(bytes(32))
        labels = read_labels(hospital.labels, run.task)
        summary = take_in(Order(hospital.folder, folder / hospital.name, run, labels, key))
        taken[hospital.name] = (summary, Cohort.open(folder / hospital.name))
    return taken


def test_three_hospitals_and_an_evaluation_set(
    hospitals: list[Hospital], taken_in: dict[str, tuple[IntakeSummary, Cohort]]
) -> None:
    assert [hospital.name for hospital in hospitals] == ["north", "harbour", "hill", "evaluation"]
    for hospital in hospitals:
        summary, cohort = taken_in[hospital.name]
        contents = summary.contents
        assert (contents.images, contents.patients) == (hospital.images, hospital.patients)
        assert len(summary.not_used) == hospital.unusable
        assert contents.unit == "patient"
        assert contents.images_a_patient[2] > 1
        assert contents.warnings == ()
        assert min(count.images for count in contents.classes) > 4
        cohort.verify()


def test_nothing_planted_comes_through(
    hospitals: list[Hospital], taken_in: dict[str, tuple[IntakeSummary, Cohort]]
) -> None:
    for hospital in hospitals:
        files = [path for path in hospital.folder.rglob("*") if path.is_file()]
        source = b"".join(str(path).encode() + path.read_bytes() for path in files)
        cohort = taken_in[hospital.name][1].path
        kept = b"".join(path.read_bytes() for path in cohort.iterdir())
        assert len(hospital.planted) > hospital.patients
        for text in hospital.planted:
            assert text.encode() in source
            assert text.encode() not in kept


def test_one_hospital_stores_films_inverted_and_they_come_out_alike(
    hospitals: list[Hospital], taken_in: dict[str, tuple[IntakeSummary, Cohort]]
) -> None:
    found = set()
    for hospital in hospitals:
        path = next(
            p for p in hospital.folder.rglob("*") if p.is_file() and p.stat().st_size > 9e4 / 2
        )
        film = dcmread(path)
        found.add((film.PhotometricInterpretation, film.BitsStored))
        images = taken_in[hospital.name][1].images(range(20))[:, 0]
        spine = images[:, 20:44, 30:34].mean()
        lungs = images[:, 20:44, 18:24].mean()
        assert spine > lungs + 0.1
    assert ("MONOCHROME1", 16) in found
    assert ("MONOCHROME2", 12) in found


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    once, again, other = (
        make_hospitals(tmp_path / name, seed=seed, size=SMALL)
        for name, seed in (("once", 1), ("again", 1), ("other", 2))
    )
    for one, two in zip(once, again, strict=True):
        names = sorted(p.relative_to(one.folder) for p in one.folder.rglob("*") if p.is_file())
        assert names == sorted(
            p.relative_to(two.folder) for p in two.folder.rglob("*") if p.is_file()
        )
        for name in names:
            assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
        assert one.labels.read_bytes() == two.labels.read_bytes()
    assert once[0].labels.read_bytes() != other[0].labels.read_bytes()


def test_an_existing_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "north").mkdir()

    with pytest.raises(FileExistsError):
        make_hospitals(tmp_path, seed=1, size=0.01)


def test_an_opacity_is_a_local_brightening_of_the_lung() -> None:
    """The finding is there, and mean brightness alone does not give it away."""
    differences, plain = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        anatomy, opacity = Anatomy.of(random), Opacity.of(random)
        with_it, without = (
            draw(anatomy, shown, (96, 80), np.random.default_rng((seed, 1)))
            for shown in (opacity, None)
        )
        difference = with_it - without
        assert difference.max() > 0.1
        assert (np.abs(difference) > 0.02).mean() < 0.25
        differences.append(difference.mean())
        plain.append(without.mean())
    assert np.mean(differences) < np.std(plain)
