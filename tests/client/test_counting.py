"""A site's noised counts: one image a patient, noise from the keystream, nothing from the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from client import counting
from client.counting import noised_counts, row_bytes
from client.gate import Gate, Site
from client.training import Compute
from common import models
from common.errors import RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply
from common.noise import Keystream
from common.spec import RunSpec
from common.tasks import counts
from common.tasks.classification import Classification
from common.tasks.preprocess import normalise

CPU = Compute(torch.device("cpu"))
FEDERATED = {"federated": {"noise_multiplier": 3.0, "bins": 8}}
Spec = Callable[..., RunSpec]


def test_without_noise_every_patient_is_there_once(
    make_spec: Spec, write_cohort: Any, global_weights: Any, quiet_keystream: Any
):
    spec = make_spec(evaluation=FEDERATED)
    owners = [0] * 9 + list(range(1, 20))  # nine images of one patient
    cohort = write_cohort(spec, owners)
    table = noised_counts(
        spec, global_weights(spec), cohort, keystream=quiet_keystream(), compute=CPU
    )
    assert table.shape == (1, 2, 8)
    assert table.dtype == np.float32
    assert table.sum() == 20


def test_one_patient_moves_the_table_by_one(
    make_spec: Spec, write_cohort: Any, global_weights: Any, quiet_keystream: Any
):
    spec = make_spec(evaluation=FEDERATED)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 65536, (20, 1, 16, 16), dtype=np.uint16)
    labels = rng.integers(0, 2, 20)
    tables = []
    for name, kept in (("with", 20), ("without", 19)):
        cohort = write_cohort(
            spec, range(kept), labels=labels[:kept], pixels=pixels[:kept], name=name
        )
        tables.append(
            noised_counts(
                spec, global_weights(spec), cohort, keystream=quiet_keystream(), compute=CPU
            )
        )
    assert np.linalg.norm(tables[0] - tables[1]) == pytest.approx(1.0)


def test_an_empty_cohort_releases_noise_of_the_stated_deviation(
    make_spec: Spec, write_cohort: Any, global_weights: Any
):
    spec = make_spec(evaluation={"federated": {"noise_multiplier": 3.0, "bins": 1000}})
    cohort = write_cohort(spec, [])
    weights = global_weights(spec)
    one, other = (
        noised_counts(spec, weights, cohort, keystream=Keystream.fresh(), compute=CPU)
        for _ in range(2)
    )
    assert one.std() == pytest.approx(counts.deviation(spec), rel=0.1)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15


def test_several_columns_have_noise_for_their_sensitivity(
    make_spec: Spec, write_cohort: Any, global_weights: Any
):
    spec = make_spec(
        task={"kind": "multilabel", "classes": ["a", "b", "c", "d"]},
        evaluation={"federated": {"noise_multiplier": 3.0, "bins": 500}},
    )
    assert counts.deviation(spec) == 6.0
    cohort = write_cohort(make_spec(), []).with_split("test")
    table = noised_counts(
        spec, global_weights(spec), cohort, keystream=Keystream.fresh(), compute=CPU
    )
    assert table.std() == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("model", ["small-cnn", "reference-cnn", "compact-cnn"])
def test_what_is_predicted_of_a_patient_depends_on_nobody_else(  # noqa: PLR0913, PLR0917
    make_spec: Spec,
    array_cohort: Any,
    global_weights: Any,
    quiet_keystream: Any,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """To the last bit: a kernel adds in another order for another size of batch and, at most sizes,
    for another place in it; and a bin's edge could lie between the two.
    """
    side = max(32, models.NETWORKS[model].smallest_side)
    spec = make_spec(model={"name": model}, input={"height": side, "width": side})
    weights = {name: 3 * weight for name, weight in global_weights(spec).items()}
    rng = np.random.default_rng(7)
    images = rng.random((67, *spec.input.shape), dtype=np.float32)
    labels = rng.integers(0, 2, len(images))

    def predicted(patients: list[int]) -> Any:
        cohort = array_cohort(images[patients], labels[patients])
        found, _ = counting._predictions(spec, weights, cohort, quiet_keystream(), CPU)
        return found

    together = predicted(list(range(67)))
    assert np.unique(together).size > 60
    for patients in ([0], [66], [3, 9], [9, 3, 66], list(range(1, 64)), list(range(2, 67))):
        assert np.array_equal(predicted(patients), together[patients])
    assert np.unique(predicted([5] * 31), axis=0).shape[0] == 1

    network = models.build(spec).eval()  # the negative control: what a batch would have done
    for name, parameter in network.named_parameters():
        parameter.data.copy_(torch.from_numpy(weights[name]))
    with torch.no_grad():
        seen = normalise(torch.from_numpy(images), spec.input)
        batch = Classification(spec).probabilities(network(seen))
    assert torch.allclose(batch, torch.from_numpy(together), atol=1e-4)
    assert not np.array_equal(batch, together)


# --- Memory -----------------------------------------------------------------------------------


def test_a_study_takes_as_much_as_its_images(make_spec: Spec):
    assert 30 < row_bytes(make_spec(input={"images": 40})) / row_bytes(make_spec()) < 60


def test_it_is_refused_at_the_invitation_if_not_one_fits(
    make_spec: Spec, make_policy: Any, make_ledger: Any, monkeypatch: pytest.MonkeyPatch
):
    spec = make_spec(evaluation=FEDERATED)
    policy = make_policy(limits={"federated_evaluation": True})
    ledger = make_ledger(policy)
    gate = Gate(Site(policy, ledger, "c" * 64), trainer_for=_never)
    before = ledger.book.last
    with monkeypatch.context() as patch:
        patch.setattr(counting, "row_bytes", lambda _: 513 * 2**20)
        assert gate.invite(Invitation(spec)) == RefusalReply(code=RefusalCode.POLICY)
    assert ledger.book.last == before
    assert isinstance(gate.invite(Invitation(spec)), NodeCard)


def _never(*_: Any) -> Any:
    raise AssertionError("no trainer is made at an invitation")


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("patients", [0, 1])
def test_what_fails_fails_for_an_empty_cohort_as_well(  # noqa: PLR0913, PLR0917
    make_spec: Spec,
    write_cohort: Any,
    global_weights: Any,
    quiet_keystream: Any,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    patients: int,
):
    """Or an answer would tell whether there is a held-out patient (docs/privacy.md 5)."""
    spec = make_spec(evaluation=FEDERATED, input={"images": images})
    cohort, weights = write_cohort(make_spec(), range(patients)), global_weights(spec)
    given = {"keystream": quiet_keystream(), "compute": CPU}
    assert noised_counts(spec, weights, cohort, **given).sum() == patients
    shapes: list[Any] = []

    def out_of_memory(self: Any, outputs: torch.Tensor) -> Any:
        shapes.append(outputs.shape)
        raise MemoryError

    monkeypatch.setattr(Classification, "probabilities", out_of_memory)
    with pytest.raises(MemoryError):
        noised_counts(spec, weights, cohort, **given)
    assert [shape[0] for shape in shapes] == [1]
