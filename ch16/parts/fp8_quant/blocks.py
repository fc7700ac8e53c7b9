"""Products and blocks in BF16 and in FP8: bytes of weights, agreement of outputs, FLOP/s and tokens/s."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.fp8_quant.precision import Precision, calibrate, held_bytes, load_quantized, pad_rows, padded_rows
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.cli import CannotRun
from common.device import synchronise
from common.fp8 import E4M3
from common.gpu import Machine
from common.timing import graphed, measure, measure_together

AGREEMENT_LIMIT = 0.10  # relative difference of FP8 and BF16 outputs beyond which a comparison of speed means nothing


def measure_gemms(precisions: Sequence[Precision], machine: Machine, sizes: Fp8Sizes) -> list[dict]:
    """The largest layer at all numbers of tokens, then every layer at the largest: rows of `gemm_columns`."""
    shapes = sizes.layer_shapes
    work = [("mlp_fc1", tokens) for tokens in sizes.gemm_tokens]
    work += [(name, sizes.gemm_tokens[-1]) for name in shapes if name != "mlp_fc1"]
    return [
        measure_gemm(name, *shapes[name], tokens, precisions, machine, sizes.repeats)
        for name, tokens in tqdm(work, desc="products", leave=False, disable=None)
    ]


@torch.no_grad()
def measure_gemm(
    layer: str, k: int, n: int, tokens: int, precisions: Sequence[Precision], machine: Machine, repeats: int
) -> dict:
    """A row of `gemm_columns`: one linear layer [n, k], weights quantized beforehand, everything as CUDA graphs.

    `limit`: operands that are FP8 already. Rows that pad `tokens` to a multiple of 16 are computed, not counted.
    """
    options = {"bias": False, "params_dtype": torch.bfloat16, "device": machine.device}
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device=machine.device)
    padded = pad_rows(x)
    plain = precisions[0].te.Linear(k, n, **options).requires_grad_(False)
    works = {"BF16": lambda: plain(x)}
    for precision in precisions:
        calibrate(plain, precision, [padded, padded])
        with precision.weights():
            quantized = precision.te.Linear(k, n, **options)
        load_quantized(quantized, plain, precision)

        def work(precision: Precision = precision, quantized: nn.Module = quantized) -> None:
            with precision.compute():
                padded_rows(quantized, x)

        works[precision.name] = work
    eager = {name: measure(works[name], machine.device, repeats=repeats).median for name in list(works)[:2]}

    one = torch.ones((), device=machine.device)
    x8 = padded.to(E4M3)
    w8 = (plain.weight * 16).to(E4M3).t()
    works["limit"] = lambda: torch._scaled_mm(x8, w8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    times = math.ceil(4096 / tokens)  # small products are repeated in the graph: its launch must not count
    graphs = {name: graphed(lambda work=work: [work() for _ in range(times)]) for name, work in works.items()}
    timings = measure_together(graphs, machine.device, repeats=repeats)

    flops = 2 * tokens * k * n
    row = {name: flops * times / timing.median / 1e12 for name, timing in timings.items()}
    best = max(row[p.name] for p in precisions)
    peak = machine.peak.fp8_flops
    return row | {
        "layer": layer,
        "tokens": tokens,
        "peak_percent": 100 * best * 1e12 / peak if peak else None,
        "of_limit": best / row["limit"],
        "speedup": best / row["BF16"],
        "eager_speedup": eager["BF16"] / eager[precisions[0].name],
    }


@torch.no_grad()
def measure_stack(
    build: Callable[[Precision], nn.Module], precision: Precision, machine: Machine, sizes: Fp8Sizes, seed: int
) -> tuple[dict, list[dict]]:
    """A row of MEMORY_COLUMNS and, with FP8 units, rows of STACK_COLUMNS: blocks in BF16, and the same weights in FP8.

    `build` makes the stack in a precision: a module called with (x [B, S, H], caches, position). CannotRun if the
    outputs differ by more than FP8 explains.
    """
    device = machine.device
    torch.manual_seed(seed)
    x = torch.randn(sizes.prefill // sizes.sequence, sizes.sequence, sizes.hidden, dtype=torch.bfloat16, device=device)
    twin, twin_bytes = _allocating(lambda: build(precision.bf16()), device)
    for weight in twin.parameters():
        if weight.dim() == 2:  # keeps variances at one: with sharper attention than a trained model's, errors grow
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    calibrate(twin, precision, [x, x])
    quantized, fp8_bytes = _allocating(lambda: build(precision), device)
    load_quantized(quantized, twin, precision)

    reference = twin(x).float()
    difference = (torch.linalg.norm(quantized(x).float() - reference) / torch.linalg.norm(reference)).item()
    del reference
    if not difference < AGREEMENT_LIMIT:
        differ = f"FP8 ({precision.name}) and BF16 outputs differ by {difference:.0%}"
        raise CannotRun(f"{differ}; speeds are not comparable")
    memory = {"recipe": precision.name, "bf16_mb": twin_bytes / 1e6, "fp8_mb": fp8_bytes / 1e6}
    memory |= {"weight_ratio": fp8_bytes / twin_bytes, "difference": difference}
    if not machine.native_fp8:  # an emulated product has no speed worth measuring
        return memory, []
    memory["bf16_peak_mb"] = (twin_bytes + _activation_peak(lambda: twin(x))) / 1e6
    memory["fp8_peak_mb"] = (fp8_bytes + _activation_peak(lambda: quantized(x))) / 1e6

    pair = {"bf16": twin, "fp8": quantized}
    timings = measure_together({k: lambda m=m: m(x) for k, m in pair.items()}, device, repeats=sizes.repeats)
    rates = {name: sizes.prefill / timing.median for name, timing in timings.items()}
    rows = [_speed_row(precision, "prefill", sizes.prefill, rates)]
    for sequences in sizes.decode:
        token = torch.randn(sequences, 1, sizes.hidden, dtype=torch.bfloat16, device=device)
        shape = (2, sequences, sizes.kv_heads, sizes.context, sizes.head_dim)
        caches = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(sizes.layers)]
        steps = {k: lambda m=m: m(token, caches, sizes.context - 1) for k, m in pair.items()}  # noqa: B023
        eager = {k: sequences / measure(step, device, repeats=sizes.repeats).median for k, step in steps.items()}
        graphs = {k: graphed(step) for k, step in steps.items()}
        timings = measure_together(graphs, device, repeats=2 * sizes.repeats)
        rates = {name: sequences / timing.median for name, timing in timings.items()}
        rows.append(_speed_row(precision, "decode, CUDA graph", sequences, rates, eager))
    return memory, rows


def _speed_row(precision: Precision, phase: str, tokens: int, rates: dict, eager: dict | None = None) -> dict:
    row = {"recipe": precision.name, "phase": phase, "tokens": tokens, "speedup": rates["fp8"] / rates["bf16"]}
    row |= {"bf16_tokens_per_s": rates["bf16"], "fp8_tokens_per_s": rates["fp8"]}
    if eager:
        row |= {"bf16_eager": eager["bf16"], "fp8_eager": eager["fp8"], "graph_gain": rates["fp8"] / eager["fp8"]}
    return row


def _allocating(build: Callable[[], nn.Module], device: str) -> tuple[nn.Module, int]:
    """A model and the bytes that it takes."""
    if device == "cpu":
        model = build()
        return model, held_bytes(model)
    before = torch.cuda.memory_allocated()
    model = build()
    synchronise(torch.device(device))
    return model, torch.cuda.memory_allocated() - before


def _activation_peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` allocates at once, beyond those allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before
