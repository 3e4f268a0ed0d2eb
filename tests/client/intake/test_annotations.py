"""Pictures with masks or boxes: read from every format, moved with the picture, told by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.intake.keys import SiteKey
from client.intake.pictures import Pictures
from client.intake.run import intake
from common.cohort import Cohort
from common.errors import ConfigError, IntakeError

SIZE = (40, 60)
RNG = np.random.default_rng(4)
GREY = RNG.integers(0, 256, SIZE, dtype=np.uint8)
MASKS = {"task": {"name": "segmentation", "classes": ["none", "organ", "lesion"]}}
BOXES = {"task": {"name": "detection", "classes": ["cell", "clot"], "most_boxes": 3}}
TABLES = {"mask": ("dice", "dice"), "boxes": ("heatmap", "map50")}
Take = Callable[..., tuple[Cohort, dict[str, str]]]


def save(path: Path, pixels: np.ndarray = GREY, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def drawn(value: int = 1) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[10:30, 20:50] = value
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


@pytest.fixture
def take(tmp_path: Path, folder: Path, make_spec: Any) -> Take:
    """`take(labels, task)`: the cohort, and by name why something was not used."""

    def _take(
        labels: str | Path,
        tables: dict[str, Any],
        *,
        fit: str = "stretch",
        keep_empty: bool = False,
    ) -> tuple[Cohort, dict[str, str]]:
        kind = "mask" if tables is MASKS else "boxes"
        loss, metric = TABLES[kind]
        spec = make_spec(
            **tables,
            model={"name": {"mask": "unet", "boxes": "centernet"}[kind]},
            loss={"name": loss},
            evaluation={"metric": metric},
            input={"height": 40, "width": 60, "fit": fit},
        )
        path = labels if isinstance(labels, Path) else tmp_path / "labels.csv"
        if isinstance(labels, str):
            path.write_text(labels)
        source = Pictures.of(folder, path, spec, SiteKey.random())
        source.keep_empty = keep_empty
        summary = intake(source, tmp_path / "cohort", spec)
        reasons = {item.what.partition(" (")[0]: item.reason for item in summary.not_used}
        return Cohort.open(tmp_path / "cohort"), reasons

    return _take


# --- Masks ---------------------------------------------------------------------------------------


def test_a_mask_of_every_kind_is_read(folder: Path, take: Take) -> None:
    palette = Image.fromarray(drawn(2)).convert("P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    save(folder / "masks" / "grey.png", drawn(2))
    save(folder / "masks" / "deep.png", drawn(2).astype(np.uint16))
    Image.fromarray(drawn(2)).save(folder / "masks" / "palette.png")
    names = ("grey", "deep", "palette")
    for name in names:
        save(folder / f"{name}.png")

    lines = [f"{name}.png,masks/{name}.png,P{i},train\n" for i, name in enumerate(names)]
    cohort, reasons = take("file,mask,patient,split\n" + "".join(lines), MASKS)

    assert reasons == {}
    assert (cohort.unit, cohort.kind, len(cohort)) == ("patient", "mask", 3)
    for mask in cohort.targets(range(3)):
        np.testing.assert_array_equal(mask, drawn(2))


def test_a_mask_in_black_and_white_is_read_where_there_are_two_classes(
    folder: Path, take: Take, make_spec: Any, tmp_path: Path
) -> None:
    save(folder / "a.png")
    save(folder / "m.png", drawn(255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MASKS["task"], "classes", ["none", "organ"])
        cohort, reasons = take("file,mask\na.png,m.png\n", MASKS)
    assert reasons == {}
    np.testing.assert_array_equal(cohort.targets([0])[0], drawn(1))


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_a_mask_moves_with_its_picture(folder: Path, take: Take, fit: str) -> None:
    """The picture is its own mask, of another aspect than the run."""
    mask = np.zeros((90, 70), dtype=np.uint8)
    mask[30:70, 25:60] = 1
    save(folder / "a.png", mask * 255)
    save(folder / "m.png", mask)
    cohort, reasons = take("file,mask\na.png,m.png\n", MASKS, fit=fit)
    assert reasons == {}
    image, target = cohort.images([0])[0, 0], cohort.targets([0])[0]
    clear = (image < 0.1) | (image > 0.9)
    assert ((image > 0.5) == (target == 1))[clear].all()
    assert target.any()


def test_every_mask_that_cannot_be_used_is_named_with_its_reason(folder: Path, take: Take) -> None:
    save(folder / "good.png")
    save(folder / "good_mask.png", drawn())
    bad = {
        "size": drawn()[:30],
        "class": drawn(3),
        "empty": drawn(0),
        "colour": np.stack([drawn()] * 3, axis=-1),
    }
    lines = ["good.png,good_mask.png\n"]
    for name, mask in bad.items():
        save(folder / f"{name}.png", RNG.integers(0, 256, SIZE, dtype=np.uint8))
        save(folder / f"{name}_mask.png", mask)
        lines.append(f"{name}.png,{name}_mask.png\n")
    save(folder / "jpeg.png")
    save(folder / "jpeg_mask.jpg", drawn())
    save(folder / "missing.png")
    save(folder / "nothing.png")
    save(folder / "forgotten.png")
    lines += ["jpeg.png,jpeg_mask.jpg\n", "missing.png,none.png\n", "nothing.png,\n"]

    cohort, reasons = take("file,mask\n" + "".join(lines), MASKS)

    assert len(cohort) == 1
    assert reasons.pop("size.png") == (
        "its mask size_mask.png has 60 x 30 pixels, the picture 60 x 40 pixels"
    )
    assert reasons.pop("class.png").startswith("its mask class_mask.png has the value 3; expected")
    assert "is empty: nothing but 'none'" in reasons.pop("empty.png")
    assert reasons.pop("colour.png").startswith("its mask has the mode RGB")
    assert reasons.pop("jpeg.png").startswith("its mask is a JPEG, which changes values")
    assert reasons.pop("missing.png").startswith("label without a picture")
    assert reasons.pop("nothing.png") == "line 9 names no mask"
    assert reasons.pop("forgotten.png").startswith("no label")
    assert reasons == {}


def test_an_empty_mask_is_kept_where_a_person_says_so(folder: Path, take: Take) -> None:
    save(folder / "a.png")
    save(folder / "m.png", drawn(0))
    cohort, reasons = take("file,mask\na.png,m.png\n", MASKS, keep_empty=True)
    assert reasons == {}
    assert not cohort.targets([0]).any()


# --- Boxes ---------------------------------------------------------------------------------------

HEAD = "file,left,top,right,bottom,label\n"


def voc(folder: Path, name: str, *things: tuple[str, int, int, int, int], extra: str = "") -> None:
    folder.mkdir(exist_ok=True)
    objects = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for kind, a, b, c, d in things
    )
    size = "<size><width>60</width><height>40</height><depth>1</depth></size>"
    text = f"{extra}<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
    (folder / f"{name}.xml").write_text(text)


def coco(path: Path, boxes: list[dict[str, Any]], **image: Any) -> Path:
    images = [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60} | image,
        {"id": 8, "file_name": "b.png", "height": 40, "width": 60},
    ]
    kinds = [{"id": 3, "name": "clot"}, {"id": 5, "name": "cell"}, {"id": 6, "name": "dust"}]
    whole = {"images": images, "annotations": boxes, "categories": kinds, "info": {"year": 2026}}
    path.write_text(json.dumps(whole))
    return path


def test_three_formats_say_the_same(folder: Path, take: Take, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(folder / f"{name}.png", RNG.integers(0, 256, SIZE, dtype=np.uint8))
    table = HEAD + "a.png,6,4,30,20,cell\na.png,0,0,60,40,clot\nb.png,,,,,\n"
    voc(tmp_path / "voc", "a", ("cell", 7, 5, 30, 20), ("clot", 1, 1, 60, 40))
    voc(tmp_path / "voc", "b")
    boxes = [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [6, 4, 24, 16]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 60, 40]},
    ]
    found = []
    for labels in (table, tmp_path / "voc", coco(tmp_path / "coco.json", boxes)):
        cohort, reasons = take(labels, BOXES)
        assert reasons == {}
        assert cohort.kind == "boxes"
        found.append(sorted(cohort.targets(range(2)).tolist()))
        for path in (tmp_path / "cohort").iterdir():
            path.unlink()
        (tmp_path / "cohort").rmdir()
    assert found[0] == found[1] == found[2]
    nothing, both = found[0]
    assert both[0] == pytest.approx([0.1, 0.1, 0.5, 0.5, 0])
    assert both[1] == [0, 0, 1, 1, 1]
    assert {row[4] for row in nothing} == {-1}


def test_a_box_moves_with_its_picture_and_is_cut_with_it(folder: Path, take: Take) -> None:
    save(folder / "a.png", RNG.integers(0, 256, (40, 120), dtype=np.uint8))
    lines = "a.png,30,0,60,20,cell\na.png,0,0,20,40,clot\na.png,80,10,100,30,clot\n"
    cohort, reasons = take(HEAD + lines, BOXES, fit="crop")
    assert reasons == {}
    first, second = cohort.targets([0])[0]
    assert first.tolist() == pytest.approx([0, 0, 0.5, 0.5, 0])
    assert second.tolist() == pytest.approx([50 / 60, 0.25, 1, 0.75, 1])


def test_every_box_that_cannot_be_used_is_named_with_its_reason(folder: Path, take: Take) -> None:
    bad = {
        "outside": "50,0,61,10,cell",
        "above": "5,-3,10,10,cell",
        "flat": "5,5,5,9,cell",
        "inverted": "9,5,5,9,cell",
        "class": "1,1,9,9,dust",
        "words": "left,1,9,9,cell",
        "endless": "1,1,inf,9,cell",
        "half": "1,1,,9,cell",
    }
    lines = []
    for name, box in bad.items():
        save(folder / f"{name}.png", RNG.integers(0, 256, SIZE, dtype=np.uint8))
        lines.append(f"{name}.png,{box}\n")
    save(folder / "good.png")
    save(folder / "many.png", RNG.integers(0, 256, SIZE, dtype=np.uint8))
    lines += ["good.png,1,1,60.4,9,cell\n", *(f"many.png,{i},1,20,9,cell\n" for i in range(4))]

    cohort, reasons = take(HEAD + "".join(lines), BOXES)

    assert len(cohort) == 1
    assert cohort.targets([0])[0, 0, 2] == 1
    outside = "reaches outside of the picture, which has 60 x 40 pixels"
    assert reasons.pop("outside.png") == f"the box 50, 0, 61, 10 {outside}"
    assert reasons.pop("above.png") == f"the box 5, -3, 10, 10 {outside}"
    assert "has no area" in reasons.pop("flat.png")
    assert "has no area" in reasons.pop("inverted.png")
    assert reasons.pop("class.png") == (
        "line 6 has the unknown label 'dust'; the run's classes are 'cell', 'clot'"
    )
    assert "expected four numbers" in reasons.pop("words.png")
    assert "expected finite numbers" in reasons.pop("endless.png")
    assert "expected four numbers" in reasons.pop("half.png")
    assert reasons.pop("many.png") == "it has 4 boxes; task.most_boxes allows 3"
    assert reasons == {}


def test_a_picture_of_another_size_or_turned_by_its_exif_is_told(
    folder: Path, take: Take, tmp_path: Path
) -> None:
    save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    save(folder / "b.png", exif=exif)
    cohort, reasons = take(coco(tmp_path / "coco.json", [], width=61), BOXES)
    assert len(cohort) == 0
    assert reasons["a.png"] == "it has 60 x 40 pixels; it was annotated at 61 x 40 pixels"
    assert reasons["b.png"].startswith("its EXIF orientation turns it")


def test_what_coco_says_that_no_box_can_hold_is_told(
    folder: Path, take: Take, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        save(folder / f"{name}.png")
    boxes: list[dict[str, Any]] = [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 1, 9, 9], "iscrowd": 1},
        {"id": 2, "image_id": 8, "category_id": 6, "bbox": [1, 1, 9, 9]},
    ]
    cohort, reasons = take(coco(tmp_path / "coco.json", boxes), BOXES)
    assert len(cohort) == 0
    assert reasons["a.png"].startswith("annotation 1 is a crowd")
    assert reasons["b.png"].startswith("annotation 2 has the unknown label 'dust'")


def test_an_xml_that_is_none_or_has_a_document_type_is_told(
    folder: Path, take: Take, tmp_path: Path
) -> None:
    save(folder / "a.png")
    voc(tmp_path / "voc", "a", ("cell", 1, 1, 9, 9))
    voc(tmp_path / "voc", "b", extra="<!DOCTYPE x [<!ENTITY y 'z'>]>")
    (tmp_path / "voc" / "c.xml").write_text("<annotation>")
    (tmp_path / "voc" / "d.xml").write_text('<?xml version="1.0" encoding="klingon"?><annotation/>')
    cohort, reasons = take(tmp_path / "voc", BOXES)
    assert len(cohort) == 1
    assert "it has a document type" in reasons["b.xml"]
    assert reasons["c.xml"].startswith("c.xml cannot be read as VOC's XML (no element found")
    assert reasons["d.xml"].startswith("d.xml cannot be read as VOC's XML (unknown encoding")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,left,top,right,label\n", "1: column 'bottom' is missing"),
        (HEAD, "nothing is annotated in it"),
        (HEAD + ",1,1,2,2,cell\n", "2: file is empty"),
        (HEAD + "a.png,1,1,2\n", "2: has not as many values"),
        (HEAD[:-1] + ",split\na.png,1,1,2,2,cell,future\n", "2: split 'future' is unknown"),
        (HEAD[:-1] + ",patient\na.png,1,1,2,2,cell,P\na.png,1,1,2,2,cell,Q\n", "another patient"),
    ],
)
def test_a_table_that_is_wrong_as_a_whole_is_refused(
    folder: Path, take: Take, text: str, says: str
) -> None:
    save(folder / "a.png")
    with pytest.raises(ConfigError, match=says):
        take(text, BOXES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected COCO's JSON"),
        ('{"images": []}', "categories: Field required"),
        ('{"images": [{"id": 1}], "categories": [], "annotations": []}', r"images\.0\.file_name"),
    ],
)
def test_a_json_that_is_none_of_coco_is_refused_with_the_place(
    folder: Path, take: Take, tmp_path: Path, text: str, says: str
) -> None:
    save(folder / "a.png")
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        take(tmp_path / "coco.json", BOXES)


def test_a_box_of_no_image_and_an_image_twice_are_refused(
    folder: Path, take: Take, tmp_path: Path
) -> None:
    save(folder / "a.png")
    stray = [{"id": 1, "image_id": 99, "category_id": 5, "bbox": [1, 1, 9, 9]}]
    with pytest.raises(ConfigError, match="annotation 1 is of no image: 99"):
        take(coco(tmp_path / "coco.json", stray), BOXES)
    with pytest.raises(ConfigError, match="stands there twice"):
        take(coco(tmp_path / "coco.json", [], id=8), BOXES)
    with pytest.raises(ConfigError, match="stands there twice, first on line 2"):
        take("file,mask\na.png,m.png\na.png,n.png\n", MASKS)


def test_a_folder_that_is_none_is_refused(take: Take) -> None:
    with pytest.raises(IntakeError, match="no such folder"):
        take(HEAD + "a.png,1,1,2,2,cell\n", BOXES)
