"""Kernels of SortNet's neurons in Gluon; see `cuda_forward.py` for tiles and copies.

A thread keeps the largest terms |x_i - w_i| of each of its outputs in registers, sorted. Each new term passes through
this list by a chain of maxima and minima, so the time does not depend on the values.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import constexpr

from linflab.models.distance.cuda_forward import PROPAGATE_NAN, _copy_tiles, _places


@gluon.jit
def _zeros(TOP: constexpr, BM: constexpr, BN: constexpr, DTYPE: constexpr, L: constexpr):
    """Return a tuple of TOP tiles of zeros."""
    values = ()
    for _ in gl.static_range(TOP):
        values = values + (gl.zeros((BM, BN), DTYPE, layout=L),)
    return values


@gluon.jit
def _insert(values, term, TOP: constexpr):
    """Return the TOP largest of `values`, in descending order, and `term`."""
    result = ()
    for rank in gl.static_range(TOP):
        result = result + (gl.maximum(values[rank], term, propagate_nan=PROPAGATE_NAN),)
        term = gl.minimum(values[rank], term, propagate_nan=PROPAGATE_NAN)
    return result


@gluon.jit
def _insert_with_codes(values, codes, term, code, TOP: constexpr):
    """Return the TOP largest of `values` and `term`, and the codes of each; the earlier of equal terms comes first."""
    new_values = ()
    new_codes = ()
    new = term
    for rank in gl.static_range(TOP):
        better = new > values[rank]  # then also for all later ranks, which move by one
        new_values = new_values + (gl.where(better, term, values[rank]),)
        new_codes = new_codes + (gl.where(better, code, codes[rank]),)
        code = gl.where(better, codes[rank], code)
        term = gl.where(better, values[rank], term)
    return new_values, new_codes


@gluon.jit
def _weighted_sum(values, coefficients, TOP: constexpr):
    """Return the sum of coefficients[k] * values[k]."""
    total = values[0] * gl.load(coefficients)
    for rank in gl.static_range(1, TOP):
        total += values[rank] * gl.load(coefficients + rank)
    return total


@gluon.jit
def sort_distance_kernel(
    x, w, coefficients, y, grad_y, columns, slopes, M, N, K,
    RECORD: constexpr, TOP: constexpr, BM: constexpr, BN: constexpr, BK: constexpr, STAGES: constexpr,
    L: constexpr, COPY: constexpr, SHARED: constexpr,
):  # fmt: skip
    """Compute y[m, n], the sum of coefficients[k] times the k-th largest |x[m] - w[n]|.

    RECORD computes its gradient times grad_y instead: columns[m, k, n] is the input of the k-th largest term, and
    slopes[m, k, n] the derivative in this input.
    """
    first_m, first_n = gl.program_id(0) * BM, gl.program_id(1) * BN
    x_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BM], SHARED)
    w_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BN], SHARED)
    column = gl.arange(0, BK, layout=gl.SliceLayout(1, COPY))[:, None]
    x_rows = gl.minimum(first_m + gl.arange(0, BM, layout=gl.SliceLayout(0, COPY)), M - 1)[None, :] * K
    w_rows = gl.minimum(first_n + gl.arange(0, BN, layout=gl.SliceLayout(0, COPY)), N - 1)[None, :] * K
    for stage in gl.static_range(STAGES - 1):
        _copy_tiles(x, w, x_rows, w_rows, w, column, K, x_tiles.index(stage), w_tiles.index(stage), False)
        column += BK
    largest = _zeros(TOP, BM, BN, gl.float32, L)
    if RECORD:
        codes = _zeros(TOP, BM, BN, gl.int32, L)  # 2 k, plus 1 where x_k < w_k
        faulty = gl.zeros((BM, BN), gl.float32, layout=L)  # NaN where a term is
    slot = 0
    for first in range(0, K, BK):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        free = slot - 1
        if free < 0:
            free += STAGES
        _copy_tiles(x, w, x_rows, w_rows, w, column, K, x_tiles.index(free), w_tiles.index(free), False)
        column += BK
        for k in gl.static_range(BK):
            d = x_tiles.index(slot).slice(k, 1, 0).permute([1, 0]).load(L) - w_tiles.index(slot).slice(k, 1, 0).load(L)
            if RECORD:
                faulty = gl.maximum(faulty, d, propagate_nan=PROPAGATE_NAN)
                code = gl.where(d < 0, 2 * (first + k) + 1, 2 * (first + k))
                largest, codes = _insert_with_codes(largest, codes, gl.abs(d), code, TOP)
            else:
                largest = _insert(largest, gl.abs(d), TOP)
        slot += 1
        if slot == STAGES:
            slot = 0
    places, inside = _places(first_m, first_n, M, N, BM, BN, L)
    if RECORD:
        upstream = gl.where(faulty == faulty, gl.load(grad_y + places, mask=inside, other=0.0), float("nan"))
        m = first_m + gl.arange(0, BM, layout=gl.SliceLayout(1, L))[:, None]
        n = first_n + gl.arange(0, BN, layout=gl.SliceLayout(0, L))[None, :]
        for rank in gl.static_range(TOP):
            slope = gl.load(coefficients + rank) * upstream
            slope = gl.where(codes[rank] % 2 == 1, -slope, slope)
            slope = gl.where((largest[rank] > 0) | (slope != slope), slope, 0.0)
            target = (m * TOP + rank) * N + n
            gl.store(columns + target, codes[rank] // 2, mask=inside)
            gl.store(slopes + target, slope, mask=inside)
    else:
        gl.store(y + places, _weighted_sum(largest, coefficients, TOP), mask=inside)


@gluon.jit
def sort_distance_bounds_kernel(
    lower, upper, w, coefficients, low, high, M, N, K,
    TOP: constexpr, BM: constexpr, BN: constexpr, BK: constexpr, STAGES: constexpr,
    L: constexpr, COPY: constexpr, SHARED: constexpr,
):  # fmt: skip
    """Compute the bounds of the neurons over the box lower[m] <= x <= upper[m], from bounds of each term."""
    first_m, first_n = gl.program_id(0) * BM, gl.program_id(1) * BN
    lower_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BM], SHARED)
    upper_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BM], SHARED)
    w_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BN], SHARED)
    column = gl.arange(0, BK, layout=gl.SliceLayout(1, COPY))[:, None]
    x_rows = gl.minimum(first_m + gl.arange(0, BM, layout=gl.SliceLayout(0, COPY)), M - 1)[None, :] * K
    w_rows = gl.minimum(first_n + gl.arange(0, BN, layout=gl.SliceLayout(0, COPY)), N - 1)[None, :] * K
    for stage in gl.static_range(STAGES - 1):
        async_copy.async_copy_global_to_shared(lower_tiles.index(stage), lower + (column + x_rows), mask=column < K)
        _copy_tiles(upper, w, x_rows, w_rows, w, column, K, upper_tiles.index(stage), w_tiles.index(stage), False)
        column += BK
    smallest = _zeros(TOP, BM, BN, gl.float32, L)
    largest = _zeros(TOP, BM, BN, gl.float32, L)
    slot = 0
    for _ in range(0, K, BK):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        free = slot - 1
        if free < 0:
            free += STAGES
        async_copy.async_copy_global_to_shared(lower_tiles.index(free), lower + (column + x_rows), mask=column < K)
        _copy_tiles(upper, w, x_rows, w_rows, w, column, K, upper_tiles.index(free), w_tiles.index(free), False)
        column += BK
        for k in gl.static_range(BK):
            weight = w_tiles.index(slot).slice(k, 1, 0).load(L)
            below = lower_tiles.index(slot).slice(k, 1, 0).permute([1, 0]).load(L) - weight
            above = upper_tiles.index(slot).slice(k, 1, 0).permute([1, 0]).load(L) - weight
            largest = _insert(largest, gl.maximum(above, -below, propagate_nan=PROPAGATE_NAN), TOP)
            smallest = _insert(smallest, gl.maximum(below, -above, propagate_nan=PROPAGATE_NAN), TOP)
        slot += 1
        if slot == STAGES:
            slot = 0
    places, inside = _places(first_m, first_n, M, N, BM, BN, L)
    gl.store(low + places, _weighted_sum(smallest, coefficients, TOP), mask=inside)
    gl.store(high + places, _weighted_sum(largest, coefficients, TOP), mask=inside)
