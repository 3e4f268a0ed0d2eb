"""Images a second of `cloister predict`, beside plain PyTorch on arrays that are prepared already.

    python benchmarks/predict.py                         # 1,000 studies of 2 drawn films
    python benchmarks/predict.py --model resnet18 --side 128

Both answer the same images, by turns; the better of the repetitions counts, and the machine's own
noise cancels in the ratio. What predict does more: it finds, hashes, parses, decodes and
de-identifies DICOM, brings it to the network's size, and writes tables and JSON. Memory is the
peak of the process that answers, beyond what it was before the first image; with more studies it
should stay where it is.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from client.prediction.answering import Model
from client.prediction.predict import Order, predict
from common import models
from common.cohort import PIXEL_MAX
from common.package import Package
from common.spec import parse_run_text
from common.tasks.preprocess import normalise

RUN = """
name = "predict"
rounds = 1
[task]
classes = ["no", "yes"]
[model]
name = "{model}"
[input]
height = {side}
width = {side}
[optimizer]
name = "sgd"
learning_rate = 0.01
[local]
batch_size = 1
[privacy]
mechanism = "none"
"""
BATCH = 64


def write_films(folder: Path, studies: int, each: int, side: int) -> None:
    """Films of smooth noise, as large as asked for."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 4096, (8, side // 8, side // 8), dtype=np.uint16)
    planes = [np.kron(plane, np.ones((8, 8), dtype=np.uint16)) for plane in coarse]
    for number in range(studies * each):
        study, image = divmod(number, each)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
        meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{study + 1}.1.{image + 1}")
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        film = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta)
        film.SOPClassUID = ComputedRadiographyImageStorage
        film.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        film.StudyInstanceUID, film.SeriesInstanceUID = f"1.2.3.{study + 1}", f"1.2.3.{study + 1}.1"
        film.Modality, film.PatientID = "CR", f"P{study}"
        film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
        film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
        pixels = np.roll(planes[number % len(planes)], number, axis=1)
        film.Rows, film.Columns = pixels.shape
        film.PixelData = pixels.tobytes()
        film.save_as(folder / f"{number}.dcm", enforce_file_format=True)


def plain(model: Model, pixels: np.ndarray) -> float:
    """Seconds that PyTorch takes for images that are there, of the network's size."""
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(pixels), BATCH):
            images = torch.from_numpy(pixels[start : start + BATCH] / np.float32(PIXEL_MAX))
            torch.sigmoid(model.network(normalise(images, model.package.spec.input)))
    return time.perf_counter() - began


def answered(model: Model, source: Path, target: Path, workers: int) -> tuple[float, int]:
    """Seconds of a whole prediction, and how many images were answered."""
    began = time.perf_counter()
    summary = predict(Order(model, source, target, workers=workers))
    return time.perf_counter() - began, summary.images


def peak() -> int:
    """Peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small-cnn")
    parser.add_argument("--side", type=int, default=64, help="of the network's input")
    parser.add_argument("--film", type=int, default=512, help="side of a film")
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--images", type=int, default=2, help="of a study")
    parser.add_argument("--workers", type=int, default=0, help="0: one for each core")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    spec = parse_run_text(RUN.format(model=options.model, side=options.side), source="RUN").spec
    count = options.studies * options.images
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        (here / "run").mkdir()
        (here / "source").mkdir()
        (here / "run" / "spec.json").write_text(spec.canonical_json)
        save_file(models.build(spec).state_dict(), here / "run" / "model.safetensors")
        write_films(here / "source", options.studies, options.images, options.film)
        model = Model(Package.open(here / "run", unsigned=True))
        pixels = np.zeros((count, *spec.input.shape), dtype=np.uint16)
        plain(model, pixels[:BATCH])
        before, times = peak(), []
        for number in range(options.repeat):
            seconds, images = answered(
                model, here / "source", here / f"answers{number}", options.workers
            )
            if images < 0.9 * count:  # some are refused: the detector takes their noise for text
                raise SystemExit(f"{images} of {count} images were answered")
            times.append((seconds, plain(model, pixels)))
    ours, theirs = (count / min(column) for column in zip(*times, strict=True))
    table = Table("", "images a second", title=f"{count} films of {options.film} x {options.film}")
    table.add_row("cloister predict", f"{ours:,.0f}")
    table.add_row("PyTorch, images prepared", f"{theirs:,.0f}")
    table.add_row("ratio", f"{ours / theirs:.3f}")
    table.add_row("peak memory more than before", f"{(peak() - before) / 2**20:,.0f} MiB")
    Console().print(table)


if __name__ == "__main__":
    main()
