// What every host kernel shares. A kernel takes one argument, its job: addresses and numbers, each an Index, in the
// order that its text reads them. Arrays are C-contiguous, all of type R; they may be one another, but not overlap.
#ifndef GPUBACKPROP_HOST
#define GPUBACKPROP_HOST

#include <stdint.h>
#include <string.h>

#define OWN_FUNCTIONS
#include "prelude.cuh"
#include "pool.h"

#ifdef FLOAT64
#define TYPED(name) name##_float64
#else
#define TYPED(name) name##_float32
#endif
#define KERNEL(name) extern "C" __attribute__((visibility("default"))) void TYPED(name)(const Index* job)

// Before a loop whose elements do not depend on each other, whatever arrays may be one: it becomes vectors.
#ifdef __clang__
#define LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define LOOP _Pragma("GCC ivdep")
#endif

namespace gpubackprop {

// As in the prelude, but by two selects, which become vectors.
static inline R maximum(R a, R b) {
    const R larger = a > b ? a : b;
    return a != a ? a : larger;
}
static inline R minimum(R a, R b) {
    const R smaller = a < b ? a : b;
    return a != a ? a : smaller;
}

[[maybe_unused]] constexpr Index GRAIN = 16384;  // elements in a piece of work that may go to another core

// Whether work is worth another core, which takes some 20 µs to wake: elements, and what one costs, as backends/host.py
// counts it (about 0.1 ns).
static inline bool worth(Index elements, Index cost) { return elements * cost >= 600000; }

[[maybe_unused]] constexpr Index STRIP = 16;     // sums that are added up side by side

template <typename E>
static inline E* pointer(Index address) {
    return reinterpret_cast<E*>(address);
}

// Sums, in an order that their count alone decides. A running sum in float drifts as it grows: up to LENGTH values are
// added up in R, as STRIP sums and then halves of them, and what these come to in double.
[[maybe_unused]] constexpr Index LENGTH = 256;

// Σ values[0 … count), of up to LENGTH.
static inline R short_sum(const R* values, Index count) {
    R sums[STRIP] = {};
    Index i = 0;
    for (; i + STRIP <= count; i += STRIP) {
        LOOP for (Index lane = 0; lane < STRIP; ++lane) sums[lane] += values[i + lane];
    }
    for (Index lane = 0; i + lane < count; ++lane) sums[lane] += values[i + lane];
    for (Index half = STRIP / 2; half > 0; half /= 2) {
        for (Index lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

// Σ values[0 … count).
static inline R sum_of(const R* values, Index count) {
    if (count <= LENGTH) return short_sum(values, count);
    double sum = 0;
    for (Index at = 0; at < count; at += LENGTH) {
        sum += double(short_sum(values + at, count - at < LENGTH ? count - at : LENGTH));
    }
    return R(sum);
}

// Σ of `count` values, of which fill(values, at, n) writes n, those from `at` on, at a time.
template <typename Fill>
static inline R sum_filled(Index count, const Fill& fill) {
    R values[LENGTH];
    double sum = 0;
    for (Index at = 0; at < count; at += LENGTH) {
        const Index n = count - at < LENGTH ? count - at : LENGTH;
        fill(values, at, n);
        sum += double(short_sum(values, n));
    }
    return R(sum);
}

// Σ value(i) for i = 0 … count − 1; value may store what it likes.
template <typename Value>
static inline R sum_each(Index count, const Value& value) {
    return sum_filled(count, [&](R* values, Index at, Index n) {
        LOOP for (Index i = 0; i < n; ++i) values[i] = value(at + i);
    });
}

// ---- what a training step reads and leaves behind -------------------------------------------------------------------

// The step table, as backends/native.py lays it out: see StepTable in backends/base.py.
struct Steps {
    Index step, applied;   // rows in force
    Index last, first;     // the last row; the number of the first step
    Index width;           // columns
    const R* rows;         // (steps, columns)
    const Index* offsets;  // of each step's batch
    R *row, *applied_row;  // copies of the rows in force
    const R* control;
};

// What an epoch adds up: see Tally in backends/base.py.
struct Tally {
    double* loss;
    Index *bad_step, *correct;
};

static inline void add_to(const Tally& tally, R total, const Steps& steps) {
    *tally.loss += double(total);
    if (*tally.bad_step == 0 && !(abs(total) < R(INFINITY))) *tally.bad_step = steps.first + steps.step;
}

}  // namespace gpubackprop

#endif
