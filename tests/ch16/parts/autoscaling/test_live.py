import json

import pytest

from ch16.parts.autoscaling.live import read_costs
from common.cli import CannotRun
from common.costs import Costs

ROW = {"source": "x", "slots": 8, "scale": 0.5, "base_ms": 10, "sequence_ms": 1, "prompt_token_ms": 0.1}


def test_costs_of_an_earlier_run(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"tables": {"costs": {"rows": [ROW]}}}))
    assert read_costs(str(path)) == ("x", Costs(0.01, 0.001, 0.0001), 8, 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"tables": {"costs": {"rows": []}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"base_ms": "fast"}]}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"base_ms": -1}]}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"base_ms": float("nan")}]}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"base_ms": 0, "sequence_ms": 0}]}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"slots": 0}]}}}),
        json.dumps({"tables": {"costs": {"rows": [ROW | {"scale": 0}]}}}),
    ],
)
def test_files_that_hold_no_costs(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(CannotRun, match="costs") as error:
        read_costs(str(path))
    assert "\n" not in str(error.value)


def test_no_file():
    with pytest.raises(CannotRun, match="No such file"):
        read_costs("/nowhere.json")
