"""Traces of real traffic: arrival times, lengths of prompts and answers."""

import csv
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from common.cli import CannotRun

# The first 216 requests of the conversation trace of Azure's LLM inference dataset 2023 (Splitwise, arXiv 2311.18677),
# https://github.com/Azure/AzurePublicDataset, licensed CC-BY 4.0 by Microsoft.
BUNDLED = Path(__file__).with_name("azure_conv_2023.csv")
BLOCK_TOKENS = 512  # of a hash id in Mooncake's traces


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    tokens_in: int
    tokens_out: int
    blocks: tuple[Hashable, ...] = ()  # ids of its prompt's blocks; prompts that begin alike share the first ones


def read_trace(path: str | Path, in_order: bool = False) -> list[Arrival]:
    """Read a trace, in order of arrival, from 0 s on; `in_order` refuses one that goes back in time.

    Two formats: Azure's (CSV: TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's (JSON lines: timestamp in ms,
    input_length, output_length, hash_ids). CannotRun: no such file, neither format, or not in order.
    """
    try:
        with open(path, newline="") as file:
            if str(path).endswith(".csv"):
                parsed = [_azure(row) for row in csv.DictReader(file)]
            else:
                parsed = [_mooncake(json.loads(line)) for line in file if line.strip()]
        for one in parsed:
            if one.tokens_in < 1 or one.tokens_out < 1 or not math.isfinite(one.at_s):
                raise ValueError(f"a request of {one.tokens_in} tokens in and {one.tokens_out} out at {one.at_s} s")
    except OSError as error:
        raise CannotRun(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CannotRun(f"{path} is no trace of Azure's (.csv) or Mooncake's (.jsonl) form: {error}") from None
    if len(parsed) < 2:
        raise CannotRun(f"{path} holds {len(parsed)} requests, at least 2 are needed")
    for number, (earlier, later) in enumerate(pairwise(parsed), start=2):
        if in_order and later.at_s < earlier.at_s:
            back_s = earlier.at_s - later.at_s
            raise CannotRun(f"{path} goes back in time: request {number} comes {back_s:,.3f} s before the one above it")
    parsed.sort(key=lambda arrival: arrival.at_s)
    return [replace(arrival, at_s=arrival.at_s - parsed[0].at_s) for arrival in parsed]


def _azure(row: dict[str, str]) -> Arrival:
    whole, _, fraction = row["TIMESTAMP"].partition(".")  # seven digits: more than datetime reads
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction[:9].rstrip('Z') or 0}")
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(row: dict) -> Arrival:
    blocks = tuple(map(int, row["hash_ids"]))
    return Arrival(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), blocks)


def shrink(trace: Sequence[Arrival], factor: float, max_tokens: int) -> list[Arrival]:
    """Lengths times `factor`, at least 1 in and 2 out, prompts cut so that a request has at most `max_tokens`."""
    smaller = []
    for arrival in trace:
        tokens_out = max(2, min(round(arrival.tokens_out * factor), max_tokens // 2))
        tokens_in = max(1, min(round(arrival.tokens_in * factor), max_tokens - tokens_out))
        smaller.append(replace(arrival, tokens_in=tokens_in, tokens_out=tokens_out))
    return smaller


def at_rate(trace: Sequence[Arrival], requests: int, rate: float) -> list[Arrival]:
    """The first `requests` of a trace, repeated where it is shorter, at `rate` requests/s: bursts stay bursts."""
    period = trace[-1].at_s * len(trace) / (len(trace) - 1)  # so that the next round begins a gap after the last
    longer = [
        replace(arrival, at_s=arrival.at_s + round_ * period, blocks=tuple((block, round_) for block in arrival.blocks))
        for round_ in range(-(-requests // len(trace)))
        for arrival in trace
    ][:requests]
    speed = longer[-1].at_s * rate / (requests - 1) if requests > 1 and longer[-1].at_s else 1.0
    return [replace(arrival, at_s=arrival.at_s / speed) for arrival in longer]


def mean_lengths(trace: Sequence[Arrival]) -> tuple[float, float]:
    """Tokens in and out of a request, on average."""
    return fmean(arrival.tokens_in for arrival in trace), fmean(arrival.tokens_out for arrival in trace)


def write_timed_trace(trace: Sequence[Arrival], path: Path, block_tokens: int) -> None:
    """The file that vLLM's benchmark client replays (dataset `timed_trace`, blocks of `block_tokens`)."""
    with open(path, "w") as file:
        for number, arrival in enumerate(trace):
            count = -(-arrival.tokens_in // block_tokens)
            blocks = [str(block) for block in arrival.blocks[:count]]
            blocks += [f"{number}/{i}" for i in range(len(blocks), count)]  # shared with no other request
            line = {"timestamp": arrival.at_s, "input_length": arrival.tokens_in, "output_length": arrival.tokens_out}
            file.write(json.dumps(line | {"hash_ids": blocks}) + "\n")
