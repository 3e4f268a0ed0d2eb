"""Synthetic images that are mixed in are no patients, and change nothing of what one can move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.folder import cohort_digest
from client.gate import Gate, Site
from client.synthetic import fitting, synthetic_cohort
from client.training import LocalTrainer
from common.cohort import Cohort
from common.errors import CohortError, Refusal, RefusalCode, SpecError
from common.messages import Invitation, NodeCard, RefusalReply, TrainTask
from common.noise import Keystream
from common.spec import RunSpec
from common.tasks.generation import Drawn
from deploy.synthetic import write_cohort as write_drawn

PATIENTS, MIXED, C = 5, 3, 0.3
Make = Callable[..., Any]


@pytest.fixture
def make(make_spec: Any, make_trainer: Any, array_cohort: Any) -> Make:
    """A trainer of everyone that mixes in three synthetic images of six, and its cohort."""

    def of(synthetic: int = MIXED, clip_norm: float = C, **privacy: Any) -> Any:
        spec = make_spec(
            model={"name": "small-cnn", "width": 4},
            local={"batch_size": PATIENTS, "steps": 1},
            augmentation={"rotate": 20.0, "synthetic": synthetic},
            privacy=privacy or {"clip_norm": clip_norm},
        )
        rng = np.random.default_rng(5)
        images = rng.random((PATIENTS, *spec.input.shape), dtype=np.float32)
        made = rng.random((2 * MIXED, *spec.input.shape), dtype=np.float32)
        cohort = array_cohort(images, np.arange(PATIENTS) % 2)
        trainer = make_trainer(spec, cohort, PATIENTS)
        return trainer.mix_in(array_cohort(made, np.arange(2 * MIXED) % 2)), cohort, spec

    return of


def sum_of(made: Any, patients: list[int], weights: Any, watch: Any, keystream: Any) -> Any:
    trainer, cohort, _ = made
    cohort.show([[patient] for patient in patients])
    with watch() as steps:
        result = trainer.train(weights, 1, keystream())
    assert result.sampled == (len(patients),)  # they are counted as nobody
    return steps[0]


@pytest.mark.parametrize("clip_norm", [1e-3, 0.3])
def test_no_patient_moves_the_sum_by_more_than_c(
    make: Make, global_weights: Any, watch_steps: Any, quiet_keystream: Any, clip_norm: float
):
    made = make(clip_norm=clip_norm)
    given = global_weights(made[2]), watch_steps, quiet_keystream
    whole = sum_of(made, [0, 1, 2, 3, 4], *given).summed.astype(np.float64)
    for last in range(PATIENTS):
        others = [patient for patient in range(PATIENTS) if patient != last]
        there = sum_of(made, [*others, last], *given).summed.astype(np.float64)
        gone = sum_of(made, others, *given).summed.astype(np.float64)
        assert np.linalg.norm(there - gone) <= clip_norm * (1 + 1e-5)
    nobody = sum_of(made, [], *given).summed
    assert 0 < np.linalg.norm(nobody) <= 2 * MIXED * clip_norm  # each of them clipped as well
    assert np.linalg.norm(whole - nobody) > 0


def test_the_sum_is_divided_by_patients_and_synthetic_images_together(
    make: Make, global_weights: Any, watch_steps: Any, quiet_keystream: Any
):
    made = make()
    step = sum_of(made, [0, 1], global_weights(made[2]), watch_steps, quiet_keystream)
    np.testing.assert_allclose(step.gradient, step.summed / (PATIENTS + MIXED), rtol=1e-6)


def test_as_many_as_the_run_expects_are_taken_on_average(make: Make, global_weights: Any):
    trainer, _, spec = make()
    weights, seen = global_weights(spec), []
    for number in range(60):
        trainer._synthetic.reads.clear()
        trainer.train(weights, 1, Keystream.seeded(number, "north", 1))
        seen.append(sum(map(len, trainer._synthetic.reads)))
    assert abs(np.mean(seen) - MIXED) < 4 * np.sqrt(MIXED / 2 / len(seen))
    assert np.var(seen) > 0.5  # Poisson, not a fixed number


def test_without_privacy_they_count_as_much_as_patients(
    make: Make, global_weights: Any, watch_steps: Any
):
    made = make(mechanism="none")
    trainer, cohort, spec = made
    cohort.show([])
    with watch_steps() as steps:
        trainer.train(global_weights(spec), 1, Keystream.seeded(1, "north", 1))
    assert np.linalg.norm(steps[0].gradient) > 0


def test_a_run_that_mixes_in_trains_nothing_without_them(
    make_spec: Any, make_trainer: Any, array_cohort: Any, global_weights: Any
):
    spec = make_spec(augmentation={"synthetic": 2})
    cohort = array_cohort(np.zeros((1, *spec.input.shape), np.float32), np.zeros(1, np.int64))
    cohort.path = Path("made")
    trainer: LocalTrainer = make_trainer(spec, cohort, 40)
    with pytest.raises(ValueError, match="no synthetic cohort is mixed in"):
        trainer.train(global_weights(spec), 1, Keystream.seeded(1, "north", 1))
    with pytest.raises(CohortError, match="1 synthetic images, the run expects 2"):
        trainer.mix_in(cohort)


def test_older_specs_keep_their_digest(make_spec: Any):
    assert "synthetic" not in make_spec().canonical_json
    assert make_spec(augmentation={"synthetic": 0}).digest == make_spec().digest
    one = make_spec(augmentation={"synthetic": 1})
    assert one.digest != make_spec().digest
    assert "synthetic_without_privacy" not in one.canonical_json
    open_to_all = {"synthetic": 1, "synthetic_without_privacy": True}
    assert make_spec(augmentation=open_to_all).digest != one.digest


@pytest.mark.parametrize(
    ("synthetic", "privacy"), [(0, {}), (1, {"mechanism": "none"})], ids=["none", "no privacy"]
)
def test_a_run_says_so_only_where_it_means_something(
    make_spec: Any, synthetic: int, privacy: dict[str, Any]
):
    augmentation = {"synthetic": synthetic, "synthetic_without_privacy": True}
    with pytest.raises(SpecError, match="means something to a run under dp-sgd that mixes in"):
        make_spec(augmentation=augmentation, privacy=privacy)


# --- Which cohorts are taken ----------------------------------------------------------------------


def told(cohort: Cohort, **about: Any) -> Path:
    known = {"cohort_sha256": cohort_digest(cohort.path)} | about
    (cohort.path.parent / "about.json").write_text(json.dumps(known))
    return cohort.path


def protecting(unit: str | None, **figures: Any) -> dict[str, Any]:
    """What is said of a generator that had privacy."""
    return {"differential_privacy": {"unit": unit, "epsilon": 2.5, "delta": 1e-5} | figures}


def test_patients_are_never_mixed_in(write_cohort: Any, make_spec: Any):
    path = told(write_cohort(make_spec(), range(3)), **protecting("patient"))
    with pytest.raises(CohortError, match="its source is 'test', expected 'synthetic'"):
        synthetic_cohort(path, without_privacy=True)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"differential_privacy": None},
        {"differential_privacy": True},  # by itself: of how much, nobody says
        {"differential_privacy": "yes"},
        protecting("patient") | {"cohort_sha256": "c" * 64},
        protecting("patient") | {"cohort_sha256": None},
        protecting("patient", epsilon=None),
        protecting("patient", epsilon="8"),
        protecting("patient", epsilon=True),
        protecting("patient", epsilon=-1.0),
        protecting("patient", epsilon=float("inf")),
        protecting("patient", epsilon=10**400),
        protecting("patient", delta=None),
        protecting("patient", delta=0),
        protecting("patient", delta=1.0),
    ],
)
def test_images_of_a_generator_without_privacy_take_a_word(
    make_synthetic: Any, about: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    path = told(make_synthetic(), **about)
    with pytest.raises(CohortError, match=r"about\.json: .*synthetic_without_privacy = true"):
        synthetic_cohort(path, without_privacy=False)
    assert len(synthetic_cohort(path, without_privacy=True).cohort) == 3
    assert "without differential privacy are mixed in" in caplog.text  # the node's own log
    told(make_synthetic(), **protecting("patient"))
    assert len(synthetic_cohort(path, without_privacy=False).cohort) == 3


@pytest.mark.parametrize(
    ("about", "unit", "behind"),
    [
        (protecting("patient"), "patient", "protected"),
        (protecting("patient"), "image", "protected"),
        (protecting("image"), "image", "protected"),
        (protecting("image"), "patient", "unprotected"),
        (protecting(None), "patient", "unprotected"),
        (protecting("patient", epsilon=None), "image", "unprotected"),
        ({"differential_privacy": None}, "image", "unprotected"),
    ],
)
@pytest.mark.parametrize("site_says", [True, False])
@pytest.mark.parametrize("run_says", [True, False])
def test_the_patients_behind_are_protected_or_run_and_site_both_say_that_they_are_not(  # noqa: PLR0913, PLR0917
    make_synthetic: Any,
    make_spec: Any,
    about: dict[str, Any],
    unit: str,
    behind: str,
    site_says: bool,
    run_says: bool,
):
    """A generator that protected single images leaves a patient of many with less than the run."""
    path = told(make_synthetic(), **about)
    augmentation = {"synthetic": 3} | ({"synthetic_without_privacy": True} if run_says else {})
    spec = make_spec(augmentation=augmentation, privacy={"unit": unit})

    def taken() -> Cohort | None:
        made = synthetic_cohort(path, without_privacy=site_says)
        assert made.behind(spec) == behind
        return fitting(spec, made)

    if behind == "protected" or (site_says and run_says):
        assert taken() is not None
        return
    with pytest.raises(CohortError, match="synthetic_without_privacy = true"):
        taken()


def test_a_run_without_privacy_claims_nothing_and_takes_them(make_synthetic: Any, make_spec: Any):
    made = synthetic_cohort(told(make_synthetic()), without_privacy=True)
    spec = make_spec(augmentation={"synthetic": 3}, privacy={"mechanism": "none"})
    assert fitting(spec, made) is not None


@pytest.fixture
def make_synthetic(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Callable[[], Cohort]:
    def make() -> Cohort:
        spec, path = make_spec(), tmp_path / "made" / "cohort"
        if not path.exists():
            path.parent.mkdir()
            drawn = Drawn(torch.zeros(3, *spec.input.shape), torch.tensor([0, 1, 0]))
            write_drawn(path, drawn, spec)
        return Cohort.open(path)

    return make


def test_a_site_that_names_no_synthetic_cohort_says_so(make_policy: Any, make_spec: Any):
    spec = make_spec(augmentation={"synthetic": 2})
    with pytest.raises(Refusal, match=r"\[data\] names no synthetic cohort"):
        make_policy().judge(spec, 1)
    assert make_policy(data={"synthetic": "made/cohort"}).judge(spec, 1)


def test_a_step_of_more_synthetic_images_than_patients_would_take_is_refused(
    make_policy: Any, make_spec: Any
):
    policy = make_policy(data={"synthetic": "made/cohort"})
    assert policy.judge(make_spec(augmentation={"synthetic": 16}), 1)  # of a batch of 4
    with pytest.raises(Refusal, match=r"synthetic images to a patient: 4\.25, at most 4"):
        policy.judge(make_spec(augmentation={"synthetic": 17}), 1)


def test_too_few_or_others_are_refused_before_anything_is_set_aside(
    make_synthetic: Any, make_policy: Any, make_ledger: Any, make_spec: Any
):
    policy = make_policy(data={"synthetic": "made/cohort"})
    ledger, made = make_ledger(policy), make_synthetic()
    known = synthetic_cohort(told(made, **protecting("patient")), without_privacy=False)
    site = Site(policy, ledger, "c" * 64, synthetic=known)
    gate, before = Gate(site, trainer_for=_never), ledger.book.last
    answer = gate.invite(Invitation(make_spec(augmentation={"synthetic": 4})))
    assert answer == RefusalReply(code=RefusalCode.POLICY)
    assert ledger.book.last == before
    assert isinstance(gate.invite(Invitation(make_spec(augmentation={"synthetic": 3}))), NodeCard)
    other = make_spec(augmentation={"synthetic": 3}, input={"fit": "crop"})
    with pytest.raises(CohortError, match="does not fit"):
        fitting(other, known)


def _never(*_: Any) -> Any:
    raise AssertionError("no trainer is made at an invitation")


def test_a_run_goes_on_with_the_images_that_it_was_set_aside_with(
    make_synthetic: Any, make_policy: Any, make_ledger: Any, make_spec: Any, global_weights: Any
):
    """The coordinator was told of them at the invitation, and the card says so of the site."""
    policy = make_policy(data={"synthetic": "made/cohort"})
    made, ledger = make_synthetic(), make_ledger(policy)
    augmentation = {"synthetic": 3, "synthetic_without_privacy": True}
    spec, trained = make_spec(augmentation=augmentation), list[str]()

    def gate(**about: Any) -> Gate:
        known = synthetic_cohort(told(made, **about), without_privacy=True)
        site = Site(policy, ledger, "c" * 64, synthetic=known)
        return Gate(site, trainer_for=lambda *_: trained.append(str(known)))  # type: ignore[arg-type]

    protected = gate(**protecting("patient"))
    card = protected.invite(Invitation(spec))
    assert isinstance(card, NodeCard)
    assert card.synthetic == "protected"
    task, last = TrainTask(spec, 1, global_weights(spec)), ledger.book.last
    for other in (gate(), gate(**protecting("patient", epsilon=9.0))):
        for answer in (other.train(task), other.invite(Invitation(spec))):
            assert answer == RefusalReply(code=RefusalCode.POLICY)
    assert (ledger.book.last, trained) == (last, [])
    gate(**protecting("patient")).train(task)
    assert len(trained) == 1  # the same ones, in another process
    assert isinstance(gate().invite(Invitation(spec.identified("another"))), NodeCard)


def test_images_that_were_changed_under_a_node_at_work_are_not_trained_on(
    make_synthetic: Any, make_spec: Any
):
    known = synthetic_cohort(told(make_synthetic()), without_privacy=True)
    known.check_same()
    shutil.rmtree(known.cohort.path)
    drawn = Drawn(torch.ones(3, *make_spec().input.shape), torch.tensor([0, 1, 0]))
    write_drawn(known.cohort.path, drawn, make_spec())
    with pytest.raises(CohortError, match="other synthetic images lie there"):
        known.check_same()
