"""The committed pictures are what docs/tools/pictures.py draws, and pages show all of them."""

import re
import runpy
import xml.etree.ElementTree as ET

import pytest

from documentation.snippets import ROOT, pages

TOOL = runpy.run_path(str(ROOT / "docs/tools/pictures.py"))
FOLDER = ROOT / "docs/pictures"


def test_they_are_up_to_date():
    drawn = {f"{name}.svg": TOOL["svg"](picture) for name, picture in TOOL["PICTURES"].items()}
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert there == drawn, "run python docs/tools/pictures.py"


def test_each_is_shown_and_each_that_is_shown_is_there():
    shown = {name for text in pages().values() for name in re.findall(r"pictures/(\w+)\.svg\)", text)}
    assert shown == set(TOOL["PICTURES"])


@pytest.mark.parametrize("name", TOOL["PICTURES"])
def test_boxes_do_not_touch_and_lie_inside(name):
    root = ET.fromstring(TOOL["svg"](TOOL["PICTURES"][name]))
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [box.centre for box in TOOL["PICTURES"][name].boxes.values()]
    w, h = TOOL["WIDTH"], TOOL["HEIGHT"]
    for i, (x, y) in enumerate(boxes):
        assert w / 2 <= x <= width - w / 2 and h / 2 <= y <= height - h / 2
        assert all(abs(x - x2) > w or abs(y - y2) > h for x2, y2 in boxes[:i])
    # nothing is fetched from elsewhere
    assert not re.search(r"(href|src)=|url\((?!#)", TOOL["svg"](TOOL["PICTURES"][name]))


def test_text_that_does_not_fit_is_refused():
    box = TOOL["Box"](0, 0, "a text that is much longer than its box", "memory")
    picture = TOOL["Picture"]("t", {"a": box}, [])
    with pytest.raises(ValueError, match="does not fit"):
        TOOL["svg"](picture)
