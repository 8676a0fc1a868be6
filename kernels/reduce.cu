// Sum, mean, maximum and minimum of x (outer, length, inner) along `length`: out (outer, inner) = the result, or += it.
// NaN wins a maximum or minimum. Reads S, combines in R, writes O.
//
// Bytes per element: reduce_sum S, reduce_mean S, reduce_max S, reduce_min S. What blocks leave to each other is less
// by a factor of 64 or more.
//
// Geometry (reduce_geometry in backends/geometry.py). inner == 1: a line is contiguous, and belongs to a team: part of
// a warp (a power of two), or a block. inner > 1: a thread has WIDE columns of a line's rows; blockDim.y threads share
// the rows, blockDim.z lines the block. Where lines are few, gridDim.y blocks split each: they leave their parts in
// `partials` (outer, gridDim.y) or (gridDim.y, outer, inner), and the last of them combines these; `tickets` has one
// for each blockIdx.x.
#include "teams.cuh"

namespace gpubackprop {

constexpr int WIDE = LANES * sizeof(T) / sizeof(S);  // elements of 16 bytes

template <typename Operation>
constexpr int DEPTH = 4;  // vectors under way together in each thread
template <>
constexpr int DEPTH<Add> = sizeof(S) < 4 ? 3 : 4;  // each of its lanes has two parts

// What a thread has combined, lane by lane, in two parts.
template <int W, typename Operation>
struct Lanes {
    Operation combine;
    Vector<W> parts, low;

    DEVICE Lanes(Operation combine, R identity) : combine(combine) {
        UNROLL for (int lane = 0; lane < W; ++lane) parts[lane] = identity, low[lane] = 0;
    }
    DEVICE void take(int lane, R v) { combine.append(parts[lane], low[lane], v); }
    DEVICE void take(const Vector<W>& v) {
        UNROLL for (int lane = 0; lane < W; ++lane) take(lane, v[lane]);
    }
    DEVICE Vector<W> all() {
        UNROLL for (int lane = 0; lane < W; ++lane) parts[lane] = combine.whole(parts[lane], low[lane]);
        return parts;
    }
};

// ---- contiguous lines -----------------------------------------------------------------------------------------------

// x (length) combined over the team; each thread gets the result.
template <bool VECTORS, int W, typename E, typename Operation>
DEVICE R along(const E* x, Index length, Operation combine, R identity) {
    const Index whole = length / W * W;
    Packed<W, E> v[DEPTH<Operation>];
    Lanes<W, Operation> lanes(combine, identity);
    sweep<DEPTH<Operation>, false>(Index(threadIdx.x) * W, Index(blockDim.x) * W, whole,
        [&](int k, Index at) { v[k] = read<VECTORS, W>(x + at, W); },
        [&](int k, Index) { lanes.take(values(v[k])); });
    UNROLL for (int lane = 0; lane < W - 1; ++lane) {
        const bool mine = whole / W % blockDim.x == threadIdx.x && whole + lane < length;
        if (mine) lanes.take(lane, R(x[whole + lane]));
    }
    Vector<W> parts = lanes.all();
    UNROLL for (int lane = 1; lane < W; ++lane) parts[0] = combine(parts[0], parts[lane]);
    return across_team(parts[0], combine, identity);
}

template <bool VECTORS, typename Operation>
DEVICE void reduce_lines(O* out, R* partials, Word* tickets, const S* x, int accumulate, Operation combine, R identity,
        R share, Index outer, Index length) {
    const Index line = blockIdx.x * Index(blockDim.y) + threadIdx.y, split = gridDim.y, step = Index(blockDim.x) * WIDE;
    const Index slice = ((length - 1) / split / step + 1) * step, start = blockIdx.y * slice;
    const Index end = line < outer ? (start + slice < length ? start + slice : length) : 0;
    const bool writes = line < outer && threadIdx.x == 0;
    R v = along<VECTORS, WIDE>(x + line * length + start, end - start, combine, identity);
    if (split > 1) {
        if (writes) partials[line * split + blockIdx.y] = v;
        if (!last_block(tickets + blockIdx.x, gridDim.y)) return;
        v = along<false, 1>(partials + line * split, line < outer ? split : 0, combine, identity);
    }
    if (writes) put<false>(out + line, Vector<1>{{v * share}}, 1, accumulate);
}

// ---- lines of rows --------------------------------------------------------------------------------------------------

// x (length, pitch) combined over the length, for the W columns that start at x; each thread below gets the result.
template <bool VECTORS, int W, typename E, typename Operation>
DEVICE Vector<W> downward(const E* x, int left, Index length, Index pitch, Operation combine, R identity) {
    Packed<W, E> v[DEPTH<Operation>];
    Lanes<W, Operation> lanes(combine, identity);
    sweep<DEPTH<Operation>, false>(threadIdx.y * pitch, blockDim.y * pitch, length * pitch,
        [&](int k, Index at) { v[k] = read<VECTORS, W>(x + at, left); },
        [&](int k, Index) { lanes.take(values(v[k])); });
    return down(lanes.all(), combine);
}

template <bool VECTORS, typename Operation>
DEVICE void reduce_rows(O* out, R* partials, Word* tickets, const S* x, int accumulate, Operation combine, R identity,
        R share, Index outer, Index length, Index inner) {
    const Word tiles = Word((inner - 1) / (Index(blockDim.x) * WIDE) + 1);
    const Index line = blockIdx.x / tiles * Index(blockDim.z) + threadIdx.z, split = gridDim.y;
    const Index column = (blockIdx.x % tiles * Index(blockDim.x) + threadIdx.x) * WIDE;
    const bool live = line < outer && column < inner;
    const int left = inner - column < WIDE ? int(inner - column) : WIDE;
    const Index slice = (length - 1) / split + 1, start = blockIdx.y * slice;
    const Index end = live ? (start + slice < length ? start + slice : length) : 0;
    Vector<WIDE> v = downward<VECTORS, WIDE>(
        x + (line * length + start) * inner + column, left, end - start, inner, combine, identity);
    if (split > 1) {
        R* const part = partials + line * inner + column;
        if (live && threadIdx.y == 0) put<VECTORS>(part + blockIdx.y * outer * inner, v, left);
        if (!last_block(tickets + blockIdx.x, gridDim.y)) return;
        v = downward<VECTORS, WIDE>(part, left, live ? split : 0, outer * inner, combine, identity);
    }
    if (!live || threadIdx.y > 0) return;
    UNROLL for (int lane = 0; lane < WIDE; ++lane) v[lane] *= share;
    put<VECTORS>(out + line * inner + column, v, left, accumulate);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <typename Operation>
DEVICE void reduce(O* out, R* partials, Word* tickets, const S* x, int accumulate, Operation combine, R identity,
        R share, Index outer, Index length, Index inner) {
    const size_t off = misaligned(out) | misaligned(partials) | misaligned(x);
    if (inner == 1) {
        branch(misaligned(x) == 0 && (outer == 1 || length % WIDE == 0), [&](auto vectors) {
            reduce_lines<decltype(vectors)::value>(
                out, partials, tickets, x, accumulate, combine, identity, share, outer, length);
        });
    } else {
        branch(off == 0 && inner % WIDE == 0, [&](auto vectors) {
            reduce_rows<decltype(vectors)::value>(
                out, partials, tickets, x, accumulate, combine, identity, share, outer, length, inner);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) reduce_sum(O* __restrict__ out, R* __restrict__ partials,
        Word* __restrict__ tickets, const S* __restrict__ x, const int accumulate, const Index outer,
        const Index length, const Index inner) {
    reduce(out, partials, tickets, x, accumulate, Add(), R(0), R(1), outer, length, inner);
}

extern "C" __global__ void __launch_bounds__(THREADS) reduce_mean(O* __restrict__ out, R* __restrict__ partials,
        Word* __restrict__ tickets, const S* __restrict__ x, const int accumulate, const Index outer,
        const Index length, const Index inner) {
    reduce(out, partials, tickets, x, accumulate, Add(), R(0), R(1) / R(length), outer, length, inner);
}

extern "C" __global__ void __launch_bounds__(THREADS) reduce_max(O* __restrict__ out, R* __restrict__ partials,
        Word* __restrict__ tickets, const S* __restrict__ x, const int accumulate, const Index outer,
        const Index length, const Index inner) {
    reduce(out, partials, tickets, x, accumulate, Maximum(), R(-INFINITY), R(1), outer, length, inner);
}

extern "C" __global__ void __launch_bounds__(THREADS) reduce_min(O* __restrict__ out, R* __restrict__ partials,
        Word* __restrict__ tickets, const S* __restrict__ x, const int accumulate, const Index outer,
        const Index length, const Index inner) {
    reduce(out, partials, tickets, x, accumulate, Minimum(), R(INFINITY), R(1), outer, length, inner);
}

}  // namespace gpubackprop
