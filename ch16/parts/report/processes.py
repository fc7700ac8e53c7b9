"""Scripts in processes of their own that start at once: forked from one that has imported vLLM, and done nothing else.

Importing vLLM takes 10 to 30 seconds on two cores, more than many scripts measure. The process that is forked is
multiprocessing's fork server. On a GPU it imports nothing: a fork cannot use a GPU that its parent has touched.
"""

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from common.gpu import detect
from common.results import ROOT


def fork_server() -> ForkServerContext:
    """The server's context. The server is started, once per process."""
    context = multiprocessing.get_context("forkserver")
    if detect().device == "cpu":
        context.set_forkserver_preload(["ch16.parts.report.preloaded"])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with patch.dict(os.environ, PYTHONPATH=path):  # for the server and its scripts, not for this process
        forkserver.ensure_running()
    return context


def start(context: ForkServerContext, words: Sequence[str], output: Path, errors: Path) -> BaseProcess:
    """Start a script in the repository's folder.

    Args:
        words: the script's path and its flags.
        output: the file that gets what it prints.
        errors: the file that gets what it says on stderr; the same one for both together.
    """
    process = context.Process(target=_run, args=(list(words), output, errors))
    process.start()
    return process


def _run(words: Sequence[str], output: Path, errors: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, flags, 0o644), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115 (until it ends)
    os.chdir(ROOT)
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception:  # as Python itself would; multiprocessing names its own process first
        traceback.print_exc()
        sys.exit(1)
