"""A site's part in a federated evaluation: noised counts of its held-out patients.

Each patient is represented by one image, drawn at random, so that a patient's part in the table
is a function of that patient's record alone (docs/privacy.md 2). A cohort without held-out patients
releases noise, like any other (docs/privacy.md 5), and one image goes through the network even for
nobody: what fails, fails for every cohort.

Each patient goes through it alone. Beside others, a kernel rounds by the size of the batch and by
the place in it, both of which a patient's absence changes; and weights can be made so that the last
bit of everybody else lies on the edge of a bin.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.memory import OF_KERNELS, peak_bytes
from client.training import Compute, patient_bytes
from common import models
from common.cohort import Cohort
from common.messages import Arrays
from common.noise import Keystream
from common.spec import RunSpec
from common.studies import rows_for
from common.tasks import counts
from common.tasks.classification import Classification
from common.tasks.preprocess import normalise

_COPIES = 6  # float32 tensors of a row around the network: as it is read, padded, normalised


def noised_counts(
    spec: RunSpec,
    weights: Arrays,
    cohort: Cohort,
    *,
    keystream: Keystream,
    compute: Compute,
) -> NDArray[np.float32]:
    """The table of `cohort` under the model `weights`, with the noise that the spec asks for.

    Args:
        spec: the run.
        weights: of the network, by name; the caller has checked them.
        cohort: the site's held-out images.
        keystream: randomness of this attempt, made in this process.
        compute: where to predict, and with how much memory.

    Returns:
        (columns, 2, bins) float32; see `common.tasks.counts`.
    """
    rows = rows_for(spec, cohort)
    table = counts.tabulate(spec, *_predictions(spec, weights, rows, keystream, compute))
    noise = keystream.derive("noise").gaussian(table.size).reshape(table.shape)
    return (table + counts.deviation(spec) * noise).astype(np.float32)


def memory_of(spec: RunSpec) -> dict[str, int]:
    """The bytes that one patient takes in each part of a run: the least that goes through at once.

    Raises:
        ModelError: as `patient_bytes`.
    """
    training = {"training": patient_bytes(spec)}
    if spec.evaluation.federated is None:
        return training
    return training | {"federated evaluation": row_bytes(spec)}


@lru_cache(maxsize=32)
def row_bytes(spec: RunSpec) -> int:
    """What the prediction of an image or a study takes; no data is needed to know it.

    Raises:
        ModelError: as `models.build`.
    """
    network, settings = models.outline(spec).eval(), spec.input
    places = (settings.places,) if settings.of_studies else ()

    @torch.no_grad()
    def predict(rows: int) -> None:
        network(torch.zeros(rows, *places, *settings.shape, device="meta"))

    one, two = (peak_bytes(partial(predict, rows)) for rows in (1, 2))
    around = _COPIES * settings.places * math.prod(settings.shape)
    return math.ceil(OF_KERNELS * (two - one)) + 4 * around


@torch.no_grad()
def _predictions(
    spec: RunSpec, weights: Arrays, cohort: Cohort, keystream: Keystream, compute: Compute
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(patients, classes) probabilities and labels of one random image or study of each patient."""
    owned = [cohort.rows_of(patient) for patient in range(len(cohort.patients))]
    drawn = keystream.derive("images").below(np.array([len(r) for r in owned], dtype=np.int64))
    rows = np.array([r[which] for r, which in zip(owned, drawn, strict=True)], dtype=np.int64)
    network = models.build(spec)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.from_numpy(np.array(weights[name])))
    network.to(compute.device).eval()
    task, classes = Classification(spec), len(spec.task.classes)
    found = np.empty((len(rows), classes), dtype=np.float32)

    def predicted(images: NDArray[np.float32]) -> Tensor:
        seen = normalise(torch.from_numpy(images).to(compute.device), spec.input)
        return task.probabilities(network(seen)).float().cpu()

    for place in range(len(rows)):
        found[place] = predicted(cohort.images(rows[place : place + 1]))[0].numpy()
    if not len(rows):
        predicted(np.zeros((1, *cohort.images(rows).shape[1:]), dtype=np.float32))
    return found, cohort.labels[rows]
