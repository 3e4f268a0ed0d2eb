"""What is true and what was found, drawn on an image."""

from __future__ import annotations

import numpy as np
import pytest

from common.tasks import pictures
from common.tasks.pictures import FOUND, TRUE

SIDE = 120


def grey():
    return np.full((SIDE, SIDE, 3), 90, np.uint8)


def boxes(*rows):
    return np.array(rows, dtype=np.float32).reshape(-1, 5)


def drawn(true, found, classes=3):
    blue, orange = (pictures.framed(boxes(*each), SIDE, SIDE) for each in (true, found))
    return pictures.compared(grey(), blue, orange, classes)


def has(picture, colour):
    return (picture == colour).all(axis=2)


def test_each_box_has_the_number_of_its_class_outside_of_itself():
    true, found = (0.2, 0.2, 0.5, 0.5, 0), (0.6, 0.6, 0.9, 0.9, 2)
    blue = has(drawn([true], []), TRUE)
    assert blue[:22].any()  # above the line, which is one pixel wider on either side
    assert blue[:22, 22:34].sum() == blue[:22].sum()
    assert not blue[27:56, 27:56].any()
    orange = has(drawn([], [found]), FOUND)
    assert orange[110:].any()
    assert not has(drawn([], [found]), TRUE).any()


def test_numbers_differ_and_are_the_same_on_every_thing_of_a_class():
    def number(kind):
        return has(drawn([(0.2, 0.2, 0.5, 0.5, kind)], [], 12), TRUE)[:22].tobytes()

    assert len({number(kind) for kind in range(12)}) == 12
    assert number(4) == number(4)


def test_one_class_needs_no_number_and_leaves_the_image_as_it_is():
    picture = drawn([(0.2, 0.2, 0.5, 0.5, 0)], [], classes=1)
    assert (picture[:22] == 90).all()
    assert pictures.legend(["organ"]).endswith("orange one.")
    assert pictures.legend(["head", "tail"]).endswith("orange one. 1 head, 2 tail.")


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 0.02, 0.02), (0.98, 0.98, 1, 1)])
def test_a_number_stays_within_the_picture(box):
    inside = drawn([(*box, 9)], [(*box, 9)])
    assert inside.shape == (SIDE, SIDE, 3)
    assert has(inside, TRUE).any()
    assert has(inside, FOUND).any()


def test_a_picture_smaller_than_a_number_takes_what_there_is_room_for():
    small = np.zeros((4, 3, 3), np.uint8)
    shapes = pictures.framed(boxes((0, 0, 1, 1, 99)), 4, 3)
    assert pictures.compared(small, shapes, shapes, 100).shape == (4, 3, 3)


def test_an_outline_is_one_thing_for_each_class_that_is_there():
    classes = np.zeros((20, 20), np.uint16)
    classes[4:9, 5:12], classes[12:15, 1:3] = 1, 3
    shapes = pictures.outlined(classes)
    assert [(n, d.start, r.start, d.stop, r.stop) for n, (d, r) in shapes.things] == [
        (1, 4, 5, 9, 12),
        (3, 12, 1, 15, 3),
    ]
    assert shapes.lines.sum() == (5 * 7 - 3 * 5) + 3 * 2
    assert pictures.outlined(np.zeros((5, 5), np.uint16)).things == []
