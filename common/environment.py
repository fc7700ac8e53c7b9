"""Run this program where its packages are: in the Python that started it, else in the repository's `.venv`.

A script of the chapter begins with

    runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

before it imports anything that `make install` brings, so `python3 ch16/fp8_quant.py` works from any folder with the
system's Python. `python3 -m common.results` comes here by `common/__init__.py`. This file imports nothing but the
standard library, and old versions of Python can read it.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST = (3, 11)
# What nearly every script needs. (Both builds of vLLM are imported as vllm.)
PACKAGES = ("torch", "vllm", "transformers", "numpy", "psutil", "prometheus_client", "requests", "tqdm")


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that this repository imports and that are not installed: a script can print `--help`."""

    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201, D102 (importlib's signature)
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        importer = Path(frame.f_code.co_filename).resolve()
        if ROOT not in importer.parents or VENV in importer.parents:  # another package, trying what is optional to it
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):  # noqa: ANN001, ANN201, D102
        from unittest.mock import MagicMock  # any attribute of it can be called, subclassed, or used as a decorator

        return MagicMock(name=spec.name)

    def exec_module(self, module):  # noqa: ANN001, ANN201, D102
        pass


def starts_here() -> bool:
    """Whether the running program is a file of this repository: no other program is started again in `.venv`."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return sys.argv[0] == "-m" or (file is not None and ROOT in Path(file).resolve().parents)


def say(message: str) -> None:
    """Print one line on stderr, dim on a terminal."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print("\033[2m" + message + "\033[0m" if dim else message, file=sys.stderr, flush=True)


def enter() -> None:
    """Return if this Python has the packages; else become the same program in `.venv`, or end with one line."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing or not starts_here():
        return
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        say("running in " + str(VENV))
        try:  # the same process goes on: working folder, streams, signals and exit status stay as they are
            os.execv(str(python), [str(python)] + sys.orig_argv[1:])  # noqa: RUF005 (as old versions read it)
        except OSError as error:
            sys.exit("error: cannot run " + str(python) + ": " + str(error.strerror) + "; run: make clean install")
    if sys.version_info < OLDEST:
        sys.exit("error: Python 3.11 or newer is needed, this is {}.{}".format(*sys.version_info))
    what = "not installed: " + ", ".join(missing) + "; run: make install"
    if Path.cwd() != ROOT:
        what += " (in " + str(ROOT) + ")"
    if not {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit("error: " + what)
    say(what)
    sys.meta_path.append(Placeholders())


enter()
