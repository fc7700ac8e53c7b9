"""What the steps of the real engine cost: measured in waves and checked against the simulation, or read from a file."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ch16.parts.autoscaling.records import as_requests
from ch16.parts.autoscaling.simulate import Pool, simulate_fixed
from common.cli import CannotRun
from common.costs import Costs, TimedStep, check_rows, timed_steps
from common.load import SteppedEngine, exactly, random_prompts
from common.timing import percentile
from common.traces import Arrival

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

TOKENS_OUT = 16  # of each answer


def timed_wave(
    llm: "LLM", count: int, tokens_in: int, vocab_size: int, seed: int
) -> tuple[list[TimedStep], list[float], float]:
    """`count` requests at once. Returns the steps, each request's time to first token, and output tokens/s."""
    engine, sampling = SteppedEngine(llm), exactly(TOKENS_OUT)
    for i, prompt in enumerate(random_prompts(count, tokens_in, vocab_size, seed)):
        engine.add(str(i), prompt, sampling)
    while engine.running:
        engine.step()
    sent, arrived = engine.timeline.sent, engine.timeline.arrived
    seconds = max(times[-1] for times in arrived.values()) - sent["0"]
    steps = timed_steps(engine.timeline, dict.fromkeys(sent, tokens_in))
    return steps, [arrived[name][0] - sent[name] for name in sent], count * TOKENS_OUT / seconds


def measure_costs(llm: "LLM", slots: int, tokens_in: int, rounds: int, vocab_size: int, seed: int) -> Costs:
    """What a step costs, from waves of one request, of half the slots and of all of them."""
    timed_wave(llm, slots, tokens_in, vocab_size, seed)  # warm-up
    counts = [1, max(1, slots // 2), slots] * rounds
    waves = [timed_wave(llm, n, tokens_in, vocab_size, seed + i) for i, n in enumerate(counts, start=1)]
    return Costs.fit([step for steps, _, _ in waves for step in steps])


def check_simulation(llm: "LLM", costs: Costs, slots: int, tokens_in: int, vocab_size: int, seed: int) -> list[dict]:
    """Rows of `check_columns`: twice as many requests as slots, all at once."""
    _, real_s, real_rate = timed_wave(llm, 2 * slots, tokens_in, vocab_size, seed)
    requests = as_requests([Arrival(0.0, tokens_in, TOKENS_OUT)] * (2 * slots))
    outcome = simulate_fixed(requests, Pool(costs, slots, 1, 0.0), 1)
    figures = {
        "TTFT P50 s": (percentile(real_s, 50), percentile(outcome.ttft_s, 50)),
        "TTFT max s": (max(real_s), float(outcome.ttft_s.max())),
        "output tok/s": (real_rate, len(requests) * TOKENS_OUT / float(outcome.requests["last_s"].max())),
    }
    return check_rows(figures)


def read_costs(path: str) -> tuple[str, Costs, int, float]:
    """From the JSON of an earlier run: the engine, its costs, its slots, and by how much lengths were multiplied.

    Raises:
        CannotRun: no such file, or it holds none.
    """
    try:
        row = json.loads(Path(path).read_text())["tables"]["costs"]["rows"][0]
        parts = [float(row[f"{part}_ms"]) / 1e3 for part in ("base", "sequence", "prompt_token")]
        source, slots, scale = str(row["source"]), int(row["slots"]), float(row["scale"])
    except OSError as error:
        raise CannotRun(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise CannotRun(f"{path} holds no costs; write such a file with: autoscaling.py --json FILE") from None
    if not (all(0 <= part < math.inf for part in parts) and parts[0] + parts[1] > 0 and slots > 0 < scale < math.inf):
        raise CannotRun(f"{path} holds costs that no engine has: {parts}, {slots} slots, lengths times {scale}")
    return source, Costs(*parts), slots, scale
