// Enough of CUDA for g++ to compile a kernel's unmodified source and run it on the CPU; included before the source.
//
// Threads are fibers that emulation.cpp switches at barriers and shuffles only, so there is no parallelism, but every
// order of threads and blocks that barriers permit may be asked for. Stricter than CUDA: a barrier or a shuffle that
// names a thread which has returned is an error, and so are blocks counted in products of 32 bits. Not modelled: memory
// that becomes visible late (fences do nothing; the rules of benchmarks/ledger.py ask for them).
#ifndef EMULATION
#define EMULATION

#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static thread_local  // so that all of it lies in one segment of the library, and nothing else does

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
constexpr int warpSize = 32;

namespace emulation {

// A number of blocks: times what is 32-bit too, it may be more than 32 bits hold, which no array in a test would show.
struct Blocks {
    unsigned n;
    operator unsigned() const { return n; }
};
template <typename V>
constexpr bool wide = std::is_integral<V>::value && sizeof(V) == 8;
template <typename V>
V operator*(Blocks blocks, V v) {
    static_assert(wide<V>, "blockIdx or gridDim times 32 bits may not fit 32 bits; make a factor an Index");
    return V(blocks.n) * v;
}
template <typename V>
V operator*(V v, Blocks blocks) {
    return blocks * v;
}
inline unsigned operator*(Blocks, Blocks) = delete;  // for the same reason
template <typename V>
std::conditional_t<wide<V>, V, Blocks> operator/(Blocks blocks, V v) {
    return {static_cast<std::conditional_t<wide<V>, V, unsigned>>(blocks.n) / v};
}
template <typename V>
std::conditional_t<wide<V>, V, Blocks> operator%(Blocks blocks, V v) {
    return {static_cast<std::conditional_t<wide<V>, V, unsigned>>(blocks.n) % v};
}

struct Grid {
    Blocks x, y, z;
};

}  // namespace emulation

extern uint3 threadIdx;
extern dim3 blockDim;
extern emulation::Grid blockIdx, gridDim;

namespace emulation {

struct Place {
    const char *what, *function;
    int line;
};

// The thread waits for all of its block, or for the lanes of its warp that `mask` names.
void wait_for_block(Place);
void wait_for_lanes(unsigned mask, Place);

// The value of lane `source` after all lanes of `mask` have given theirs.
uint64_t exchange(unsigned mask, uint64_t value, int source, Place);

// The lanes of `mask` whose predicate holds.
unsigned vote(unsigned mask, bool predicate, Place);

int lane();

// Blocks learn of each other at atomics only: there half of the seeds hold up the rest of the block.
void atomic();

struct Launch {
    Grid grid;
    dim3 block;
    unsigned long long order;  // 0: threads and blocks in their natural order, else the seed of their permutation
};

// Runs the kernel; the return value says what is wrong with its barriers, or is null.
const char* launch(const char* name, const Launch&, void (*kernel)(void* const*), void* const* arguments);

}  // namespace emulation

// ---- barriers and warps ---------------------------------------------------------------------------------------------

#define PLACE const char *function = __builtin_FUNCTION(), int line = __builtin_LINE()

inline void __syncthreads(PLACE) { emulation::wait_for_block({"__syncthreads", function, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, PLACE) {
    emulation::wait_for_lanes(mask, {"__syncwarp", function, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, PLACE) {
    return emulation::vote(mask, predicate != 0, {"__ballot_sync", function, line});
}
inline int __any_sync(unsigned mask, int predicate, PLACE) {
    return emulation::vote(mask, predicate != 0, {"__any_sync", function, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PLACE) {
    return emulation::vote(mask, predicate != 0, {"__all_sync", function, line}) == mask;
}

namespace emulation {

template <typename V>
V shuffle(unsigned mask, V v, int source, Place place) {
    static_assert(std::is_trivially_copyable<V>::value && sizeof(V) <= 8, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof(V));
    bits = exchange(mask, bits, source, place);
    memcpy(&v, &bits, sizeof(V));
    return v;
}

}  // namespace emulation

template <typename V>
V __shfl_sync(unsigned mask, V v, int source, int width = warpSize, PLACE) {
    const int first = emulation::lane() & ~(width - 1);
    return emulation::shuffle(mask, v, first + (source & (width - 1)), {"__shfl_sync", function, line});
}
template <typename V>
V __shfl_up_sync(unsigned mask, V v, unsigned delta, int width = warpSize, PLACE) {
    const int lane = emulation::lane(), first = lane & ~(width - 1), from = lane - int(delta);
    return emulation::shuffle(mask, v, from < first ? lane : from, {"__shfl_up_sync", function, line});
}
template <typename V>
V __shfl_down_sync(unsigned mask, V v, unsigned delta, int width = warpSize, PLACE) {
    const int lane = emulation::lane(), last = lane | (width - 1), from = lane + int(delta);
    return emulation::shuffle(mask, v, from > last ? lane : from, {"__shfl_down_sync", function, line});
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V v, int with, int width = warpSize, PLACE) {
    const int lane = emulation::lane(), last = lane | (width - 1), from = lane ^ with;
    return emulation::shuffle(mask, v, from > last ? lane : from, {"__shfl_xor_sync", function, line});
}

#undef PLACE

// ---- memory ---------------------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}

// Integers only: a float atomic adds in an order that timing decides.
#define ATOMIC(name, update)                                                   \
    template <typename V>                                                      \
    V name(V* at, std::common_type_t<V> v) {                                   \
        static_assert(std::is_integral<V>::value, "atomics of integers only"); \
        const V old = *at;                                                     \
        *at = V(update);                                                       \
        emulation::atomic();                                                   \
        return old;                                                            \
    }
ATOMIC(atomicAdd, old + v)
ATOMIC(atomicSub, old - v)
ATOMIC(atomicMax, old > v ? old : v)
ATOMIC(atomicMin, old < v ? old : v)
ATOMIC(atomicAnd, old & v)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicXor, old ^ v)
ATOMIC(atomicExch, v)
ATOMIC(atomicInc, old >= v ? 0 : old + 1)
ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef ATOMIC
template <typename V>
V atomicCAS(V* at, std::common_type_t<V> compare, std::common_type_t<V> v) {
    const V old = *at;
    if (old == compare) *at = v;
    emulation::atomic();
    return old;
}

template <typename V>
V __ldg(const V* at) {
    return *at;
}

template <typename To, typename From>
To emulated_bits(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "the same bits");
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int v) { return emulated_bits<float>(v); }
inline int __float_as_int(float v) { return emulated_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline double __longlong_as_double(long long v) { return emulated_bits<double>(v); }
inline long long __double_as_longlong(double v) { return emulated_bits<long long>(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// ---- the door for Python --------------------------------------------------------------------------------------------

struct __half;
struct __nv_bfloat16;

namespace emulation {

// What the compiler sees in a parameter: NumPy's character of a type, before it * for a pointer, c* for one to const.
template <typename V>
constexpr const char* code() {
    if constexpr (std::is_same<V, float>::value) return "f";
    else if constexpr (std::is_same<V, double>::value) return "d";
    else if constexpr (std::is_same<V, __half>::value) return "e";
    else if constexpr (std::is_same<V, __nv_bfloat16>::value) return "E";
    else if constexpr (std::is_same<V, bool>::value) return "?";
    else if constexpr (std::is_integral<V>::value && sizeof(V) == 1) return std::is_signed<V>::value ? "b" : "B";
    else if constexpr (std::is_integral<V>::value && sizeof(V) == 2) return std::is_signed<V>::value ? "h" : "H";
    else if constexpr (std::is_integral<V>::value && sizeof(V) == 4) return std::is_signed<V>::value ? "i" : "I";
    else if constexpr (std::is_integral<V>::value && sizeof(V) == 8) return std::is_signed<V>::value ? "q" : "Q";
    else return "V";  // a structure, by value
}

struct Parameter {
    const char* kind;  // "" a value, "*" a pointer to what is written, "c*" to what is read
    const char* code;
    uint64_t size;
};

template <typename V>
constexpr Parameter parameter() {
    if constexpr (std::is_pointer<V>::value) {
        using E = std::remove_pointer_t<V>;
        return {std::is_const<E>::value ? "c*" : "*", code<std::remove_cv_t<E>>(), sizeof(E)};
    } else {
        return {"", code<V>(), sizeof(V)};
    }
}

template <typename F>
struct Kernel;
template <typename... A>
struct Kernel<void (*)(A...)> {
    static constexpr int count = sizeof...(A);
    static constexpr Parameter parameters[] = {parameter<A>()...};

    template <void (*kernel)(A...)>
    static void call(void* const* arguments) {
        unpack<kernel>(arguments, std::index_sequence_for<A...>());
    }
    template <void (*kernel)(A...), size_t... i>
    static void unpack(void* const* arguments, std::index_sequence<i...>) {
        kernel(*static_cast<const A*>(arguments[i])...);
    }
};

}  // namespace emulation

// Exports a kernel: its parameters, the most threads in a block, and the call.
#define EXPORT extern "C" __attribute__((visibility("default")))
#define KERNEL(name, threads)                                                                          \
    EXPORT int emulated_count_##name() { return emulation::Kernel<decltype(&name)>::count; }           \
    EXPORT const emulation::Parameter* emulated_parameters_##name() {                                  \
        return emulation::Kernel<decltype(&name)>::parameters;                                         \
    }                                                                                                  \
    EXPORT int emulated_threads_##name() { return threads; }                                           \
    EXPORT const char* emulated_##name(const emulation::Launch* how, void* const* arguments) {         \
        return emulation::launch(#name, *how, emulation::Kernel<decltype(&name)>::call<name>, arguments);\
    }

#endif
