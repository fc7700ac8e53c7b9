"""A stack of blocks in BF16 and in FP8: bytes of weights, agreement of outputs, tokens/s."""

from collections.abc import Callable

import torch
import torch.nn as nn

from ch16.parts.fp8_quant.precision import Precision, calibrate, held_bytes, load_quantized
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.cli import CannotRun
from common.device import synchronise
from common.gpu import Machine
from common.results import Column
from common.timing import graphed, measure, measure_together

AGREEMENT_LIMIT = 0.10  # relative difference of FP8 and BF16 outputs beyond which a comparison of speed means nothing

MEMORY_COLUMNS = (
    Column("recipe", "recipe"),
    Column("bf16_mb", "BF16 weights MB", ",.1f"),
    Column("fp8_mb", "FP8 weights MB", ",.1f"),
    Column("weight_ratio", "FP8 / BF16", ".3f"),
    Column("bf16_peak_mb", "BF16 peak MB", ",.0f"),
    Column("fp8_peak_mb", "FP8 peak MB", ",.0f"),
    Column("difference", "output difference", ".3f"),
)
STACK_COLUMNS = (
    Column("recipe", "recipe"),
    Column("phase", "phase"),
    Column("tokens", "tokens at once", ",d"),
    Column("bf16_tokens_per_s", "BF16 tok/s", ",.0f"),
    Column("fp8_tokens_per_s", "FP8 tok/s", ",.0f"),
    Column("speedup", "FP8 speed-up", ".2f"),
    Column("bf16_eager", "BF16 eager tok/s", ",.0f"),
    Column("fp8_eager", "FP8 eager tok/s", ",.0f"),
    Column("graph_gain", "FP8 graph speed-up", ".1f", detail=True),
)


@torch.no_grad()
def measure_stack(
    build: Callable[[Precision], nn.Module], precision: Precision, machine: Machine, sizes: Fp8Sizes, seed: int
) -> tuple[dict, list[dict]]:
    """Blocks in BF16, and with the same weights in FP8.

    `build` makes the stack in a precision: a module called with (x [B, S, H], caches, position).

    Returns:
        A row of MEMORY_COLUMNS and, on a machine with FP8 units, rows of STACK_COLUMNS.

    Raises:
        CannotRun: the outputs differ by more than FP8 explains.
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
        raise CannotRun(
            f"FP8 ({precision.name}) and BF16 outputs differ by {difference:.0%}; speeds are not comparable"
        )
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
