"""Drawn chest films: stylised, nobody's, and quick to make.

A film is a map of density, 0 for air and 1 for what stops all rays, in coordinates that run from
-1 to 1 over the chest. The finding is an opacity: a soft, mottled patch within one lung. Vessels,
ribs, the heart's edge and small round shadows, which healthy and ill have alike, keep it from
being found by brightness alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Film: TypeAlias = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Anatomy:
    """One patient's chest; lengths are parts of half the film's width."""

    scale: float
    lung_width: float
    lung_top: float
    lung_base: float
    heart: float
    spacing: float
    ribs: float
    tissue: float
    vessels: float

    @classmethod
    def of(cls, random: np.random.Generator) -> Self:
        """Draw a patient."""
        return cls(
            scale=random.uniform(0.90, 1.10),
            lung_width=random.uniform(0.27, 0.33),
            lung_top=random.uniform(-0.80, -0.70),
            lung_base=random.uniform(0.42, 0.58),
            heart=random.uniform(0.24, 0.33),
            spacing=random.uniform(0.145, 0.175),
            ribs=random.uniform(0.05, 0.09),
            tissue=random.uniform(0.55, 0.68),
            vessels=random.uniform(0.035, 0.06),
        )


@dataclass(frozen=True)
class Opacity:
    """The finding: where it lies in which lung, how large and how dense."""

    side: int
    across: float
    along: float
    radius: float
    stretch: float
    density: float

    @classmethod
    def of(cls, random: np.random.Generator) -> Self:
        """Draw a finding."""
        return cls(
            side=int(random.choice((-1, 1))),
            across=random.uniform(-0.55, 0.55),
            along=random.uniform(0.22, 0.85),
            radius=random.uniform(0.22, 0.35),
            stretch=random.uniform(0.75, 1.35),
            density=random.uniform(0.30, 0.52),
        )


def draw(
    anatomy: Anatomy,
    opacity: Opacity | None,
    shape: tuple[int, int],
    random: np.random.Generator,
) -> Film:
    """Draw one film of a patient; position and texture differ from film to film.

    Returns:
        `shape`, density in 0..1.
    """
    x, y = _grid(anatomy, shape, random)
    air = np.maximum(_lung(anatomy, -x, y), _lung(anatomy, x, y)) * (
        1 - 0.93 * _heart(anatomy, x, y)
    )
    density = anatomy.tissue * (0.90 + 0.10 * _cloud(shape, 5, random)) * (1 - 0.72 * air)
    density += 0.16 * np.exp(-((x * (1 / 0.12)) ** 2)) + _bones(anatomy, x, y)
    density += air * _vessels(anatomy, x, y, random) + _shadows(air, x, y, random)
    if opacity is not None:
        density += air * _patch(anatomy, opacity, x, y, random)
    film: Film = np.clip(density * _body(x, y), 0, 1)
    return film


def _grid(
    anatomy: Anatomy, shape: tuple[int, int], random: np.random.Generator
) -> tuple[Film, Film]:
    """Chest coordinates of every pixel: the patient never stands quite the same."""
    height, width = shape
    turn, right, down = random.normal(0, (0.025, 0.03, 0.03)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x = (x - (width - 1) / 2) / (width / 2) * anatomy.scale - right
    y = (y - (height - 1) / 2) / (height / 2) * anatomy.scale - down
    return x + turn * y, y - turn * x


def _edge(distance: Film, softness: float) -> Film:
    """A soft step from 0, where `distance` is below zero by the softness, to 1 above it."""
    step: Film = np.clip(distance * (0.5 / softness) + 0.5, 0, 1)
    return step * step * (3 - 2 * step)


def _body(x: Film, y: Film) -> Film:
    """Shoulders slope from the neck; beside the body there is air."""
    across = np.abs(x)
    shoulders = _edge(1.0 - across, 0.03) * _edge(y + 1.06 - 0.56 * across * across, 0.06)
    body: Film = np.maximum(shoulders, _edge(0.24 + 0.1 * (y + 1) - across, 0.05))
    return body


def _lung(anatomy: Anatomy, x: Film, y: Film) -> Film:
    """The lung at positive `x`: narrow at the top, cut by the dome of the diaphragm."""
    height = (y - anatomy.lung_top) / (anatomy.lung_base + 0.25 - anatomy.lung_top)
    width = anatomy.lung_width * (0.45 + 0.55 * np.sqrt(np.clip(height * 1.6, 0, 1)))
    middle = 0.17 + width + 0.05 * np.clip(height, 0, 1)
    side = 1 - ((x - middle) / width) ** 2
    dome = anatomy.lung_base + 0.9 * (x - 0.42) ** 2 - y
    top = y - anatomy.lung_top - 0.35 * (x - 0.40) ** 2
    return _edge(side, 0.35) * _edge(dome, 0.05) * _edge(top, 0.08)


def _heart(anatomy: Anatomy, x: Film, y: Film) -> Film:
    """Where the heart and the great vessels take the place of air."""
    across, down = (x - 0.14) / anatomy.heart, (y - 0.24) / (anatomy.heart * 1.1)
    muscle = _edge(1 - across * across - down * down - 0.5 * across * down, 0.45)
    arch = 1 - ((x - 0.07) * (1 / 0.15)) ** 2 - ((y + 0.30) * (1 / 0.20)) ** 2
    solid: Film = np.maximum(muscle, 0.8 * _edge(arch, 0.6))
    return solid


def _bones(anatomy: Anatomy, x: Film, y: Film) -> Film:
    """Ribs that fall away to the sides, and the collar bones."""
    across = np.abs(x)
    beyond = across - 0.35
    phase = (y - 0.55 * beyond * np.abs(beyond) - 0.22 * across) * (1 / anatomy.spacing)
    offset = np.abs(phase - np.rint(phase))
    ribs = _edge(0.17 - offset, 0.14) * _edge(0.92 - across, 0.1)
    collar = _edge(0.03 - np.abs(y + 0.66 + 0.22 * (across - 0.5)), 0.03)
    visible = _edge(across - 0.12, 0.08)
    inside = _edge(y + 0.78, 0.1) * _edge(0.75 - y, 0.2)
    return visible * (anatomy.ribs * ribs * inside + 0.09 * collar * _edge(0.8 - across, 0.1))


def _vessels(anatomy: Anatomy, x: Film, y: Film, random: np.random.Generator) -> Film:
    """Streaks that thin out from the root of the lung."""
    distance = np.sqrt((np.abs(x) - 0.2) ** 2 + (y + 0.02) ** 2)
    near = np.exp(distance * (-1 / 0.28))
    texture = np.abs(_cloud(x.shape, 22, random)) + 0.6 * _cloud(x.shape, 11, random)
    streaks: Film = anatomy.vessels * (1.6 * near + texture * (0.5 + near))
    return streaks


def _shadows(air: Film, x: Film, y: Film, random: np.random.Generator) -> Film:
    """Small round shadows of no meaning: nipples, vessels seen end on."""
    total = np.zeros_like(x)
    for _ in range(int(random.integers(0, 4))):
        across = random.uniform(0.25, 0.7) * int(random.choice((-1, 1)))
        down, radius = random.uniform(-0.5, 0.4), random.uniform(0.04, 0.08)
        reach = ((x - across) ** 2 + (y - down) ** 2) * (1 / radius**2)
        total += random.uniform(0.06, 0.14) * _edge(1 - reach, 1.0)
    return air * total


def _patch(
    anatomy: Anatomy,
    opacity: Opacity,
    x: Film,
    y: Film,
    random: np.random.Generator,
) -> Film:
    along = anatomy.lung_top + opacity.along * (anatomy.lung_base - anatomy.lung_top)
    across = opacity.side * (0.17 + anatomy.lung_width * (1 + opacity.across))
    across, along = (at + 0.015 * float(random.standard_normal()) for at in (across, along))
    reach = ((x - across) * (1 / (opacity.radius * opacity.stretch))) ** 2
    reach += ((y - along) * (opacity.stretch / opacity.radius)) ** 2
    uneven = np.maximum(1 + 0.4 * _cloud(x.shape, 9, random), 0.2)
    mottled = 1 + 0.3 * _cloud(x.shape, 18, random)
    patch: Film = opacity.density * mottled * np.exp(-reach * uneven)
    return patch


def _cloud(shape: tuple[int, ...], cells: int, random: np.random.Generator) -> Film:
    """Smooth noise of mean 0 and deviation near 1, with about `cells` bumps across."""
    coarse = Image.fromarray(random.standard_normal((cells, cells), dtype=np.float32))
    smooth = coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)
