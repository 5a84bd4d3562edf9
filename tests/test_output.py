"""The page builder: escaped, self-contained, deterministic, accessible."""

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from pyro_vae.app.output import Page, plus_minus

NASTY = "<script>alert('x')</script> & \"quotes\" <b>"


class Reader(HTMLParser):
    """Collects the tags, the text and every attribute that could name a resource."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.images, self.data, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [v for k, v in values.items() if k in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(values)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.data.append(data)


def lines(count=2):
    figure = Figure(figsize=(4, 3), dpi=100)
    figure.subplots().plot(np.arange(count), np.arange(count) % 7, "o")
    return figure


def full_page():
    page = Page(f"Title {NASTY}", subtitle=NASTY)
    page.section(f"Result {NASTY}")
    page.text(NASTY)
    page.warning(NASTY)
    page.code(NASTY)
    page.table(["name", NASTY], [[NASTY, NASTY], ["row", 1.5]], caption=NASTY)
    page.facts({NASTY: NASTY, "inner": {NASTY: [1, NASTY]}}, caption=NASTY)
    page.section("Figures")
    page.figure(lines(), caption=NASTY, description=NASTY)
    return page


def test_everything_is_escaped():
    html = full_page().html()
    read = Reader(html)
    assert not {"script", "b"} & set(read.tags)
    assert "".join(read.data).count("<script>alert('x')</script>") >= 12
    assert read.open == []
    assert read.images[0]["alt"] == NASTY


def test_the_page_needs_nothing_else():
    html = full_page().html()
    read = Reader(html)
    assert not {"script", "link", "iframe", "object", "embed", "audio", "video"} & set(read.tags)
    assert all(source.startswith(("data:image/", "#")) for source in read.sources)
    assert not re.search(r"https?:|url\(|@import|javascript:| on\w+=", html)
    assert "default-src 'none'" in html


def test_on_a_narrow_screen_wide_figures_scroll_and_names_wrap():
    page = Page("figures")
    for width in (3, 9):
        figure = Figure(figsize=(width, 3))
        figure.subplots().plot([0, 1])
        page.figure(figure, caption="c")
    html = page.html()
    assert ["class" in image for image in Reader(html).images] == [False, True]
    narrow = html.split("@media (max-width: 40rem)")[1].split("@page")[0]
    assert "img.broad" in narrow
    assert "tbody th { white-space: normal; }" in narrow


def test_the_same_content_gives_the_same_bytes():
    assert full_page().html() == full_page().html()
    assert Page("a").html() != Page("b").html()


def test_links_lead_to_the_sections():
    html = full_page().html()
    targets = [source for source in Reader(html).sources if source.startswith("#")]
    assert targets == ["#section-1", "#section-2"]
    assert all(html.count(f'id="{target[1:]}"') == 1 for target in targets)
    assert "<nav" not in Page("no sections").html()


def test_headings_language_and_row_headers():
    html = full_page().html()
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert '<html lang="de">' in Page("Titel", language="de").html()
    tags = Reader(html).tags
    assert (tags.count("h1"), tags.count("h2"), tags.count("main")) == (1, 2, 1)
    assert html.count('<th scope="col"') == 2
    assert html.count('<th scope="row"') == 4
    assert html.count("<caption>") == 2


def test_numbers_stand_right_and_text_left():
    page = Page("t")
    rows = [["a", 1.234, "-2.5 \u00b1 0.1", "x", None], ["b", -1234567, None, "1", math.nan]]
    page.table(["n", "f", "e", "s", "u"], rows, caption="c", decimals=1)
    html = page.html()
    assert html.count('<th scope="col" class="number">') == 3
    for cell in ("1.2", "-1,234,567", "-2.5 \u00b1 0.1", "-"):
        assert f'<td class="number">{cell}</td>' in html
    assert "<td>x</td>" in html
    assert '<th scope="row">a</th>' in html


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        Page("t").table(["a", "b"], [["1", "2"], ["1", "2", "3"]], caption="c")


def test_settings_are_shown_as_they_are():
    page = Page("t")
    page.facts({"learning_rate": 1e-3, "epochs": 12345, "download": False}, caption="c")
    page.facts({"versions": {"torch": "2.11.0"}}, caption="c")
    html = page.html()
    assert '<th scope="row">learning rate</th><td>0.001</td>' in html
    assert "<td>12345</td>" in html
    assert "<td>no</td>" in html
    assert '<th scope="row">versions / torch</th><td>2.11.0</td>' in html


def embedded(page):
    image = Reader(page.html()).images[0]
    kind, content = re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", image["src"]).groups()
    return kind, base64.b64decode(content), image


@pytest.mark.parametrize(("count", "kind"), [(5, "svg+xml"), (20_000, "png")])
def test_a_figure_of_many_points_becomes_pixels(count, kind):
    page = Page("t")
    page.figure(lines(count), caption="c")
    got, content, image = embedded(page)
    assert got == kind
    assert (b"<svg" in content) == (kind == "svg+xml")
    assert content.startswith(b"\x89PNG") == (kind == "png")
    assert (image["width"], image["height"]) == ("384", "288")
    assert image["alt"] == "c"


def test_a_value_with_its_error():
    assert plus_minus(-19.314, 0.051) == "-19.31 \u00b1 0.05"
    assert plus_minus(1.0, None, 1) == plus_minus(1.0, math.nan, 1) == "1.0"
    assert plus_minus(math.nan, 0.1) == plus_minus(None, 0.1) == "-"
    assert plus_minus(0.0, 0.0, 3) == "0.000"  # such as the difference of the best from itself
