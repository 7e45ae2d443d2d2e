import io

import pytest
from rich.console import Console

from tests.reporting.records import STUDENT, TEACHER, record
from tfaccel.reporting.tables import columns_of, make_table


def drawn(table, width=200):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_numbers_are_spelled_in_the_heading_s_unit():
    cells = {heading: spell(TEACHER) for heading, spell in columns_of([TEACHER])}

    assert cells == {
        "accuracy": "99.00%",
        "kB": "4,600.0",
        "kB gzipped": "4,200.0",
        "ms": "1.500",
        "ms p95": "1.750",
        "ms 2 threads": "0.900",
        "peak MB": "0.3",
        "k parameters": "1,149.5",
        "M MACs": "14.30",
        "zeros": "0.0%",
    }


def test_columns_that_nothing_fills_are_left_out():
    bare = record(accuracy=None, latency_threads_ms=None)

    assert not {"accuracy", "ms 2 threads", "threads"} & {h for h, _ in columns_of([bare])}
    cells = {heading: spell(bare) for heading, spell in columns_of([bare, TEACHER])}
    assert cells["accuracy"] == "-"


def test_different_numbers_of_threads_share_a_column():
    headings = [h for h, _ in columns_of([TEACHER, record(threads=4)])]

    assert "ms threads" in headings


def test_the_table_has_a_row_for_each_record():
    text = drawn(make_table([TEACHER, STUDENT], title="digits"))

    lines = text.splitlines()
    assert lines[0].strip() == "digits"
    assert sum("teacher" in line for line in lines) == 1
    assert "98.00%" in next(line for line in lines if "student" in line)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_loses_columns_but_no_digit(width):
    text = drawn(make_table([TEACHER, STUDENT], width=width), width)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for wanted in ("accuracy", "99.00%", "4,600.0", "1.500"):
        assert wanted in text
