"""vLLM profiled by its own switch; its trace is read like torch's."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.inference_profiling.attribution import Profile
from ch16.parts.inference_profiling.trace import Event, Trace, read_trace
from common.cli import CannotRun, first_line
from common.engine import start_engine
from common.load import random_prompts, send_wave
from common.timing import percentile

if TYPE_CHECKING:
    from vllm import LLM

# How vLLM's worker names the range of a step: requests (and tokens) of prefill, then of decode.
STEP = re.compile(r"execute_context_(\d+)\(\d+\)_generation_(\d+)\(\d+\)")


def start_profiled_engine(settings: Mapping[str, object], folder: str, stacks: bool) -> tuple["LLM", float]:
    """An engine whose profiler is ready but off, and the seconds that the start took."""
    try:
        from vllm.config import ProfilerConfig
    except ImportError as error:
        raise CannotRun(f"vLLM cannot be imported: {first_line(error)}; run: make install") from None
    config = ProfilerConfig(
        profiler="torch",
        torch_profiler_dir=folder,
        torch_profiler_with_stack=stacks,
        torch_profiler_record_shapes=True,
        torch_profiler_dump_cuda_time_total=False,
    )
    return start_engine({**settings, "profiler_config": config})


def profile_engine(
    llm: "LLM", folder: str, batch: int, prompt_tokens: int, steps: int, vocab_size: int, seed: int
) -> tuple[Profile, dict[str, float], Path]:
    """Profile a wave of `batch` prompts: prefill, and `steps` decode steps.

    Also the seconds of both phases without the profiler, and the file of the trace. All seconds are the client's.
    CannotRun if the engine wrote no trace, or one in which the steps cannot be found.
    """

    def wave(round_: int) -> dict[str, float]:
        """Seconds to the last first token, and of the decode steps after it."""
        prompts = random_prompts(batch, prompt_tokens, vocab_size, seed + round_)
        # Two more tokens: the first comes from the prefill, and a step ends where the next one begins.
        sent, arrived = send_wave(llm, prompts, steps + 2)
        first = max(tokens[0] for tokens in arrived)
        return {"prefill": first - min(sent), "decode": max(tokens[steps] for tokens in arrived) - first}

    waves = [wave(round_) for round_ in tqdm(range(5), desc="waves", leave=False, disable=None)]
    # The first two compile, and fill caches.
    seconds = {phase: percentile([took[phase] for took in waves[2:]], 50) for phase in ("prefill", "decode")}
    try:
        llm.start_profile()
        profiled_seconds = wave(5)
        with contextlib.redirect_stdout(io.StringIO()):  # on a CPU the worker prints a table of its own
            llm.stop_profile()
    except Exception as error:  # whatever the engine's process reports
        raise CannotRun(f"vLLM could not profile: {first_line(error)}") from None
    path, trace = _worker_trace(Path(folder))
    return Profile(trace, step_spans(trace, batch, steps), profiled_seconds), seconds, path


def _worker_trace(folder: Path) -> tuple[Path, Trace]:
    files = sorted(folder.glob("*.pt.trace.json*"))
    for path in files:  # the engine's front end writes a trace as well
        trace = read_trace(path)
        if any(STEP.search(event.name) for event in trace.ranges):
            return path, trace
    raise CannotRun(f"vLLM wrote {len(files)} traces, and none has the steps of a worker")


def step_spans(trace: Trace, batch: int, steps: int) -> dict[str, Event]:
    """ "prefill" and "decode" (`steps` steps), each from the start of a step to the start of a later one.

    Ranges of the device count if there are any, because the host runs ahead. CannotRun if there is no prefill, fewer
    than `steps` + 1 decode steps of the whole `batch` after it, or a step of both.
    """
    ranges = _steps(trace.device_ranges) or _steps(trace.ranges)
    prompts = [event for event, prefill, _ in ranges if prefill]
    answers = [event for event, prefill, decode in ranges if not prefill and decode == batch]
    if mixed := [event.name for event, prefill, decode in ranges if prefill and decode]:
        raise CannotRun(f"vLLM mixed prefill and decode in a step ({mixed[0]}): take a smaller --batch")
    if not prompts or len(answers) <= steps or prompts[-1].start > answers[0].start:
        found = f"{len(prompts)} prefill and then {len(answers)} decode steps"
        raise CannotRun(f"the trace has {found}; 1 and {steps + 1} are needed")
    edges = {"prefill": (prompts[0], answers[0]), "decode": (answers[0], answers[steps])}
    return {name: Event(name, first.start, after.start, first.thread) for name, (first, after) in edges.items()}


def _steps(ranges: Sequence[Event]) -> list[tuple[Event, int, int]]:
    """Steps by start, each with its numbers of requests in prefill and in decode."""
    found = ((event, STEP.search(event.name)) for event in ranges)
    return [(event, int(match[1]), int(match[2])) for event, match in found if match]
