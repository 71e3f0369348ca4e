// Threads, their floating-point state and aligned buffers. Results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <dlfcn.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

// Flushes denormals to zero, or keeps them, during its lifetime. Powers of small ratios become denormal, and slow,
// while they are negligible. For bounds even the smallest difference counts.
class Denormals {
#if defined(__SSE__)
    static constexpr unsigned FLUSHED = 0x8040;
    unsigned before = _mm_getcsr();

  public:
    explicit Denormals(bool flush) { _mm_setcsr(flush ? before | FLUSHED : before & ~FLUSHED); }
    ~Denormals() { _mm_setcsr(before); }
#else
  public:
    explicit Denormals(bool) {}
#endif
};

// Buffer aligned to cache lines, so that no vector crosses one.
template <class T = float>
class Buffer {
    std::unique_ptr<T[]> storage;

  public:
    explicit Buffer(int64_t n) : storage(new T[n + 64 / sizeof(T)]) {}
    T* data() { return storage.get() + (-reinterpret_cast<uintptr_t>(storage.get()) & 63) / sizeof(T); }
};

struct Threads {
    int all, useful;  // threads allowed, and threads with enough work
};

// Runs job on several threads. If torch has loaded GCC's OpenMP library, its threads are used: they spin for a while
// after every matrix product and would block the cores for other threads. Callers must request as many threads as torch
// does, even without work for all: the library ends unused threads and must start them again for the next call.
template <class F>
void on_threads(int threads, F job) {
    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (threads == 1) {
        job();
    } else if (region) {
        region([](void* data) { (*static_cast<F*>(data))(); }, &job, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> others;
        for (int k = 1; k < threads; ++k) others.emplace_back(job);
        job();
        for (auto& other : others) other.join();
    }
}

// Runs work(begin, end) on parts of [0, items), in multiples of `grain`, on the useful number of threads.
template <class F>
void parallel(Threads threads, int64_t items, int64_t grain, F work) {
    const int64_t grains = (items + grain - 1) / grain;
    const int parts = (int)std::max<int64_t>(1, std::min<int64_t>(threads.useful, grains));
    std::atomic<int> next{0};
    std::exception_ptr failure;  // such as bad_alloc; must not pass through the OpenMP library
    std::mutex guard;
    on_threads(parts == 1 ? 1 : threads.all, [&] {
        const Denormals flushed(true);
        try {
            for (int part; (part = next++) < parts;) {
                const int64_t begin = grains * part / parts * grain, end = grains * (part + 1) / parts * grain;
                work(begin, std::min(end, items));
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            failure = std::current_exception();
        }
    });
    if (failure) std::rethrow_exception(failure);
}

Threads threads_for(int threads, double terms) {  // waking a thread costs about 200 thousand cheap terms
    return {threads, (int)std::min<double>(threads, 1 + terms / 2e5)};
}

}  // namespace
