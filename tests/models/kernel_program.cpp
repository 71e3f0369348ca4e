// Runs one kernel, for tests on processors for which there is no Python: arguments are the kernel and its sizes, standard
// input has the float32 operands one after another, and standard output gets the results.
#include "backward.h"
#include "bounds.h"
#include "forward.h"
#include "limits.h"
#include "patches.h"
#include "sort.h"
#include "subsets.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using Floats = std::vector<float>;

Floats read(int64_t count) {
    Floats values(count);
    if (std::fread(values.data(), sizeof(float), count, stdin) != (size_t)count) std::exit(3);
    return values;
}

void write(const Floats& values) { std::fwrite(values.data(), sizeof(float), values.size(), stdout); }

constexpr int THREADS = 2;

void run_backward(Shape s, double p, const Floats& x, const Floats& w, const Floats& grad_y) {
    Floats y(grad_y.size()), scratch(y), grad_x(x.size()), grad_w(w.size());
    std::vector<int32_t> blocks(y.size());
    const Gradients q{x.data(), w.data(), y.data(), grad_y.data(), grad_x.data(), grad_w.data(), s};
    if (std::isinf(p)) {
        forward_with_blocks(x.data(), w.data(), y.data(), blocks.data(), s, THREADS);
        largest_backward(q, blocks.data(), THREADS);
    } else {
        forward(x.data(), w.data(), y.data(), s, p, THREADS);
        backward(q, scratch.data(), p, THREADS);
    }
    write(grad_x);
    write(grad_w);
}

void run_convolution(const Images& s, double p) {
    const Floats x = read(s.samples * s.pixels()), w = read(s.filters * s.inputs());
    Floats y(s.samples * s.filters * s.positions());
    convolution(x.data(), w.data(), y.data(), s, p, THREADS);
    write(y);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return 2;
    const std::string kernel = argv[1];
    if (kernel == "isa") return std::puts(LINFLAB_ISA) < 0;
    if (argc < 6) return 2;
    const double p = std::atof(argv[2]);
    const auto size = [&](int k) { return k < argc ? (int64_t)std::atoll(argv[k]) : 0; };
    if (kernel == "convolution") {
        run_convolution({size(3), size(4), size(5), size(5), size(6), size(7), size(7), size(8), size(9)}, p);
        return 0;
    }
    const Shape s{size(3), size(4), size(5)};
    const Floats x = read(s.samples * s.inputs), w = read(s.outputs * s.inputs);
    Floats y(s.samples * s.outputs), high(y);
    if (kernel == "forward") {
        forward(x.data(), w.data(), y.data(), s, p, THREADS);
    } else if (kernel == "backward") {
        run_backward(s, p, x, w, read(s.samples * s.outputs));
        return 0;
    } else if (kernel == "bounds") {
        const Floats upper = read(s.samples * s.inputs);
        bounds(x.data(), upper.data(), w.data(), y.data(), high.data(), s, THREADS);
        write(high);
    } else if (kernel == "sort") {
        const Floats coefficients = read(size(6));
        sort_forward(x.data(), w.data(), y.data(), s, {coefficients.data(), (int)size(6)}, THREADS);
    } else if (kernel == "subsets") {
        const int64_t group = size(6), groups = (s.samples + group - 1) / group;
        const Floats mask = read(groups * s.inputs);
        const std::unique_ptr<bool[]> kept(new bool[mask.size()]);
        for (size_t k = 0; k < mask.size(); ++k) kept[k] = mask[k] != 0;
        forward_on_subsets(x.data(), w.data(), y.data(), {s, kept.get(), group}, p, THREADS);
    } else {
        return 2;
    }
    write(y);
    return 0;
}
