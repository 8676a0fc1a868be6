// What the machine can do at most, for benchmarks to compare with: multiply-adds whose operands never leave registers.
#include "host.h"

namespace gpubackprop {
namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define FUSED __attribute__((target("avx512f"), optimize("fp-contract=fast")))
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define FUSED __attribute__((target("fma"), optimize("fp-contract=fast")))
#else
#define VECTOR_BYTES 16
#define FUSED __attribute__((optimize("fp-contract=fast")))
#endif
#ifdef __clang__
#undef FUSED
#define FUSED
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

typedef R Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int CHAINS = 12;  // that do not wait for each other

// `steps` multiply-adds in each lane of each chain; the sum of them all, so that none can be left out.
FUSED R multiply_adds(Index steps) {
#ifdef __clang__
#pragma clang fp contract(fast)
#endif
    Vector sums[CHAINS] = {}, factor = {}, term = {};
    factor += R(0.999), term += R(0.001);
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] += R(chain);  // or they would be one
    for (Index i = 0; i < steps; ++i) {
        UNROLLED for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * factor + term;
    }
    R total = 0;
    for (int chain = 0; chain < CHAINS; ++chain) {
        for (unsigned lane = 0; lane < VECTOR_BYTES / sizeof(R); ++lane) total += sums[chain][lane];
    }
    return total;
}

}  // namespace

// job: where each of `pieces` leaves its sum; pieces; steps; where to say how many operations a step of a piece has.
KERNEL(limits) {
    R* const totals = pointer<R>(job[0]);
    const Index steps = job[2];
    *pointer<Index>(job[3]) = 2 * CHAINS * VECTOR_BYTES / Index(sizeof(R));
    each(job[1], true, [=](Index i) { totals[i] = multiply_adds(steps); });
}

}  // namespace gpubackprop
