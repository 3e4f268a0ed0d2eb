"""Calibration against slow formulas, and what it must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.special import expit, softmax

from common.calibration import Calibrated, Calibration, calibrate
from common.spec import RunSpec

CLASSES = {"binary": ["no", "yes"], "multiclass": ["a", "b", "c"], "multilabel": ["a", "b"]}


def drawn(kind: str, images: int, heat: float, seed: int = 5) -> dict[str, NDArray[Any]]:
    """What a model says that is `heat` times too sure, and what is true."""
    generator = np.random.default_rng(seed)
    classes = len(CLASSES[kind])
    logits = generator.normal(0, 1.5, (images, classes))
    if kind == "multilabel":
        labels = (generator.random(logits.shape) < expit(logits)).astype(np.float32)
        said = expit(heat * logits)
    elif kind == "binary":
        labels = (generator.random(images) < expit(logits[:, 0])).astype(np.int64)
        said = np.stack([expit(-heat * logits[:, 0]), expit(heat * logits[:, 0])], axis=1)
    else:
        true = softmax(logits, axis=1).cumsum(axis=1)
        labels = (generator.random((images, 1)) > true).sum(axis=1).clip(max=classes - 1)
        said = softmax(heat * logits, axis=1)
    return {
        "probabilities": said.astype(np.float32),
        "labels": labels,
        "patients": np.arange(images) // 2,
    }


def parts(kind: str, heat: float, images: int = 3000) -> dict[str, NDArray[Any]]:
    validation = drawn(kind, images, heat)
    return drawn(kind, 1000, heat, seed=6) | {f"validation_{k}": v for k, v in validation.items()}


@pytest.fixture
def spec_of(make_spec: Callable[..., RunSpec]) -> Callable[[str], RunSpec]:
    return lambda kind: make_spec(
        task={"kind": kind, "classes": CLASSES[kind]}, evaluation={"bootstrap": 20}
    )


def done(found: Calibrated) -> Calibration:
    assert found.calibration is not None, found.why
    return found.calibration


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("heat", [0.5, 3.0])
def test_a_model_that_is_too_sure_or_not_sure_enough_is_put_right(
    kind: str, heat: float, spec_of: Any
) -> None:
    found = calibrate(spec_of(kind), parts(kind, heat))
    assert done(found).temperatures == pytest.approx([heat] * len(done(found).temperatures), 0.1)
    assert found.test is not None
    for name in ("brier", "ece"):
        before, after = (side[name].value for side in (found.test.before, found.test.after))
        assert before is not None
        assert after is not None
        assert after < before
    assert found.test.after["ece"].low is not None


@pytest.mark.parametrize("kind", CLASSES)
def test_no_other_temperature_has_a_smaller_cross_entropy(kind: str, spec_of: Any) -> None:
    arrays = parts(kind, 2.0)
    found = done(calibrate(spec_of(kind), arrays))
    said = arrays["validation_probabilities"].astype(np.float64)
    labels = arrays["validation_labels"]

    def cost(heat: float) -> float:
        if kind == "multiclass":
            powers = said ** (1 / heat)
            p = (powers / powers.sum(axis=1, keepdims=True))[np.arange(len(labels)), labels]
        else:
            one, is_one = (said[:, 1], labels) if kind == "binary" else (said[:, 0], labels[:, 0])
            yes, no = one ** (1 / heat), (1 - one) ** (1 / heat)
            p = np.where(is_one > 0, yes, no) / (yes + no)
        return -float(np.log(p).mean())

    ours = cost(found.temperatures[0])
    assert ours <= min(cost(heat) for heat in np.geomspace(0.1, 10, 400)) + 1e-6


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_likelier_stays_likelier_and_it_still_adds_up(kind: str) -> None:
    said = drawn(kind, 200, 4.0)["probabilities"]
    labels = len(CLASSES[kind]) if kind == "multilabel" else 1
    plain = Calibration(kind="binary", temperatures=(4.0,), images=30, patients=3)
    one = plain.model_copy(update={"kind": kind, "temperatures": (4.0,) * labels})
    after = one(said)
    assert after.shape == said.shape
    assert (after.argsort(axis=0) == said.argsort(axis=0)).all() or kind == "multiclass"
    assert (after.argmax(axis=1) == said.argmax(axis=1)).all() or kind == "multilabel"
    if kind != "multilabel":
        assert np.allclose(after.sum(axis=1), 1)
    neutral = one.model_copy(update={"temperatures": (1.0,) * labels})
    assert np.allclose(neutral(said), said, atol=1e-6)
    assert not np.allclose(after, said, atol=1e-2)


def test_a_certainty_that_float32_rounds_is_no_infinity() -> None:
    one = Calibration(kind="binary", temperatures=(2.0,), images=30, patients=3)
    after = one(np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32))
    assert np.isfinite(after).all()
    assert after[0, 1] > 0.99


def test_the_test_part_chooses_nothing(spec_of: Any) -> None:
    arrays, other = parts("binary", 3.0), parts("binary", 3.0)
    other["labels"] = 1 - other["labels"]
    assert done(calibrate(spec_of("binary"), arrays)) == done(calibrate(spec_of("binary"), other))
    swapped = dict(arrays, validation_labels=1 - arrays["validation_labels"])
    assert done(calibrate(spec_of("binary"), swapped)).temperatures != pytest.approx([3.0], 0.1)


def test_a_label_that_few_have_keeps_what_the_model_says(spec_of: Any) -> None:
    arrays = parts("multilabel", 3.0)
    arrays["validation_labels"][:, 1] = 0
    found = calibrate(spec_of("multilabel"), arrays)
    assert done(found).temperatures[1] == 1.0
    assert done(found).temperatures[0] == pytest.approx(3.0, 0.1)
    assert done(found).left == ("b",)
    assert "but for b" in found.why


def without_validation(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if "validation" not in name}


def with_nan(arrays: dict[str, Any]) -> dict[str, Any]:
    arrays["validation_probabilities"][7, 0] = np.nan
    return arrays


def of_one_class(arrays: dict[str, Any]) -> dict[str, Any]:
    return dict(arrays, validation_labels=np.zeros_like(arrays["validation_labels"]))


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (without_validation, "no validation part"),
        (with_nan, "not finite"),
        (of_one_class, "fewer than two classes"),
        (lambda arrays: {k: v[:29] for k, v in arrays.items()}, "29 images, expected at least 30"),
    ],
)
def test_where_nothing_can_be_fitted_it_says_why(spoilt: Any, why: str, spec_of: Any) -> None:
    found = calibrate(spec_of("binary"), spoilt(parts("binary", 3.0)))
    assert found.calibration is None
    assert why in found.why
    assert found.to_json()["temperatures"] is None


def test_a_task_without_probabilities_has_no_calibration(make_spec: Any) -> None:
    spec = make_spec(
        task={"name": "segmentation", "kind": "mask", "classes": ["ground", "organ"]},
        model={"name": "unet", "width": 4},
        input={"height": 32, "width": 32},
        loss={"name": "dice"},
        evaluation={"metric": "dice"},
    )
    assert "no probabilities" in calibrate(spec, {}).why


@pytest.mark.parametrize(
    "changed",
    [
        {"temperatures": [0.0]},
        {"temperatures": [float("inf")]},
        {"temperatures": [1.0, 1.0]},
        {"kind": "mask"},
        {"more": 1},
    ],
)
def test_a_file_that_is_no_calibration_is_refused(changed: Any) -> None:
    whole = Calibration(kind="binary", temperatures=(2.0,), images=30, patients=3)
    assert Calibration.model_validate_json(whole.model_dump_json()) == whole
    with pytest.raises(ValidationError):
        Calibration.model_validate_json(json.dumps(whole.model_dump(mode="json") | changed))


def test_the_calibration_of_another_task_is_known(spec_of: Any) -> None:
    one = Calibration(kind="binary", temperatures=(2.0,), images=30, patients=3)
    assert not one.problem_with(spec_of("binary"))
    assert "the run's is multilabel" in one.problem_with(spec_of("multilabel"))
