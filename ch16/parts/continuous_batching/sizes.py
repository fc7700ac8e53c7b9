"""How large should a batch be? Decode and prefill over growing batches, the knee, the roofline's crossover."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tqdm import tqdm

from ch16.parts.continuous_batching.drive import all_at_once, drive, random_requests
from common.gpu import Peak
from common.models import parameter_count
from common.results import Column, Verdict, judge, not_applicable
from common.timing import percentile

if TYPE_CHECKING:
    from vllm import LLM

DECODE_COLUMNS = (
    Column("batch", "sequences", "d"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("ms", "ms a token of each", ",.1f"),
    Column("power", "tok/s over ms", ",.1f"),
    Column("mark", ""),
)
PREFILL_COLUMNS = (
    Column("batch", "prompts", "d"),
    Column("tokens_per_s", "prompt tok/s", ",.0f"),
    Column("ms", "ms to first tokens", ",.1f"),
    Column("power", "tok/s over ms", ",.1f"),
    Column("mark", ""),
)
KNEE_COLUMNS = (
    Column("phase", "phase"),
    Column("knee", "batches of the knee"),
    Column("share", "of the most tok/s, %"),
    Column("chapter", "the chapter's"),
    Column("crossover", "compute-bound from batch", ",.0f"),
    Column("why", ""),
)
KNEE = 0.9  # of the highest power
CHAPTER = {"decode": ("B2", 32, 128), "prefill": ("B3", 1, 8)}


@dataclass(frozen=True)
class Sweep:
    """Batches to measure, tokens of each prompt; `repeats`: decode steps, or prefills, of which the median counts."""

    batches: tuple[int, ...]
    tokens: int
    repeats: int


def decode_rows(llm: "LLM", sweep: Sweep, vocab_size: int, seed: int) -> list[dict]:
    """Rows of DECODE_COLUMNS: the median step that gives every sequence one token and reads no prompt."""
    config, rows = llm.llm_engine.vllm_config, []
    budget, cache = config.scheduler_config.max_num_batched_tokens, config.cache_config
    for batch in tqdm(sweep.batches, desc="decode", leave=False, disable=None):
        # Where the prompts need several steps, the first sequences are so many tokens ahead of the last.
        ahead = math.ceil(batch * sweep.tokens / (budget - batch))
        length = sweep.repeats + ahead + 1
        if batch * math.ceil((sweep.tokens + length) / cache.block_size) >= cache.num_gpu_blocks:
            break  # more do not fit into the KV cache
        course = drive(llm, all_at_once(random_requests(sweep.tokens, [length] * batch, vocab_size, seed + batch)))
        ends = [end for end, count in course.steps if count == batch][: sweep.repeats + 1]
        rows.append(_row(batch, batch, percentile([later - end for end, later in pairwise(ends)], 50)))
    return marked(rows)


def prefill_rows(llm: "LLM", sweep: Sweep, vocab_size: int, seed: int) -> list[dict]:
    """Rows of PREFILL_COLUMNS: from sending the prompts to the first token of the last of them."""
    rows = []
    for batch in tqdm(sweep.batches, desc="prefill", leave=False, disable=None):
        seconds = []
        for repeat in range(sweep.repeats):
            requests = random_requests(sweep.tokens, [1] * batch, vocab_size, seed + 1000 * batch + repeat)
            course = drive(llm, all_at_once(requests))
            seconds.append(course.steps[-1][0] - min(course.sent.values()))
        rows.append(_row(batch, batch * sweep.tokens, percentile(seconds, 50)))
    return marked(rows)


def _row(batch: int, tokens: int, seconds: float) -> dict:
    return {"batch": batch, "tokens_per_s": tokens / seconds, "ms": 1e3 * seconds}


# ---- the knee ----


def marked(rows: Sequence[Mapping]) -> list[dict]:
    """Rows with their power, the knee marked.

    The knee is where throughput over latency is highest (power: Kleinrock, "Power and deterministic rules of thumb for
    probabilistic problems in computer communications", 1979). Where a step takes base + part * batch seconds that is at
    batch = base / part: what all share costs as much there as what each adds. It is flat there: the knee is all
    batches that come near.
    """
    power = [row["tokens_per_s"] / row["ms"] for row in rows]
    near = KNEE * max(power)
    return [{**row, "power": p, "mark": "<- knee" if p >= near else ""} for row, p in zip(rows, power, strict=True)]


def knee_of(rows: Sequence[Mapping]) -> tuple[Mapping, Mapping]:
    """The first and the last marked row."""
    knee = [row for row in rows if row["mark"]]
    return knee[0], knee[-1]


def size_claim(phase: str, rows: Sequence[Mapping]) -> Verdict:
    """B2 or B3: is a batch of the knee where the chapter says?"""
    name, low, high = CHAPTER[phase]
    first, last = knee_of(rows)
    text = f"knee at {_span(first['batch'], last['batch'])}, {_span(round(first['ms'], 1), round(last['ms'], 1))} ms"
    if last is rows[-1] and last["batch"] < low:
        return not_applicable(name, f"{last['batch']} was the largest batch measured: the knee may be beyond", text)
    return judge(name, any(row["mark"] and low <= row["batch"] <= high for row in rows), text)


def knee_row(phase: str, rows: Sequence[Mapping], cross: tuple[float | None, str]) -> dict:
    """A row of KNEE_COLUMNS."""
    _, low, high = CHAPTER[phase]
    first, last = knee_of(rows)
    most = max(row["tokens_per_s"] for row in rows)
    batch, why = cross
    return {
        "phase": phase,
        "knee": _span(first["batch"], last["batch"]),
        "share": _span(*(round(100 * row["tokens_per_s"] / most) for row in (first, last))),
        "chapter": _span(low, high),
        "crossover": None if batch is None or math.isinf(batch) else math.ceil(batch),
        "why": why,
    }


def _span(first: float, last: float) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


# ---- the roofline's crossover ----


def crossover(
    peak: Peak, config: Mapping[str, object], fp8: bool, kv_bytes: int, tokens: int, context: int
) -> tuple[float | None, str]:
    """The batch from which a step is limited by computing instead of memory, and how it is known; None if it is not.

    FLOPs: 2 a weight and token. Bytes: the weights once, and the keys and values of each sequence. Computing takes
    longer from FLOPs / peak FLOP/s = bytes / peak bytes/s on (Williams, Waterman and Patterson, "Roofline", 2009).
    Attention's own FLOPs are left out, as a few percent in short contexts.

    Args:
        fp8: weights and products in FP8 instead of BF16.
        kv_bytes: of a token in the KV cache.
        tokens: new ones of each sequence in a step: 1 in decode, the prompt in prefill.
        context: tokens of each sequence whose keys and values are read or written.
    """
    flops_per_s = peak.fp8_flops if fp8 else peak.bf16_flops
    parameters = parameter_count(config)
    if not flops_per_s or not peak.bytes_per_s:
        return None, "unknown: the limits of this machine are"
    if parameters is None or config.get("num_experts") or config.get("num_local_experts"):
        return None, "unknown: counted for dense Llama-like models only"
    itemsize = 1 if fp8 else 2
    ridge = flops_per_s / peak.bytes_per_s  # FLOPs a byte
    looked_up = 0 if config.get("tie_word_embeddings") else config["vocab_size"] * config["hidden_size"]
    weights = parameters - looked_up  # an embedding that is not the head, too, is looked up, not multiplied
    flops_each = 2 * weights * tokens
    bytes_each = context * kv_bytes
    if flops_each <= ridge * bytes_each:
        return math.inf, "never: the KV cache alone keeps the memory busy"
    return ridge * weights * itemsize / (flops_each - ridge * bytes_each), f"data sheet: {ridge:.0f} FLOPs a byte"
