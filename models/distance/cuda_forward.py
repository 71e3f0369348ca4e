"""Forward kernels of `cuda.py` in Gluon, Triton's language with explicit layouts of tiles over threads.

A program computes a tile of outputs. Asynchronous copies bring slices of the operands to shared memory, a few slices
ahead of their use, and transpose them on the way. A thread reads few operand values, as vectors, for many terms
|x_i - w_i|. Operands are never padded: copies past the end of the inputs give zeros, and a term |0 - 0| adds nothing.

For some integers p, powers of |x_i - w_i| are computed by multiplication, for other p as 2^(p log2 |x_i - w_i|). Large
powers need operands near 1, so each sample has a power of two as its scale. Sums that have left the range of float32
nevertheless are recomputed from ratios to the largest term.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language import PropagateNan, constexpr

from linflab.models.distance.reference import BLOCK_INPUTS

REAL_P = constexpr(-1)  # EXPONENT of p without multiplication chain; 0 is p = inf
PROPAGATE_NAN = constexpr(PropagateNan.ALL)  # a maximum with NaN is NaN, as in PyTorch
BLOCK_TERMS = constexpr(BLOCK_INPUTS)  # inputs per block that `distance_sums_kernel` records
NO_OUTPUT = constexpr(2**31 - 1)


@gluon.jit
def log2_approx(x):
    """Return log2(x) with an error of at most 2^-22, absolute near x = 1 and relative elsewhere.

    The function of libdevice needs ten more instructions.
    """
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def exp2_approx(x):
    """Return 2^x."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal_approx(x):
    """Return 1 / x within one unit in the last place, without the call of a subroutine."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def power(x, EXPONENT: constexpr):
    """Return x^EXPONENT by multiplication, for 1 to 8 and 2^k or 3 2^k up to 64; odd powers keep the sign of x."""
    if EXPONENT % 2 == 0 and EXPONENT % 3 != 0:  # 2^k
        result = x * x
        if EXPONENT > 2:
            result = power(result, EXPONENT // 2)
    elif EXPONENT % 2 == 0:  # 3 2^k
        result = power(x * x * x, EXPONENT // 3)
    else:
        result = x
        if EXPONENT > 1:
            square = x * x
            result = square * x
        if EXPONENT == 5:
            result = result * square
        if EXPONENT == 7:
            result = result * (square * square)
    return result


@gluon.jit
def distance_sums_kernel(
    x, w, scales, largest, sums, blocks, row_indices, counts, p, M, N, K, tiles, group_size,
    EXPONENT: constexpr, SCALED: constexpr, RATIOS: constexpr, MASKED: constexpr, RECORD: constexpr,
    BM: constexpr, BN: constexpr, BK: constexpr, STAGES: constexpr,
    L: constexpr, COPY: constexpr, SHARED: constexpr,
):  # fmt: skip
    """Compute sums[s, m, n], the sum or maximum of the powers of |x[m, k] - w[n, k]| over the k of part s.

    Part s has tiles * BK inputs k. With SCALED, x holds the samples times their scales. With RATIOS, terms are divided
    by largest[m, n]. With MASKED, samples of group g = m // group_size use the inputs row_indices[g, :counts[g]].
    RECORD requires EXPONENT 0 and a single part s = 0: blocks[m, n] is the first block of BLOCK_TERMS inputs that
    contains the maximum.
    """
    first_m, first_n, part = gl.program_id(0) * BM, gl.program_id(1) * BN, gl.program_id(2)
    x_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BM], SHARED)
    w_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, BK, BN], SHARED)
    lane = gl.arange(0, BK, layout=gl.SliceLayout(1, COPY))[:, None]
    x_rows = gl.minimum(first_m + gl.arange(0, BM, layout=gl.SliceLayout(0, COPY)), M - 1)[None, :] * K
    w_rows = gl.minimum(first_n + gl.arange(0, BN, layout=gl.SliceLayout(0, COPY)), N - 1)[None, :] * K
    last = gl.minimum(K, (part + 1) * tiles * BK)
    if MASKED:
        row_indices += (first_m // group_size) * K
        last = gl.minimum(last, gl.load(counts + first_m // group_size))
    column = part * tiles * BK + lane  # inputs of the next tile to copy
    used = gl.maximum(last - part * tiles * BK + BK - 1, 0) // BK
    if RECORD:  # round up to whole blocks, at least one
        used = gl.maximum((used * BK + BLOCK_TERMS - 1) // BLOCK_TERMS, 1) * (BLOCK_TERMS // BK)
    for stage in gl.static_range(STAGES - 1):
        _copy_tiles(x, w, x_rows, w_rows, row_indices, column, last, x_tiles.index(stage), w_tiles.index(stage), MASKED)
        column += BK
    negative = 1.0
    if SCALED:
        m = first_m + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
        negative = -gl.load(scales + gl.minimum(m, M - 1))[:, None]
    inverse = 1.0
    if RATIOS:
        places, inside = _places(first_m, first_n, M, N, BM, BN, L)
        top = gl.load(largest + places, mask=inside, other=0.0)
        inverse = gl.where(top > 0, reciprocal_approx(gl.maximum(top, 1e-37)), 0.0)
    total = gl.zeros((BM, BN), gl.float32, layout=L)
    slot = 0
    if RECORD:
        best = total
        where = gl.zeros((BM, BN), gl.int32, layout=L)
        for block in range(used * BK // BLOCK_TERMS):
            total, column, slot = _add_slices(
                gl.zeros((BM, BN), gl.float32, layout=L), BLOCK_TERMS // BK, slot, column, last, x, w, x_rows, w_rows,
                row_indices, x_tiles, w_tiles, negative, inverse, p, EXPONENT, SCALED, RATIOS, MASKED, BK, STAGES, L,
            )  # fmt: skip
            better = ~(total <= best) & (best == best)  # the first NaN stays
            best = gl.where(better, total, best)
            where = gl.where(better, block, where)
        total = best
        places, inside = _places(first_m, first_n, M, N, BM, BN, L)
        gl.store(blocks + places, where, mask=inside)
    else:
        total, column, slot = _add_slices(
            total, used, slot, column, last, x, w, x_rows, w_rows,
            row_indices, x_tiles, w_tiles, negative, inverse, p, EXPONENT, SCALED, RATIOS, MASKED, BK, STAGES, L,
        )  # fmt: skip
    places, inside = _places(first_m, first_n, M, N, BM, BN, L)
    gl.store(sums + part * M * N + places, total, mask=inside)


@gluon.jit
def _add_slices(
    total, count, slot, column, last, x, w, x_rows, w_rows, row_indices, x_tiles, w_tiles, negative, inverse, p,
    EXPONENT: constexpr, SCALED: constexpr, RATIOS: constexpr, MASKED: constexpr,
    BK: constexpr, STAGES: constexpr, L: constexpr,
):  # fmt: skip
    """Add the terms of the next `count` slices of the operands, and start as many copies of later slices.

    Returns:
        The sums or maxima, the next inputs to copy, and the slot of the next slice in shared memory.
    """
    for _ in range(count):
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        free = slot - 1
        if free < 0:
            free += STAGES
        _copy_tiles(x, w, x_rows, w_rows, row_indices, column, last, x_tiles.index(free), w_tiles.index(free), MASKED)
        column += BK
        total = _add_terms(
            total, x_tiles.index(slot), w_tiles.index(slot), negative, inverse, p, EXPONENT, SCALED, RATIOS, BK, L
        )
        slot += 1
        if slot == STAGES:
            slot = 0
    return total, column, slot


@gluon.jit
def _places(first_m, first_n, M, N, BM: constexpr, BN: constexpr, L: constexpr):
    """Return the flat indices of a tile's outputs, and which of them lie inside (M, N)."""
    m = first_m + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = first_n + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    return m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]


@gluon.jit
def _copy_tiles(x, w, x_rows, w_rows, row_indices, column, last, x_tile, w_tile, MASKED: constexpr):
    """Start copying the inputs `column` of both operands, as one group of asynchronous copies."""
    source = column
    if MASKED:
        source = gl.load(row_indices + column, mask=column < last, other=0)
    async_copy.async_copy_global_to_shared(x_tile, x + (source + x_rows), mask=column < last)
    async_copy.async_copy_global_to_shared(w_tile, w + (source + w_rows), mask=column < last)
    async_copy.commit_group()


@gluon.jit
def _add_terms(
    total, x_tile, w_tile, negative, inverse, p,
    EXPONENT: constexpr, SCALED: constexpr, RATIOS: constexpr, BK: constexpr, L: constexpr,
):  # fmt: skip
    """Return the sums or maxima with the terms of one tile, in the order of the inputs."""
    for k in gl.static_range(BK):
        a = x_tile.slice(k, 1, 0).permute([1, 0]).load(L)
        b = w_tile.slice(k, 1, 0).load(L)
        d = a + b * negative if SCALED else a - b  # scales are powers of two, so products are exact
        if EXPONENT == 0:
            total = gl.maximum(total, gl.abs(d), propagate_nan=PROPAGATE_NAN)
        elif EXPONENT == REAL_P:
            d = gl.abs(d)
            if RATIOS:
                d = d * inverse
            total += exp2_approx(p * log2_approx(d))
        elif EXPONENT % 2 == 1:
            total += power(gl.abs(d), EXPONENT)
        else:
            total += power(d, EXPONENT)
    return total


@gluon.jit
def scales_kernel(
    x, w, scaled, scales, margin, M, N, K,
    SAMPLES: constexpr, BK: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Compute scales[m], a power of two near 1 / ||x[m] - w[n]||_p for most n, and scaled[m] = scales[m] * x[m].

    The norms are estimated as the l_inf distances to SAMPLES rows of w, times 2^margin for l_p. The scale of a sample
    does not depend on other samples. scaled[m] is finite where x[m] is finite.
    """
    L: constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, WARPS], [1, 0])
    m = gl.program_id(0)
    sample = gl.arange(0, SAMPLES, layout=gl.SliceLayout(1, L)) * N // SAMPLES
    k = gl.arange(0, BK, layout=gl.SliceLayout(0, L))
    distances = gl.zeros((SAMPLES, BK), gl.float32, layout=L)
    size = gl.zeros((1, BK), gl.float32, layout=L)
    for first in range(0, K, BK):
        used = (first + k < K)[None, :]
        one = gl.load(x + m * K + first + k[None, :], mask=used, other=0.0)
        other = gl.load(w + sample[:, None] * K + first + k[None, :], mask=used, other=0.0)
        size = gl.maximum(size, gl.abs(one))
        distances = gl.maximum(distances, gl.abs(one - other))
    logs = gl.log2(gl.maximum(gl.max(distances, axis=1), 1e-37))
    exponent = gl.floor(gl.sum(logs, axis=0) / SAMPLES + margin + 0.5)
    least = gl.maximum(gl.log2(gl.maximum(gl.max(gl.max(size, axis=1), axis=0), 1e-37)) - 120, -100.0)
    exponent = gl.floor(gl.minimum(gl.maximum(exponent, least), 100.0))
    scale = gl.exp2(-exponent)
    gl.store(scales + m, scale)
    for first in range(0, K, BK):
        places = m * K + first + k[None, :]
        used = (first + k < K)[None, :]
        gl.store(scaled + places, scale * gl.load(x + places, mask=used, other=0.0), mask=used)


@gluon.jit
def distances_kernel(
    sums, x, w, scales, largest, y, row_indices, counts, p, least, most, parts, M, N, K, group_size,
    EXPONENT: constexpr, SCALED: constexpr, RATIOS: constexpr, MASKED: constexpr,
    BLOCK: constexpr, BK: constexpr, WARPS: constexpr,
):  # fmt: skip
    """Compute the distances y (M, N) from the sums (parts, M, N) of `distance_sums_kernel`.

    Sums outside [least, most] are recomputed from x and w. The result of an output depends on no other output.
    """
    L: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=L)
    inside = place < M * N
    total = gl.load(sums + place, mask=inside, other=1.0)
    for part in range(1, parts):
        another = gl.load(sums + part * M * N + place, mask=inside, other=1.0)
        if EXPONENT == 0:
            total = gl.maximum(total, another, propagate_nan=PROPAGATE_NAN)
        else:
            total += another
    unsafe = inside & ((total < least) | (total > most))
    if EXPONENT == 2:
        total = gl.sqrt(total)
    elif EXPONENT == REAL_P or EXPONENT > 2:
        total = gl.exp2(gl.log2(total) / p)
    if SCALED:
        total = total / gl.load(scales + gl.minimum(place // N, M - 1))
    if RATIOS:
        total = total * gl.load(largest + place, mask=inside, other=0.0)
    if EXPONENT != 0 and not RATIOS:
        missing = gl.where(unsafe, place, NO_OUTPUT)
        first = gl.min(missing, axis=0)
        while first < NO_OUTPUT:
            value = _ratio_norm(x, w, row_indices, counts, p, first // N, first % N, K, group_size, MASKED, BK, L)
            total = gl.where(place == first, value, total)
            missing = gl.where(place == first, NO_OUTPUT, missing)
            first = gl.min(missing, axis=0)
    gl.store(y + place, total, mask=inside)


@gluon.jit
def _ratio_norm(x, w, row_indices, counts, p, m, n, K, group_size, MASKED: constexpr, BK: constexpr, L: constexpr):
    """Return ||x[m] - w[n]||_p as the largest term times the norm of the ratios of all terms to it."""
    k = gl.arange(0, BK, layout=L)
    inputs = K
    if MASKED:
        row_indices += (m // group_size) * K
        inputs = gl.load(counts + m // group_size)
    top = gl.zeros((BK,), gl.float32, layout=L)
    for first in range(0, inputs, BK):
        d = _differences(x + m * K, w + n * K, row_indices, first + k, inputs, MASKED)
        top = gl.maximum(top, gl.abs(d), propagate_nan=PROPAGATE_NAN)
    largest = gl.max(top, axis=0)
    inverse = 0.0
    if largest > 0:
        inverse = 1 / gl.maximum(largest, 1e-37)
    total = gl.zeros((BK,), gl.float32, layout=L)
    for first in range(0, inputs, BK):
        d = _differences(x + m * K, w + n * K, row_indices, first + k, inputs, MASKED)
        total += exp2_approx(p * log2_approx(gl.abs(d) * inverse))
    return largest * exp2_approx(log2_approx(gl.sum(total, axis=0)) / p)


@gluon.jit
def _differences(x, w, row_indices, k, inputs, MASKED: constexpr):
    """Return x[k] - w[k] of one sample and one output, 0 past the last input."""
    source = k
    if MASKED:
        source = gl.load(row_indices + k, mask=k < inputs, other=0)
    return gl.load(x + source, mask=k < inputs, other=0.0) - gl.load(w + source, mask=k < inputs, other=0.0)


@gluon.jit
def linf_distance_bounds_kernel(
    lower, upper, w, low, high, M, N, K,
    BM: constexpr, BN: constexpr, BK: constexpr, STAGES: constexpr,
    L: constexpr, COPY: constexpr, SHARED: constexpr,
):  # fmt: skip
    """Compute the range of ||x - w[n]||_inf over the box lower[m] <= x <= upper[m]."""
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
    smallest = gl.zeros((BM, BN), gl.float32, layout=L)
    largest = gl.zeros((BM, BN), gl.float32, layout=L)
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
            largest = gl.maximum(
                largest, gl.maximum(above, -below, propagate_nan=PROPAGATE_NAN), propagate_nan=PROPAGATE_NAN
            )
            smallest = gl.maximum(
                smallest, gl.maximum(below, -above, propagate_nan=PROPAGATE_NAN), propagate_nan=PROPAGATE_NAN
            )
        slot += 1
        if slot == STAGES:
            slot = 0
    places, inside = _places(first_m, first_n, M, N, BM, BN, L)
    gl.store(low + places, smallest, mask=inside)
    gl.store(high + places, largest, mask=inside)
