"""Measure what the planner needs on this machine, and run the whole model to check its prediction."""

import gc
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from ch16.parts.moe_benchmark.baseline import vllm_dispatch
from ch16.parts.moe_benchmark.decoder import DecoderLayer, sample, seconds_of
from ch16.parts.moe_benchmark.dispatch import steps_on
from ch16.parts.moe_benchmark.experts import Dispatch, Experts
from ch16.parts.moe_benchmark.parallel import busiest_part
from ch16.parts.moe_benchmark.plain import sort_rows
from ch16.parts.moe_benchmark.planner import Link, Parts, Workload, fits, memory_per_rank, predict
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.routing import make_routing
from common import models
from common.cli import CannotRun, first_line
from common.device import torch_dtype
from common.engine import engine_args, start_engine, stop_engine
from common.gpu import Machine
from common.load import random_prompts, send_wave, summarise


def planning_bytes(preset: Preset, workload: Workload, itemsize: int) -> float:
    """Bytes that one device needs beside a layer's weights: its KV cache, the embedding, logits in float32."""
    cache = workload.sequences * workload.context * itemsize * preset.kv_values_per_token / preset.layers
    return cache + preset.vocab * (itemsize * preset.hidden + 4 * 3 * workload.sequences)


class Capacity:
    """Times one decoder layer and the head of a preset on one device, for any number of ranks.

    Ranks are emulated: this device does what the busiest of N ranks would do. Exchange is computed from `link`. Experts
    are computed by vLLM's kernel, which predicts the engine best, or where there is none, by `dispatch`.
    """

    def __init__(
        self, preset: Preset, dispatch: Dispatch, machine: Machine, link: Link, repeats: int, seed: int
    ) -> None:
        self.preset, self.machine, self.link, self.repeats, self.seed = preset, machine, link, repeats, seed
        self.device, self.dtype = machine.device, torch_dtype(machine)
        self.experts = Experts.random(preset.sizes, self.device, self.dtype)
        vllms, _ = vllm_dispatch(self.experts)
        self.dispatch: Dispatch = vllms or dispatch
        self.dispatch_name = "vLLM's fused experts" if vllms else "grouped dispatch"
        self.embedding = self._random(preset.vocab, preset.hidden) * 0.02

    def parts(self, workload: Workload, ranks: int, phase: str) -> Parts:
        """Seconds of a "prefill" or "decode" step's parts on the busiest of `ranks` ranks."""
        p, layer = self.preset, DecoderLayer(self.preset, self.experts, self.dispatch)
        if phase == "prefill":
            sequences = workload.prefill_sequences(ranks)
            x = self._random(sequences, min(workload.tokens_in, workload.chunk), p.hidden)
            attention = partial(layer.prefill_attention, x)
        else:
            sequences = workload.rank_sequences(ranks)
            x = self._random(sequences, p.hidden)
            attention = partial(layer.decode_attention, x, layer.cache(sequences, workload.context))
        flat = x.view(-1, p.hidden)
        experts = self._experts_work(layer, flat, ranks)
        repeats = self.repeats if phase == "decode" else max(3, self.repeats // 4)
        last = flat[:sequences]
        return Parts(
            layer=seconds_of(lambda: experts(attention().view(-1, p.hidden)), self.device, repeats),
            experts=seconds_of(lambda: experts(flat), self.device, repeats),
            exchange=self.link.exchange_seconds(len(flat) * p.top_k, p.hidden, ranks),
            head=seconds_of(lambda: sample(last, self.embedding), self.device, repeats),
        )

    def _experts_work(self, layer: DecoderLayer, x: torch.Tensor, ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
        p = self.preset
        if ranks == 1:
            return lambda hidden: layer.apply_experts(hidden, layer.choose(hidden))
        routing = make_routing("uniform", len(x) * ranks, p.experts, p.top_k, self.seed, self.device)
        _, tokens, local = busiest_part(routing, p.experts, ranks)
        rows = self._random(len(tokens), p.hidden)
        shard = self.experts.part(0, p.experts // ranks)
        home = make_routing("uniform", len(x), p.experts, p.top_k, self.seed, self.device)
        places, _ = sort_rows(home.experts, p.experts)
        returned = self._random(places.numel(), p.hidden)

        def work(hidden: torch.Tensor) -> torch.Tensor:
            layer.choose(hidden)
            self.dispatch(rows, shard, local)
            return hidden + steps_on(hidden.device).combine(returned, places, home.weights)

        return work

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def plan_row(self, workload: Workload, ranks: int) -> dict:
        """One row of PLAN_COLUMNS."""
        memory = memory_per_rank(self.preset, workload, ranks, self.machine.itemsize)
        prefill, decode = (self.parts(workload, ranks, phase) for phase in ("prefill", "decode"))
        enough = fits(memory, self.machine.memory_bytes)
        predicted = predict(self.preset, workload, prefill, decode, ranks)
        return {
            "gpus": ranks,
            "weights_gb": memory["weights"] / 1e9,
            "kv_gb": memory["kv_cache"] / 1e9,
            "fits": "yes" if enough else "no",
            "prefill_layer_ms": 1e3 * prefill.layer,
            "layer_ms": 1e3 * decode.layer,
            "experts_ms": 1e3 * decode.experts,
            "exchange_ms": 1e3 * decode.exchange,
            "head_ms": 1e3 * decode.head,
            **(predicted if enough else predicted | {"tokens_per_s": None}),
        }


def run_whole_model(preset: Preset, workload: Workload, machine: Machine, seed: int) -> dict[str, float]:
    """The workload on vLLM with random weights: the field's serving figures of the median of three waves.

    Two shorter waves go first: vLLM compiles kernels at the first mixtures of prefill and decode.

    Raises:
        CannotRun: the model does not fit, or vLLM does not start.
    """
    model = models.dummy(preset.name)
    length = workload.tokens_in + workload.tokens_out
    settings = engine_args(
        model, machine, quantization="none", tensor_parallel=1, max_model_len=length, max_num_seqs=workload.sequences
    ) | {"max_num_batched_tokens": max(workload.chunk, length), "seed": seed}
    gc.collect()
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    llm, _ = start_engine(settings)
    waves = []
    try:
        lengths = (8, 16, *[workload.tokens_out] * 3)
        for wave, out in enumerate(tqdm(lengths, desc="vLLM", leave=False, disable=None)):
            prompts = random_prompts(workload.sequences, workload.tokens_in, model.vocab_size, seed + wave)
            sent, arrived = send_wave(llm, prompts, out)
            waves.append(summarise(sent, arrived, 1) | {"prefill_s": max(tokens[0] for tokens in arrived) - min(sent)})
    except Exception as error:
        raise CannotRun(f"vLLM stopped: {first_line(error)} (VLLM_LOGGING_LEVEL=INFO shows its log)") from None
    finally:
        stop_engine(llm)
    return sorted(waves[2:], key=lambda wave: wave["tokens_per_s"])[1]
