"""The flags every script has, and errors as one clear line.

Exit status: 0 when the script ran (a missed performance target is a result), 2 for a usage error,
1 for a failure, 130 when interrupted, 141 when nobody reads the output (`script | head`).
"""

import argparse
import math
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what a shell reports of a process that a signal ends


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
    """Parser with the flags that all scripts spell alike; without `model_help`, there is no `--model`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    common = parser.add_argument_group("flags of every script")
    common.add_argument("--quick", action="store_true", help="smaller sizes, for a classroom")
    common.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    if model_help is not None:
        common.add_argument("--model", default="auto", help=model_help)
    common.add_argument("--seed", type=non_negative_int, default=0, help="for everything random")
    common.add_argument("--json", type=output_file, metavar="FILE", help="also write what was measured to FILE")
    common.add_argument("--wide", action="store_true", help="print all columns of the tables, however wide")
    common.add_argument("--plot", type=png_file, metavar="FILE.png", help="also draw it to FILE.png")
    return parser


def _number(name: str, kind: type, fits: Callable[[float], bool], bound: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value

    parse.__name__ = name  # argparse says it of a text that is no number
    return parse


# argparse types. No number is infinite.
positive_int = _number("positive_int", int, lambda value: value >= 1, "at least 1")
non_negative_int = _number("non_negative_int", int, lambda value: value >= 0, "at least 0")
positive_float = _number("positive_float", float, lambda value: 0 < value < math.inf, "above 0")
non_negative_float = _number("non_negative_float", float, lambda value: 0 <= value < math.inf, "at least 0")


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
        try:
            status = _status(main)
        finally:
            sys.stdout.flush()  # while a reader that has left can still be dealt with
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _nobody_reads(stream)]
        if not unread:  # another pipe
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:  # what it still holds is written when Python ends
            os.dup2(nowhere, stream.fileno())
        status = UNREAD
    sys.exit(status or 0)


def _status(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        what = type(error).__name__  # torch's and vLLM's: this module imports neither
        if what == "OutOfMemoryError":
            print(f"error: out of GPU memory: {first_line(error)} Choose smaller sizes.", file=sys.stderr)
        elif what == "EngineDeadError":
            print("error: the engine died (VLLM_LOGGING_LEVEL=INFO shows its log)", file=sys.stderr)
        else:
            raise
        return 1


def _nobody_reads(stream: TextIO) -> bool:
    """Whether it is a pipe that its reader has closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors and hang-ups are reported without being asked for
        return bool(poll.poll(0))
    except (OSError, ValueError):  # no file, or closed
        return False
