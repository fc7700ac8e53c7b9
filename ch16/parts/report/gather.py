"""What the chapter's scripts found: run each of them, or read what earlier runs have written."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from ch16.parts.report.processes import fork_server, start
from common.cli import CannotRun

LIMIT_S = 600  # a script in its --quick form takes half a minute; on two cores without units for BF16 two
CLEAN_UP_S = 30
# The scripts of ch16/ in the chapter's order, with the claims that each measures.
CHAPTER = {
    "inference_serving": ("S1", "S2", "S3", "S4"),
    "fp8_quant": ("F1", "F2", "F3"),
    "moe_benchmark": ("M1", "M2"),
    "inference_profiling": ("P1",),
    "kv_cache_monitor": ("S5", "K1", "K2"),
    "request_scheduler": ("Q1",),
    "speculative_decoding": ("D1",),
    "continuous_batching": ("B1", "B2", "B3", "B4"),
    "load_balancer": ("L1",),
    "load_test": ("W1",),
    "monitoring": (),  # none; it checks its metrics against the clients
    "serving_layouts": (),  # S1 to S4 once more, on several GPUs
    "autoscaling": ("A1",),
}


@dataclass(frozen=True)
class ScriptRun:
    """One run of a script: what it has written, or why it has not."""

    name: str  # of its files: "fp8_quant_4096" for another run of "fp8_quant"
    script: str
    content: Mapping | None  # as common.results.Report writes it
    picture: bytes | None  # a PNG
    seconds: float | None  # None: nobody has noted it
    error: str = ""


def read(folder: Path) -> list[ScriptRun]:
    """Every results file of a folder, with the picture beside it, if there is one.

    Raises:
        CannotRun: there is no results file, or one is not as the scripts write it.
    """
    outcomes = [read_one(file) for file in sorted(folder.glob("*.json"))]
    if not outcomes:
        raise CannotRun(f"no results in {folder}: scripts write them there with --json {folder / 'NAME.json'}")
    return outcomes


def read_one(file: Path) -> ScriptRun:
    """A results file, with the picture beside it."""
    picture = file.with_suffix(".png")
    try:
        content = json.loads(file.read_text())
        missing = {"script", "date", "machine", "settings", "tables", "claims"} - content.keys()
    except (OSError, ValueError, AttributeError):
        missing = {"JSON object"}
    if missing:
        raise CannotRun(f"{file} is not a results file: it has no {', '.join(sorted(missing))}")
    return ScriptRun(
        name=file.stem,
        script=Path(content["script"]).stem,
        content=content,
        picture=picture.read_bytes() if picture.exists() else None,
        seconds=content.get("seconds"),
    )


def run_all(scripts: list[Path], folder: Path) -> Iterator[ScriptRun]:
    """Run scripts one after the other in their --quick form, with progress on stderr.

    Args:
        scripts: their files.
        folder: where JSON, pictures and what they print go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = fork_server()
    for number, script in enumerate(scripts, 1):
        print(f"{number:2}/{len(scripts)}  {script.name} ... ", end="", file=sys.stderr, flush=True)
        outcome = run_one(server, script, folder)
        ended = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.0f} s"
        print(ended, file=sys.stderr, flush=True)
        yield outcome


def run_one(server: ForkServerContext, script: Path, folder: Path) -> ScriptRun:
    """Run a script in its --quick form. What an earlier run has left in the folder is gone, whatever happens."""
    results, picture, log = (folder / f"{script.stem}{suffix}" for suffix in (".json", ".png", ".log"))
    for file in (results, picture, log):
        file.unlink(missing_ok=True)
    words = [str(script), "--quick", "--json", str(results), "--plot", str(picture)]
    started = time.perf_counter()
    process = start(server, words, log, log)
    if ends(process, LIMIT_S):
        error = "" if process.exitcode == 0 else last_words(log)
    else:
        error = f"not done after {LIMIT_S} s"
    seconds = time.perf_counter() - started
    if not error:
        try:
            return replace(read_one(results), seconds=seconds)
        except CannotRun as unreadable:
            error = str(unreadable)
    return ScriptRun(script.stem, script.stem, None, None, seconds, error)


def ends(process: BaseProcess, limit_s: float) -> bool:
    """Wait for a script: whether it ends in time. If not, it is interrupted, so that it ends what it has started, and
    killed when it does not."""
    process.join(limit_s)
    if process.exitcode is not None:
        return True
    os.kill(process.pid, signal.SIGINT)
    process.join(CLEAN_UP_S)
    process.kill()
    process.join()
    return False


def last_words(log: Path) -> str:
    """Why a script failed, in one line: its own `error:`, else the last thing that it printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
