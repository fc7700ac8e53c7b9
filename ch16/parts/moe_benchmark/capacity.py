"""What the planner needs, measured here: a decoder layer on random weights and the head; the whole model as a check.

    x += attention(norm(x)) over a KV cache;  x += experts(norm(x));  at the end: norm, logits, a sampled token

Rotary embeddings are left out: they touch a few kilobytes per token.
"""

import gc
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing, route
from ch16.parts.moe_benchmark.plain import sort_rows, steps_on
from ch16.parts.moe_benchmark.planner import Link, Parts, Workload, fits, memory_per_rank, predict
from ch16.parts.moe_benchmark.presets import Preset, require_memory
from ch16.parts.moe_benchmark.reference import vllm_dispatch
from ch16.parts.moe_benchmark.routing import busiest_part, make_routing
from ch16.parts.moe_benchmark.sizes import WEIGHT_COPIES, MoESizes
from common import models
from common.cli import CannotRun, first_line
from common.device import torch_dtype
from common.engine import engine_args, start_engine, stop_engine
from common.gpu import Machine
from common.load import random_prompts, send_wave, summarise
from common.timing import graphed, measure


class DecoderLayer:
    """Attention and router of one layer of a whole model, in the dtype of the given experts."""

    def __init__(self, preset: Preset, experts: Experts, dispatch: Dispatch) -> None:
        self.preset, self.experts, self.dispatch = preset, experts, dispatch
        device, dtype = experts.w_in.device, experts.w_in.dtype

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5

        p = preset
        self.qkv = weight((p.heads + 2 * p.kv_heads) * p.head_dim, p.hidden)
        self.out = weight(p.hidden, p.heads * p.head_dim)
        self.router = weight(p.experts, p.hidden)

    def cache(self, sequences: int, context: int) -> torch.Tensor:
        """Keys and values of `context` tokens of each sequence: [2, sequences, kv_heads, context, head_dim]."""
        shape = 2, sequences, self.preset.kv_heads, context, self.preset.head_dim
        return torch.randn(shape, device=self.qkv.device, dtype=self.qkv.dtype)

    def prefill_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Whole prompts x [B, S, H] to the same shape."""
        q, k, v = self._heads(x)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, heads, S, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + mixed.transpose(1, 2).flatten(2) @ self.out.t()

    def decode_attention(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """One token per sequence, x [B, H], which takes the last place of a full cache: to the same shape."""
        p = self.preset
        q, k, v = self._heads(x[:, None])
        cache[0, :, :, -1], cache[1, :, :, -1] = k[:, 0], v[:, 0]
        # Query heads that share a key head become rows of one product: keys are read once for all of them.
        q = q.view(len(x), p.kv_heads, p.heads // p.kv_heads, p.head_dim)
        mixed = F.scaled_dot_product_attention(q, cache[0], cache[1])
        return x + mixed.reshape(len(x), -1) @ self.out.t()

    def choose(self, x: torch.Tensor) -> Routing:
        """Router and top-k for tokens x [T, H]."""
        return route(_norm(x) @ self.router.t(), self.preset.top_k)

    def apply_experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Experts on tokens x [T, H], with the residual: to the same shape."""
        return x + self.dispatch(_norm(x), self.experts, routing)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values [B, S, heads, head_dim], the first two normalised (as in Qwen3 and OLMoE)."""
        p = self.preset
        heads = (_norm(x) @ self.qkv.t()).unflatten(-1, (-1, p.head_dim))
        q, k, v = heads.split([p.heads, p.kv_heads, p.kv_heads], dim=2)
        return _norm(q), _norm(k), v


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


def sample(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Last hidden states x [B, H] to one random token each [B]: logits, softmax, and the Gumbel-max trick."""
    probabilities = (_norm(x) @ embedding.t()).float().softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of `work()`; on a GPU as a CUDA graph, as engines run it."""
    with torch.no_grad():
        return measure(graphed(work) if device == "cuda" else work, device, repeats=repeats).median


class Capacity:
    """Times one decoder layer and the head of a preset on one device, for any number of ranks.

    Ranks are emulated: this device does what the busiest of N ranks would do. Exchange is computed from `link`. Experts
    are computed by vLLM's kernel, which predicts the engine best, or where there is none, by `dispatch`.

    Raises:
        CannotRun: the layer, its KV cache and the head do not fit into memory.
    """

    def __init__(
        self, preset: Preset, dispatch: Dispatch, machine: Machine, link: Link, sizes: MoESizes, seed: int
    ) -> None:
        self.preset, self.machine, self.link, self.seed = preset, machine, link, seed
        self.workload, self.repeats = sizes.workload, sizes.repeats
        self.device, self.dtype = machine.device, torch_dtype(machine)
        sequences, context, itemsize = self.workload.sequences, self.workload.context, machine.itemsize
        cache = sequences * context * itemsize * preset.kv_values_per_token / preset.layers
        head = preset.vocab * (itemsize * preset.hidden + 4 * 3 * sequences)  # the embedding, logits in float32
        require_memory(preset, self.workload.chunk, machine, WEIGHT_COPIES, contenders=2, extra=cache + head)
        self.experts = Experts.random(preset.sizes, self.device, self.dtype)
        vllms, _ = vllm_dispatch(self.experts)
        self.dispatch: Dispatch = vllms or dispatch
        self.dispatch_name = "vLLM's fused experts" if vllms else "grouped dispatch"
        self.embedding = self._random(preset.vocab, preset.hidden) * 0.02

    def parts(self, ranks: int, phase: str) -> Parts:
        """Seconds of a "prefill" or "decode" step's parts on the busiest of `ranks` ranks."""
        workload, repeats = self.workload, self.repeats
        p, layer = self.preset, DecoderLayer(self.preset, self.experts, self.dispatch)
        if phase == "prefill":
            sequences = workload.prefill_sequences(ranks)
            x = self._random(sequences, min(workload.tokens_in, workload.chunk), p.hidden)
            attention, repeats = partial(layer.prefill_attention, x), max(3, repeats // 4)
        else:
            sequences = workload.rank_sequences(ranks)
            x = self._random(sequences, p.hidden)
            attention = partial(layer.decode_attention, x, layer.cache(sequences, workload.context))
        flat = x.view(-1, p.hidden)
        experts = self._experts_work(layer, flat, ranks)
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

    def plan_row(self, ranks: int) -> dict:
        """One row of PLAN_COLUMNS."""
        memory = memory_per_rank(self.preset, self.workload, ranks, self.machine.itemsize)
        prefill, decode = (self.parts(ranks, phase) for phase in ("prefill", "decode"))
        enough = fits(memory, self.machine.memory_bytes)
        predicted = predict(self.preset, self.workload, prefill, decode, ranks)
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
