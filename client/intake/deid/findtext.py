"""Finds lines of text in an image, by the shape of writing: no dictionary, no learned model.

A glyph is a small piece that stands out of what lies around it: lighter or darker than an opening
or closing of the image would have it (Soille 2003, 4.5), or of exactly one grey value, as overlays
are drawn. A line of text is a row of such pieces of like height, side by side, with quiet around
them. Found lines are boxed with a margin.

It finds lines of about four glyphs and more, nearly upright, 6 pixels high or higher. It does not
see handwriting, single letters, steep lines or text that is fainter than what it lies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from client.intake.deid.burned_in import Box

Grey = NDArray[np.int16]
Mask = NDArray[np.bool_]

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
_FEWEST_GLYPHS = 3.4
_ALIKE_HEIGHT, _ALIKE_CONTRAST = 2.2, 2.2
_GAP = 1.5
_QUIET, _LESS_QUIET = 0.25, 0.42
"""Most relief between and around the glyphs, of that in them; the second where text was found."""
_SHORTEST = 2.6
_ON_LINE, _OF_ONE_HEIGHT = 0.5, 0.3
_UNEVEN = (24, 0.24, 0.6)
"""From this height on strokes are wide and even; below, their soft edges count for more."""
_SPIKES = 4
_MOST_STEPS = 8
_HALVED, _QUARTERED = 400, 1400
"""Images with a longer side are searched at a smaller size too, for larger letters."""


class _Pieces(NamedTuple):
    """Connected pieces as columns: rows, columns, pixels, and contrast to what lies around."""

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    bottom: NDArray[np.int64]
    right: NDArray[np.int64]
    area: NDArray[np.int64]
    contrast: NDArray[np.float64]

    def chosen(self, rows: Any) -> _Pieces:
        return _Pieces(*(column[rows] for column in self))


class _Line(NamedTuple):
    """A row of pieces that looks like text."""

    box: Box
    certain: bool

    def enlarged(self, times: int) -> _Line:
        return _Line(Box(*(times * end for end in self.box)), self.certain)


def find_text(plane: NDArray[Any]) -> list[Box]:
    """Boxes of the lines of text in a plane of any numbers; (rows, columns).

    Each call looks at this image alone. Where one line is certain, more are likely: then those
    count too that would be too uncertain by themselves.
    """
    if min(plane.shape) < _SMALLEST_SIDE:
        return []
    grey = _stretched(plane)
    lines = [*_by_shape(grey), *_by_one_value(plane, grey)]
    for longest, times in ((_HALVED, 2), (_QUARTERED, 4)):
        if max(plane.shape) > longest:
            lines += [line.enlarged(times) for line in _by_shape(_shrunk(grey, times))]
    if not any(line.certain for line in lines):
        return []
    return _merged([line.box for line in lines], plane.shape)


def _shrunk(grey: Grey, times: int) -> Grey:
    """The means of squares; an incomplete row or column of them is left out."""
    rows, columns = (side // times for side in grey.shape)
    squares = grey[: rows * times, : columns * times].reshape(rows, times, columns, times)
    shrunk: Grey = squares.mean(axis=(1, 3), dtype=np.float32).astype(np.int16)
    return shrunk


def _stretched(plane: NDArray[Any]) -> Grey:
    """0 to 255 between the 0.5th and the 99.5th percentile, or the range if they are equal.

    What lies beyond is held only at twice that: text is often all there is beyond them.
    """
    values = np.nan_to_num(plane.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.zeros(plane.shape, dtype=np.int16)
    stretched = (values - low) * (_GREYS / (high - low))
    held: Grey = np.clip(stretched, -_GREYS, 2 * _GREYS).astype(np.int16)
    return held


def _by_shape(grey: Grey) -> list[_Line]:
    """Lines of what is lighter, then of what is darker than its surroundings."""
    lighter = grey - _highest(_lowest(grey, _BODY), _BODY)
    darker = _lowest(_highest(grey, _BODY), _BODY) - grey
    return [line for relief in (lighter, darker) for line in _of_relief(relief)]


def _highest(grey: Grey, size: int) -> Grey:
    """The highest value in a square around each pixel, by windows that double (van Herk 1992)."""
    for _ in range(2):
        window, highest = 1, np.pad(grey, ((size // 2, size // 2), (0, 0)), mode="edge")
        while 2 * window <= size:
            highest = np.maximum(highest[:-window], highest[window:])
            window *= 2
        if rest := size - window:
            highest = np.maximum(highest[:-rest], highest[rest:])
        grey = np.ascontiguousarray(highest.T)
    return grey


def _lowest(grey: Grey, size: int) -> Grey:
    lowest: Grey = -_highest(-grey, size)
    return lowest


def _of_relief(relief: Grey) -> Iterator[_Line]:
    """Search at falling contrast: bright text is found before texture joins it."""
    highest = float(np.percentile(relief, 99.9))
    levels = {max(_FAINTEST, part * highest) for part in (0.6, 0.35, 0.18)}
    for level in sorted(levels, reverse=True):
        yield from _lines(relief > level, relief)


def _by_one_value(plane: NDArray[Any], grey: Grey) -> list[_Line]:
    """Lines drawn in one value: of those that have many more pixels than the values beside them."""
    lines: list[_Line] = []
    edges = _highest(grey, 3) - _lowest(grey, 3)
    for value in _spikes(plane):
        mask = plane == value
        if mask.mean() < 0.3:
            lines += _lines(mask, np.where(mask, edges, 0), least=_CLEAREST)
    return lines


def _spikes(plane: NDArray[Any]) -> Iterator[Any]:
    """The lowest and highest values, and those that stand out of the histogram."""
    values, counts = np.unique(plane, return_counts=True)
    around = ndimage.median_filter(counts, size=9, mode="nearest")
    excess = counts - 3 * around
    chosen = {0, len(values) - 1, *np.argsort(excess)[::-1][:_SPIKES].tolist()}
    yield from (values[place] for place in sorted(chosen) if counts[place] > 20)


def _lines(mask: Mask, relief: Grey, least: float = _CLEAR) -> Iterator[_Line]:
    everything = _pieces(mask, relief)
    pieces = everything.chosen(_glyphlike(everything))
    if not 3 <= len(pieces.top) <= _MOST_PIECES:
        return
    for group in _rows_of(pieces):
        line = pieces.chosen(group)
        ends = (line.top.min(), line.left.min(), line.bottom.max(), line.right.max())
        box = Box(*map(int, ends))
        if _is_text(line, box) and (noise := _noise(line, box, relief)) <= _LESS_QUIET:
            certain = noise <= _QUIET and _is_certain(line, least)
            yield _Line(_extended(box, line, everything), certain)


def _pieces(mask: Mask, relief: Grey) -> _Pieces:
    """All connected pieces."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    places = ndimage.find_objects(labels)
    ends = np.array([(r.start, c.start, r.stop, c.stop) for r, c in places], dtype=np.int64)
    inside = labels[mask]
    area = np.bincount(inside, minlength=count + 1)[1:]
    total = np.bincount(inside, weights=relief[mask], minlength=count + 1)[1:]
    top, left, bottom, right = ends.reshape(-1, 4).T
    return _Pieces(top, left, bottom, right, area, total / np.maximum(area, 1))


def _glyphlike(pieces: _Pieces) -> Mask:
    """Which have the size and the fill of glyphs."""
    height, width = pieces.bottom - pieces.top, pieces.right - pieces.left
    fill = pieces.area / (height * width)
    sized = (height >= _HEIGHTS[0]) & (height <= _HEIGHTS[1]) & (width <= _WIDEST * height)
    solid = (fill >= _FILL[0]) & ((fill <= _FILL[1]) | (height > 3 * width))
    return sized & solid & (pieces.area >= 5)


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
    """Groups of pieces that are neighbours on one line, each of like height and contrast."""
    height = (pieces.bottom - pieces.top).astype(np.float64)
    middle = (pieces.top + pieces.bottom) / 2
    ends = np.stack([(pieces.left + pieces.right) / 2, middle], axis=1)
    reach = float(np.percentile(height, 95)) * (_GAP + 2)
    first, second = cKDTree(ends).query_pairs(reach, output_type="ndarray").T
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
    count = len(height)
    graph = coo_array(
        (np.ones(int(linked.sum())), (first[linked], second[linked])), shape=(count, count)
    )
    _, group = connected_components(graph, directed=False)
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members) >= 2:
            yield members


def _is_text(line: _Pieces, box: Box) -> bool:
    """Enough glyphs of like height that stand on one line and not behind each other."""
    height = (line.bottom - line.top).astype(np.float64)
    typical = float(np.median(height))
    length, width = box.right - box.left, line.right - line.left
    glyphs = float(np.maximum(1, width / (0.75 * typical)).sum())
    return bool(
        len(line.top) >= 3
        and glyphs >= _FEWEST_GLYPHS
        and box.bottom - box.top <= 2.2 * typical
        and length >= _SHORTEST * typical
        and 0.45 <= width.sum() / length <= 1.35
        and _on_one_line(line, typical) >= _ON_LINE
        and (abs(height / typical - 1) <= 0.25).mean() >= _OF_ONE_HEIGHT
    )


def _is_certain(line: _Pieces, least: float) -> bool:
    """Whether it would be text even in an image that has no other, at this contrast at least."""
    height = (line.bottom - line.top).astype(np.float64)
    typical = float(np.median(height))
    alike = float((abs(height / typical - 1) <= 0.25).mean())
    return (
        len(height) >= 4
        and alike >= 0.5
        and _on_one_line(line, typical) >= 0.65
        and _under_one_line(line, typical) >= 0.4
        and float(np.median(line.contrast)) >= least
    )


def _on_one_line(line: _Pieces, typical: float) -> float:
    """The part of the glyphs that stand on a level line, or on one that rises or falls a little."""
    tolerance = max(1.0, 0.1 * typical)
    middle = (line.left + line.right) / 2
    slope, start = np.polyfit(middle, line.bottom, 1)
    lines = [np.full(len(middle), np.median(line.bottom))]
    if abs(slope) < 0.1:
        lines.append(slope * middle + start)
    return max(float((abs(line.bottom - level) <= tolerance).mean()) for level in lines)


def _under_one_line(line: _Pieces, typical: float) -> float:
    """The largest part of the glyphs that reach up equally far: capitals, digits, or small ones."""
    tolerance = max(1.0, 0.1 * typical)
    reach = line.top - line.bottom.max()
    return max(float((abs(reach - one) <= tolerance).mean()) for one in np.unique(reach))


def _noise(line: _Pieces, box: Box, relief: Grey) -> float:
    """How much there is between and around the glyphs, of what is in them; 1 for uneven strokes."""
    typical = int(np.median(line.bottom - line.top))
    margin = max(2, typical // 3)
    top, left = max(0, box.top - margin), max(0, box.left - margin)
    around = relief[top : box.bottom + margin, left : box.right + margin]
    inside = float((line.contrast * line.area).sum())
    pixels = int(line.area.sum())
    strokes = around[around > 0.5 * float(np.median(line.contrast))]
    height, even, uneven = _UNEVEN
    faint = inside < _FAINTEST * pixels
    if faint or strokes.std() > (even if typical >= height else uneven) * strokes.mean():
        return 1.0
    rest = (float(around.sum()) - inside) / max(1, around.size - pixels)
    return rest * pixels / inside


def _merged(boxes: list[Box], shape: tuple[int, ...]) -> list[Box]:
    """Each box with a margin of a third of its height; those that overlap are one."""
    if not boxes:
        return []
    covered = np.zeros(shape, dtype=np.bool_)
    for box in boxes:
        margin = 2 + (box.bottom - box.top) // 3
        top, left = max(0, box.top - margin), max(0, box.left - margin)
        covered[top : box.bottom + margin, left : box.right + margin] = True
    labels, _ = ndimage.label(covered)
    return [
        Box(rows.start, columns.start, rows.stop, columns.stop)
        for rows, columns in ndimage.find_objects(labels)
    ]
