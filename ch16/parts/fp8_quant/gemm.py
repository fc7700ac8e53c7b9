"""One matrix product y = x W^T in BF16, in FP8 by each recipe, and at the limit: operands that are FP8 already."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.fp8_quant.precision import Precision, calibrate, load_quantized, pad_rows, padded_rows
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.fp8 import E4M3
from common.gpu import Machine
from common.results import Column
from common.timing import graphed, measure, measure_together


def gemm_columns(precisions: Sequence[Precision]) -> list[Column]:
    """Columns of the rows of `measure_gemm`, with one for each recipe; the eager speed-up is that of the first."""
    return [
        Column("layer", "layer"),
        Column("tokens", "tokens", ",d"),
        Column("BF16", "BF16 TFLOP/s", ",.0f"),
        *[Column(p.name, f"{p.name} TFLOP/s", ",.0f") for p in precisions],
        Column("limit", "limit TFLOP/s", ",.0f"),
        Column("peak_percent", "best, % of peak", ".0f"),
        Column("of_limit", "best / limit", ".2f"),
        Column("speedup", "best speed-up", ".2f"),
        Column("eager_speedup", "eager speed-up", ".2f"),
    ]


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
    layer: str,
    k: int,
    n: int,
    tokens: int,
    precisions: Sequence[Precision],
    machine: Machine,
    repeats: int,
) -> dict:
    """One linear layer [n, k] on `tokens` tokens, weights quantized beforehand, everything as CUDA graphs.

    Rows that pad the tokens to a multiple of 16 are computed and not counted. Keys: those of `gemm_columns`.
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
