// What every kernel shares: types, vectors of 16 bytes, the functions of the formula language, Philox.
//
// NVRTC compiles it without a header for float and double, g++ compiles it for the host. Options: --fmad=false,
// -ffp-contract=off, never fast math, so that + - * / sqrt, comparisons and ?: give equal bits on every backend.
#ifndef GPUBACKPROP_PRELUDE
#define GPUBACKPROP_PRELUDE

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#else
#define DEVICE inline
#define UNROLL
#define ROLLED
#include <math.h>
#include <stddef.h>
#endif

// FLOAT64, FLOAT16 or BFLOAT16, if defined, chooses the storage type T; else it is float.
#if defined(FLOAT16)
#include <cuda_fp16.h>
#elif defined(BFLOAT16)
#include <cuda_bf16.h>
#endif

namespace gpubackprop {

// ---- types ----------------------------------------------------------------------------------------------------------

#if defined(FLOAT64)
using T = double;
using R = double;  // arithmetic is done in R
#elif defined(FLOAT16)
using T = __half;
using R = float;
#elif defined(BFLOAT16)
using T = __nv_bfloat16;
using R = float;
#else
using T = float;
using R = float;
#endif

// What a kernel that converts reads (S) and writes (O); T unless the unit says otherwise.
#ifndef SOURCE
#define SOURCE T
#endif
#ifndef OUTPUT
#define OUTPUT T
#endif
using S = SOURCE;
using O = OUTPUT;

using Index = long long;  // a batch of 2^31 elements is within reach, and i += step must not wrap
using Word = unsigned int;
using Long = unsigned long long;

[[maybe_unused]] constexpr int LANES = 16 / sizeof(T);  // elements in one vector
[[maybe_unused]] constexpr int THREADS = 256;           // the most in a block

// What kernels promise the compiler: the threads of a block, and how many blocks a multiprocessor shall hold at least.
// Where the second is left out, ptxas spills registers in order to hold more.
#ifdef __CUDACC__
#define BOUNDS THREADS, 2
#else
#define BOUNDS THREADS
#endif

// ---- vectors --------------------------------------------------------------------------------------------------------

// W consecutive elements as they are stored: accesses of up to 16 bytes.
template <int W, typename E>
struct alignas(W * sizeof(E) < 16 ? W * sizeof(E) : 16) Packed {
    E at[W];
};

// W consecutive elements as they are computed with.
template <int W>
struct Vector {
    R at[W];
    DEVICE R& operator[](int lane) { return at[lane]; }
    DEVICE R operator[](int lane) const { return at[lane]; }
};

template <int W, typename E>
DEVICE Vector<W> load(const E* __restrict__ x) {
    const Packed<W, E> packed = *reinterpret_cast<const Packed<W, E>*>(x);
    Vector<W> v;
    UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = R(packed.at[lane]);
    return v;
}

template <int W, typename E>
DEVICE void store(E* x, const Vector<W>& v) {
    Packed<W, E> packed;
    UNROLL for (int lane = 0; lane < W; ++lane) packed.at[lane] = E(v[lane]);
    *reinterpret_cast<Packed<W, E>*>(x) = packed;
}

// The bits of a pointer that say how far it lies past a boundary of 16 bytes.
DEVICE size_t misaligned(const void* x) { return reinterpret_cast<size_t>(x) % 16; }

// ---- the functions of the formula language --------------------------------------------------------------------------
// Inside this namespace they hide the global ones, so that one text serves both arithmetic types.

#ifdef OWN_FUNCTIONS  // the host's, which become vectors
#include <functions.h>
#else
#define FUNCTION(f, of_float, of_double)               \
    DEVICE float f(float x) { return ::of_float(x); }  \
    DEVICE double f(double x) { return ::of_double(x); }
FUNCTION(exp, expf, exp)
FUNCTION(log, logf, log)
FUNCTION(log1p, log1pf, log1p)
FUNCTION(expm1, expm1f, expm1)
FUNCTION(sqrt, sqrtf, sqrt)
FUNCTION(tanh, tanhf, tanh)
FUNCTION(abs, fabsf, fabs)
#undef FUNCTION

DEVICE float pow(float x, float y) { return ::powf(x, y); }
DEVICE double pow(double x, double y) { return ::pow(x, y); }

// NaN if either is NaN, and b of two zeros, as NumPy has it; fmax would drop a NaN.
DEVICE R maximum(R a, R b) { return a > b || a != a ? a : b; }
DEVICE R minimum(R a, R b) { return a < b || a != a ? a : b; }
#endif

// ---- random numbers -------------------------------------------------------------------------------------------------

struct Block {
    Word word[4];
};

// Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3").
DEVICE Block philox4x32(Block x, Word key0, Word key1) {
    UNROLL for (int round = 0; round < 10; ++round) {
        const Long p0 = Long(0xD2511F53u) * x.word[0], p1 = Long(0xCD9E8D57u) * x.word[2];
        x = {{Word(p1 >> 32) ^ x.word[1] ^ key0, Word(p1), Word(p0 >> 32) ^ x.word[3] ^ key1, Word(p0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

// The words of elements 4 · block … 4 · block + 3, an element being row · columns + column of the whole batch: the
// convention of gpubackprop/backends/philox.py.
DEVICE Block draw(Long seed, Word site, Word step, Long block) {
    return philox4x32({{Word(block), Word(block >> 32), step, site}}, Word(seed), Word(seed >> 32));
}

// Lanes, added to the site: the low words of the uniforms of float64; the second uniform of a normal number.
[[maybe_unused]] constexpr Word LOW = 1u << 31, SECOND = 1u << 30;
[[maybe_unused]] constexpr R TURN = R(0x1.921fb54442d18p2);  // 2π

// A uniform number in [0, 1), from its word or words: k / 2^24 and k / 2^53.
DEVICE float uniform(Word word) { return float(word >> 8) * 0x1p-24f; }
DEVICE double uniform(Word high, Word low) { return double((Long(high) << 32 | low) >> 11) * 0x1p-53; }

}  // namespace gpubackprop

#endif
