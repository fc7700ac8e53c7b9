"""The grouped path on a GPU: small Triton kernels around the two grouped products.

    sort      where does each row go?                     counting sort by expert, two launches, no host
    dispatch  copy tokens to their rows                   (FP8: quantized on the way)
    product   rows x w_in of their expert, activation     PyTorch's grouped GEMM, or ours where experts get few rows
    product   rows x w_out of their expert
    combine   weighted sum of each token's K rows

With a few rows an expert the products read weights and do little else; a tile of 16 rows keeps the GPU's memory
busy where a GEMM tile of 64 or 128 would multiply padding. With many rows PyTorch's grouped GEMM (CUTLASS) wins.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from common.fp8 import E4M3

FEW_ROWS = 160  # mean rows an expert up to which our product is faster than PyTorch's, measured on an H100
SORT_PROGRAMS = 128
E4M3_MAX = tl.constexpr(448.0)


def grouped(x: torch.Tensor, experts: Experts, routing: Routing, fp8: bool = False) -> torch.Tensor:
    """The layer on tokens x [T, H]: [T, H]. In FP8, every row and every weight row has a scale of its own.

    Raises:
        ValueError: tokens or weights are not bfloat16.
    """
    if x.dtype != torch.bfloat16 or experts.w_in.dtype != torch.bfloat16:
        raise ValueError(f"the GPU kernels compute bfloat16, not {x.dtype} with {experts.w_in.dtype}")
    if len(x) == 0:
        return x
    places, ends = sort_rows(routing.experts.contiguous(), experts.sizes.experts)
    rows = dispatch(x.contiguous(), places, fp8)
    out = compute_sorted(*rows, experts, ends, fp8)
    return combine(out, places, routing.weights.contiguous())


def library_product_works(sizes: ExpertSizes, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's grouped products are kernels here: Hopper and Blackwell, rows that are multiples of 16 bytes.

    On other GPUs the one for bfloat16 is a loop that waits for the host, and there is none for FP8.
    """
    return capability in ((9, 0), (10, 0)) and sizes.hidden % 16 == 0 and sizes.intermediate % 16 == 0


def compute_sorted(
    rows: torch.Tensor, scales: torch.Tensor | None, experts: Experts, ends: torch.Tensor, fp8: bool
) -> torch.Tensor:
    """Sorted rows [R, H] (and their scales [R] in FP8) through their experts: [R, H] bfloat16."""
    gated = experts.sizes.gated
    few = rows.shape[0] <= FEW_ROWS * experts.sizes.experts
    if few or not library_product_works(experts.sizes, torch.cuda.get_device_capability(rows.device)):
        (w_in, s_in), (w_out, s_out) = experts.fp8() if fp8 else ((experts.w_in, None), (experts.w_out, None))
        h = few_rows_product(rows, w_in, ends, "silu" if gated else "gelu", scales, s_in)
        h, scales = activate(h, "none", fp8) if fp8 else (h, None)
        return few_rows_product(h, w_out, ends, "none", scales, s_out)
    product = _many_rows_fp8 if fp8 else _many_rows
    h = product(rows, scales, experts, 0, ends)
    h, scales = activate(h, "silu" if gated else "gelu", fp8)
    return product(h, scales, experts, 1, ends)


def _many_rows(rows: torch.Tensor, _: None, experts: Experts, which: int, ends: torch.Tensor) -> torch.Tensor:
    weight = (experts.w_in, experts.w_out)[which]
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def _many_rows_fp8(
    rows: torch.Tensor, scales: torch.Tensor, experts: Experts, which: int, ends: torch.Tensor
) -> torch.Tensor:
    weight = experts.fp8()[which]
    transposed = weight.values.transpose(1, 2)
    return torch._scaled_grouped_mm(
        rows, transposed, scales, weight.scales, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )


# ---- sort: where does each row go? ----


def sort_rows(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ch16.parts.moe_benchmark.experts.sort_rows`, int32 and without the host: places [T, K], ends [E]."""
    rows = experts.numel()
    bins = max(16, triton.next_power_of_2(count))
    chunk = max(32, 16384 // bins)  # rows one program ranks at a time: chunk x bins numbers are in registers
    chunks = triton.cdiv(triton.cdiv(rows, chunk), SORT_PROGRAMS)  # chunks a program
    programs = triton.cdiv(rows, chunk * chunks)
    counts = torch.empty(programs, bins, dtype=torch.int32, device=experts.device)
    places = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    ends = torch.empty(count, dtype=torch.int32, device=experts.device)
    sizes = {"CHUNK": chunk, "BINS": bins, "num_warps": 8}
    _count_kernel[(programs,)](experts, counts, rows, chunks, **sizes)
    _place_kernel[(programs,)](
        experts, counts, places, ends, rows, chunks, programs, count, P=triton.next_power_of_2(programs), **sizes
    )
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
    """A row's place: rows of smaller experts, rows of its expert in earlier programs, and earlier rows here."""
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


# ---- dispatch and combine: between tokens and rows ----


def dispatch(x: torch.Tensor, places: torch.Tensor, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens x [T, H] copied to their rows [R, H]; in FP8, with the factor [R] to multiply each row with."""
    hidden, top_k = x.shape[1], places.shape[1]
    rows = torch.empty(places.numel(), hidden, dtype=E4M3 if fp8 else x.dtype, device=x.device)
    scales = torch.empty(places.numel(), dtype=torch.float32, device=x.device) if fp8 else None
    block = triton.next_power_of_2(hidden)
    _dispatch_kernel[(x.shape[0],)](x, places, rows, scales, hidden, K=top_k, BLOCK=block, FP8=fp8, num_warps=8)
    return rows, scales


@triton.jit
def _to_fp8(v):
    """Values as E4M3 and the factor that brings them back: their largest becomes the format's largest."""
    scale = tl.max(tl.abs(v), axis=0) / E4M3_MAX
    scale = tl.where(scale > 0, scale, 1.0)
    return (v / scale).to(tl.float8e4nv), scale


@triton.jit
def _dispatch_kernel(x, places, rows, scales, H, K: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
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


# ---- activation, and quantization of its result ----


def activate(h: torch.Tensor, kind: str, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h [R, N] through "silu" ([gate, up] to half the width), "gelu" or "none"; in FP8 with row factors [R]."""
    rows, width = h.shape
    width = width // 2 if kind == "silu" else width
    out = torch.empty(rows, width, dtype=E4M3 if fp8 else h.dtype, device=h.device)
    scales = torch.empty(rows, dtype=torch.float32, device=h.device) if fp8 else None
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    _activate_kernel[(rows,)](h, out, scales, width, KIND=kind, BLOCK=block, FP8=fp8, num_warps=warps)
    return out, scales


@triton.jit
def _activation(v, up, KIND: tl.constexpr):
    if KIND == "silu":
        v = v * tl.sigmoid(v) * up
    elif KIND == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def _activate_kernel(h, out, scales, N, KIND: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < N
    if KIND == "silu":
        value = tl.load(h + row * 2 * N + column, mask=here, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * N + N + column, mask=here, other=0.0).to(tl.float32)
    else:
        value = tl.load(h + row * N + column, mask=here, other=0.0).to(tl.float32)
        up = value
    value = _activation(value, up, KIND)
    if FP8:
        value, scale = _to_fp8(value)
        tl.store(scales + row, scale)
    tl.store(out + row * N + column, value.to(out.dtype.element_ty), mask=here)


# ---- the grouped product for few rows ----


def few_rows_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    kind: str,
    row_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sorted rows [R, K] times their expert's weight [E, N, K], then the activation: [R, N], or [R, N / 2] gated.

    Each program computes a tile of 16 to 64 rows of one expert. How many tiles an expert has is known on the device
    only: the grid has as many programs as there can be tiles, and those without one end at once.
    """
    count, width, inner = weight.shape
    width = width // 2 if kind == "silu" else width
    fp8 = row_scales is not None
    out = torch.empty(rows.shape[0], width, dtype=torch.bfloat16, device=rows.device)
    tile, columns, step = _tile(rows.shape[0] / count, kind, fp8)
    tiles = min(rows.shape[0], triton.cdiv(rows.shape[0], tile) + count)
    grid = (tiles * triton.cdiv(width, columns),)
    _few_rows_kernel[grid](
        rows,
        weight,
        out,
        ends,
        row_scales,
        weight_scales,
        width,
        inner,
        count,
        KIND=kind,
        FP8=fp8,
        EVEN=inner % step == 0 and width % columns == 0,
        BINS=triton.next_power_of_2(count),
        TILE=tile,
        COLUMNS=columns,
        STEP=step,
        num_stages=3,
        num_warps=4,
    )
    return out


# Rows of a tile: its columns and its inner step in a gated and in a plain product. The fastest of about 30 each,
# measured on an H100. Three stages of loads in flight, four warps.
_TILES = {16: ((32, 256), (64, 256)), 32: ((64, 128), (128, 128)), 64: ((64, 64), (128, 64))}
_TILES_FP8 = {16: ((32, 512), (128, 256)), 32: ((64, 256), (64, 256)), 64: ((64, 128), (128, 128))}


def _tile(mean_rows: float, kind: str, fp8: bool) -> tuple[int, int, int]:
    """Rows, columns and inner step of a tile.

    Up to 8 rows an expert, 16 are enough for nearly all of them (a binomial's mean and three standard deviations). With
    more rows a larger tile pads more, and a smaller one reads weights again, though from the cache.
    """
    rows = 16 if mean_rows <= 8 else 32 if mean_rows <= 40 else 64
    gated, plain = (_TILES_FP8 if fp8 else _TILES)[rows]
    return rows, *(gated if kind == "silu" else plain)


@triton.jit
def _few_rows_kernel(
    rows,
    weight,
    out,
    ends,
    row_scales,
    weight_scales,
    N,
    K,
    E,
    KIND: tl.constexpr,
    FP8: tl.constexpr,
    EVEN: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Programs are ordered by expert, then by columns, then by rows: neighbours share an expert's weights in the cache.
    pid = tl.program_id(0)
    column_tiles = tl.cdiv(N, COLUMNS)
    bins = tl.arange(0, BINS)
    end = tl.load(ends + bins, mask=bins < E, other=0)
    start = tl.where((bins > 0) & (bins < E), tl.load(ends + bins - 1, mask=(bins > 0) & (bins < E), other=0), 0)
    tiles = tl.where(bins < E, (end - start + TILE - 1) // TILE, 0)
    programs_end = tl.cumsum(tiles, axis=0) * column_tiles
    expert = tl.sum((programs_end <= pid).to(tl.int32), axis=0)
    if expert >= E:
        return
    mine = bins == expert
    own_tiles = tl.sum(tl.where(mine, tiles, 0), axis=0)
    own_pid = pid - tl.sum(tl.where(mine, programs_end - tiles * column_tiles, 0), axis=0)
    row = tl.sum(tl.where(mine, start, 0), axis=0) + (own_pid % own_tiles) * TILE + tl.arange(0, TILE)
    column = (own_pid // own_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.sum(tl.where(mine, end, 0), axis=0)

    inner = tl.arange(0, STEP)
    row_pointer = rows + row[:, None].to(tl.int64) * K + inner[None, :]
    height = N * 2 if KIND == "silu" else N  # of the expert's weight: gate rows, then up rows
    weight_pointer = weight + expert.to(tl.int64) * height * K + column[None, :].to(tl.int64) * K + inner[:, None]
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    total_up = tl.zeros((TILE, COLUMNS), tl.float32)
    for k in range(0, K, STEP):
        if EVEN:
            a = tl.load(row_pointer, mask=row[:, None] < last, other=0.0)
            b = tl.load(weight_pointer)
        else:
            a = tl.load(row_pointer, mask=(row[:, None] < last) & (inner[None, :] + k < K), other=0.0)
            b = tl.load(weight_pointer, mask=(column[None, :] < N) & (inner[:, None] + k < K), other=0.0)
        total = tl.dot(a, b, total)
        if KIND == "silu":
            if EVEN:
                b = tl.load(weight_pointer + N * K)
            else:
                b = tl.load(weight_pointer + N * K, mask=(column[None, :] < N) & (inner[:, None] + k < K), other=0.0)
            total_up = tl.dot(a, b, total_up)
        row_pointer += STEP
        weight_pointer += STEP

    if FP8:
        row_scale = tl.load(row_scales + row, mask=row < last, other=0.0)[:, None]
        scale_pointer = weight_scales + expert * height + column
        total *= row_scale * tl.load(scale_pointer, mask=column < N, other=0.0)[None, :]
        if KIND == "silu":
            total_up *= row_scale * tl.load(scale_pointer + N, mask=column < N, other=0.0)[None, :]
    total = _activation(total, total_up, KIND)
    here = (row[:, None] < last) & (column[None, :] < N)
    tl.store(out + row[:, None].to(tl.int64) * N + column[None, :], total.to(tl.bfloat16), mask=here)
