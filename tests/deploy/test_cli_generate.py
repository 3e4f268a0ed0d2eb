"""`cloister generate`: what it writes can be read as any other images, and says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from client.intake.keys import SiteKey
from client.intake.pictures import Pictures
from client.intake.run import intake
from client.synthetic import Claim, synthetic_cohort
from common import models
from common.cohort import Cohort
from common.errors import CohortError
from common.spec import NoPrivacy, RunSpec
from common.tasks.generation import Drawn
from deploy import synthetic

Cloister = Callable[..., Any]
TABLES: dict[str, Any] = {
    "task": {"name": "generation", "classes": ["normal", "finding"], "latent": 4},
    "loss": {"name": "adversarial"},
    "model": {"name": "dcgan", "width": 4},
    "evaluation": {"metric": "tstr-auroc"},
}


@pytest.fixture
def finished(tmp_path: Path, make_spec: Callable[..., RunSpec]) -> Callable[..., Path]:
    """A run's folder with as much of it as a model needs."""

    def make(**changes: Any) -> Path:
        spec = make_spec(**TABLES | changes)
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "spec.json").write_text(spec.canonical_json)
        save_file(models.build(spec).state_dict(), folder / "model.safetensors")
        return folder

    return make


def spec_of(run: Path) -> RunSpec:
    return RunSpec.from_json((run / "spec.json").read_text())


def opened(cohort: Path, run: Path) -> Cohort:
    """The cohort, which fits the run as far as data goes."""
    found, spec = Cohort.open(cohort), spec_of(run)
    found.check_fits(spec.model_copy(update={"privacy": NoPrivacy(mechanism="none", unit="image")}))
    found.verify()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input": {"channels": 3}},
        {"task": TABLES["task"] | {"kind": "multilabel", "classes": ["a", "b", "c"]}},
    ],
    ids=["grey", "colour", "multilabel"],
)
def test_what_is_made_opens_as_a_cohort_and_the_pictures_are_the_same_images(
    cloister: Cloister, finished, tmp_path: Path, changes
):
    run, out = finished(**changes), tmp_path / "out"
    said = cloister("generate", run, out, "--images", 9)
    assert said.code == 0, said.err
    made = opened(out / "cohort", run)
    assert len(made) == 9
    assert made.meta.source == "synthetic"
    assert made.unit == "image"
    assert all(name.startswith("synthetic-") for name in made.patients)
    spec = spec_of(run)
    source = Pictures.of(unmarked(out / "images"), out / "labels.csv", spec, SiteKey.random())
    intake(source, tmp_path / "again", spec)
    again = opened(tmp_path / "again", run)
    distance = np.abs(again.images(range(9)) - made.images(range(9))[:, None]).max((2, 3, 4))
    place = distance.argmin(axis=1)  # an intake puts images in an order of its own
    assert sorted(place) == list(range(9))
    assert distance.min(axis=1).max() <= (1 / 65535 if spec.input.channels == 1 else 1 / 255)
    assert np.array_equal(again.labels[place], made.labels)


def unmarked(pictures: Path) -> Path:
    """Pictures whose text is gone: what they say of themselves keeps them out of an intake."""
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            picture.load()
            picture.info.clear()
            picture.save(path)
    return pictures


def test_pictures_and_cohort_are_no_patients_of_a_run_under_privacy(
    cloister: Cloister, finished, tmp_path: Path
):
    run, out = finished(privacy={"mechanism": "none", "unit": "image"}), tmp_path / "out"
    cloister("generate", run, out, "--images", 9)
    free = spec_of(run)
    source = Pictures.of(out / "images", out / "labels.csv", free, SiteKey.random())
    said = [item.reason for step in source.steps() for item in step.not_used]
    assert len(said) == 9
    assert all("it is no patient's picture" in reason for reason in said)
    cohort = Cohort.open(out / "cohort")
    cohort.check_fits(free)
    private = RunSpec.from_json(json.dumps(json.loads(free.canonical_json) | {"privacy": WHOLE_DP}))
    with pytest.raises(CohortError, match=r"its source is 'synthetic'.*expected patients"):
        cohort.check_fits(private)


def test_a_node_admits_no_synthetic_cohort_unless_it_takes_runs_without_privacy(
    cloister: Cloister, finished, tmp_path: Path
):
    run, out, home = finished(), tmp_path / "out", tmp_path / "north"
    cloister("generate", run, out, "--images", 9)
    node = ("--site", "north", "--declared-size", 9, "--epsilon", 3, "--delta", 1e-4)
    assert cloister("node", "init", home, *node, "--cohort", out / "cohort").code == 0
    settings = home / "node.toml"
    settings.write_text(settings.read_text().replace("least_patients = 50", "least_patients = 5"))
    person = ("--reason", "looked at it", "--by", "Ada")
    said = cloister("node", "admit", home, *person)
    assert said.code == 1
    assert "Synthetic ones are named by [data] synthetic" in said.words
    open_to_all = settings.read_text().replace("privacy = false", "privacy = true")
    settings.write_text(open_to_all)
    assert cloister("node", "admit", home, *person).code == 0


def test_it_says_of_each_part_that_it_is_synthetic(cloister: Cloister, finished, tmp_path: Path):
    run, out = finished(), tmp_path / "out"
    cloister("generate", run, out, "--images", 3, "--seed", 5)
    about = json.loads((out / "about.json").read_text())
    assert "synthetic" in about["what"]
    assert about["run_digest"] == spec_of(run).digest
    assert (about["images"], about["seed"]) == (3, 5)
    with Image.open(out / "images" / "000001.png") as picture:
        assert "synthetic" in picture.info["Comment"]


DP = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "delta": 1e-5, "unit": "image"}
WHOLE_DP = DP | {"clip_norm": 1.0}
LAST_STEP = {"model_sha256": "a" * 64}


@pytest.mark.parametrize(
    ("changes", "said", "known"),
    [
        ({"privacy": {"mechanism": "none"}}, {"protected": False}, False),
        ({"privacy": DP}, {"protected": True}, True),
        ({"privacy": DP}, {"protected": False}, False),  # a simulation: its noise came from a seed
        ({"privacy": DP}, None, False),  # no card: nobody says so
        ({"privacy": DP}, {"protected": True, "all_sites_epsilon": None}, False),  # nor how much
        # of the steps before, nobody does
        ({"privacy": DP, "start": LAST_STEP}, {"protected": True}, False),
    ],
)
def test_it_says_whether_patients_may_be_given_away(  # noqa: PLR0913, PLR0917
    cloister: Cloister, finished, tmp_path: Path, changes, said, known
):
    run, out = finished(**changes), tmp_path / "out"
    if said is not None:
        card(run, **said)
    said = cloister("generate", run, out, "--images", 2)
    assert said.code == 0, said.err
    about = json.loads((out / "about.json").read_text())
    words = "ε = 7.50 at δ = 1e-05 for each image" if known else "they may give patients away"
    assert words in about["privacy"]
    if known:
        found = synthetic_cohort(out / "cohort", without_privacy=False)
        assert (len(found.cohort), found.claim) == (2, Claim("image", 7.5, 1e-5))
    else:
        assert about["differential_privacy"] is None
        refused(out / "cohort")


def test_what_is_said_is_of_one_cohort_alone(cloister: Cloister, finished, tmp_path: Path):
    run, out = finished(privacy=DP), tmp_path / "out"
    card(run, protected=True)
    cloister("generate", run, out, "--images", 2)
    synthetic_cohort(out / "cohort", without_privacy=False)
    shutil.rmtree(out / "cohort")
    drawn = synthetic.load_generator(run).draw(2, 99)
    synthetic.write_cohort(out / "cohort", drawn, spec_of(run))
    refused(out / "cohort")


def refused(cohort: Path) -> None:
    with pytest.raises(CohortError, match="does not say that the images of just this cohort"):
        synthetic_cohort(cohort, without_privacy=False)


def card(run: Path, **privacy: Any) -> None:
    model = sha256((run / "model.safetensors").read_bytes()).hexdigest()
    text = {
        "spec_sha256": spec_of(run).digest,
        "model": {"safetensors_sha256": model},
        "privacy": {"all_sites_epsilon": 7.5, "all_sites_delta": 1e-5} | privacy,
    }
    (run / "model_card.json").write_text(json.dumps(text))


def test_the_seed_alone_decides_what_is_made(cloister: Cloister, finished, tmp_path: Path):
    run = finished()
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        cloister("generate", run, tmp_path / name, "--images", 5, "--seed", seed)
    one, same, other = (
        Cohort.open(tmp_path / name / "cohort").images(range(5))
        for name in ("one", "same", "other")
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_memorised_images_are_told(cloister: Cloister, finished, tmp_path: Path):
    """Made twice from one seed, as if the second cohort had been trained on and come back."""
    run = finished()
    cloister("generate", run, tmp_path / "one", "--images", 20)
    known = cloister("generate", run, tmp_path / "two", "--against", tmp_path / "one" / "cohort")
    assert "; 100 % of its images" in " ".join(known.out.split())
    other = cloister(
        "generate", run, tmp_path / "three", "--seed", 9, "--against", tmp_path / "one" / "cohort"
    )
    assert "100 %" not in " ".join(other.out.split())


def test_a_memorised_image_is_told_wherever_it_stands_among_those_that_were_made(
    cloister: Cloister, finished, tmp_path: Path
):
    run = finished()
    drawn = synthetic.load_generator(run).draw(300, 9)
    last = Drawn(drawn.images[-6:], drawn.labels[-6:])
    synthetic.write_cohort(tmp_path / "trained", last, spec_of(run))
    said = cloister(
        *("generate", run, tmp_path / "out", "--images", 300, "--seed", 9),
        *("--against", tmp_path / "trained"),
    )
    assert "; 100 % of its images" in " ".join(said.out.split())


def test_a_cohort_that_cannot_be_compared_with_is_refused_before_anything_is_made(
    cloister: Cloister, finished, tmp_path: Path
):
    run, out = finished(), tmp_path / "out"
    generator = synthetic.load_generator(run)
    drawn, spec = generator.draw(3, 1), spec_of(run)
    wider = spec.model_copy(update={"input": spec.input.model_copy(update={"fit": "crop"})})
    synthetic.write_cohort(tmp_path / "other", drawn, wider)
    synthetic.write_cohort(tmp_path / "empty", Drawn(drawn.images[:0], drawn.labels[:0]), spec)
    for name, message in (("other", "does not fit"), ("empty", "no image"), ("none", "not a coh")):
        said = cloister("generate", run, out, "--against", tmp_path / name)
        assert said.code == 2
        assert message in " ".join(said.err.split())
        assert not out.exists()


def test_what_ends_in_the_middle_leaves_nothing(finished, tmp_path: Path):
    run = finished()
    generator = synthetic.load_generator(run)
    drawn = generator.draw(3, 1)
    nameless = Drawn(drawn.images, drawn.labels + 7)  # of no class: found after the pictures
    with pytest.raises(IndexError):
        synthetic.write(tmp_path / "out", generator, nameless, 1)
    assert list(tmp_path.iterdir()) == [run]
    synthetic.write(tmp_path / "out", generator, drawn, 1)
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run, out: out.mkdir(), "is there already"),
        (lambda run, out: (run / "model.safetensors").unlink(), "not the folder of a finished run"),
        (lambda run, out: (run / "model.safetensors").write_bytes(b"x" * 40), "no safetensors"),
        (lambda run, out: (run / "spec.json").write_text("{}"), "not the folder"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    cloister: Cloister, finished, tmp_path: Path, spoil, message
):
    run, out = finished(), tmp_path / "out"
    spoil(run, out)
    before = sorted(out.rglob("*"))
    said = cloister("generate", run, out)
    assert said.code == 2
    assert message in " ".join(said.err.split())
    assert sorted(out.rglob("*")) == before


def test_a_run_of_another_task_and_weights_of_another_network_are_refused(
    cloister: Cloister, finished, tmp_path: Path, make_spec: Callable[..., RunSpec]
):
    run = finished()
    wider = make_spec(**TABLES | {"model": {"name": "dcgan", "width": 8}})
    (run / "spec.json").write_text(wider.canonical_json)
    said = cloister("generate", run, tmp_path / "out")
    assert "not those of dcgan" in " ".join(said.err.split())
    (run / "spec.json").write_text(make_spec().canonical_json)
    said = cloister("generate", run, tmp_path / "out")
    assert "makes no images" in " ".join(said.err.split())
    assert not (tmp_path / "out").exists()
