import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.reporting.records import STUDENT, TEACHER, record
from tfaccel.reporting.pages import draw_plot, render_html, summarize


class Page(HTMLParser):
    """Collects what a page refers to and which tags are open."""

    def __init__(self, text):
        super().__init__()
        self.references, self.ids, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_needs_no_other_file(tmp_path):
    path = render_html([TEACHER, STUDENT], tmp_path / "report.html", "digits")
    page = Page(path.read_text())

    assert all(reference.startswith("#") for reference in page.references)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in path.read_text()


def test_the_page_has_title_table_and_three_plots(tmp_path):
    path = render_html(
        [TEACHER, STUDENT],
        tmp_path / "report.html",
        "digits <1>",
        facts={"seed": "0"},
        sources={"recipe": "name: <digits>"},
    )
    text = path.read_text()

    assert "<h1>digits &lt;1&gt;</h1>" in text
    assert "name: &lt;digits&gt;" in text
    assert text.count("<svg") == 3
    for cell in ("teacher", "student", "99.00%", "98.00%", "4,600.0", "0.300"):
        assert cell in text
    assert Page(text).tags.count("tr") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_ids_of_the_plots_do_not_meet(tmp_path):
    """An id that two plots share would make one draw with the other's clip path."""
    path = render_html([TEACHER, STUDENT], tmp_path / "report.html", "digits")
    svgs = re.findall(r"<svg.*?</svg>", path.read_text(), re.DOTALL)
    used = [set(re.findall(r'url\(#(.*?)\)|xlink:href="#(.*?)"', svg)) for svg in svgs]

    assert not used[0] & used[1]
    assert not used[0] & used[2]


def test_the_same_records_give_the_same_bytes(tmp_path):
    pages = [
        render_html([TEACHER, STUDENT], tmp_path / f"{i}.html", "digits").read_bytes()
        for i in range(2)
    ]

    assert pages[0] == pages[1]


def test_records_without_accuracy_have_no_plots(tmp_path):
    path = render_html([record(accuracy=None)], tmp_path / "report.html", "digits")

    assert "<svg" not in path.read_text()


def test_no_records_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="one measurement at least"):
        render_html([], tmp_path / "report.html", "digits")
    assert not list(tmp_path.iterdir())


def test_a_plot_is_svg_with_a_labelled_point_for_each_record():
    svg = draw_plot([TEACHER, STUDENT], "size_bytes", 1e-3, "size [kB]")

    assert {"teacher", "student", "size [kB]", "accuracy, held-out"} <= texts_of(svg)


def texts_of(svg):
    elements = ElementTree.fromstring(svg).iter()  # noqa: S314  our own
    return {"".join(element.itertext()).strip() for element in elements}


def test_a_wide_range_is_drawn_on_a_logarithmic_axis():
    wide = texts_of(draw_plot([TEACHER, STUDENT], "size_bytes", 1e-3, "size [kB]"))
    narrow = texts_of(draw_plot([TEACHER, STUDENT], "latency_ms", 1.0, "latency"))

    assert {"200", "500", "1,000", "2,000", "5,000"} <= wide
    assert "0" not in wide
    assert "0.0" in narrow or "0.00" in narrow


def test_the_summary_holds_the_ratios():
    # 4,600 to 230 kB, 4,200 to 210 kB, 1.5 to 0.3 ms.
    assert summarize([TEACHER, STUDENT]) == (
        "student against teacher: 20.0 times smaller, 20.0 times smaller gzipped, "
        "5.0 times faster, -1.00 points of accuracy (99.00% to 98.00%)."
    )
    assert "3.0 times slower" in summarize([TEACHER, record(latency_ms=4.5)])
    assert "2.0 times larger," in summarize([TEACHER, record(size_bytes=9_200_000)])
    assert summarize([TEACHER]) == ""
