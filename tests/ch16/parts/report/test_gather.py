import json
import textwrap

import pytest

from ch16.parts.report import gather
from common.cli import CannotRun
from common.results import CLAIMS

CONTENT = {"script": "ch16/alpha.py", "date": "2026-01-02", "machine": {}, "settings": {}, "tables": {}, "claims": []}
WRITES = f"""
    import argparse, pathlib
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", required=True)
    parser.add_argument("--json"), parser.add_argument("--plot")
    args = parser.parse_args()
    pathlib.Path(args.json).write_text({json.dumps(CONTENT)!r})
    pathlib.Path(args.plot).write_bytes(b"png")
"""


def script(folder, name, text):
    file = folder / f"{name}.py"
    file.write_text(textwrap.dedent(text))
    return file


def test_every_claim_has_one_script():
    assert sorted(claim for claims in gather.CHAPTER.values() for claim in claims) == sorted(CLAIMS)


def test_a_folder_is_read_with_the_pictures_beside_its_files(tmp_path):
    (tmp_path / "alpha.json").write_text(json.dumps(CONTENT))
    (tmp_path / "alpha_large.json").write_text(json.dumps(CONTENT | {"seconds": 12.5}))
    (tmp_path / "alpha_large.png").write_bytes(b"png")
    first, second = gather.read(tmp_path)
    assert (first.name, first.script, first.picture, first.seconds) == ("alpha", "alpha", None, None)
    assert (second.name, second.script, second.picture, second.seconds) == ("alpha_large", "alpha", b"png", 12.5)


@pytest.mark.parametrize(
    ("text", "missing"), [("[]", "JSON object"), ("{", "JSON object"), ('{"script": "a.py"}', "claims, date")]
)
def test_a_file_that_no_script_wrote_is_named(tmp_path, text, missing):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CannotRun, match=rf"bad\.json is not a results file: it has no {missing}"):
        gather.read(tmp_path)


def test_a_folder_without_results_says_how_they_come_there(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CannotRun, match=r"no results in .*: scripts write them there with --json"):
            gather.read(folder)


@pytest.mark.slow
def test_scripts_run_in_their_quick_form(tmp_path, capsys):
    scripts = [
        script(tmp_path, "alpha", WRITES),
        script(
            tmp_path, "refuses", "import sys; print('0 of 3 done'); sys.exit('error: no GPU found: try --device cpu')"
        ),
        script(tmp_path, "breaks", "import sys; print('a'); 1 / 0"),
        script(tmp_path, "forgets", ""),
        script(tmp_path, "mute", "raise SystemExit(3)"),
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "refuses.json").write_text(json.dumps(CONTENT))  # of an earlier run, which went well
    outcomes = list(gather.run_all(scripts, folder))
    assert [outcome.name for outcome in outcomes] == ["alpha", "refuses", "breaks", "forgets", "mute"]
    good, *bad = outcomes
    assert good.content == CONTENT and good.picture == b"png" and good.seconds > 0 and not good.error
    assert [outcome.error.split("/")[-1] for outcome in bad] == [
        "no GPU found: try --device cpu",
        "ZeroDivisionError: division by zero",
        "forgets.json is not a results file: it has no JSON object",
        "it said nothing",
    ]
    assert all(outcome.content is None and outcome.picture is None for outcome in bad)
    assert not (folder / "refuses.json").exists()
    assert "0 of 3 done" in (folder / "refuses.log").read_text()
    progress = capsys.readouterr().err.splitlines()
    assert progress[0].startswith(" 1/5  alpha.py ... ") and progress[1].endswith("failed: " + bad[0].error)


@pytest.mark.slow
def test_a_script_that_hangs_is_interrupted_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gather, "LIMIT_S", 3)
    monkeypatch.setattr(gather, "CLEAN_UP_S", 0.5)
    tidy = script(tmp_path, "tidy", "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('tidied up')")
    deaf = script(tmp_path, "deaf", "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)")
    for outcome in gather.run_all([tidy, deaf], tmp_path):
        assert outcome.error == "not done after 3 s" and outcome.content is None
    assert (tmp_path / "tidy.log").read_text() == "tidied up\n"
