// A block as teams: the blockDim.x threads of a team stand side by side, and teams stand one below another.
//
// Which thread takes which elements depends on the shape alone, not on where a view starts in memory: a pointer off the
// boundary of 16 bytes changes the accesses, never the order of a sum.
#ifndef GPUBACKPROP_TEAMS
#define GPUBACKPROP_TEAMS

#include "reduce.cuh"

namespace gpubackprop {

// W elements from x on, of which `left` exist; the others are 0. VECTORS: all exist, and stand on the boundary.
template <bool VECTORS, int W, typename E>
DEVICE Packed<W, E> read(const E* x, int left) {
    if constexpr (VECTORS) {
        return *reinterpret_cast<const Packed<W, E>*>(x);
    } else {
        Packed<W, E> packed;
        UNROLL for (int lane = 0; lane < W; ++lane) packed.at[lane] = lane < left ? x[lane] : E(0);
        return packed;
    }
}

template <int W, typename E>
DEVICE Vector<W> values(const Packed<W, E>& packed) {
    Vector<W> v;
    UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = R(packed.at[lane]);
    return v;
}

template <bool VECTORS, int W, typename E>
DEVICE Vector<W> load(const E* x, int left) {
    return values(read<VECTORS, W>(x, left));
}

// out = v or, if `accumulate`, out += v, for the elements that exist.
template <bool VECTORS, int W, typename E>
DEVICE void put(E* out, Vector<W> v, int left, int accumulate = 0) {
    if (accumulate) {
        const Vector<W> old = load<VECTORS, W>(out, left);
        UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = old[lane] + v[lane];
    }
    if constexpr (VECTORS) {
        store(out, v);
    } else {
        UNROLL for (int lane = 0; lane < W; ++lane) {
            if (lane < left) out[lane] = E(v[lane]);
        }
    }
}

// A condition that is known to the compiler inside f, where decltype(parameter)::value has its value.
template <bool V>
struct Known {
    static constexpr bool value = V;
};
template <typename F>
DEVICE void branch(bool condition, F f) {
    condition ? f(Known<true>()) : f(Known<false>());
}

// One thread's share of a line: fetch(k, at), then visit(k, at) for at = first, first + step, … before `end`, K of them
// at a time, so that K loads are under way together. ONCE: there are no more than K.
template <int K, bool ONCE, typename I, typename Fetch, typename Visit>
DEVICE void sweep(I first, I step, I end, Fetch fetch, Visit visit) {
    do {
        UNROLL for (int k = 0; k < K; ++k) {
            if (first + k * step < end) fetch(k, first + k * step);
        }
        UNROLL for (int k = 0; k < K; ++k) {
            if (first + k * step < end) visit(k, first + k * step);
        }
        first += K * step;
    } while (!ONCE && first < end);
}

// `v` combined over the team, which is part of a warp (a power of two) or the whole block; each thread gets the result.
template <typename Operation>
DEVICE R across_team(R v, Operation combine, R identity) {
    return blockDim.x <= WARP ? across(v, combine, int(blockDim.x)) : across_block(v, combine, identity);
}

// `v` combined over the threads that stand one below another; each gets the result. Where that takes more than a warp
// (blockDim.x · blockDim.y > WARP), the block has no third dimension.
template <int W, typename Operation>
DEVICE Vector<W> down(Vector<W> v, Operation combine) {
    __shared__ Vector<W> of_warp[THREADS / WARP][WARP];
    if (blockDim.y == 1) return v;
    const int team = int(blockDim.x), span = team * int(blockDim.y), lane = thread() % WARP;
    ROLLED for (int offset = (span < WARP ? span : WARP) / 2; offset >= team; offset /= 2) {
        UNROLL for (int i = 0; i < W; ++i) v[i] = combine(v[i], __shfl_xor_sync(ALL, v[i], offset));
    }
    if (span <= WARP) return v;
    __syncthreads();  // an earlier call's values have been read
    of_warp[thread() / WARP][lane] = v;
    __syncthreads();
    v = of_warp[0][lane];
    ROLLED for (int warp = 1; warp < span / WARP; ++warp) {
        UNROLL for (int i = 0; i < W; ++i) v[i] = combine(v[i], of_warp[warp][lane][i]);
    }
    return v;
}

}  // namespace gpubackprop

#endif
