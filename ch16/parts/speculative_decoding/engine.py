"""The real engine with speculation: waves of greedy requests, and what vLLM's metrics say of its drafts."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ch16.parts.speculative_decoding.drafts import LONGEST, SHORTEST
from ch16.parts.speculative_decoding.theory import Counts
from ch16.parts.speculative_decoding.waves import Wave, joined
from common.cli import CannotRun
from common.load import send_wave
from common.models import Model

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM, RequestOutput

METRIC = "vllm:spec_decode_num_"


def ngram_config(gamma: int) -> dict[str, object]:
    """vLLM's `speculative_config` for prompt lookup."""
    return {
        "method": "ngram",
        "num_speculative_tokens": gamma,
        "prompt_lookup_max": LONGEST,
        "prompt_lookup_min": SHORTEST,
    }


def draft_config(gamma: int, draft: Model) -> dict[str, object]:
    """vLLM's `speculative_config` for a smaller model."""
    return {"method": "draft_model", "model": draft.path, "num_speculative_tokens": gamma}


def eagle_config(gamma: int, head: Model, target: Model) -> dict[str, object]:
    """vLLM's `speculative_config` for an EAGLE head, which reads the target's hidden states (arXiv 2401.15077).

    Raises:
        CannotRun: the head is not one for this target.
    """
    reads = head.config.get("target_hidden_size") or head.config.get("hidden_size")
    if head.config.get("num_hidden_layers", 1) >= target.config["num_hidden_layers"]:
        raise CannotRun(f"{head.name} is no EAGLE head: it has as many layers as {target.name}")
    if reads != target.config["hidden_size"] or head.vocab_size != target.vocab_size:
        raise CannotRun(f"{head.name} is no EAGLE head for {target.name}: its hidden size or its vocabulary differs")
    described = " ".join([head.name, *head.config.get("architectures", [])]).lower()
    method = "eagle3" if "eagle3" in described else "eagle"
    return {"method": method, "model": head.path, "num_speculative_tokens": gamma}


def greedy_wave(llm: "LLM", prompts: Sequence[Sequence[int]], tokens_out: int) -> Wave:
    """All prompts at once, `tokens_out` tokens each."""
    wave = Wave([[] for _ in prompts])
    last = None  # when the last step ended, once all have begun

    def record(outputs: Sequence["RequestOutput"]) -> None:
        nonlocal last
        now = time.perf_counter()
        new = [len(output.outputs[0].token_ids) for output in outputs if output.outputs[0].token_ids]
        for output in outputs:
            wave.answers[int(output.request_id)].extend(output.outputs[0].token_ids)
        if new and last is not None:
            wave.steps.append((now - last, new))
        if new and all(wave.answers):
            last = now

    send_wave(llm, prompts, tokens_out, record, temperature=0.0)
    return wave


def batched(llm: "LLM", prompts: Sequence[Sequence[int]], batch: int, tokens_out: int) -> Wave:
    """All prompts `batch` at a time; repeated to fill a larger batch."""
    prompts = [prompts[i % len(prompts)] for i in range(max(batch, len(prompts)))]
    starts = range(0, len(prompts), batch)
    return joined(greedy_wave(llm, prompts[start : start + batch], tokens_out) for start in starts)


def read_counters(llm: "LLM") -> dict[str, int]:
    """vLLM's counters of speculation so far: drafts, accepted tokens, and drafts accepted to the last token."""
    found = {m.name.removeprefix(METRIC): m for m in llm.get_metrics() if m.name.startswith(METRIC)}
    return {
        "drafts": found["drafts"].value,
        "accepted": found["accepted_tokens"].value,
        "complete": found["accepted_tokens_per_pos"].values[-1],
    }


def counts_between(before: dict[str, int], after: dict[str, int], passes: int) -> Counts:
    """What became of the drafts between two readings of the counters."""
    return Counts(passes, **{name: after[name] - before[name] for name in before})


def logprob_gap(llm: "LLM", tokens: Sequence[int], one: int, other: int) -> float:
    """How much more likely one next token is than another; at least so much, if the other is not among the best."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    (output,) = llm.generate({"prompt_token_ids": list(tokens)}, sampling, use_tqdm=False)
    best = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
    least = min(best.values())
    return abs(best.get(one, least) - best.get(other, least))
