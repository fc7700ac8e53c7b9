import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import results
from common.gpu import Machine
from common.results import Column, Report, format_table, judge, not_applicable

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)
COLUMNS = (Column("name", "name"), Column("value", "tok/s", ",.1f"), Column("missing", "GPU %", ".0f"))
ROWS = [{"name": "a", "value": 1234.56}, {"name": "longer", "value": 7.0}]


def test_table_is_aligned_and_dashes_what_is_missing():
    assert format_table(ROWS, COLUMNS).splitlines() == [
        "                 GPU",
        "name      tok/s  %",
        "a       1,234.6  -",
        "longer      7.0  -",
    ]


def test_headings_take_two_lines_where_they_are_wider_than_the_cells():
    columns = (Column("value", "time to first token ms", ".0f"), Column("name", "a"), Column("value", "x", ".0f"))
    assert format_table([{"value": 12, "name": "abc"}], columns).splitlines() == [
        "time to first",
        "     token ms  a     x",
        "           12  abc  12",
    ]


@given(st.lists(st.text("ab ", min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 10**9))
def test_a_heading_is_broken_where_it_is_shortest(titles, value):
    """Beside every way to break it."""
    columns = [Column("value", title, "d") for title in titles]
    head = format_table([{"value": value}], columns).splitlines()
    assert len(head) in (2, 3)
    widths = []
    for title in titles:
        words, cell = title.split(), len(str(value))
        ways = [max(len(" ".join(words[:i])), len(" ".join(words[i:]))) for i in range(1, len(words))]
        widths.append(max(cell, len(title)) if len(title) <= cell or not ways else max(cell, min(ways)))
    assert max(map(len, head)) == sum(widths) + 2 * (len(titles) - 1)


def test_details_are_printed_only_when_asked_for():
    columns = (Column("name", "name"), Column("value", "tok/s", ".1f", detail=True))
    assert "tok/s" not in format_table(ROWS, columns) and "1234.6" in format_table(ROWS, columns, wide=True)
    assert "tok/s" not in format_table(ROWS, columns, markdown=True)


@pytest.mark.parametrize(("columns", "longest"), [("60", 60), ("200", 100)])
def test_claims_and_titles_wrap_at_the_terminals_width(monkeypatch, capsys, columns, longest):
    monkeypatch.setenv("COLUMNS", columns)
    report = Report("script.py", CPU, {})
    report.table("load", "words " * 40, ROWS, COLUMNS)
    report.claims([not_applicable("S1", "reasons " * 30, "measured " * 30)])
    lines = capsys.readouterr().out.splitlines()
    assert longest - 10 < max(map(len, lines)) <= longest
    assert sum(line.count("words") for line in lines) == 40 and sum(line.count("reasons") for line in lines) == 30


def test_markdown():
    assert format_table(ROWS, COLUMNS, markdown=True).splitlines() == [
        "| name | tok/s | GPU % |",
        "|---|---:|---|",
        "| a | 1,234.6 | - |",
        "| longer | 7.0 | - |",
    ]


def test_verdicts():
    assert judge("S1", True, "1").verdict == "holds" and judge("S1", False, "1").verdict == "fails"
    assert not_applicable("S1", "no GPU").verdict == "n/a"
    with pytest.raises(ValueError):
        judge("Z9", True, "")


def test_report_prints_what_it_writes(tmp_path, capsys):
    file = tmp_path / "folder" / "out.json"
    report = Report("script.py", CPU, {"seed": 0})
    report.table("load", "Load", ROWS, COLUMNS)
    report.claims([judge("S2", True, "40 ms"), not_applicable("S1", "no GPU")])
    report.save(str(file))
    printed = capsys.readouterr().out
    assert "1,234.6" in printed and "n/a because no GPU" in printed
    content = json.loads(file.read_text())
    assert content["tables"]["load"]["rows"] == ROWS and content["settings"] == {"seed": 0}
    assert [c["verdict"] for c in content["claims"]] == ["holds", "n/a"]
    assert [p.name for p in file.parent.iterdir()] == ["out.json"], "no partial file stays behind"
    assert "| a | 1,234.6 | - |" in results.render(file, "load")
    assert "| S2 | P50 under 50 ms a token | 40 ms | holds |" in results.render(file, "claims")
    with pytest.raises(KeyError):
        results.render(file, "nothing")


def test_no_json_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Report("script.py", CPU, {}).save(None)
    assert not list(tmp_path.iterdir())
