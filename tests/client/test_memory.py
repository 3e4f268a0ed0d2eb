"""What an image takes in training is known before any image is there, and is what it really takes.

The real figure is the greatest resident size of a process of its own: how much it grows with each
further image of a batch.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.gate import Gate, Site
from client.memory import peak_bytes
from client.training import Compute, LocalTrainer, patient_bytes
from common import accounting, models
from common.errors import RefusalCode
from common.messages import Invitation, NodeCard, RefusalReply
from common.spec import RunSpec

Spec = Callable[..., RunSpec]

RESET = Path("/proc/self/clear_refs")

# One process for all: for each spec a batch of a few images, then one of more. What its peak grows
# by is what these images take; the kernel is asked to forget the peak in between.
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np, torch
from client.training import Compute, LocalTrainer
from common import models
from common.accounting import planned
from common.cohort import Cohort
from common.noise import Keystream
from common.spec import RunSpec

torch.set_num_threads(1)

class Images(Cohort):
    def __init__(self, number, spec):
        self.spec, self.patients = spec, range(number)
    def rows_of(self, patient):
        return np.array([patient])
    def images(self, rows):
        return np.zeros((len(rows), *self.spec.input.shape), np.float32)
    def targets(self, rows):
        shape = self.spec.input.shape[1:]
        if self.spec.task.kind == "mask":
            return np.zeros((len(rows), *shape), np.int64)
        if self.spec.task.kind == "boxes":
            return np.tile(np.float32([0.2, 0.2, 0.8, 0.8, 0]), (len(rows), 1, 1))
        return np.zeros(len(rows), np.int64)

def peak(text, number):
    text["local"]["batch_size"] = number
    spec = RunSpec.from_json(json.dumps(text))
    trainer = LocalTrainer(spec, Images(number, spec), declared_size=number,
        mechanism=planned(spec, number), compute=Compute(torch.device("cpu"), 512))
    weights = {n: p.detach().numpy().copy() for n, p in models.build(spec).named_parameters()}
    Path("/proc/self/clear_refs").write_text("5")
    result = trainer.train(weights, 1, Keystream.seeded(1, "north", 1))
    assert result.sampled == (number,)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

for text, few, many in json.loads(sys.argv[1]):
    peak(text, few)
    before = peak(text, few)
    print((peak(text, many) - before) / (many - few))
"""
LET_GO = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}

SEGMENTATION = {
    "task": {"name": "segmentation", "kind": "mask", "classes": ["none", "a", "b"]},
    "model": {"name": "unet"},
    "input": {"height": 64, "width": 64},
    "loss": {"name": "dice-cross-entropy"},
    "evaluation": {"metric": "dice"},
}
DETECTION = {
    "task": {"name": "detection", "kind": "boxes", "classes": ["a"]},
    "model": {"name": "centernet"},
    "input": {"height": 128, "width": 128},
    "loss": {"name": "heatmap"},
    "evaluation": {"metric": "map50"},
}
CLASSIFICATION = {"model": {"name": "densenet121"}, "input": {"height": 64, "width": 64}}
GENERATION = {
    "task": {"name": "generation", "classes": ["a", "b"]},
    "model": {"name": "dcgan"},
    "input": {"height": 64, "width": 64},
    "loss": {"name": "adversarial"},
    "evaluation": {"metric": "tstr-auroc"},
}
PLAIN = {"mechanism": "none"}
CASES = {
    "unet": SEGMENTATION,
    "centernet": DETECTION,
    "densenet121": CLASSIFICATION,
    "dcgan": GENERATION,
}
# So many that what is there once, as the weights, is little beside them.
IMAGES = {"unet": (1, 4), "centernet": (8, 24), "densenet121": (2, 6), "dcgan": (32, 96)}


@pytest.fixture(scope="module")
def taken(make_spec: Spec) -> dict[str, float]:
    """Bytes by which the peak of a process really grows with each image of a batch."""
    if not RESET.exists():
        pytest.skip(f"{RESET}: only Linux forgets a process's peak on request")
    asked = [
        (json.loads(make_spec(**changes).canonical_json), *IMAGES[name])
        for name, changes in CASES.items()
    ]
    command = [sys.executable, "-c", TRAIN, json.dumps(asked)]
    done = subprocess.run(
        command, env=os.environ | LET_GO, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return dict(zip(CASES, map(float, done.stdout.split()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_batch_grows_by_no_more_than_was_said_and_not_by_far_less(name, taken, make_spec: Spec):
    spec = make_spec(**CASES[name])
    said = patient_bytes(spec)
    assert 0.5 * said < taken[name] < said


def test_what_lives_at_one_time_is_counted_and_what_is_gone_is_not():
    def work() -> None:
        first = torch.zeros(100, device="meta")
        second = first + 1  # both: 800 bytes
        del first
        third = second[:50]  # a view takes nothing
        torch.cat([third, second])  # 400 and 600

    assert peak_bytes(work) == 1000
    assert peak_bytes(lambda: None) == 0


def test_it_is_a_function_of_the_spec_alone(make_spec: Spec):
    one, other = make_spec(**SEGMENTATION), make_spec(**SEGMENTATION, name="another", seed=7)
    assert patient_bytes(one) == patient_bytes.__wrapped__(one) == patient_bytes(other)


def test_it_grows_with_the_image_and_not_with_the_parameters_alone(make_spec: Spec):
    """What Opacus and the backward pass keep of an image: the gradient is the lesser part."""
    small = patient_bytes(make_spec(**SEGMENTATION))
    large = patient_bytes(make_spec(**SEGMENTATION | {"input": {"height": 256, "width": 256}}))
    parameters = sum(math.prod(s) for s in models.shapes(make_spec(**SEGMENTATION)).values())
    assert large > 10 * small > 10 * 4 * parameters


def test_all_that_is_made_of_a_patient_goes_through_at_once(make_spec: Spec):
    of = {n: patient_bytes(make_spec(augmentation={"multiplicity": n})) for n in (1, 2, 4)}
    assert 1.9 * of[2] < of[4] < 2.1 * of[2]
    study = patient_bytes(make_spec(input={"images": 4}))
    assert 3.5 * of[1] < study < 6 * of[1]


def test_half_precision_gradients_are_made_whole_beside_themselves(make_spec: Spec):
    full, half = make_spec(), make_spec(local={"precision": "bfloat16"})
    parameters = sum(math.prod(shape) for shape in models.shapes(full).values())
    assert patient_bytes(half) - patient_bytes(full) == 4 * parameters


def test_without_privacy_no_gradients_of_single_patients_are_held(make_spec: Spec):
    private, plain = make_spec(**CLASSIFICATION), make_spec(**CLASSIFICATION, privacy=PLAIN)
    parameters = sum(math.prod(shape) for shape in models.shapes(plain).values())
    assert patient_bytes(private) - patient_bytes(plain) > 3 * parameters


def test_as_many_images_go_through_at_once_as_fit(make_spec: Spec, array_cohort: Any):
    spec = make_spec(**SEGMENTATION)
    sizes = []
    for memory in (1, 5 * patient_bytes(spec), 2**62):
        trainer = LocalTrainer(
            spec,
            array_cohort(np.zeros((1, *spec.input.shape)), np.zeros((1, 64, 64))),
            declared_size=40,
            mechanism=accounting.planned(spec, 40),
            compute=Compute(torch.device("cpu"), gradient_memory=memory),
        )
        sizes.append(trainer._physical_patients)
    assert sizes == [1, 5, 512]


def test_a_run_of_which_no_image_fits_is_refused_before_anything_is_booked(
    make_spec: Spec, make_policy: Any, make_ledger: Any
):
    spec = make_spec(**SEGMENTATION | {"input": {"height": 128, "width": 128}})
    data = {
        "kind": "mask",
        "classes": list(spec.task.classes),
        "shape": list(spec.input.shape),
        "preprocessing": spec.input.preprocessing_digest,
    }
    enough = math.ceil(patient_bytes(spec) / 2**20)
    answers = []
    for memory in (enough, enough - 1):
        policy = make_policy(
            machine={"gradient_memory": memory}, data=data, limits={"tasks": "any"}
        )
        ledger = make_ledger(policy, name=f"ledger-{memory}")
        before = ledger.book.last
        gate = Gate(Site(policy, ledger, "c" * 64), trainer_for=_never)
        answers.append(gate.invite(Invitation(spec)))
        assert (ledger.book.last > before) == isinstance(answers[-1], NodeCard)
    assert isinstance(answers[0], NodeCard)
    assert answers[1] == RefusalReply(code=RefusalCode.POLICY)


def _never(*_: Any) -> Any:
    raise AssertionError("no trainer is made at an invitation")
