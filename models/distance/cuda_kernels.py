"""The kernels of `cuda.py`, in Gluon: Triton's language in which the layout of a tile over threads is said.

Every thread holds a small square of a tile, so of an operand it reads a few values for many terms |x_i - w_i|, and
reads them as vectors. Operands come padded with zeros to whole tiles (a term |0 - 0| adds nothing), so no loop has a
mask.

Powers are taken by multiplication where p is a small integer, and as 2^(p log2 ratio) for any real p: of ratios in
[0, 1], so nothing overflows. The multiplications are of distances as they are, where these lie in a range in which no
power overflows or is lost; what does not is computed again by ratios.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan, constexpr

REAL = constexpr(-1)  # in place of a small integer as EXPONENT; 0 stands for infinity
UNKNOWN = constexpr(-1.0)  # no distance is negative
NAN_WINS = constexpr(PropagateNan.ALL)  # a maximum with it is NaN, as PyTorch's


@gluon.jit
def _log2(x):
    # within 2^-22, absolutely near 1 and relatively elsewhere; libdevice's takes ten instructions more
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _power(x, EXPONENT: constexpr):
    """x^EXPONENT by squaring; |x|^EXPONENT sign(x) where the exponent is odd."""
    result = x
    if EXPONENT == 2:
        result = x * x
    if EXPONENT == 3:
        result = x * x * x
    if EXPONENT == 4:
        square = x * x
        result = square * square
    if EXPONENT == 5:
        square = x * x
        result = square * square * x
    if EXPONENT == 6:
        cube = x * x * x
        result = cube * cube
    if EXPONENT == 7:
        square = x * x
        result = (square * x) * (square * square)
    if EXPONENT == 8:
        square = x * x
        fourth = square * square
        result = fourth * fourth
    return result


@gluon.jit
def distances(
    x, w, y, steps, counts, p, low, high, M, N, K, x_step, w_step, group,
    EXPONENT: constexpr, INDIRECT: constexpr, UNROLL: constexpr,
    BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    """y[m, n] = ||x[:, m] - w[:, n]||_p over the K rows of x (K, x_step) and w (K, w_step), or over those in `steps`.

    With INDIRECT, samples m of group m // group use the rows steps[m // group, :counts[m // group]].
    """
    m = gl.program_id(0) * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = gl.program_id(1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    if INDIRECT:
        steps += (gl.program_id(0) * BM // group) * (K + UNROLL)
        K = gl.load(counts + gl.program_id(0) * BM // group)
    x += m
    w += n
    inside = (m[:, None] < M) & (n[None, :] < N)
    places = y + m[:, None] * N + n[None, :]
    if EXPONENT > 0:
        total = gl.zeros((BM, BN), gl.float32, layout=L)
        for k in range(0, K, UNROLL):
            for u in gl.static_range(UNROLL):
                row = gl.load(steps + k + u) if INDIRECT else k + u
                d = gl.load(x + row * x_step)[:, None] - gl.load(w + row * w_step)[None, :]
                if EXPONENT % 2 == 1:
                    d = gl.abs(d)
                total += _power(d, EXPONENT)
        unsafe = inside & ((total < low) | (total > high))
        if EXPONENT == 2:
            total = gl.sqrt(total)
        elif EXPONENT > 2:
            total = gl.exp2(gl.log2(total) / p)
        # those that are safe stay, whatever else is in the tile; they wait in y, not in registers
        gl.store(places, gl.where(unsafe, UNKNOWN, total), mask=inside)
        if gl.max(gl.max(unsafe.to(gl.int32), axis=1), axis=0) > 0:
            total = _by_ratios(x, w, steps, p, K, x_step, w_step, INDIRECT, UNROLL, BM, BN, L)
            gl.store(places, total, mask=inside & (gl.load(places, mask=inside, other=0.0) == UNKNOWN))
    elif EXPONENT == REAL:
        total = _by_ratios(x, w, steps, p, K, x_step, w_step, INDIRECT, UNROLL, BM, BN, L)
        gl.store(places, total, mask=inside)
    else:
        gl.store(places, _largest(x, w, steps, K, x_step, w_step, INDIRECT, UNROLL, BM, BN, L), mask=inside)


@gluon.jit
def _largest(
    x, w, steps, K, x_step, w_step,
    INDIRECT: constexpr, UNROLL: constexpr, BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    largest = gl.zeros((BM, BN), gl.float32, layout=L)
    for k in range(0, K, UNROLL):
        for u in gl.static_range(UNROLL):
            row = gl.load(steps + k + u) if INDIRECT else k + u
            d = gl.load(x + row * x_step)[:, None] - gl.load(w + row * w_step)[None, :]
            largest = gl.maximum(largest, gl.abs(d), propagate_nan=NAN_WINS)
    return largest


@gluon.jit
def _by_ratios(
    x, w, steps, p, K, x_step, w_step,
    INDIRECT: constexpr, UNROLL: constexpr, BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    """The distances for any p: the largest term, times the norm of all terms' ratios to it."""
    largest = _largest(x, w, steps, K, x_step, w_step, INDIRECT, UNROLL, BM, BN, L)
    inverse = gl.where(largest > 0, 1 / gl.maximum(largest, 1e-37), 0.0)
    total = gl.zeros((BM, BN), gl.float32, layout=L)
    for k in range(0, K, UNROLL):
        for u in gl.static_range(UNROLL):
            row = gl.load(steps + k + u) if INDIRECT else k + u
            d = gl.load(x + row * x_step)[:, None] - gl.load(w + row * w_step)[None, :]
            total += _exp2(p * _log2(gl.abs(d) * inverse))
    return largest * _exp2(_log2(total) / p)


@gluon.jit
def gradients(
    x, w, slopes, inverses, kept, of_x, of_w, unsafe, exponent, M, K, part, step, slopes_step, group,
    EXPONENT: constexpr, MASKED: constexpr, BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    """Both gradients, each term computed once: with s = g[n, m] sign(d) |d / y[n, m]|^(p - 1), d = x[m, k] - w[n, k],

        of_x[part, m, k] = the sum of s over the n of that part,        of_w[n, k] = minus the sum of s over all m

    A program has all m of a slab of k and of a part of the n, and goes through them in order, so nothing is added up by
    chance; of_x is to be summed over the parts. BM rows of x are in a tile, and BN of the k. EXPONENT is p, `exponent`
    p - 1; inverses = 1 / y. Where EXPONENT is an integer and unsafe is 0, slopes = g / y^(p - 1); else slopes = g. With
    MASKED, terms count where kept[m // group, k] is 1, and not where it is 0. All is padded: M and K are of whole
    tiles, part is even, and what is read past the end has a slope of 0.
    """
    k = gl.program_id(1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    rows = gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    first = gl.program_id(0) * part
    x += k
    w += first * step + k
    of_w += first * step + k
    of_x += gl.program_id(0) * M * K + k
    slopes += first * slopes_step + rows
    inverses += first * slopes_step + rows
    by_ratios = gl.load(unsafe)
    if EXPONENT == 1:
        by_ratios = 0
    if EXPONENT == REAL:
        by_ratios = 1
    for top in range(0, M, BM):
        mine = gl.load(x[None, :] + (top + rows)[:, None] * step)
        mask = gl.load(kept + (top // group) * K + k) if MASKED else k
        total = gl.zeros((BM, BN), gl.float32, layout=L)
        if by_ratios == 0:
            if EXPONENT > 0:
                total = _sums(
                    total, mine, mask, w, of_w, slopes + top, inverses, exponent, top, part, step, slopes_step, k,
                    EXPONENT, MASKED,
                )  # fmt: skip
        else:
            total = _sums(
                total, mine, mask, w, of_w, slopes + top, inverses + top, exponent, top, part, step, slopes_step, k,
                REAL, MASKED,
            )  # fmt: skip
        gl.store(of_x[None, :] + (top + rows)[:, None] * K, total)


@gluon.jit
def _sums(
    total, mine, mask, w, of_w, slopes, inverses, exponent, top, part, step, slopes_step, k,
    EXPONENT: constexpr, MASKED: constexpr,
):  # fmt: skip
    """Add a tile's terms to total, over the n of a part, and to of_w, over its rows; two n at a time."""
    begun = (k >= 0) & (top > 0)
    for n in range(0, part, 2):
        # nothing is read after the first is written: for all that the compiler knows, that could be the same place
        place, below = of_w + n * step, of_w + n * step + step
        before, before_below = gl.load(place, mask=begun, other=0.0), gl.load(below, mask=begun, other=0.0)
        one, other = gl.load(w + n * step), gl.load(w + n * step + step)
        slope, slope_below = gl.load(slopes + n * slopes_step), gl.load(slopes + n * slopes_step + slopes_step)
        inverse, inverse_below = slope, slope_below
        if EXPONENT == REAL:
            inverse = gl.load(inverses + n * slopes_step)
            inverse_below = gl.load(inverses + n * slopes_step + slopes_step)
        term = _slopes(mine, one, mask, slope, inverse, exponent, EXPONENT, MASKED)
        total += term
        before -= gl.sum(term, axis=0)
        term = _slopes(mine, other, mask, slope_below, inverse_below, exponent, EXPONENT, MASKED)
        total += term
        before_below -= gl.sum(term, axis=0)
        gl.store(place, before)
        gl.store(below, before_below)
    return total


@gluon.jit
def _slopes(mine, other, mask, slope, inverse, exponent, EXPONENT: constexpr, MASKED: constexpr):
    """What x[m, k] - w[n, k] adds to the gradients, for all m and k of a tile and one n."""
    d = mine - other[None, :]
    if MASKED:
        d *= mask[None, :]
    slope = slope[:, None]
    if EXPONENT == REAL:
        power = _exp2(exponent * _log2(gl.abs(d) * inverse[:, None]))
        signed = power.to(gl.int32, bitcast=True) | (d.to(gl.int32, bitcast=True) & -2147483648)
        term = slope * signed.to(gl.float32, bitcast=True)
    elif EXPONENT == 1:
        term = gl.where(d > 0, slope, gl.where(d < 0, -slope, 0.0))
    elif EXPONENT == 2:
        term = slope * d
    elif EXPONENT % 2 == 1:
        term = (slope * gl.abs(d)) * _power(d, EXPONENT - 2)
    elif EXPONENT == 8:
        square = d * d
        term = (slope * (square * d)) * (square * square)
    else:
        term = slope * _power(d, EXPONENT - 1)
    return term


@gluon.jit
def first_largest(
    x, w, y, index, steps, counts, M, N, K, x_step, w_step, group,
    INDIRECT: constexpr, UNROLL: constexpr, BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    """index[m, n] = the first row where |x[:, m] - w[:, n]| is y[m, n], its largest; operands as for `distances`."""
    m = gl.program_id(0) * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = gl.program_id(1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    if INDIRECT:
        steps += (gl.program_id(0) * BM // group) * (K + UNROLL)
        K = gl.load(counts + gl.program_id(0) * BM // group)
    inside = (m[:, None] < M) & (n[None, :] < N)
    largest = gl.load(y + m[:, None] * N + n[None, :], mask=inside, other=0.0)
    x += m
    w += n
    found = gl.zeros((BM, BN), gl.int32, layout=L)
    end = (K + UNROLL - 1) // UNROLL * UNROLL
    for back in range(0, K, UNROLL):
        for u in gl.static_range(UNROLL):
            k = end - 1 - back - u
            row = gl.load(steps + k) if INDIRECT else k
            d = gl.load(x + row * x_step)[:, None] - gl.load(w + row * w_step)[None, :]
            found = gl.where(gl.abs(d) == largest, row, found)
    gl.store(index + m[:, None] * N + n[None, :], found, mask=inside)


@gluon.jit
def bounds(
    lower, upper, w, low, high, M, N, K, x_step, w_step,
    UNROLL: constexpr, BM: constexpr, BN: constexpr, L: constexpr,
):  # fmt: skip
    """The smallest and largest ||x - w[:, n]||_inf over the box lower[:, m] <= x <= upper[:, m]; K in whole UNROLLs."""
    m = gl.program_id(0) * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = gl.program_id(1) * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    lower += m
    upper += m
    w += n
    smallest = gl.zeros((BM, BN), gl.float32, layout=L)
    largest = gl.zeros((BM, BN), gl.float32, layout=L)
    for k in range(0, K, UNROLL):
        for u in gl.static_range(UNROLL):
            weight = gl.load(w + (k + u) * w_step)[None, :]
            below = gl.load(lower + (k + u) * x_step)[:, None] - weight
            above = gl.load(upper + (k + u) * x_step)[:, None] - weight
            largest = gl.maximum(largest, gl.maximum(above, -below, propagate_nan=NAN_WINS), propagate_nan=NAN_WINS)
            smallest = gl.maximum(smallest, gl.maximum(below, -above, propagate_nan=NAN_WINS), propagate_nan=NAN_WINS)
    inside = (m[:, None] < M) & (n[None, :] < N)
    gl.store(low + m[:, None] * N + n[None, :], smallest, mask=inside)
    gl.store(high + m[:, None] * N + n[None, :], largest, mask=inside)
