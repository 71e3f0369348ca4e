// Python module of the kernels for distances and boxes on CPUs, compiled once per instruction set.
#include "backward.h"
#include "bounds.h"
#include "boxes.h"
#include "forward.h"
#include "limits.h"
#include "patches.h"
#include "sort.h"
#include "subsets.h"

#include <cstdint>

#include <pybind11/pybind11.h>

namespace {

template <class T = float>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

// Tensors are passed as addresses of contiguous arrays, of float32 unless a type is given. The caller checks shapes.
PYBIND11_MODULE(MODULE_NAME, module) {
    namespace py = pybind11;
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.attr("isa") = LINFLAB_ISA;
    module.attr("sources") = SOURCES;
    module.def("multiply_in_registers", &multiply_in_registers, free);
    module.def("run_in_registers_inf", &run_in_registers<Largest, false>, free);
    module.def("run_in_registers_8", &run_in_registers<SumOfPowers<8>, false>, free);
    module.def("run_in_registers_8_backward", &run_in_registers<SumOfPowers<8>, true>, free);
    module.def(
        "forward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t samples, int64_t outputs, int64_t inputs, double p,
           int threads) { forward(at(x), at(w), at(y), {samples, outputs, inputs}, p, threads); },
        free);
    module.def(
        "backward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w,
           uintptr_t scratch, int64_t samples, int64_t outputs, int64_t inputs, double p, int threads) {
            backward({at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), {samples, outputs, inputs}},
                     at(scratch), p, threads);
        },
        free);
    module.def(
        "forward_with_blocks",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t blocks, int64_t samples, int64_t outputs, int64_t inputs,
           int threads) {
            forward_with_blocks(at(x), at(w), at(y), at<int32_t>(blocks), {samples, outputs, inputs}, threads);
        },
        free);
    module.def(
        "largest_backward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w,
           uintptr_t blocks, int64_t samples, int64_t outputs, int64_t inputs, int threads) {
            largest_backward({at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), {samples, outputs, inputs}},
                             at<int32_t>(blocks), threads);
        },
        free);
    module.def(
        "bounds",
        [](uintptr_t lower, uintptr_t upper, uintptr_t w, uintptr_t lo, uintptr_t hi, int64_t samples,
           int64_t outputs, int64_t inputs, int threads) {
            bounds(at(lower), at(upper), at(w), at(lo), at(hi), {samples, outputs, inputs}, threads);
        },
        free);
    module.def(
        "forward_on_subsets",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t kept, int64_t samples, int64_t outputs, int64_t inputs,
           double p, int64_t group, int threads) {
            forward_on_subsets(at(x), at(w), at(y), {{samples, outputs, inputs}, at<bool>(kept), group}, p, threads);
        },
        free);
    module.def(
        "backward_on_subsets",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w,
           uintptr_t scratch, uintptr_t kept, int64_t samples, int64_t outputs, int64_t inputs, double p, int64_t group,
           int threads) {
            const Shape s = {samples, outputs, inputs};
            backward_on_subsets({at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), s},
                                {s, at<bool>(kept), group}, at(scratch), p, threads);
        },
        free);
    module.def(
        "convolution",
        [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t samples, int64_t channels, int64_t height, int64_t width,
           int64_t filters, int64_t kernel_height, int64_t kernel_width, int64_t stride, int64_t padding, double p,
           int threads) {
            const Images s{samples, channels, height, width, filters, kernel_height, kernel_width, stride, padding};
            convolution(at(x), at(w), at(y), s, p, threads);
        },
        free);
    module.def(
        "convolution_backward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w, int64_t samples,
           int64_t channels, int64_t height, int64_t width, int64_t filters, int64_t kernel_height, int64_t kernel_width,
           int64_t stride, int64_t padding, double p, int threads) {
            const Images s{samples, channels, height, width, filters, kernel_height, kernel_width, stride, padding};
            convolution_backward(at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), s, p, threads);
        },
        free);
    module.def(
        "sort_forward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t coefficients, int64_t samples, int64_t outputs,
           int64_t inputs, int terms, int threads) {
            sort_forward(at(x), at(w), at(y), {samples, outputs, inputs}, {at(coefficients), terms}, threads);
        },
        free);
    module.def(
        "sort_backward",
        [](uintptr_t x, uintptr_t w, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w, uintptr_t coefficients,
           int64_t samples, int64_t outputs, int64_t inputs, int terms, int threads) {
            sort_backward(
                {at(x), at(w), nullptr, at(grad_y), at(grad_x), at(grad_w), {samples, outputs, inputs}},
                {at(coefficients), terms}, threads);
        },
        free);
    module.def(
        "sort_bounds",
        [](uintptr_t lower, uintptr_t upper, uintptr_t w, uintptr_t lo, uintptr_t hi, uintptr_t coefficients,
           int64_t samples, int64_t outputs, int64_t inputs, int terms, int threads) {
            sort_bounds(at(lower), at(upper), at(w), at(lo), at(hi), {samples, outputs, inputs},
                        {at(coefficients), terms}, threads);
        },
        free);
    module.def(
        "relu_of_boxes",
        [](uintptr_t center, uintptr_t radius, uintptr_t new_center, uintptr_t new_radius, int64_t n, float factor,
           int threads) {
            relu_of_boxes(at(center), at(radius), at(new_center), at(new_radius), n, factor, threads);
        },
        free);
    module.def(
        "relu_of_boxes_backward",
        [](uintptr_t center, uintptr_t radius, uintptr_t grad_new_center, uintptr_t grad_new_radius,
           uintptr_t grad_center, uintptr_t grad_radius, int64_t n, float factor, int threads) {
            relu_of_boxes_backward(at(center), at(radius), at(grad_new_center), at(grad_new_radius), at(grad_center),
                                   at(grad_radius), n, factor, threads);
        },
        free);
    module.def(
        "sums_of_boxes",
        [](uintptr_t center, uintptr_t radius, uintptr_t sums, int64_t n, int threads) {
            sums_of_boxes(at(center), at(radius), at<double>(sums), n, threads);
        },
        free);
    module.def(
        "sums_of_boxes_backward",
        [](uintptr_t center, uintptr_t radius, uintptr_t grad_sums, uintptr_t grad_center, uintptr_t grad_radius,
           int64_t n, int threads) {
            sums_of_boxes_backward(at(center), at(radius), at<double>(grad_sums), at(grad_center), at(grad_radius), n,
                                   threads);
        },
        free);
    module.def(
        "channel_moments",
        [](uintptr_t x, uintptr_t mean, uintptr_t variance, int64_t samples, int64_t channels, int64_t positions,
           int threads) { channel_moments(at(x), at(mean), at(variance), samples, channels, positions, threads); },
        free);
}
