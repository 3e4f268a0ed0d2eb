"""Finds lines of text in an image, by the shape of writing: no dictionary, no learned model.

A glyph is a small piece that stands out of what lies around it: lighter or darker than an opening
or closing of the image would have it (Soille 2003, 4.5), or of one grey value, as overlays are
drawn, or of the lightest or darkest in the image. A line of text is a row of such pieces of like
height, side by side or one above the other, with quiet around them. Found lines are boxed with a
margin.

It finds lines of about four glyphs and more, 6 pixels high or higher, nearly level or nearly
upright. It does not see handwriting, single letters, slanting lines or text that is fainter than
what it lies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from client.intake.deid.burned_in import Box

# The intake has a process for each core; threads of the library's own would only disturb them.
cv2.setNumThreads(1)

Grey = NDArray[np.int16]
Mask = NDArray[np.bool_]
Column = NDArray[np.float64]

_SMALLEST_SIDE = 24
_GREYS = 255.0
_CLEAR, _CLEAREST = 35.0, 70.0
"""Least contrast of text by itself; the second for pieces of one value, which noise has too."""
_BODY = 15
"""Side of the structuring element in pixels: wider than a stroke, narrower than most anatomy."""
_FAINTEST = 22.0
"""Least contrast of a glyph, in 255 greys of the image's range."""
_HEIGHTS = (5, 32)
_WIDEST = 10.0
"""Widest piece in heights: several letters may touch."""
_FILL = (0.08, 0.97)
_MOST_PIECES = 20_000
_LEAST_AREA = 5
_DENSE, _MOST_PAIRS = 2000, 1_000_000
_OFF_LINE = 0.6
"""Farthest that centres on one line are apart upwards, in heights."""
_FEWEST_GLYPHS = 3.4
_ALIKE_HEIGHT, _ALIKE_CONTRAST = 2.2, 2.2
_GAP = 1.5
_QUIET, _LESS_QUIET = 0.25, 0.42
"""Most relief between and around the glyphs, of that in them; the second where text was found."""
_SHORTEST = 2.6
_ON_LINE, _OF_ONE_HEIGHT = 0.5, 0.3
_UNEVEN = (24, 0.24, 0.6)
"""From this height on strokes are wide and even; below, their soft edges count for more."""
_STROKED = (12, 0.8)
"""From this height on a glyph is made of strokes and fills no more of its box; a vertebra does."""
_SPIKES = 4
_END = 0.06
"""Part of the image's range that is an end of it."""
_GROUND = 0.3
"""Part of the pixels from which on a value is no text but what text stands on."""
_CLEAREST_COUNTED = 100
"""So much contrast is enough: text at an end of the range may lie half on light, half on dark."""
_MOST_STEPS = 8
_SMALLER = ((383, 2), (1400, 4))
"""Images with a longer side are searched at a smaller size too, for larger letters."""
_MOST_BINS = 2**16
_FEWEST_PIXELS = 15
"""Three pieces of five pixels."""
_LETTERS = 1 / 64
"""More pieces a pixel are no writing: letters of the smallest kind take as much room."""
_WHOLE = np.uint8(255)
_NEAR, _SPARSE = 31, 0.03
"""Side of a neighbourhood in pixels, and the part of it that texture fills at least."""


class _Pieces(NamedTuple):
    """Connected pieces as columns: rows, columns, pixels, and contrast to what lies around."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    bottom: NDArray[np.int64]
    right: NDArray[np.int64]
    area: NDArray[np.int64]
    contrast: Column

    def chosen(self, rows: Any) -> _Pieces:
        return _Pieces(*(column[rows] for column in self))

    def turned(self) -> _Pieces:
        """With rows for columns: an upright line is then a level one."""
        return self._replace(top=self.left, left=self.top, bottom=self.right, right=self.bottom)


class _Line(NamedTuple):
    """A row of pieces that looks like text."""

    box: Box
    certain: bool
    upright: bool = False

    def enlarged(self, times: int) -> _Line:
        return self._replace(box=Box(*(times * end for end in self.box)))

    def turned(self) -> _Line:
        top, left, bottom, right = self.box
        return self._replace(box=Box(left, top, right, bottom), upright=True)


class _Groups(NamedTuple):
    """Pieces in groups: their numbers, group by group, and each group's first place and size."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, group: NDArray[Any]) -> _Groups:
        sizes = np.bincount(group)
        return cls(np.argsort(group, kind="stable"), np.cumsum(sizes) - sizes, sizes)

    def over(self, how: np.ufunc, column: NDArray[Any]) -> Column:
        """Reduce a column of the pieces to one of the groups."""
        reduced: Column = how.reduceat(column[self.order].astype(np.float64), self.starts)
        return reduced

    def spread(self, column: Column) -> Column:
        """A column of the groups as one of the pieces."""
        pieces = np.empty(len(self.order))
        pieces[self.order] = np.repeat(column, self.sizes)
        return pieces

    def median(self, column: NDArray[Any]) -> Column:
        group = np.repeat(np.arange(len(self.sizes)), self.sizes)
        rising = column[self.order][np.lexsort((column[self.order], group))]
        ends = (self.starts + (self.sizes - 1) // 2, self.starts + self.sizes // 2)
        middle: Column = (rising[ends[0]] + rising[ends[1]]) / 2
        return middle

    def members(self, chosen: Mask) -> Iterator[NDArray[np.int64]]:
        for place in np.flatnonzero(chosen):
            yield self.order[self.starts[place] :][: self.sizes[place]]


class _Span(NamedTuple):
    """Values of an image, both ends included."""

    low: Any
    high: Any


class _Histogram(NamedTuple):
    """The values of an image, rising, and how often each stands in it."""

    values: NDArray[Any]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, plane: NDArray[Any]) -> _Histogram:
        low, high = plane.min(), plane.max()
        if plane.dtype.kind == "f" or int(high) - int(low) >= _MOST_BINS:
            return cls(*np.unique(plane, return_counts=True))
        bins = int(high) - int(low) + 1
        counts = cv2.calcHist([(plane - low).astype(np.uint16)], [0], None, [bins], [0, bins])
        places = np.flatnonzero(counts)
        return cls(places.astype(plane.dtype) + low, counts.ravel()[places].astype(np.int64))

    def percentile(self, part: float) -> float:
        """The value below which a part of the pixels lies, between two by the straight line."""
        upto = np.cumsum(self.counts)
        position = part * (int(upto[-1]) - 1)
        ends = np.searchsorted(upto, [np.floor(position), np.ceil(position)], side="right")
        lower, upper = (float(self.values[end]) for end in ends)
        return lower + (upper - lower) * (position % 1)


def find_text(plane: NDArray[Any]) -> list[Box]:
    """Boxes of the lines of text in a plane of any numbers; (rows, columns).

    Each call looks at this image alone. Where one line is certain, more are likely: then those of
    its direction count too that would be too uncertain by themselves. Boxes may overlap.
    """
    if min(plane.shape) < _SMALLEST_SIDE:
        return []
    plane = _numbers(plane)
    histogram = _Histogram.of(plane)
    grey = _stretched(plane, histogram)
    spans = list(dict.fromkeys(_spans(histogram)))
    lines = [*_by_shape(grey), *_by_value(plane, grey, spans)]
    for longest, times in _SMALLER:
        if max(plane.shape) > longest:
            smaller = [*_by_shape(_shrunk(grey, times))]
            smaller += _by_value(_thinned(plane, times), _thinned(grey, times), spans)
            lines += [line.enlarged(times) for line in smaller]
    return [box for upright in (False, True) for box in _boxes(lines, upright, plane.shape)]


def _numbers(plane: NDArray[Any]) -> NDArray[Any]:
    """Integers as they are, all else as finite floats."""
    if plane.dtype.kind in "iu":
        return plane
    return np.nan_to_num(plane.astype(np.float32), posinf=0.0, neginf=0.0)


def _thinned(plane: NDArray[Any], times: int) -> NDArray[Any]:
    """Every second or fourth pixel: wide strokes keep their one value."""
    return np.ascontiguousarray(plane[::times, ::times])


def _shrunk(grey: Grey, times: int) -> Grey:
    """The means of squares; an incomplete row or column of them is left out."""
    rows, columns = (side // times for side in grey.shape)
    whole = grey[: rows * times, : columns * times].astype(np.float32)
    shrunk: Grey = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.int16)
    return shrunk


def _stretched(plane: NDArray[Any], histogram: _Histogram) -> Grey:
    """0 to 255 between the 0.5th and the 99.5th percentile, or the range if they are equal.

    What lies beyond is held only at twice that: text is often all there is beyond them.
    """
    low, high = histogram.percentile(0.005), histogram.percentile(0.995)
    if high <= low:
        low, high = float(histogram.values[0]), float(histogram.values[-1])
    if high <= low:
        return np.zeros(plane.shape, dtype=np.int16)
    stretched = plane.astype(np.float32)
    stretched -= np.float32(low)
    stretched *= np.float32(_GREYS / (high - low))
    held: Grey = np.clip(stretched, -_GREYS, 2 * _GREYS, out=stretched).astype(np.int16)
    return held


def _by_shape(grey: Grey) -> Iterator[_Line]:
    """Lines of what is lighter, then of what is darker than its surroundings."""
    square = np.ones((_BODY, _BODY), dtype=np.uint8)
    for relief in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
        yield from _of_relief(cv2.morphologyEx(grey, relief, square).astype(np.int16, copy=False))


def _of_relief(relief: Grey) -> Iterator[_Line]:
    """Search at falling contrast: bright text is found before texture joins it.

    What falls apart into more pieces than a page has letters is texture, and lower only more of
    it: there the search ends, and goes on where it is quiet.
    """
    highest = _Histogram.of(relief).percentile(0.999)
    levels = {max(_FAINTEST, part * highest) for part in (0.6, 0.35, 0.18)}
    quiet = np.ones(relief.shape, dtype=np.bool_)
    for level in sorted(levels, reverse=True):
        mask = (relief > level) & quiet
        everything = _pieces(mask, relief)
        yield from _lines(everything, relief)
        if len(everything.top) > _LETTERS * relief.size:
            filled = cv2.boxFilter(mask.view(np.uint8) * _WHOLE, -1, (_NEAR, _NEAR))
            quiet &= filled < _SPARSE * _WHOLE


def _by_value(plane: NDArray[Any], grey: Grey, spans: list[_Span]) -> Iterator[_Line]:
    """Lines drawn in one value, or in values at an end of the image's range."""
    edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), dtype=np.uint8))
    even = np.minimum(edges, _CLEAREST_COUNTED)
    for low, high in spans:
        single = low == high
        mask = plane == low if single else (plane >= low) & (plane <= high)
        if np.count_nonzero(mask) < _GROUND * mask.size:
            relief = np.where(mask, edges if single else even, 0).astype(np.int16)
            yield from _lines(_pieces(mask, relief), relief, least=_CLEAREST)


def _spans(histogram: _Histogram) -> Iterator[_Span]:
    """Values that text may have: single ones, and the highest and the lowest together."""
    values, counts = histogram
    around = ndimage.median_filter(counts, size=9, mode="nearest")
    most = np.argsort(counts - 3 * around)[::-1][:_SPIKES].tolist()
    for place in sorted({0, len(values) - 1, *most}):
        if counts[place] > 20:
            yield _Span(values[place], values[place])
    low, high = float(values[0]), float(values[-1])
    reach = _END * (histogram.percentile(0.995) - histogram.percentile(0.005))
    for part in (0, 0.001):
        darkest, lightest = histogram.percentile(part), histogram.percentile(1 - part)
        yield _Span(low, darkest + reach)
        yield _Span(lightest - reach, high)


def _lines(everything: _Pieces, relief: Grey, least: float = _CLEAR) -> Iterator[_Line]:
    """Level lines, and of the pieces that are in none of them, upright ones."""
    pieces = everything.chosen(_glyphlike(everything))
    free = np.ones(len(pieces.top), dtype=np.bool_)
    for group in _rows_of(pieces):
        if line := _line(pieces.chosen(group), everything, relief, least):
            free[group] = False
            yield line
    everything, pieces = everything.turned(), pieces.chosen(free).turned()
    for group in _rows_of(pieces):
        if line := _line(pieces.chosen(group), everything, relief.T, least):
            yield line.turned()


def _line(line: _Pieces, everything: _Pieces, relief: Grey, least: float) -> _Line | None:
    """What looks like a line by its pieces, if there is quiet around them."""
    ends = (line.top.min(), line.left.min(), line.bottom.max(), line.right.max())
    box = Box(*map(int, ends))
    noise = _noise(line, box, relief)
    if noise > _LESS_QUIET:
        return None
    certain = noise <= _QUIET and _is_certain(line, least)
    return _Line(_extended(box, line, everything), certain)


def _pieces(mask: Mask, relief: Grey) -> _Pieces:
    """All connected pieces; none where there are too few pixels for three glyphs."""
    places = np.flatnonzero(mask)
    if len(places) < _FEWEST_PIXELS:
        none = np.zeros(0, dtype=np.int64)
        return _Pieces(none, none, none, none, none, np.zeros(0))
    count, labels, found, _ = cv2.connectedComponentsWithStats(
        mask.view(np.uint8),
        connectivity=8,
        ltype=cv2.CV_16U if len(places) < 2**16 else cv2.CV_32S,
    )
    left, top, width, height, area = found[1:].T.astype(np.int64)
    inside, weights = labels.ravel()[places], relief.ravel()[places]
    total = np.bincount(inside, weights=weights, minlength=count)[1:]
    return _Pieces(top, left, top + height, left + width, area, total / np.maximum(area, 1))


def _glyphlike(pieces: _Pieces) -> Mask:
    """Which have the size and the fill of glyphs, level or upright."""
    height, width = pieces.bottom - pieces.top, pieces.right - pieces.left
    fill = pieces.area / (height * width)
    sized = (height >= _HEIGHTS[0]) & (height <= _HEIGHTS[1]) & (width <= _WIDEST * height)
    solid = (fill >= _FILL[0]) & ((fill <= _FILL[1]) | (height > 3 * width))
    return sized & solid & (pieces.area >= _LEAST_AREA)


def _extended(box: Box, line: _Pieces, everything: _Pieces) -> Box:
    """With the pieces beside it on its line that are no glyphs by themselves: points, strokes."""
    height = box.bottom - box.top
    on_line = (
        (everything.top >= box.top - 0.3 * height)
        & (everything.bottom <= box.bottom + 0.3 * height)
        & (everything.contrast >= float(np.median(line.contrast)) / _ALIKE_CONTRAST)
        & (everything.right - everything.left <= _WIDEST * height)
    )
    beside = everything.chosen(on_line)
    left, right = box.left, box.right
    for _ in range(_MOST_STEPS):
        near = (beside.right >= left - 2 * height) & (beside.left <= right + 2 * height)
        wider = (
            min(left, int(beside.left[near].min(initial=left))),
            max(right, int(beside.right[near].max(initial=right))),
        )
        if wider == (left, right):
            break
        left, right = wider
    return Box(box.top, left, box.bottom, right)


def _rows_of(pieces: _Pieces) -> Iterator[NDArray[np.int64]]:
    """Groups of pieces that have the proportions of a line of text."""
    if not 3 <= len(pieces.top) <= _MOST_PIECES:
        return
    first, second = _linked(pieces)
    if len(first) < 2:
        return
    count = len(pieces.top)
    groups = _Groups.of(_joined(count, first, second))
    yield from groups.members(_are_text(pieces, groups))


def _joined(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each piece's group, by its links: the smallest spreads until none changes."""
    group = np.arange(count)
    while True:
        smaller = np.minimum(group[first], group[second])
        if (smaller == np.maximum(group[first], group[second])).all():
            return np.unique(group, return_inverse=True)[1]
        np.minimum.at(group, first, smaller)
        np.minimum.at(group, second, smaller)
        group = group[group]


def _linked(pieces: _Pieces) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that are neighbours on one line, of like height and contrast."""
    height = (pieces.bottom - pieces.top).astype(np.float64)
    middle = (pieces.top + pieces.bottom) / 2
    first, second = _near(pieces, middle, height)
    taller = np.maximum(height[first], height[second])
    lower = np.minimum(height[first], height[second])
    gap = np.maximum(pieces.left[first], pieces.left[second]) - np.minimum(
        pieces.right[first], pieces.right[second]
    )
    strong = np.maximum(pieces.contrast[first], pieces.contrast[second])
    weak = np.minimum(pieces.contrast[first], pieces.contrast[second])
    level = np.minimum(
        abs(pieces.bottom[first] - pieces.bottom[second]), abs(middle[first] - middle[second])
    )
    linked = (
        (taller <= _ALIKE_HEIGHT * lower)
        & (level <= 0.3 * taller)
        & (gap <= _GAP * taller)
        & (gap > -0.5 * lower)
        & (strong <= _ALIKE_CONTRAST * weak)
    )
    return first[linked], second[linked]


def _near(pieces: _Pieces, middle: Column, height: Column) -> NDArray[np.int64]:
    """Pairs that may be on one line, by their centres: (2, pairs); of dense texture the nearest."""
    rank = len(height) * 19 // 20
    reach = float(np.partition(height, rank)[rank]) * (_GAP + 2)
    flattened = middle * (reach / (_OFF_LINE * float(height.max())))
    tree = cKDTree(np.stack([(pieces.left + pieces.right) / 2, flattened], axis=1))
    while len(height) > _DENSE and tree.count_neighbors(tree, reach, p=np.inf) > _MOST_PAIRS:
        reach /= 2
    pairs: NDArray[np.int64] = tree.query_pairs(reach, p=np.inf, output_type="ndarray").T
    return pairs


def _are_text(pieces: _Pieces, groups: _Groups) -> Mask:
    """Which have enough glyphs of like height that stand on one line and not behind each other."""
    height, width = pieces.bottom - pieces.top, pieces.right - pieces.left
    typical = groups.median(height)
    of_piece = groups.spread(typical)
    length = groups.over(np.maximum, pieces.right) - groups.over(np.minimum, pieces.left)
    tall = groups.over(np.maximum, pieces.bottom) - groups.over(np.minimum, pieces.top)
    filled = groups.over(np.add, width) / length
    alike = groups.over(np.add, abs(height / of_piece - 1) <= 0.25) / groups.sizes
    likely = (
        (groups.sizes >= 3)
        & (groups.over(np.add, np.maximum(1, width / (0.75 * of_piece))) >= _FEWEST_GLYPHS)
        & (tall <= 2.2 * typical)
        & (length >= _SHORTEST * typical)
        & (filled >= 0.45)
        & (filled <= 1.35)
        & (alike >= _OF_ONE_HEIGHT)
    )
    text: Mask = likely & (_on_one_line(pieces, groups, typical) >= _ON_LINE)
    return text


def _on_one_line(pieces: _Pieces, groups: _Groups, typical: Column) -> Column:
    """The part of the glyphs that stand on a level line, or on one that rises or falls a little."""
    tolerance = groups.spread(np.maximum(1.0, 0.1 * typical))
    over, spread, sizes = partial(groups.over, np.add), groups.spread, groups.sizes
    middle, bottom = (pieces.left + pieces.right) / 2, pieces.bottom
    away = middle - spread(over(middle) / sizes)
    slope = over(away * bottom) / np.maximum(over(away * away), 1e-9)
    rising = spread(slope) * away + spread(over(bottom) / sizes)
    level = over(abs(bottom - spread(groups.median(bottom))) <= tolerance) / sizes
    sloping = over(abs(bottom - rising) <= tolerance) / sizes
    return np.maximum(level, np.where(abs(slope) < 0.1, sloping, 0))


def _is_certain(line: _Pieces, least: float) -> bool:
    """Whether it would be text even in an image that has no other, at this contrast at least."""
    height = (line.bottom - line.top).astype(np.float64)
    fill = line.area / (height * (line.right - line.left))
    groups = _Groups.of(np.zeros(len(height), dtype=np.int64))
    typical = float(np.median(height))
    alike = float((abs(height / typical - 1) <= 0.25).mean())
    return (
        len(height) >= 4
        and alike >= 0.5
        and float(_on_one_line(line, groups, np.array([typical]))[0]) >= 0.65
        and (typical < _STROKED[0] or float(np.median(fill)) <= _STROKED[1])
        and _under_one_line(line, typical) >= 0.4
        and float(np.median(line.contrast)) >= least
    )


def _under_one_line(line: _Pieces, typical: float) -> float:
    """The largest part of the glyphs that reach up equally far: capitals, digits, or small ones."""
    tolerance = max(1.0, 0.1 * typical)
    reach = line.top - line.bottom.max()
    return max(float((abs(reach - one) <= tolerance).mean()) for one in np.unique(reach))


def _noise(line: _Pieces, box: Box, relief: Grey) -> float:
    """How much there is between and around the glyphs, of what is in them; 1 for uneven strokes."""
    inside, pixels = float((line.contrast * line.area).sum()), int(line.area.sum())
    if inside < _FAINTEST * pixels:
        return 1.0
    typical = int(np.median(line.bottom - line.top))
    margin = max(2, typical // 3)
    top, left = max(0, box.top - margin), max(0, box.left - margin)
    around = relief[top : box.bottom + margin, left : box.right + margin]
    rest = (float(around.sum()) - inside) / max(1, around.size - pixels)
    noise = rest * pixels / inside
    if noise > _LESS_QUIET:
        return noise
    strokes = around[around > 0.5 * float(np.median(line.contrast))]
    height, even, uneven = _UNEVEN
    return (
        1.0 if strokes.std() > (even if typical >= height else uneven) * strokes.mean() else noise
    )


def _boxes(lines: list[_Line], upright: bool, shape: tuple[int, ...]) -> list[Box]:
    """Those of one direction, if any of them is certain."""
    alike = [line for line in lines if line.upright == upright]
    certain = any(line.certain for line in alike)
    return _merged([line.box for line in alike], shape) if certain else []


def _merged(boxes: list[Box], shape: tuple[int, ...]) -> list[Box]:
    """Each box with a margin of a third of its height; those that overlap are one."""
    covered = np.zeros(shape, dtype=np.uint8)
    for box in boxes:
        margin = 2 + min(box.bottom - box.top, box.right - box.left) // 3
        top, left = max(0, box.top - margin), max(0, box.left - margin)
        covered[top : box.bottom + margin, left : box.right + margin] = 1
    _, _, found, _ = cv2.connectedComponentsWithStats(covered, connectivity=4)
    return [
        Box(top, left, top + height, left + width)
        for left, top, width, height, _ in found[1:].tolist()
    ]
