"""The page: one file that loads nothing, parses, says every number and can be used by keyboard and ear."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from smooth_rt.plot import Curve, line_plot, ticks
from smooth_rt.report import Edit, Inversion, Morph, Page, render

VOID = {"meta", "link", "img", "input", "br"}


class Parsed(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def image(value: int) -> Image.Image:
    return Image.new("RGB", (64, 48), (value, 0, 255 - value))


def page(variants: tuple[str, ...] = ("base", "smooth"), **changes: object) -> Page:
    frames = {variant: [image(60 * i) for i in range(4)] for variant in variants}
    values: dict[str, object] = {
        "title": "Morphs & <tests>",
        "lead": "a lead",
        "version": "9.9",
        "morphs": [
            Morph(
                "Two images",
                "“a” to “<b>”",
                frames,
                {variant: [1.0, 5.0, 2.5] for variant in variants},
                dict.fromkeys(variants, 1.7),
            )
        ],
        "inversions": [Inversion("a cat", image(9), dict.fromkeys(variants, image(8)), dict.fromkeys(variants, 21.5))],
        "edits": [Edit("a cat", "a dog", image(1), dict.fromkeys(variants, image(2)))],
        "rows": [{"engine": "openvino", "seconds": "1.25"}, {"engine": "onnxruntime", "seconds": "2.50"}],
        "environment": {"processor": "A <fast> one"},
        "commands": ["smooth-rt demo --prompt 'a & b'"],
    }
    return Page(**{**values, **changes})  # type: ignore[arg-type]


def test_page_loads_nothing() -> None:
    text = render(page())
    parsed = Parsed(text)
    loaded = [a[key] for _, a in parsed.tags for key in ("src", "href", "poster", "data", "srcset") if a.get(key)]
    assert len(loaded) > 8
    assert all(str(address).startswith("data:") for address in loaded)
    assert not re.search(r"url\(|@import|https?:|//\w", re.sub(r'"data:[^"]*"', "", text))
    assert all("src" not in attributes for attributes in parsed.all("script"))
    assert [attributes.get("rel") for attributes in parsed.all("link")] == ["icon"]


def test_images_are_those_given() -> None:
    sources = [str(attributes["src"]) for attributes in Parsed(render(page())).all("img")]
    # A screen and four frames a variant; the original and two rebuilt; before and after twice.
    assert len(sources) == 2 * 5 + 3 + 4
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert Image.open(io.BytesIO(content)).size == (64, 48)


def test_every_image_has_an_alt_text_and_every_control_a_name() -> None:
    parsed = Parsed(render(page()))
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    inputs = parsed.all("input")
    assert len(inputs) == 3
    assert all(attributes["type"] == "range" and attributes.get("aria-label") for attributes in inputs)
    assert inputs[0]["max"] == "3"
    assert [attributes.get("type") for attributes in parsed.all("button")] == ["button"]
    assert parsed.all("html") == [{"lang": "en"}]


def test_motion_and_colour_follow_the_reader() -> None:
    text = render(page())
    for query in ("prefers-reduced-motion: reduce", "prefers-color-scheme: dark"):
        assert query in text


def test_text_is_escaped_and_complete() -> None:
    text = render(page())
    assert "<tests>" not in text
    assert "<fast>" not in text
    said = Parsed(text).text
    for part in ("Morphs & <tests>", "“<b>”", "21.50 dB", "2.50", "A <fast> one", "smooth, ISTD 1.70", "'a & b'"):
        assert part in said, part
    assert "$" not in said


def test_empty_sections_are_left_out() -> None:
    empty = page(morphs=(), inversions=(), edits=(), rows=(), environment={}, commands=())
    assert Parsed(render(empty)).all("section") == []
    named = [attributes["id"] for attributes in Parsed(render(page())).all("section")]
    assert named == ["morph", "inversion", "edit", "istd", "results", "environment", "commands"]


def test_one_variant_alone() -> None:
    parsed = Parsed(render(page(("base",))))
    assert "Smooth-LoRA" not in parsed.text.split("Inversion")[1]
    assert len(parsed.all("img")) == 5 + 2 + 2


def test_plot_draws_every_value() -> None:
    curves = [Curve("base", "base", "Base", [1.0, 5.0, 2.5]), Curve("smooth", "smooth", "Smooth", [3.0, 3.1, 2.9])]
    svg = ElementTree.fromstring(line_plot(curves, str))
    dots = [float(dot.get("cy", "")) for dot in svg.iter("circle")]
    assert len(dots) == 6
    # Up on the screen is a smaller y.
    assert dots[1] < dots[2] < dots[0]
    assert "5.0" in svg.get("aria-label", "")
    labels = [float(t.get("y", "")) for t in svg.iter("text") if t.get("class")]
    assert abs(labels[0] - labels[1]) >= 18


@pytest.mark.parametrize(
    ("highest", "last", "step"), [(6.3, 8, 2), (0.42, 0.5, 0.1), (100, 100, 20), (0, 1, 1), (1234, 1500, 500)]
)
def test_ticks_are_round(highest: float, last: float, step: float) -> None:
    found = ticks(highest)
    assert found[0] == 0
    assert found[-1] == pytest.approx(last)
    assert found[1] == pytest.approx(step)
    assert len(found) <= 6
