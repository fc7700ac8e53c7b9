import json

import pytest

from common import results
from common.gpu import Machine
from common.results import Column, Report, format_table, judge, not_applicable

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)
COLUMNS = (Column("name", "name"), Column("value", "tok/s", ",.1f"), Column("missing", "GPU %", ".0f"))
ROWS = [{"name": "a", "value": 1234.56}, {"name": "longer", "value": 7.0}]


def test_table_is_aligned_and_dashes_what_is_missing():
    assert format_table(ROWS, COLUMNS).splitlines() == [
        "name      tok/s  GPU %",
        "a       1,234.6  -",
        "longer      7.0  -",
    ]


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
