"""What a report shows of explanations, from the evaluation's images to its table and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import models
from common.explanation import INDEPENDENT, METHODS
from common.spec import RunSpec
from common.tasks import pictures, task_for
from common.tasks.exhibits import Gallery, Table
from common.tasks.explained import MOST, exhibits
from common.tasks.task import Evidence, Task

Make = Callable[..., RunSpec]
CPU = torch.device("cpu")
KEPT = {"rows", "images", "classes", "probabilities"} | {
    f"{method}_{what}" for method in METHODS for what in ("maps", "rank", "ssim")
}


class Images:
    """An evaluation cohort in memory, as far as explanations read one."""

    def __init__(self, spec: RunSpec, count: int = 12) -> None:
        rng = np.random.default_rng(3)
        self._images = rng.random((count, *spec.input.shape), dtype=np.float32)
        self.shape = spec.input.shape

    def __len__(self) -> int:
        return len(self._images)

    def images(self, rows: Any) -> Any:
        return self._images[rows]

    def targets(self, rows: Any) -> Any:
        return np.zeros((len(rows), *self.shape[1:]), dtype=np.int64)

    def examples(self, rows: Any) -> Any:
        return self.images(rows), self.targets(rows)


def explained(task: Task, network: nn.Module, count: int = 12) -> Evidence:
    """What is kept of explanations alone."""
    cohort: Any = Images(task.spec, count)
    found = task.gallery(network.eval(), cohort, CPU)
    return {name: array for name, array in found.items() if "explained" in name}


@pytest.fixture(scope="module")
def classified(make_spec: Make) -> tuple[Task, Evidence]:
    spec = make_spec(
        evaluation={"gallery": 10, "bootstrap": 100},
        task={"kind": "multiclass", "classes": ["a", "b", "c"]},
    )
    task = task_for(spec)
    return task, explained(task, models.build(spec))


def test_what_is_kept_has_a_row_for_each_image_and_never_more_than_the_gallery(classified):
    task, kept = classified
    names = {name.removeprefix("gallery_explained_") for name in kept}
    assert names == KEPT | {f"integrated-gradients_{what}" for what in ("gains", "errors")}
    assert {len(array) for array in kept.values()} == {MOST}
    assert {array.dtype.kind for array in kept.values()} <= set("iuf")
    rows = kept["gallery_explained_rows"]
    assert set(rows) <= set(pictures.spread(12, 10))
    assert np.all(np.diff(rows) > 0)
    fewer = task_for(task.spec.model_copy(update={"evaluation": _of(task, gallery=2)}))
    kept = explained(fewer, models.build(task.spec))
    assert {len(array) for array in kept.values()} == {2}


def _of(task: Task, **changes: Any) -> Any:
    return task.spec.evaluation.model_copy(update=changes)


def shown_of(task: Task, kept: Evidence) -> tuple[Gallery, Table]:
    """The last two exhibits; `kept` stands for the task's own evidence, which it has none of."""
    gallery, table = exhibits(kept, np.arange(12), task.spec)
    assert isinstance(gallery, Gallery)
    assert isinstance(table, Table)
    return gallery, table


def test_the_report_shows_the_image_its_maps_and_what_they_are_worth(classified):
    task, kept = classified
    gallery, table = shown_of(task, kept)
    side = 16 * pictures.enlargement(16, 16)
    assert gallery.pictures.shape[:2] == (MOST, side)
    image, cam, slopes = np.split(
        gallery.pictures[:, :, : 3 * side + 8], [side + 4, 2 * side + 8], 2
    )
    assert (image[..., 0] == image[..., 2])[:, :, :side].all()  # grey, as it is
    for coloured in (cam, slopes):
        assert (coloured[..., 0] != coloured[..., 2]).any()
    first = kept["gallery_explained_rows"][0], kept["gallery_explained_classes"][0]
    likely = kept["gallery_explained_probabilities"][0]
    assert (
        gallery.captions[0] == f"Image {first[0] + 1}: {'abc'[first[1]]}, probability {likely:.2f}"
    )
    assert likely == max(likely, 1 / 3)
    assert [row[0] for row in table.rows] == ["Grad-CAM", "Integrated gradients"]
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert table.rows[1][3].endswith(" %")
    assert INDEPENDENT not in gallery.note


def test_a_map_that_does_not_depend_on_what_was_learned_is_flagged_above_all(classified):
    task, kept = classified
    same = dict(kept) | {"gallery_explained_grad-cam_rank": np.full(MOST, 0.9, np.float32)}
    gallery, table = shown_of(task, same)
    assert gallery.note.startswith(f"Grad-CAM: this map {INDEPENDENT}.")
    assert table.rows[0][-1] == INDEPENDENT
    assert table.rows[1][-1] != INDEPENDENT


def test_of_masks_those_images_are_explained_in_which_something_was_found(make_spec):
    spec = make_spec(
        task={"name": "segmentation", "classes": ["background", "organ"]},
        loss={"name": "dice"},
        evaluation={"metric": "dice", "gallery": 6},
        model={"name": "unet", "width": 4},
        input={"height": 32, "width": 32},
    )
    task = task_for(spec)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = models.build(spec)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.net(images)
            bright = images.mean(dim=(1, 2, 3)) > 0
            return found + 99 * torch.stack([~bright, bright], dim=1)[:, :, None, None]

    kept = explained(task, Half())
    cohort = Images(spec)
    looked = pictures.spread(12, 6)
    bright = [row for row in looked if cohort.images(row).mean() > 0.5]
    assert 0 < len(bright) < len(looked)
    assert kept["gallery_explained_rows"].tolist() == bright
    assert np.isnan(kept["gallery_explained_probabilities"]).all()
    assert set(kept["gallery_explained_classes"]) == {1}


class Fails(nn.Module):
    """Answers, and fails when it is asked for slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            raise RuntimeError("out of memory")
        return images.mean(dim=(2, 3)) * self.weight


def test_what_cannot_be_explained_costs_no_run_its_end(make_spec, caplog):
    task = task_for(make_spec(evaluation={"gallery": 3}))
    with caplog.at_level(logging.WARNING, "cloister.explained"):
        assert explained(task, Fails()) == {}
    assert "the report explains nothing: out of memory" in caplog.text
    broken = models.build(task.spec)
    next(broken.parameters()).data.fill_(float("nan"))
    assert explained(task, broken) == {}


def test_what_has_no_classes_is_not_explained_and_an_old_folder_shows_what_it_did(make_spec):
    spec = make_spec(
        task={"name": "reconstruction", "goal": "compress"},
        loss={"name": "mse"},
        evaluation={"metric": "psnr", "gallery": 3},
        model={"name": "autoencoder", "width": 4},
    )
    task = task_for(spec)
    assert explained(task, models.build(spec)) == {}
    plain = task_for(make_spec(evaluation={"gallery": 3}))
    evidence = {
        "probabilities": np.full((4, 2), 0.5, np.float32),
        "labels": np.array([0, 1, 0, 1]),
    }
    own = plain.exhibits(evidence, np.arange(4))
    assert [type(each) for each in plain.shown(evidence, np.arange(4))] == [type(e) for e in own]
