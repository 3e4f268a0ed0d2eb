"""What bounds denoising: one network on all sites' images, and filters, on the validation part.

    python benchmarks/denoising.py                              # the preset's noise, 6,000 steps
    python benchmarks/denoising.py --noise 0.05 0.1 --steps 0   # the filters alone
    python benchmarks/denoising.py --width 32 --steps 12000

The network is that of ``benchmarks/tasks/denoising.toml``, with its loss, optimiser and noise, but
without sites: each step takes images from the whole training part. The learning rate falls along a
cosine to the preset's part of it. Only the validation part is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tasks import DATA, HERE, changed, cohort_of
from torch import Tensor, nn

from common import models
from common.cohort import Cohort
from common.spec import RunSpec, parse_run_text
from common.tasks import task_for
from common.tasks.preprocess import normalise
from common.tasks.reconstruction import compare, median_filter, psnr

PRESET = HERE / "tasks" / "denoising.toml"
SIDES = (3, 5, 7)
SAID_EVERY = 500


def main() -> None:
    """Print the filters' PSNR, then the network's as it learns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", nargs="+", type=float, help="standard deviations of brightness")
    parser.add_argument("--steps", type=int, default=6000, help="0: the filters alone")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "tasks")
    asked = parser.parse_args()
    text = PRESET.read_text()
    whole = Cohort.open(cohort_of("pneumonia", asked.work, asked.data, text))
    for noise in asked.noise or [parse_run_text(text, source=str(PRESET)).spec.task.noise]:
        changes = {"task.noise": str(noise), "model.width": str(asked.width)}
        spec = parse_run_text(changed(text, changes), source=str(PRESET)).spec
        clean = images_of(whole, "validation")
        drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(spec.seed))
        noisy = clean + noise * drawn
        filters = {f"median {side}x{side}": median_filter(noisy, side) for side in SIDES}
        said = {name: decibels(given, clean) for name, given in {"noisy": noisy, **filters}.items()}
        print(f"noise {noise:g}:", *(f"{name} {value:.2f}" for name, value in said.items()))
        best, images = max(said.values()), images_of(whole, "train")
        for step, value in learning(spec, images, noisy, clean, asked.steps):
            print(f"  step {step}: {value:.2f} dB, {value - best:.2f} above the best", flush=True)


def images_of(cohort: Cohort, split: str) -> Tensor:
    """(N, 1, H, W) brightness of the images of that split."""
    part = cohort.with_split(split)
    return torch.from_numpy(part.images(np.arange(len(part))))


def decibels(given: Tensor, clean: Tensor) -> float:
    """The mean PSNR over images, as the evaluation has it."""
    errors, _ = compare(given, clean)
    return float(psnr(errors).mean())


def learning(
    spec: RunSpec, images: Tensor, noisy: Tensor, clean: Tensor, steps: int
) -> Iterator[tuple[int, float]]:
    """Train for so many steps, and say now and then the step and the PSNR on `noisy`."""
    torch.manual_seed(spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    task, network = task_for(spec), models.build(spec)
    rate = spec.optimizer.learning_rate
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, steps, rate * spec.schedule.final
    )
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (spec.local.batch_size,), generator=generator)
        labels = torch.zeros(len(rows), 0)
        seen, wanted = task.examples(images[rows], labels, network, generator)
        optimizer.zero_grad()
        task.losses(network(normalise(seen, spec.input)), wanted).mean().backward()
        optimizer.step()
        falling.step()
        if step % SAID_EVERY == 0 or step == steps:
            yield step, evaluated(spec, network, noisy, clean)


@torch.no_grad()
def evaluated(spec: RunSpec, network: nn.Module, noisy: Tensor, clean: Tensor) -> float:
    """The PSNR of what the network gives."""
    given = network(normalise(noisy, spec.input)) * spec.input.std[0] + spec.input.mean[0]
    return decibels(given, clean)


if __name__ == "__main__":
    main()
