"""Backward kernels of `cuda.py` in Gluon: gradients of distances in x and w, each term computed once.

At finite p, each thread holds two inputs of many samples, and the gradients in x, in registers. The gradients in w of a
part of the outputs are summed in shared memory, where each sum belongs to one thread. So no sum needs atomics or a
second pass over the terms, and results are deterministic. At p = inf each output has a nonzero gradient in only one
input. A search in one block of inputs finds this input. The gradients of an input are then added as 64-bit integers, so
their order does not matter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import constexpr

from linflab.models.distance.cuda_forward import BLOCK_TERMS, NO_OUTPUT, REAL_P, exp2_approx, log2_approx, power


@gluon.jit
def slopes_kernel(
    y, grad_y, tops, largest, slopes, scales, listed, exponent, least, headroom, M, N,
    BM: constexpr, BN: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Compute slopes[m, n] = grad_y (y scale)^-exponent, and the scale of each block of BM samples.

    tops[m] is the largest finite distance of y[m], largest[0] the largest magnitude of the operands. Scaled distances
    are at most 2^headroom. Scaled distances below 2^least have slope 0 and listed[m, n] = 1; `listed_gradients_kernel`
    adds their gradients.
    """
    L: constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    m = gl.program_id(0) * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = gl.program_id(1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    top = gl.max(gl.load(tops + m, mask=m < M, other=0.0), axis=0)
    shift = gl.floor(headroom - gl.log2(gl.maximum(top, 1e-37)))
    finite = gl.floor(120 - gl.log2(gl.maximum(gl.load(largest), 1e-37)))  # operands times scale are at most 2^120
    scale = gl.where(top > 0, gl.exp2(gl.maximum(gl.minimum(gl.minimum(shift, finite), 126.0), -126.0)), 1.0)
    inside = (m < M)[:, None] & (n < N)[None, :]
    places = m[:, None] * N + n[None, :]
    distance = gl.load(y + places, mask=inside, other=0.0)
    slope = gl.load(grad_y + places, mask=inside, other=0.0)
    logs = gl.log2(gl.maximum(distance * scale, 1e-37))
    positive = inside & ~(distance <= 0)  # true for NaN
    small = positive & (logs < least)
    slope = gl.where(positive & ~small, slope * gl.exp2(-exponent * logs), 0.0)
    slope = gl.where(distance == distance, slope, float("nan"))
    gl.store(slopes + places, slope, mask=inside)
    gl.store(listed + places, small.to(gl.int8), mask=inside)
    if gl.program_id(1) == 0:
        gl.store(scales + gl.program_id(0), scale)


@gluon.jit
def gradients_kernel(
    x, w, slopes, inverses, scales, masks, of_x, of_w, exponent, M, N, K, group_size,
    EXPONENT: constexpr, MASKED: constexpr, LAYERS: constexpr, ROWS: constexpr, BK: constexpr,
    PART: constexpr, STEP: constexpr, L: constexpr, SHARED: constexpr, COPY: constexpr,
):  # fmt: skip
    """Compute the gradients in x and w for a part of the outputs and a block of BK inputs.

    With d = (x[m, k] - w[n, k]) scales[m // (LAYERS * ROWS)] and the terms s = slopes[m, n] sign(d) |d|^(p - 1):

        of_x[part, m, k] = the sum of s over the n of the part,        of_w[n, k] = minus the sum of s over all m

    EXPONENT is p, `exponent` is p - 1. With EXPONENT REAL_P, terms have |d inverses[m, n]| in place of |d|, and scales
    are 1. With MASKED, only terms with masks[m // group_size, k] = 1 count.
    """
    BLOCK: constexpr = LAYERS * ROWS
    first_n, first_k = gl.program_id(0) * PART, gl.program_id(1) * BK
    sums = gl.allocate_shared_memory(gl.float32, [PART, 1, BK], SHARED)
    slope_rows = gl.allocate_shared_memory(gl.float32, [2 * PART, 1, BLOCK], SHARED)  # slopes of two blocks
    inverse_rows = slope_rows
    if EXPONENT == REAL_P:
        inverse_rows = gl.allocate_shared_memory(gl.float32, [2 * PART, 1, BLOCK], SHARED)
    k = first_k + gl.arange(0, BK, layout=gl.SliceLayout(0, L))
    used = (k < K)[None, :]
    column = gl.minimum(k, K - 1)[None, :]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    zero = gl.zeros((1, BK), gl.float32, layout=L)
    outputs = gl.minimum(PART, N - first_n)
    w += first_n * K
    for n in range(outputs):
        sums.index(n).store(zero)
    half = 0
    _copy_slopes(
        slopes, inverses, slope_rows, inverse_rows, 0, first_n, 0, M, N, EXPONENT, PART, STEP, BLOCK, SHARED, COPY
    )
    for top in range(0, M, BLOCK):
        async_copy.wait_group(0)
        gl.barrier()
        other = PART - half
        _copy_slopes(
            slopes, inverses, slope_rows, inverse_rows, other, first_n, top + BLOCK, M, N,
            EXPONENT, PART, STEP, BLOCK, SHARED, COPY,
        )  # fmt: skip
        scale = gl.load(scales + top // BLOCK)
        if MASKED:
            scale = scale * gl.load(masks + (top // group_size) * K + column)
        mine = ()
        totals = ()
        for layer in gl.static_range(LAYERS):
            m = gl.minimum(top + layer * ROWS + rows, M - 1)
            mine = mine + (gl.load(x + m[:, None] * K + column) * scale,)
            totals = totals + (gl.zeros((ROWS, BK), gl.float32, layout=L),)
        for n in range(outputs):
            weight = gl.load(w + n * K + column)
            before = sums.index(n).load(L)
            slope_row, inverse_row = slope_rows.index(half + n), inverse_rows.index(half + n)
            over_rows = gl.zeros((ROWS, BK), gl.float32, layout=L)
            added = ()
            for layer in gl.static_range(LAYERS):
                slope = slope_row.slice(layer * ROWS, ROWS, 1).permute([1, 0]).load(L)
                inverse = slope
                if EXPONENT == REAL_P:
                    inverse = inverse_row.slice(layer * ROWS, ROWS, 1).permute([1, 0]).load(L)
                one, other_factor = _gradient_term(mine[layer] - weight * scale, slope, inverse, exponent, EXPONENT)
                added = added + (totals[layer] + one * other_factor,)
                over_rows += one * other_factor
            totals = added
            sums.index(n).store(before - gl.sum(over_rows, axis=0)[None, :])
        for layer in gl.static_range(LAYERS):
            m = top + layer * ROWS + rows
            places = (gl.program_id(0) * M + m[:, None]) * K + k[None, :]
            gl.store(of_x + places, totals[layer], mask=(m < M)[:, None] & used)
        half = other
    for n in range(outputs):
        gl.store(of_w + (first_n + n) * K + k[None, :], sums.index(n).load(L), mask=used)


@gluon.jit
def _copy_slopes(
    slopes, inverses, slope_rows, inverse_rows, half, first_n, top, M, N,
    EXPONENT: constexpr, PART: constexpr, STEP: constexpr, BLOCK: constexpr,
    SHARED: constexpr, COPY: constexpr,
):  # fmt: skip
    """Start copying the slopes (and inverses) of BLOCK samples and PART outputs to shared memory.

    They fill the rows from `half` on, as one group of asynchronous copies. Slopes past the end are 0.
    """
    n = first_n + gl.arange(0, STEP, layout=gl.SliceLayout(1, COPY))[:, None]
    m = top + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, COPY))[None, :]
    slope_tiles = slope_rows._reinterpret(gl.float32, [2 * PART // STEP, STEP, BLOCK], SHARED)
    inverse_tiles = inverse_rows._reinterpret(gl.float32, [2 * PART // STEP, STEP, BLOCK], SHARED)
    for step in range(PART // STEP):
        places, inside = m * N + n, (m < M) & (n < N)
        async_copy.async_copy_global_to_shared(slope_tiles.index(half // STEP + step), slopes + places, mask=inside)
        if EXPONENT == REAL_P:
            async_copy.async_copy_global_to_shared(
                inverse_tiles.index(half // STEP + step), inverses + places, mask=inside
            )
        n += STEP
    async_copy.commit_group()


@gluon.jit
def _gradient_term(d, slope, inverse, exponent, EXPONENT: constexpr):
    """Return two factors of slope sign(d) |d|^(p - 1), so that additions of their product can be fused."""
    if EXPONENT == REAL_P:
        size = exp2_approx(exponent * log2_approx(gl.abs(d) * inverse))
        signed = size.to(gl.int32, bitcast=True) | (d.to(gl.int32, bitcast=True) & -2147483648)
        return slope, signed.to(gl.float32, bitcast=True)
    elif EXPONENT == 1:
        return gl.where(d > 0, slope, gl.where(d == 0, 0.0, -slope)), 1.0  # NaN if the slope is NaN
    elif EXPONENT == 2:
        return slope, d
    elif EXPONENT % 2 == 1:
        return slope * gl.abs(d), power(d, EXPONENT - 2)
    elif EXPONENT == 4:
        return slope * d, d * d
    elif EXPONENT == 6:
        square = d * d
        return slope * d, square * square
    else:
        return _even_gradient_term(d * d, slope * d, EXPONENT // 2)


@gluon.jit
def _even_gradient_term(square, slope, HALF: constexpr):
    """Return two factors of slope square^(HALF - 1), for HALF = 2^k or 3 2^k."""
    if HALF == 2:
        return slope, square
    elif HALF == 3:
        return slope, square * square
    else:
        return _even_gradient_term(square * square, slope * square, HALF // 2)


@gluon.jit
def listed_gradients_kernel(
    x, w, y, grad_y, listed, gradient, masks, exponent, N, K, x_step, y_step, output_step, group_size,
    MASKED: constexpr, BN: constexpr, BK: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Add the gradients of the listed distances of each row of x to gradient (M, K).

    Element (m, n) of y, grad_y and listed is at m * y_step + n * output_step. For gradients in w, pass w as x, x as w,
    and the steps of these three matrices transposed. Masks belong to samples, which are the rows of x if x_step is 1,
    and otherwise the rows of w.
    """
    L: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    m, first_k = gl.program_id(0), gl.program_id(1) * BK
    k = first_k + gl.arange(0, BK, layout=L)
    used = k < K
    mine = gl.load(x + m * K + k, mask=used, other=0.0)
    total = gl.load(gradient + m * K + k, mask=used, other=0.0)
    for first in range(0, N, BN):
        n = first + gl.arange(0, BN, layout=L)
        flags = gl.load(listed + m * y_step + n * output_step, mask=n < N, other=0)
        missing = gl.where(flags != 0, n, NO_OUTPUT)
        found = gl.min(missing, axis=0)
        while found < NO_OUTPUT:
            place = m * y_step + found * output_step
            d = mine - gl.load(w + found * K + k, mask=used, other=0.0)
            if MASKED:  # masked terms may be larger than the distance
                sample = m * x_step + found * (1 - x_step)
                d = d * gl.load(masks + (sample // group_size) * K + k, mask=used, other=0.0)
            ratio = gl.abs(d) / gl.load(y + place)
            slope = gl.load(grad_y + place) * exp2_approx(exponent * log2_approx(ratio))
            total += gl.where(d > 0, slope, gl.where(d < 0, -slope, 0.0))
            missing = gl.where(n == found, NO_OUTPUT, missing)
            found = gl.min(missing, axis=0)
    gl.store(gradient + m * K + k, total, mask=used)


@gluon.jit
def linf_slopes_kernel(
    x, w, y, grad_y, blocks, row_indices, counts, columns, slopes, M, N, K, group_size,
    MASKED: constexpr, BLOCK: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Find the first input in block blocks[m, n] with |x[m] - w[n]| = y[m, n], and its slope.

    Write the input to columns[m, n], and the slope to slopes[m, n].
    """
    L: constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    place = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, L))
    inside = place < M * N
    m, n = gl.minimum(place // N, M - 1)[:, None], (place % N)[:, None]
    distance = gl.load(y + place, mask=inside, other=0.0)
    first = gl.load(blocks + place, mask=inside, other=0).to(gl.int32) * BLOCK_TERMS
    term = gl.arange(0, BLOCK_TERMS, layout=gl.SliceLayout(0, L))[None, :]
    k = first[:, None] + term
    source, inputs = k, K
    if MASKED:
        inputs = gl.load(counts + m // group_size)
        source = gl.load(row_indices + (m // group_size) * K + k, mask=k < inputs, other=0)
    d = gl.load(x + m * K + source, mask=k < inputs, other=0.0) - gl.load(
        w + n * K + source, mask=k < inputs, other=0.0
    )
    hit = gl.min(gl.where(gl.abs(d) == distance[:, None], term, BLOCK_TERMS), axis=1)
    chosen = term == hit[:, None]
    found = gl.sum(gl.where(chosen, d, 0.0), axis=1)
    column = gl.sum(gl.where(chosen, source, 0), axis=1)
    slope = gl.load(grad_y + place, mask=inside, other=0.0)
    slope = gl.where(found > 0, slope, gl.where(found < 0, -slope, 0.0))
    slope = gl.where(distance == distance, slope, float("nan"))
    gl.store(columns + place, column, mask=inside)
    gl.store(slopes + place, slope, mask=inside)


@gluon.jit
def scatter_kernel(
    columns, slopes, gradient, sign, N, K, y_step, output_step, log_terms,
    BK: constexpr, BN: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Compute gradient[m, k] = sign times the sum of slopes[m, n] over the n with columns[m, n] = k.

    Slopes times 2^62 / (2^log_terms * the largest slope) are added as 64-bit integers, so their order does not matter.
    Element (m, n) of columns and slopes is at m * y_step + n * output_step. If a slope in row m is infinite or NaN,
    gradient[m] is NaN.
    """
    L: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SHARED: constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    m, first_k = gl.program_id(0), gl.program_id(1) * BK
    top = gl.zeros((BN,), gl.float32, layout=L)
    for first in range(0, N, BN):
        n = first + gl.arange(0, BN, layout=L)
        slope = gl.load(slopes + m * y_step + n * output_step, mask=n < N, other=0.0)
        top += gl.where(gl.abs(slope) <= 3e38, 0.0, float("nan"))
        top = gl.where(gl.abs(slope) > top, gl.abs(slope), top)
    largest = gl.max(top, axis=0)
    faulty = gl.sum(gl.where(top == top, 0, 1), axis=0)
    bits = 62 - log_terms - gl.ceil(gl.log2(gl.maximum(largest, 1e-37)))
    scale = gl.exp2(bits.to(gl.float64))
    sums = gl.allocate_shared_memory(gl.int64, [BK], SHARED, gl.zeros((BK,), gl.int64, layout=L))
    gl.barrier()
    for first in range(0, N, BN):
        n = first + gl.arange(0, BN, layout=L)
        places = m * y_step + n * output_step
        column = gl.load(columns + places, mask=n < N, other=-1) - first_k
        slope = gl.load(slopes + places, mask=n < N, other=0.0)
        inside = (column >= 0) & (column < BK)
        value = (slope.to(gl.float64) * scale).to(gl.int64)
        sums.atomic_scatter_add(value, gl.where(inside, column, 0), 0, mask=inside)
    gl.barrier()
    k = first_k + gl.arange(0, BK, layout=L)
    total = (sums.load(L).to(gl.float64) / scale).to(gl.float32) * sign
    gl.store(gradient + m * K + k, gl.where(faulty > 0, float("nan"), total), mask=k < K)
