from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from client.intake.builder import CohortBuilder, ImageRecord
from common.cohort import Cohort, CohortMeta
from common.errors import CohortError, RunError
from common.spec import parse_run_text
from common.tasks.estimates import Estimate
from server.evaluation import CentralEvaluator, EarlyStopping, EvaluationResult, PartResult

RUN = """
name = "small"
rounds = 5
[task]
kind = "{kind}"
classes = {classes}
[model]
name = "none"
[input]
height = 8
width = 8
{input}
[optimizer]
name = "sgd"
learning_rate = 0.1
[local]
batch_size = 4
[privacy]
mechanism = "none"
[evaluation]
bootstrap = 40
{evaluation}
"""


def make_spec(evaluation="", kind="binary", classes=("clear", "finding"), pixels=""):
    text = RUN.format(
        evaluation=evaluation, kind=kind, classes=json.dumps(list(classes)), input=pixels
    )
    return parse_run_text(text, source="run.toml").spec


def make_cohort(path, spec, images, unit="patient"):
    """A cohort of (patient, label, split); an image's brightness is 0.25 + its label / 2."""
    rng = np.random.default_rng(0)
    with CohortBuilder(path, spec.input.shape) as builder:
        for number, (patient, label, split) in enumerate(images):
            bright = np.mean(label) / 2 + 0.25 + rng.normal(0, 0.02, spec.input.shape)
            record = ImageRecord(patient, "s", "s", f"i{number}", label, 8, 8, split)
            builder.add(record, (bright.clip(0, 1) * 65535).astype(np.uint16))
        builder.finish(CohortMeta.of(spec, unit=unit, source="test", created="2026-01-01"))
    return Cohort.open(path)


def plain(count, split="", per_patient=1):
    return [(f"p{i // per_patient:03}", int(i % 4 == 0), split) for i in range(count)]


class Brightness(nn.Module):
    """Says what the mean of an image is, and notes how it was called."""

    def __init__(self, outputs=1):
        super().__init__()
        self.scale = nn.Parameter(torch.full((outputs,), 4.0))
        self.calls: list[SimpleNamespace] = []

    def forward(self, images):
        self.calls.append(
            SimpleNamespace(
                training=self.training, gradients=torch.is_grad_enabled(), images=images
            )
        )
        return images.mean(dim=(1, 2, 3))[:, None] * self.scale


# --- The parts --------------------------------------------------------------------------------


def test_marked_splits_are_kept_and_nothing_else_is_used(tmp_path):
    spec = make_spec()
    images = [
        *((f"t{i}", i % 2, "train") for i in range(6)),
        *((f"v{i}", i % 2, "validation") for i in range(4)),
        *((f"e{i}", i % 2, "test") for i in range(8)),
        ("x", 1, ""),
    ]
    parts = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, images)).parts
    assert set(parts["validation"].patients) == {f"v{i}" for i in range(4)}
    assert set(parts["test"].patients) == {f"e{i}" for i in range(8)}


def test_a_marked_test_part_is_never_used_for_choosing(tmp_path):
    spec = make_spec("validation_fraction = 0.5")
    cohort = make_cohort(tmp_path / "c", spec, plain(12, "test"))
    result = CentralEvaluator(spec, cohort).evaluate(Brightness())
    assert result.validation is None
    assert result.test is not None
    assert result.test.images == 12


def test_a_patient_marked_for_both_parts_is_refused(tmp_path):
    spec = make_spec()
    images = [("ann", 0, "validation"), ("ann", 1, "test"), ("bob", 1, "test")]
    cohort = make_cohort(tmp_path / "c", spec, images)
    expected = "1 patients have images in 'validation' and in 'test'"
    with pytest.raises(CohortError, match=expected) as refused:
        CentralEvaluator(spec, cohort)
    assert "ann" not in str(refused.value)


@pytest.mark.parametrize("per_patient", [1, 3])
def test_the_seeded_split_is_by_patient_and_has_the_right_size(tmp_path, per_patient):
    spec = make_spec("validation_fraction = 0.3")
    cohort = make_cohort(tmp_path / "c", spec, plain(120, per_patient=per_patient))
    parts = CentralEvaluator(spec, cohort).parts
    validation, test = (set(parts[name].patients) for name in ("validation", "test"))
    assert not validation & test
    assert validation | test == set(cohort.patients)
    assert len(validation) == round(0.3 * len(cohort.patients))


def test_the_split_is_stratified_where_chance_would_not_be(tmp_path):
    labels = [1] * 10 + [0] * 90
    images = [(f"p{i}", label, "") for i, label in enumerate(labels)]
    cohort = make_cohort(tmp_path / "c", make_spec(), images)
    specs = [make_spec().model_copy(update={"seed": seed}) for seed in range(8)]
    parts = [CentralEvaluator(spec, cohort).parts["validation"] for spec in specs]
    assert {int(part.labels.sum()) for part in parts} == {3}
    # The control: an unstratified permutation gives other numbers of positives as well.
    chance = {int(np.random.default_rng(s).permutation(labels)[:30].sum()) for s in range(8)}
    assert len(chance) > 1


def test_the_split_depends_on_the_seed_alone(tmp_path):
    spec = make_spec()
    cohort = make_cohort(tmp_path / "c", spec, plain(60))
    other = spec.model_copy(update={"seed": 2})
    first, again, changed = (
        CentralEvaluator(s, cohort).parts["test"].patients for s in (spec, spec, other)
    )
    assert first == again != changed


def test_without_a_validation_fraction_there_is_no_validation_part(tmp_path):
    spec = make_spec("validation_fraction = 0.0")
    cohort = make_cohort(tmp_path / "c", spec, plain(20))
    result = CentralEvaluator(spec, cohort).evaluate(Brightness())
    assert result.validation is None
    assert result.to_json()["validation"] is None
    assert result.test is not None
    assert result.test.images == 20


def test_one_patient_goes_to_the_test_part(tmp_path):
    spec = make_spec("validation_fraction = 0.9")
    parts = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(1))).parts
    assert set(parts) == {"test"}


@pytest.mark.parametrize("images", [[], [("p", 0, "train")]])
def test_nothing_to_evaluate_is_an_error_that_says_so(tmp_path, images):
    spec = make_spec()
    with pytest.raises(CohortError, match="no image to evaluate on"):
        CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, images))


def test_a_cohort_of_another_shape_is_refused(tmp_path):
    cohort = make_cohort(tmp_path / "c", make_spec(), plain(4))
    with pytest.raises(CohortError, match="does not fit the run"):
        CentralEvaluator(make_spec(classes=("clear", "nodule")), cohort)


def test_an_image_level_cohort_may_evaluate_and_says_its_unit(tmp_path):
    spec = make_spec()
    cohort = make_cohort(tmp_path / "c", spec, plain(20), unit="image")
    result = CentralEvaluator(spec, cohort).evaluate(Brightness())
    assert result.to_json()["test"]["unit"] == "image"


# --- Evaluating -------------------------------------------------------------------------------


def test_a_model_that_sees_the_label_scores_one(tmp_path):
    spec = make_spec(pixels="mean = [0.5]\nstd = [0.25]")
    result = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(80))).evaluate(
        Brightness()
    )
    assert result.test is not None
    assert result.test.metrics["auroc"] == Estimate(1.0, 1.0, 1.0)
    assert result.test.metrics["accuracy"].value == 1.0
    decided = result.test.evidence["probabilities"][:, 1] > 0.5
    assert (decided == (result.test.evidence["labels"] == 1)).all()
    assert (decided.sum(), len(decided)) == (14, 56)


def test_the_model_is_in_evaluation_mode_without_gradients_and_back_after(tmp_path):
    spec = make_spec()
    evaluator = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(20)))
    model = Brightness().train()
    evaluator.evaluate(model)
    assert all(not call.training and not call.gradients for call in model.calls)
    assert model.training
    assert not model.eval().training
    evaluator.evaluate(model)
    assert not model.training


def test_inputs_are_normalised_as_in_training(tmp_path):
    spec = make_spec(pixels="mean = [0.25]\nstd = [0.5]")
    model = Brightness()
    CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(20))).evaluate(model)
    means = torch.cat([call.images.mean(dim=(1, 2, 3)) for call in model.calls])
    assert model.calls[0].images.dtype == torch.float32
    assert sorted(means.round(decimals=1).abs().tolist()) == pytest.approx([0] * 15 + [1] * 5)


def test_images_are_read_in_batches_and_stay_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("common.tasks.task._BATCH_IMAGES", (3, 3))
    spec = make_spec("validation_fraction = 0.0")
    cohort = make_cohort(tmp_path / "c", spec, plain(20))
    model = Brightness()
    result = CentralEvaluator(spec, cohort).evaluate(model)
    assert [len(call.images) for call in model.calls] == [3] * 6 + [2]
    arrays = result.arrays()
    assert (arrays["labels"] == cohort.labels).all()
    assert ((arrays["probabilities"][:, 1] > 0.5) == (cohort.labels == 1)).all()


def test_two_evaluations_of_one_model_are_equal(tmp_path):
    spec = make_spec()
    evaluator = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(40)))
    model = Brightness()
    assert evaluator.evaluate(model).to_json() == evaluator.evaluate(model).to_json()


def test_a_model_that_went_to_nan_gives_null_and_valid_json(tmp_path):
    spec = make_spec()
    model = Brightness()
    nn.init.constant_(model.scale, float("nan"))
    result = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, plain(20))).evaluate(model)
    text = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(text)["test"]["metrics"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_one_class_only_gives_a_null_auroc(tmp_path):
    spec = make_spec()
    images = [(f"p{i}", 0, "") for i in range(20)]
    result = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, images)).evaluate(
        Brightness()
    )
    metrics = result.to_json()["test"]["metrics"]
    assert metrics["auroc"]["value"] is None
    assert metrics["accuracy"]["value"] is not None


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_several_classes(tmp_path, kind):
    spec = make_spec(kind=kind, classes=("a", "b", "c"))
    labels = [(i % 2, 0, 1) if kind == "multilabel" else i % 3 for i in range(30)]
    images = [(f"p{i}", label, "") for i, label in enumerate(labels)]
    result = CentralEvaluator(spec, make_cohort(tmp_path / "c", spec, images)).evaluate(
        Brightness(3)
    )
    part = json.loads(json.dumps(result.to_json(), allow_nan=False))["test"]
    assert part["metrics"]["auroc"]["value"] is not None
    assert result.arrays()["probabilities"].shape == (21, 3)


def test_the_arrays_hold_both_parts_and_load_without_pickle(tmp_path):
    spec = make_spec()
    cohort = make_cohort(tmp_path / "c", spec, plain(40, per_patient=2))
    result = CentralEvaluator(spec, cohort).evaluate(Brightness())
    result.save(tmp_path / "evaluation.npz")
    with np.load(tmp_path / "evaluation.npz", allow_pickle=False) as arrays:
        assert arrays["probabilities"].dtype == np.float32
        assert arrays["patients"].dtype == np.int64
        assert len(arrays["labels"]) + len(arrays["validation_labels"]) == 40
        assert str(arrays["unit"]) == "patient"


# --- Early stopping ---------------------------------------------------------------------------


def reached(value, name="auroc"):
    """An evaluation whose validation part reached `value`."""
    part = PartResult({}, np.zeros(1, int), {name: Estimate(value)}, "patient")
    return EvaluationResult(part, None)


def stopping(metric="auroc", **settings):
    """Before the first round of a run with these settings."""
    lines = [f'metric = "{metric}"', *(f"{key} = {value}" for key, value in settings.items())]
    return EarlyStopping.of(make_spec("\n".join(lines)))


def follow(state, values):
    for number, value in enumerate(values, start=1):
        state = state.after(number, reached(value, state.metric))
    return state


def test_the_best_round_is_the_highest():
    state = follow(stopping("auroc", patience=0, min_delta=0.0), [0.6, 0.8, 0.7, 0.8])
    assert (state.best_round, state.best_value, state.stop) == (2, 0.8, False)


def test_of_the_brier_score_the_lowest():
    state = follow(stopping("brier", patience=2, min_delta=0.0), [0.3, 0.2, 0.25, 0.4])
    assert (state.best_round, state.best_value, state.stop) == (2, 0.2, True)


def test_patience_counts_evaluations_without_gain():
    state = stopping("auroc", patience=3, min_delta=0.0)
    assert not follow(state, [0.8, 0.7, 0.7]).stop
    assert follow(state, [0.8, 0.7, 0.7, 0.7]).stop
    assert not follow(state, [0.8, 0.7, 0.7, 0.9]).stop


def test_small_gains_make_a_best_round_but_do_not_renew_patience():
    state = follow(stopping("auroc", patience=3, min_delta=0.1), [0.7, 0.72, 0.74, 0.76])
    assert (state.best_round, state.stop) == (4, True)
    state = follow(stopping("auroc", patience=3, min_delta=0.1), [0.7, 0.75, 0.81])
    assert (state.waited, state.reference) == (0, 0.81)


def test_a_metric_without_meaning_is_no_gain():
    state = follow(stopping("auroc", patience=2, min_delta=0.0), [0.7, None, None])
    assert (state.best_round, state.stop) == (1, True)


def test_without_a_validation_part_nothing_stops():
    state = stopping("auroc", patience=1, min_delta=0.0)
    for number in range(5):
        state = state.after(number, EvaluationResult(None, None))
    assert (state.best_round, state.stop) == (None, False)


def test_it_survives_the_checkpoint():
    spec = make_spec('metric = "brier"\npatience = 4')
    before = follow(EarlyStopping.of(spec), [0.3, 0.2, 0.25])
    assert (before.best_round, before.waited) == (2, 1)
    after = EarlyStopping.from_json(json.loads(json.dumps(before.to_json())), spec)
    assert after == before
    assert follow(after, [0.1]).best_value == 0.1  # lower is still better


@pytest.mark.parametrize("change", [{"metric": "luck"}, {"metric": "f1"}, {"more": 1}])
def test_a_foreign_state_is_refused(change):
    state = stopping(patience=1).to_json() | change
    with pytest.raises(RunError, match="early stopping in the checkpoint"):
        EarlyStopping.from_json(state, make_spec("patience = 1"))
