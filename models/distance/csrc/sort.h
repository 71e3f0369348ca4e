// SortNet's neuron: sum_k c_k (k-th largest of |x_i - w_i|) for k up to MOST_TERMS.
//
// A cell is one lane of a group of vectors: GROUP terms at a distance of N. A first pass computes the maximum of every
// cell. The cells are distributed over lists. The maxima of lists are terms at different inputs, so their K-th largest
// is at most the K-th largest of all terms. Terms not below it are in few cells, which a second pass reads again.
#pragma once

#include "backward.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int MOST_TERMS = 16;
constexpr int MOST_FOUND = 32;  // cells and terms stored per pair; if ties cause more, see `in_order`

struct Order {
    int terms;                          // number of terms in the sum, at most the number of inputs
    float coefficient[MOST_TERMS] = {};

    Order(const float* coefficients, int terms) : terms(terms) { std::copy(coefficients, coefficients + terms, coefficient); }

    // Number of vectors of lists. More lists improve the bound, but take longer to sort.
    int lists() const { return (terms <= 12 ? 16 : 32) / N; }
};

// Term to sort: |x - w|.
struct Distance {
    const float* x;

    struct Two {
        Vec x0, x1;
    };
    template <class Load>
    Two two(Load load, int64_t row, int v) const {
        return {load(x + row, v), load(x + row, v + 1)};
    }
    static Vec larger(Two t, Vec w0, Vec w1, Vec one) { return Vec::max_abs(t.x0 - w0, Vec::minus(t.x1, w1, one)); }
    Distance row(int64_t at) const { return {x + at}; }
    float operator()(int64_t at, float w) const { return std::fabs(x[at] - w); }
};

// Term to sort: the maximum of |x - w| over a box.
struct Farthest {
    const float *lower, *upper;

    struct Two {
        Vec l0, l1, u0, u1;
    };
    template <class Load>
    Two two(Load load, int64_t row, int v) const {
        return {load(lower + row, v), load(lower + row, v + 1), load(upper + row, v), load(upper + row, v + 1)};
    }
    static Vec larger(Two t, Vec w0, Vec w1, Vec one) {
        return Vec::max_positive(Vec::max_abs(t.l0 - w0, Vec::minus(t.u0, w0, one)),
                                 Vec::max_abs(t.l1 - w1, Vec::minus(t.u1, w1, one)));
    }
    Farthest row(int64_t at) const { return {lower + at, upper + at}; }
    float operator()(int64_t at, float w) const { return std::max(std::fabs(lower[at] - w), std::fabs(upper[at] - w)); }
};

// Term to sort: the minimum of |x - w| over a box.
struct Nearest {
    const float *lower, *upper;

    using Two = Farthest::Two;
    template <class Load>
    Two two(Load load, int64_t row, int v) const {
        return Farthest{lower, upper}.two(load, row, v);
    }
    static Vec larger(Two t, Vec w0, Vec w1, Vec one) {
        const Vec first = Vec::max_positive(t.l0 - w0, Vec::max_positive(Vec::minus(w0, t.u0, one), Vec::all(0.0f)));
        return Vec::max_positive(t.l1 - w1, Vec::max_positive(Vec::minus(w1, t.u1, one), first));
    }
    Nearest row(int64_t at) const { return {lower + at, upper + at}; }
    float operator()(int64_t at, float w) const { return std::max(std::max(lower[at] - w, w - upper[at]), 0.0f); }
};

// Returns by lane how many of the numbers are at least a; n is rounded up to a multiple of 4.
inline Vec at_least_as_large(const float* numbers, int n, Vec a) {
    Vec count[4];  // several, since additions depend on each other
    for (auto& c : count) c = Vec::all(0.0f);
    for (int j = 0; j < n; j += 4)
        for (int k = 0; k < 4; ++k)
            count[k] = count[k] + Vec::keep(Vec::at_least(Vec::all(numbers[j + k]), a), Vec::all(1.0f));
    return (count[0] + count[1]) + (count[2] + count[3]);
}

// Returns the K-th largest of n numbers, the largest that at least K numbers reach; n is a multiple of N.
inline float kth_largest(const float* numbers, int n, int k) {
    Vec best = Vec::all(0.0f);
    for (int i = 0; i < n; i += N) {
        const Vec a = Vec::load(numbers + i);
        const Vec all = at_least_as_large(numbers, n, a);
        best = Vec::max(best, Vec::keep(Vec::at_least(all, Vec::all((float)k)), a));
    }
    return largest(best);
}

inline uint32_t first_lanes(int64_t n) { return n >= N ? (1u << N) - 1 : n > 0 ? (1u << n) - 1 : 0; }

// At least K terms of a pair, including the K largest. `where` holds positions as floats, which are exact up to 2^24.
struct Candidates {
    float values[MOST_FOUND + N], where[MOST_FOUND + N];
    int count;
};

// Finds the K largest terms sequentially, for pairs with many equal terms.
template <class Term>
void in_order(Term term, const float* w, int64_t n, int terms, Candidates& found) {
    found.count = 0;
    float least = -1.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float value = term(i, w[i]);
        if (!(value > least)) continue;  // the first of equal terms ranks higher
        int place = std::min(found.count, terms - 1);
        for (; place > 0 && found.values[place - 1] < value; --place) {
            found.values[place] = found.values[place - 1];
            found.where[place] = found.where[place - 1];
        }
        found.values[place] = value;
        found.where[place] = (float)i;
        found.count = std::min(found.count + 1, terms);
        if (found.count == terms) least = found.values[terms - 1];
    }
}

// Calls use(pair, candidates) for every pair of a tile.
template <int TB, int TO, bool POSITIONS, class Term, class Use>
void sort_tile(Term term, const float* w, int64_t n, const Order& order, float* scratch, Use use) {
    constexpr int PAIRS = TB * TO;
    const int64_t groups = (n + GROUP * N - 1) / (GROUP * N);
    const int lists = order.lists();
    float *maxima = scratch, *largest_of_list = scratch + groups * PAIRS * N;
    int32_t cells[MOST_FOUND + 64 + N];  // first positions
    const Vec one = hidden_one();
    for (int list = 0; list < lists; ++list) {
        Vec most[PAIRS];
        for (auto& m : most) m = Vec::all(0.0f);
        for (int64_t g = list; g < groups; g += lists) {
            Vec of_group[PAIRS];
            const int64_t i = g * GROUP * N;
            const auto group = [&](auto load) {
                for (int v = 0; v < GROUP; v += 2) {
                    Vec w0[TO], w1[TO];
                    for (int c = 0; c < TO; ++c) w0[c] = load(w + c * n, v), w1[c] = load(w + c * n, v + 1);
                    for (int r = 0; r < TB; ++r) {
                        const auto two = term.two(load, r * n, v);
                        for (int c = 0; c < TO; ++c) {
                            const Vec larger = Term::larger(two, w0[c], w1[c], one);
                            Vec& so_far = of_group[r * TO + c];
                            so_far = v ? Vec::max_positive(larger, so_far) : larger;
                        }
                    }
                }
            };
            if (i + GROUP * N <= n)
                group([=](const float* p, int v) { return Vec::load(p + i + v * N); });
            else  // terms beyond the end are 0
                group([=](const float* p, int v) {
                    const int64_t left = n - i - v * N;
                    return left > 0 ? Vec::load(p + i + v * N, (int)std::min<int64_t>(N, left)) : Vec::all(0.0f);
                });
            for (int pair = 0; pair < PAIRS; ++pair) {
                of_group[pair].store(maxima + (pair * groups + g) * N);
                most[pair] = Vec::max_positive(of_group[pair], most[pair]);
            }
        }
        for (int pair = 0; pair < PAIRS; ++pair) most[pair].store(largest_of_list + (pair * lists + list) * N);
    }

    for (int pair = 0; pair < PAIRS; ++pair) {
        const float* of_list = largest_of_list + pair * lists * N;
        const float least = kth_largest(of_list, lists * N, order.terms);
        const float* w_row = w + pair % TO * n;
        const Term of_pair = term.row(pair / TO * n);
        int64_t count = 0;
        for (int64_t g = 0; g < groups; g += WINDOW) {
            const float* of_window = maxima + (pair * groups + g) * N;
            uint64_t word = 0;
            for (int k = 0; k < std::min<int64_t>(WINDOW, groups - g); ++k)
                word |= (uint64_t)Vec::at_least(Vec::load(of_window + k * N), Vec::all(least)) << (k * N);
            if (count > MOST_FOUND) break;
            for (; word; word &= word - 1) {
                const int bit = __builtin_ctzll(word);
                cells[count++] = (int32_t)((g + bit / N) * GROUP * N + bit % N);
            }
        }
        Candidates found;
        found.count = 0;
        if (count <= MOST_FOUND) {
            float terms[GROUP][MOST_FOUND], where[GROUP][MOST_FOUND];
            for (int64_t s = 0; s < count; ++s) {
                for (int v = 0; v < GROUP; ++v) {
                    const int64_t i = cells[s] + v * N;
                    terms[v][s] = i < n ? of_pair(i, w_row[i]) : -1.0f;
                    if constexpr (POSITIONS) where[v][s] = (float)i;
                }
            }
            for (int v = 0; v < GROUP; ++v)
                for (int64_t s = 0; s < count && found.count <= MOST_FOUND; s += N) {
                    const Vec values = Vec::load(terms[v] + s);
                    const uint32_t kept = Vec::at_least(values, Vec::all(least)) & first_lanes(count - s);
                    if (found.count + __builtin_popcount(kept) <= MOST_FOUND) {
                        Vec::store_packed(kept, values, found.values + found.count);
                        if constexpr (POSITIONS)
                            Vec::store_packed(kept, Vec::load(where[v] + s), found.where + found.count);
                    }
                    found.count += __builtin_popcount(kept);
                }
        } else {
            found.count = MOST_FOUND + 1;
        }
        if (found.count > MOST_FOUND) in_order(of_pair, w_row, n, order.terms, found);
        Vec::all(-1.0f).store(found.values + found.count);  // smaller than all terms
        use(pair, found);
    }
}

// Calls f(s, rank, lanes) for each N candidates from s on. `rank` is ROUNDER plus the number of larger candidates,
// valid only in `lanes`. Of equal candidates the first ranks higher: the first input if POSITIONS, else candidate.
template <bool POSITIONS, class F>
inline void with_ranks(const Candidates& found, F f) {
    constexpr int VECTORS = (MOST_FOUND + N - 1) / N;
    Vec ranks[VECTORS];
    float total = 0;
    for (int s = 0; s < found.count; s += N) {
        const Vec count = at_least_as_large(found.values, found.count, Vec::load(found.values + s));
        total += sum(Vec::keep(first_lanes(found.count - s), count));
        ranks[s / N] = count + Vec::all(ROUNDER - 1);
    }
    const bool all_differ = total == (float)(found.count * (found.count + 1) / 2);
    for (int s = 0; s < found.count; s += N) {
        if (!all_differ) {
            const Vec a = Vec::load(found.values + s);
            ranks[s / N] = Vec::all(ROUNDER);
            for (int j = 0; j < found.count; ++j) {
                const Vec b = Vec::all(found.values[j]);
                const uint32_t larger = ~Vec::at_least(a, b), no_smaller = Vec::at_least(b, a);
                uint32_t later = ~first_lanes(j + 1 - s);
                if constexpr (POSITIONS)
                    later = ~Vec::at_least(Vec::all(found.where[j]), Vec::load(found.where + s));
                ranks[s / N] = ranks[s / N] + Vec::keep(larger | (no_smaller & later), Vec::all(1.0f));
            }
        }
        f(s, ranks[s / N], first_lanes(found.count - s));
    }
}

// Returns the number of floats that sort_tile needs.
int64_t sort_scratch(int64_t inputs, int pairs) {
    const int64_t groups = inputs / (GROUP * N) + 1;
    return pairs * (groups * N + 32);
}

constexpr int SORT_RO = 2;  // outputs of a tile; it has RB samples

template <class Term>
void sort_block(Term term, const float* w, float* y, Shape s, const Order& order, int64_t b0, int64_t b1, int64_t o0,
                int64_t o1) {
    Buffer<> scratch(sort_scratch(s.inputs, RB * SORT_RO));
    const int64_t block = block_of(s.inputs);
    const Vec last = Vec::all(ROUNDER + (float)(order.terms - 1));
    for (int64_t o = o0; o < o1; o += block)
        tiles<RB, SORT_RO>(b0, b1, o, std::min(o + block, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
            constexpr int TB = decltype(nb)::value, TO = decltype(no)::value;
            const auto use = [&](int pair, const Candidates& found) {
                Vec total = Vec::all(0.0f);
                with_ranks<false>(found, [&](int at, Vec rank, uint32_t lanes) {
                    const uint32_t counted = lanes & Vec::at_least(last, rank);
                    const Vec c = Vec::keep(counted, Vec::lookup(order.coefficient, rank));
                    total = Vec::fma(c, Vec::load(found.values + at), total);
                });
                y[(tb + pair / TO) * s.outputs + to + pair % TO] = sum(total);
            };
            sort_tile<TB, TO, false>(term.row(tb * s.inputs), w + to * s.inputs, s.inputs, order, scratch.data(), use);
        });
}

void sort_forward(const float* x, const float* w, float* y, Shape s, const Order& order, int threads) {
    if (s.terms() == 0) return;
    over_plane(threads, s, [&](auto... range) { sort_block(Distance{x}, w, y, s, order, range...); });
    add_poison(x, w, y, s);
}

void sort_bounds(const float* lower, const float* upper, const float* w, float* lo, float* hi, Shape s,
                 const Order& order, int threads) {
    if (s.terms() == 0) return;
    over_plane(threads, s, [&](auto... range) {
        const Denormals kept(false);
        sort_block(Nearest{lower, upper}, w, lo, s, order, range...);
        sort_block(Farthest{lower, upper}, w, hi, s, order, range...);
    });
    for (float* y : {lo, hi})
        for (const float* x : {lower, upper}) add_poison(x, w, y, s);
}

constexpr int64_t SLOPES = 1 << 21;  // slopes stored between the two gradients

// Computes the gradients. The K slopes of each pair of a block of outputs are stored by output between both gradients.
void sort_backward(const Gradients& q, const Order& order, int threads) {
    const Shape s = q.s;
    if (s.terms() == 0) return;
    const int64_t n = s.inputs, terms = order.terms, block = block_of(n);
    const int64_t outputs = std::min(s.outputs, std::max<int64_t>(block, SLOPES / (s.samples * terms) / block * block));
    const Threads useful = threads_for(threads, (double)s.samples * outputs * n);
    std::vector<Slope> slopes(outputs * s.samples * terms);
    for (int64_t o0 = 0; o0 < s.outputs; o0 += outputs) {
        const int64_t o1 = std::min(o0 + outputs, s.outputs);
        const auto slopes_of = [&](int64_t b, int64_t o) { return slopes.data() + ((o - o0) * s.samples + b) * terms; };
        parallel(useful, s.samples, RB, [&](int64_t b0, int64_t b1) {
            Buffer<> scratch(sort_scratch(n, RB * SORT_RO));
            for (int64_t o = o0; o < o1; o += block)
                tiles<RB, SORT_RO>(b0, b1, o, std::min(o + block, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
                    constexpr int TB = decltype(nb)::value, TO = decltype(no)::value;
                    const auto use = [&](int pair, const Candidates& found) {
                        const int64_t b = tb + pair / TO, of = to + pair % TO;
                        const float *x = q.x + b * n, *w = q.w + of * n, grad_y = q.grad_y[b * s.outputs + of];
                        int32_t at[MOST_FOUND + N];  // by rank
                        with_ranks<true>(found, [&](int first, Vec rank, uint32_t lanes) {
                            float ranks[N];
                            (rank - Vec::all(ROUNDER)).store(ranks);
                            for (int lane = 0; lanes >> lane; ++lane)
                                at[(int)ranks[lane]] = (int32_t)found.where[first + lane];
                        });
                        Slope* out = slopes_of(b, of);
                        for (int k = 0; k < terms; ++k) {
                            const int32_t i = k < found.count ? at[k] : 0;  // fewer if some are NaN
                            const float d = x[i] - w[i];
                            out[k] = {i, grad_y * order.coefficient[k] * (float)((d > 0) - (d < 0))};
                            q.grad_x[b * n + i] += out[k].slope;
                        }
                    };
                    sort_tile<TB, TO, true>(Distance{q.x + tb * n}, q.w + to * n, n, order, scratch.data(), use);
                });
        });
        parallel(useful, o1 - o0, 1, [&](int64_t begin, int64_t end) {
            for (int64_t o = o0 + begin; o < o0 + end; ++o)
                for (int64_t k = 0; k < s.samples * terms; ++k) {
                    const Slope at = slopes_of(0, o)[k];
                    q.grad_w[o * n + at.input] -= at.slope;
                }
        });
    }
}

}  // namespace
