import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common.models import ROOT


def status_of(main):
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


def test_exit_status(capsys):
    def fails():
        raise cli.CannotRun("the reason")

    def interrupted():
        raise KeyboardInterrupt

    assert status_of(lambda: None) == 0 and status_of(lambda: 3) == 3
    assert status_of(fails) == 1 and status_of(interrupted) == 130
    assert capsys.readouterr().err == "error: the reason\ninterrupted\n"


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, BrokenPipeError])  # a pipe that is not the output
def test_a_real_bug_is_not_hidden(error):
    def breaks():
        raise error

    with pytest.raises(error):
        cli.run(breaks)


@pytest.mark.parametrize(
    ("name", "base", "line"),
    [
        ("EngineDeadError", Exception, "error: the engine died (VLLM_LOGGING_LEVEL=INFO shows its log)\n"),
        ("OutOfMemoryError", RuntimeError, "error: out of GPU memory: CUDA out of memory. Choose smaller sizes.\n"),
    ],
)
def test_what_torch_and_vllm_raise_is_one_line(capsys, name, base, line):
    """By name: their classes are not imported for it."""

    def breaks():
        raise type(name, (base,), {})("CUDA out of memory.\nmore")

    assert status_of(breaks) == 1 and capsys.readouterr().err == line


def test_the_names_are_torchs_and_vllms():
    from torch import OutOfMemoryError

    assert OutOfMemoryError.__name__ == "OutOfMemoryError"
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations  # importing it would take seconds
    assert "class EngineDeadError(" in (Path(folder) / "v1" / "engine" / "exceptions.py").read_text()


@pytest.mark.parametrize(
    "main",
    [
        "lambda: print('kept until the end')",
        "lambda: print('at once', flush=True)",
        "lambda: print('long ' * 100_000)",
        "cli.standard_parser('doc').print_help",
        "lambda: cli.standard_parser('doc').parse_args(['--help'])",
    ],
)
def test_nobody_reads_the_output(main):
    """As in `script | head`: no message, and the status of a process that SIGPIPE ended."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", f"from common import cli; cli.run({main})"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, env=buffered, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_standard_flags_and_their_defaults():
    parser = cli.standard_parser("doc", model_help="a model")
    args = parser.parse_args([])
    expected = {"quick": False, "device": "auto", "model": "auto", "seed": 0, "json": None, "plot": None, "wide": False}
    assert vars(args) == expected
    assert "(default: auto)" in parser.format_help() and "None" not in parser.format_help()
    assert not hasattr(cli.standard_parser("doc").parse_args([]), "model")


def test_a_seed_below_zero_is_a_usage_error(capsys):
    parser = cli.standard_parser("doc")
    assert status_of(lambda: parser.parse_args(["--seed", "-1"])) == 2
    assert "argument --seed: must be at least 0, not -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (cli.positive_int, "0"),
        (cli.non_negative_int, "-1"),
        (cli.positive_float, "0"),
        (cli.positive_float, "nan"),
        (cli.non_negative_float, "-0.1"),
        (cli.non_negative_float, "nan"),
        (cli.non_negative_float, "inf"),
    ],
)
def test_numbers_out_of_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)
    assert kind("5") == 5


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("a\nb"), "a"), (ValueError("\n  c \nd"), "c"), (KeyError(), "KeyError")]
)
def test_an_exception_in_one_line(error, line):
    assert cli.first_line(error).strip() == line


def test_files_are_found_unwritable_before_they_are_written(tmp_path):
    (tmp_path / "file").write_text("")
    for good in (tmp_path / "file", tmp_path / "new" / "folder" / "x.json"):
        assert cli.output_file(str(good)) == str(good)
    for bad in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot write to"):
            cli.output_file(str(bad))
    assert cli.png_file(str(tmp_path / "x.png"))
    with pytest.raises(argparse.ArgumentTypeError, match=r"must end in \.png"):
        cli.png_file(str(tmp_path / "x.jpg"))
