"""Measure what the planner needs on this machine, and check its prediction against the real engine."""

import gc
from collections.abc import Callable
from functools import partial

import torch

from ch16.parts.moe_benchmark.baseline import vllm_path
from ch16.parts.moe_benchmark.decoder import DecoderLayer, sample, seconds_of
from ch16.parts.moe_benchmark.experts import Dispatch, Experts, combine, grouped, sort_rows
from ch16.parts.moe_benchmark.parallel import busiest_part
from ch16.parts.moe_benchmark.planner import Link, Parts, Workload, fits, memory_per_rank, predict
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.routing import make_routing
from common import models
from common.cli import CannotRun, first_line
from common.device import torch_dtype
from common.engine import engine_args, start_engine, stop_engine
from common.gpu import Machine
from common.load import random_prompts, send_wave, summarise
from common.results import Column

PLAN_COLUMNS = (
    Column("gpus", "GPUs", "d"),
    Column("weights_gb", "weights GB each", ".1f"),
    Column("kv_gb", "KV cache GB each", ".1f"),
    Column("fits", "fits"),
    Column("prefill_layer_ms", "prefill layer ms", ".3f"),
    Column("layer_ms", "decode layer ms", ".3f"),
    Column("experts_ms", "of it experts ms", ".3f"),
    Column("exchange_ms", "exchange ms", ".3f"),
    Column("head_ms", "head ms", ".2f"),
    Column("decode_step_ms", "decode step ms", ".2f"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
)
VALIDATION_COLUMNS = (
    Column("what", "figure"),
    Column("predicted", "predicted", ",.2f"),
    Column("measured", "measured", ",.2f"),
    Column("error_percent", "error %", "+.1f"),
)


def planning_bytes(preset: Preset, workload: Workload, itemsize: int) -> float:
    """Bytes that one device needs beside a layer's weights: its KV cache, the embedding, and logits in float32."""
    cache = workload.sequences * workload.context * itemsize * preset.kv_values_per_token / preset.layers
    return cache + preset.vocab * (itemsize * preset.hidden + 4 * 3 * workload.sequences)


class Capacity:
    """Times one decoder layer and the head of a preset on one device, for any number of ranks.

    Other ranks are emulated: this device does what the busiest of N ranks would do. Exchange is computed from `link`.
    """

    def __init__(self, preset: Preset, machine: Machine, link: Link, repeats: int, seed: int) -> None:
        self.preset, self.machine, self.link, self.repeats, self.seed = preset, machine, link, repeats, seed
        self.device, self.dtype = machine.device, torch_dtype(machine)
        self.experts = Experts.random(preset.sizes, self.device, self.dtype)
        path, _ = vllm_path(self.experts)
        self.path: Dispatch = path or grouped  # the engine is predicted best by its own kernel
        self.path_name = "vLLM's fused experts" if path else "the grouped path"
        self.embedding = self._random(preset.vocab, preset.hidden) * 0.02

    def parts(self, workload: Workload, ranks: int, phase: str) -> Parts:
        """Seconds of a "prefill" or "decode" step's parts on the busiest of `ranks` ranks."""
        p, layer = self.preset, DecoderLayer(self.preset, self.experts, self.path)
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
            self.path(rows, shard, local)
            return hidden + combine(returned, places, home.weights)

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

    Shorter waves go first: vLLM still compiles kernels when a mixture of prefill and decode is new to it, which took
    1.3 s of the first full wave on an H100.

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
        for wave, out in enumerate((8, 16, *[workload.tokens_out] * 3)):
            prompts = random_prompts(workload.sequences, workload.tokens_in, model.vocab_size, seed + wave)
            sent, arrived = send_wave(llm, prompts, out)
            waves.append(summarise(sent, arrived, 1) | {"prefill_s": max(tokens[0] for tokens in arrived) - min(sent)})
    except Exception as error:
        raise CannotRun(f"vLLM stopped: {first_line(error)} (VLLM_LOGGING_LEVEL=INFO shows its log)") from None
    finally:
        stop_engine(llm)
    return sorted(waves[2:], key=lambda wave: wave["tokens_per_s"])[1]


def validation_rows(predicted: dict[str, float], measured: dict[str, float]) -> list[dict]:
    """Prediction beside measurement; the error is of the prediction, relative to the measurement."""
    pairs = (
        ("output tok/s", predicted["tokens_per_s"], measured["tokens_per_s"]),
        ("decode step ms (ITL P50)", predicted["decode_step_ms"], measured["itl_p50_ms"]),
        ("prefill s (to the last first token)", predicted["prefill_s"], measured["prefill_s"]),
    )
    return [{"what": w, "predicted": p, "measured": m, "error_percent": 100 * (p / m - 1)} for w, p, m in pairs]
