"""The steps of grouped dispatch on a GPU: Triton kernels around two grouped products. `plain.py` has them for CPUs.

    sort_rows        where each row goes               counting sort by expert: two launches
    arrange          copies tokens to their rows       in FP8 they are quantized on the way
    compute_sorted   two products and an activation    PyTorch's grouped GEMM, or few_rows.py
    combine          weighted sum of K rows per token

No step synchronises with the host, so that a CUDA graph can hold them all.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes
from ch16.parts.moe_benchmark.few_rows import FEW_ROWS, activation, few_rows_product
from common.fp8 import E4M3

SORT_PROGRAMS = 128
E4M3_MAX = tl.constexpr(448.0)


def _require_bfloat16(tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.bfloat16:
        raise ValueError(f"the GPU kernels compute bfloat16, not {tensor.dtype}")


# ---- sort: where does each row go? ----


def sort_rows(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `plain.sort_rows`, in int32 and without synchronising with the host: places [T, K], ends [E]."""
    experts = experts.contiguous()
    rows = experts.numel()
    bins = max(16, triton.next_power_of_2(count))
    chunk = max(32, 16384 // bins)  # rows ranked at a time: chunk x bins numbers are in registers
    chunks = triton.cdiv(triton.cdiv(rows, chunk), SORT_PROGRAMS)  # per program
    programs = triton.cdiv(rows, chunk * chunks)
    counts = torch.empty(programs, bins, dtype=torch.int32, device=experts.device)
    places = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    ends = torch.empty(count, dtype=torch.int32, device=experts.device)
    sizes = {"CHUNK": chunk, "BINS": bins, "num_warps": 8}
    _count_kernel[(programs,)](experts, counts, rows, chunks, **sizes)
    sizes["P"] = triton.next_power_of_2(programs)
    _place_kernel[(programs,)](experts, counts, places, ends, rows, chunks, programs, count, **sizes)
    return places, ends


@triton.jit
def _count_kernel(experts, counts, rows, chunks, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """How many rows of this program's chunks go to each expert."""
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for i in range(chunks):
        row = (pid * chunks + i) * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32)
        total += tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts + pid * BINS + bins, total)


@triton.jit
def _place_kernel(
    experts,
    counts,
    places,
    ends,
    rows,
    chunks,
    programs,
    count,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    P: tl.constexpr,
):
    """A row's place: after rows of smaller experts, its expert's rows in earlier programs, and earlier rows."""
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    program = tl.arange(0, P)
    all_counts = tl.load(
        counts + program[:, None] * BINS + bins[None, :], mask=program[:, None] < programs, other=0
    )  # [P, BINS]
    totals = tl.sum(all_counts, axis=0)
    end = tl.cumsum(totals, axis=0)
    if pid == 0:
        tl.store(ends + bins, end, mask=bins < count)
    next_place = end - totals + tl.sum(tl.where(program[:, None] < pid, all_counts, 0), axis=0)
    for i in range(chunks):
        row = (pid * chunks + i) * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32)
        hot = (expert[:, None] == bins[None, :]).to(tl.int32)  # [CHUNK, BINS]
        rank = tl.cumsum(hot, axis=0) - 1 + next_place[None, :]
        tl.store(places + row, tl.sum(hot * rank, axis=1), mask=row < rows)
        next_place += tl.sum(hot, axis=0)


# ---- arrange and combine: between tokens and rows ----


def arrange(x: torch.Tensor, places: torch.Tensor, fp8: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens x [T, H] copied to their rows [R, H]; in FP8, with the scale of each row [R].

    Raises:
        ValueError: tokens are not bfloat16.
    """
    _require_bfloat16(x)
    x = x.contiguous()
    hidden, top_k = x.shape[1], places.shape[1]
    rows = torch.empty(places.numel(), hidden, dtype=E4M3 if fp8 else x.dtype, device=x.device)
    scales = torch.empty(places.numel(), dtype=torch.float32, device=x.device) if fp8 else None
    block = triton.next_power_of_2(hidden)
    _arrange_kernel[(x.shape[0],)](x, places, rows, scales, hidden, K=top_k, BLOCK=block, FP8=fp8, num_warps=8)
    return rows, scales


@triton.jit
def _to_fp8(v):
    """Values as E4M3, and their scale: the largest value becomes the format's largest."""
    scale = tl.max(tl.abs(v), axis=0) / E4M3_MAX
    scale = tl.where(scale > 0, scale, 1.0)
    return (v / scale).to(tl.float8e4nv), scale


@triton.jit
def _arrange_kernel(x, places, rows, scales, H, K: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + token * H + column, mask=column < H, other=0.0)
    if FP8:
        value, scale = _to_fp8(value.to(tl.float32))
    for j in tl.static_range(K):
        place = tl.load(places + token * K + j).to(tl.int64)
        tl.store(rows + place * H + column, value, mask=column < H)
        if FP8:
            tl.store(scales + place, scale)


def combine(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's weighted sum of its K rows, added in float32: [R, H] to [T, H]."""
    weights = weights.contiguous()
    (tokens, top_k), hidden = places.shape, rows.shape[1]
    out = torch.empty(tokens, hidden, dtype=rows.dtype, device=rows.device)
    grid = (tokens, triton.cdiv(hidden, 1024))
    _combine_kernel[grid](rows, places, weights, out, hidden, K=top_k, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _combine_kernel(rows, places, weights, out, H, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        place = tl.load(places + token * K + j).to(tl.int64)
        weight = tl.load(weights + token * K + j)
        total += weight * tl.load(rows + place * H + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


# ---- compute: sorted rows through their experts ----


def compute_sorted(
    rows: tuple[torch.Tensor, torch.Tensor | None], experts: Experts, ends: torch.Tensor
) -> torch.Tensor:
    """Rows as `arrange` gives them, sorted by expert, through their experts: [R, H] bfloat16.

    Raises:
        ValueError: weights are not bfloat16.
    """
    _require_bfloat16(experts.w_in)
    (h, scales), fp8 = rows, rows[1] is not None
    kind = "silu" if experts.sizes.gated else "gelu"
    w_in, w_out = experts.fp8() if fp8 else ((experts.w_in, None), (experts.w_out, None))
    few = h.shape[0] <= FEW_ROWS * experts.sizes.experts
    if few or not library_product_works(experts.sizes, torch.cuda.get_device_capability(h.device)):
        h = few_rows_product(h, w_in[0], ends, kind, scales, w_in[1])
        h, scales = activate(h, "none", fp8) if fp8 else (h, None)
        return few_rows_product(h, w_out[0], ends, "none", scales, w_out[1])
    h, scales = activate(_library_product(h, scales, *w_in, ends), kind, fp8)
    return _library_product(h, scales, *w_out, ends)


def library_product_works(sizes: ExpertSizes, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's grouped products are kernels here: Hopper and Blackwell, rows that are multiples of 16 bytes.

    On other GPUs the product for bfloat16 is a loop that synchronises with the host, and there is none for FP8.
    """
    return capability in ((9, 0), (10, 0)) and sizes.hidden % 16 == 0 and sizes.intermediate % 16 == 0


def _library_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scales: torch.Tensor | None,
    ends: torch.Tensor,
) -> torch.Tensor:
    if row_scales is None:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    options = {"offs": ends, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_grouped_mm(rows, weight.transpose(1, 2), row_scales, weight_scales, **options)


def activate(h: torch.Tensor, kind: str, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h [R, N] through "silu" ([gate, up] to half the width), "gelu" or "none"; in FP8 with row scales [R]."""
    rows, width = h.shape
    width = width // 2 if kind == "silu" else width
    out = torch.empty(rows, width, dtype=E4M3 if fp8 else h.dtype, device=h.device)
    scales = torch.empty(rows, dtype=torch.float32, device=h.device) if fp8 else None
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    _activate_kernel[(rows,)](h, out, scales, width, KIND=kind, BLOCK=block, FP8=fp8, num_warps=warps)
    return out, scales


@triton.jit
def _activate_kernel(h, out, scales, N, KIND: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    if KIND == "silu":
        value = tl.load(h + row * 2 * N + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * N + N + column, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(h + row * N + column, mask=inside, other=0.0).to(tl.float32)
        up = value
    value = activation(value, up, KIND)
    if FP8:
        value, scale = _to_fp8(value)
        tl.store(scales + row, scale)
    tl.store(out + row * N + column, value.to(out.dtype.element_ty), mask=inside)
