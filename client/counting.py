"""A site's part in a federated evaluation: noised counts of its held-out patients.

Each patient is represented by one image, drawn at random, so that a patient's part in the table
is a function of that patient's record alone (docs/privacy.md 2). A cohort without held-out patients
releases noise, like any other (docs/privacy.md 5). Every batch has one size, whoever is in it: a
kernel rounds otherwise for another size, and could carry another patient over the edge of a bin.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import models
from common.cohort import Cohort
from common.messages import Arrays
from common.noise import Keystream
from common.spec import RunSpec
from common.studies import rows_for
from common.tasks import counts
from common.tasks.classification import Classification
from common.tasks.preprocess import normalise

_BATCH = 64


def noised_counts(
    spec: RunSpec,
    weights: Arrays,
    cohort: Cohort,
    *,
    keystream: Keystream,
    device: torch.device,
) -> NDArray[np.float32]:
    """The table of `cohort` under the model `weights`, with the noise that the spec asks for.

    Args:
        spec: the run.
        weights: of the network, by name; the caller has checked them.
        cohort: the site's held-out images.
        keystream: randomness of this attempt, made in this process.
        device: where to predict.

    Returns:
        (columns, 2, bins) float32; see `common.tasks.counts`.
    """
    rows = rows_for(spec, cohort)
    table = counts.tabulate(spec, *_predictions(spec, weights, rows, keystream, device))
    noise = keystream.derive("noise").gaussian(table.size).reshape(table.shape)
    return (table + counts.deviation(spec) * noise).astype(np.float32)


@torch.no_grad()
def _predictions(
    spec: RunSpec, weights: Arrays, cohort: Cohort, keystream: Keystream, device: torch.device
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(patients, classes) probabilities and labels of one random image or study of each patient."""
    owned = [cohort.rows_of(patient) for patient in range(len(cohort.patients))]
    drawn = keystream.derive("images").below(np.array([len(r) for r in owned], dtype=np.int64))
    rows = np.array([r[which] for r, which in zip(owned, drawn, strict=True)], dtype=np.int64)
    network = models.build(spec)
    for name, parameter in network.named_parameters():
        parameter.copy_(torch.from_numpy(np.array(weights[name])))
    network.to(device).eval()
    task, classes = Classification(spec), len(spec.task.classes)
    found = np.empty((len(rows), classes), dtype=np.float32)
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        seen = normalise(torch.from_numpy(cohort.images(part)).to(device), spec.input)
        predicted = task.probabilities(network(_whole_batch(seen)))[: len(part)]
        found[start : start + _BATCH] = predicted.float().cpu().numpy()
    return found, cohort.labels[rows]


def _whole_batch(images: Tensor) -> Tensor:
    """(_BATCH, C, H, W): the images, then zeros."""
    padded = images.new_zeros((_BATCH, *images.shape[1:]))
    padded[: len(images)] = images
    return padded
