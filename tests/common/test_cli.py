import argparse

import pytest

from common import cli


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


def test_a_real_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_standard_flags_and_their_defaults():
    parser = cli.standard_parser("doc", model_help="a model")
    args = parser.parse_args([])
    expected = {"quick": False, "device": "auto", "model": "auto", "seed": 0, "json": None, "plot": None}
    assert vars(args) == expected
    assert "(default: auto)" in parser.format_help() and "None" not in parser.format_help()
    assert not hasattr(cli.standard_parser("doc").parse_args([]), "model")


@pytest.mark.parametrize(("kind", "text"), [(cli.positive_int, "0"), (cli.non_negative_int, "-1")])
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
