"""The flags every script has, and errors as one clear line.

Exit status: 0 when the script ran (a missed performance target is a result), 2 for a usage error,
1 for a failure, 130 when interrupted.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path


class CannotRun(Exception):
    """The script cannot go on here; the message says what is wrong and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's line breaks, show defaults, but not "(default: None)"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def standard_parser(doc: str, model_help: str | None = None) -> argparse.ArgumentParser:
    """Parser with the flags that all scripts spell alike.

    Args:
        doc: the script's docstring, shown above the flags.
        model_help: what `--model` accepts; None for a script that uses no model.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    common = parser.add_argument_group("flags of every script")
    common.add_argument("--quick", action="store_true", help="smaller sizes, for a classroom")
    common.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    if model_help is not None:
        common.add_argument("--model", default="auto", help=model_help)
    common.add_argument("--seed", type=int, default=0, help="for everything random")
    common.add_argument("--json", type=output_file, metavar="FILE", help="also write what was measured to FILE")
    common.add_argument("--plot", type=png_file, metavar="FILE.png", help="also draw it to FILE.png")
    return parser


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def output_file(text: str) -> str:
    """argparse type: a file that can be written, found out before anything is measured."""
    path = Path(text).absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text}")
    return text


def png_file(text: str) -> str:
    """argparse type: as `output_file`, for a picture."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, not {text}")
    return output_file(text)


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its status; an expected failure becomes one line on stderr, not a traceback."""
    try:
        status = main()
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; this module does not import torch
            raise
        print(f"error: out of GPU memory: {first_line(error)} Choose smaller sizes.", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
