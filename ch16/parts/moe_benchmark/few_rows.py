"""A grouped product for few rows per expert, as in decode; `kernels.py` uses it up to `FEW_ROWS` rows per expert.

With few rows, a product mostly reads weights. Tiles of 16 rows keep the GPU's memory busy, where the tiles of 64 or 128
rows of PyTorch's grouped GEMM (CUTLASS) would mostly multiply padding. With many rows PyTorch's product is faster.
On GPUs and widths that PyTorch's product does not support, this one computes any number of rows.
"""

import torch
import triton
import triton.language as tl

FEW_ROWS = 160  # mean rows per expert up to which this product is faster than PyTorch's, measured on an H100


def few_rows_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    kind: str,
    row_scales: torch.Tensor | None = None,
    weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sorted rows [R, K] times their expert's weight [E, N, K], then the activation: [R, N], or [R, N / 2] gated.

    Each program computes a tile of 16 to 64 rows of one expert. Only the device knows how many tiles an expert has: the
    grid has as many programs as there can be tiles, and programs without a tile end at once.
    """
    count, width, inner = weight.shape
    width = width // 2 if kind == "silu" else width
    fp8 = row_scales is not None
    out = torch.empty(rows.shape[0], width, dtype=torch.bfloat16, device=rows.device)
    tile, columns, step = _tile(rows.shape[0] / count, kind, fp8)
    tiles = min(rows.shape[0], triton.cdiv(rows.shape[0], tile) + count)
    grid = (tiles * triton.cdiv(width, columns),)
    even, bins = inner % step == 0 and width % columns == 0, triton.next_power_of_2(count)
    options = {"KIND": kind, "FP8": fp8, "EVEN": even, "BINS": bins, "TILE": tile, "COLUMNS": columns, "STEP": step}
    scales = row_scales, weight_scales
    _few_rows_kernel[grid](rows, weight, out, ends, *scales, width, inner, count, **options, num_stages=3, num_warps=4)
    return out


# Rows of a tile: its columns and its inner step in a gated and in a plain product. The fastest of about 30 candidates
# each on an H100.
_TILES = {16: ((32, 256), (64, 256)), 32: ((64, 128), (128, 128)), 64: ((64, 64), (128, 64))}
_TILES_FP8 = {16: ((32, 512), (128, 256)), 32: ((64, 256), (64, 256)), 64: ((64, 128), (128, 128))}


def _tile(mean_rows: float, kind: str, fp8: bool) -> tuple[int, int, int]:
    """Rows, columns and inner step of a tile.

    Up to 8 rows per expert, a tile of 16 holds the rows of nearly every expert (a binomial's mean and three standard
    deviations). With more rows, a larger tile pads more, and a smaller one reads weights again, from the cache.
    """
    rows = 16 if mean_rows <= 8 else 32 if mean_rows <= 40 else 64
    gated, plain = (_TILES_FP8 if fp8 else _TILES)[rows]
    return rows, *(gated if kind == "silu" else plain)


@triton.jit
def activation(v, up, KIND: tl.constexpr):  # noqa: ANN201 (a Triton value)
    """Values v (and up, if gated) through "silu", "gelu" or "none"."""
    if KIND == "silu":
        v = v * tl.sigmoid(v) * up
    elif KIND == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    return v


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
    own = bins == expert
    own_tiles = tl.sum(tl.where(own, tiles, 0), axis=0)
    own_pid = pid - tl.sum(tl.where(own, programs_end - tiles * column_tiles, 0), axis=0)
    row = tl.sum(tl.where(own, start, 0), axis=0) + (own_pid % own_tiles) * TILE + tl.arange(0, TILE)
    column = (own_pid // own_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.sum(tl.where(own, end, 0), axis=0)

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
    total = activation(total, total_up, KIND)
    inside = (row[:, None] < last) & (column[None, :] < N)
    tl.store(out + row[:, None].to(tl.int64) * N + column[None, :], total.to(tl.bfloat16), mask=inside)
