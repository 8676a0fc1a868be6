// Slices by a list of indices: gather copies them, scatter_add is its gradient, by an index sorted beforehand, and
// scatter_add_live by one that launches write. Arrays are (outer, length or count, inner), a slice being `inner`
// contiguous elements.
//
// Bytes per element: gather T + T, scatter_add T + T + T, scatter_add_live T + T + T. (Of scatter_add, dy is read once,
// and the slices of `out` that an index names are read and written once.) Each slice costs 8 more for its index, and in
// scatter_add_live 8 for each of the others, most of them from the caches; one that is short or off the boundary costs
// the 32 bytes it lies in: with inner == 1, eight times as many at float32.
//
// Geometry (slices_geometry in backends/geometry.py): any grid; blocks along x and threads along y have slices, blocks
// along y and threads along x the vectors of a slice.
#include "prelude.cuh"

namespace gpubackprop {

// f(slice, at) for W elements at a time of each slice below `slices`.
template <int W, typename F>
DEVICE void each(Index slices, Index inner, F f) {
    const Index first = (blockIdx.y * Index(blockDim.x) + threadIdx.x) * W, across = gridDim.y * Index(blockDim.x) * W;
    const Index top = blockIdx.x * Index(blockDim.y) + threadIdx.y, down = gridDim.x * Index(blockDim.y);
    for (Index slice = top; slice < slices; slice += down) {
        for (Index at = first; at < inner; at += across) f(slice, at);
    }
}

// out[:, i] = x[:, index[i]], bit by bit.
template <int W>
DEVICE void gather_slices(T* __restrict__ out, const T* __restrict__ x, const Index* __restrict__ index, Index outer,
        Index length, Index count, Index inner) {
    each<W>(outer * count, inner, [&](Index slice, Index at) {
        const Index line = slice / count, from = line * length + index[slice - line * count];
        const Packed<W, T> v = *reinterpret_cast<const Packed<W, T>*>(x + from * inner + at);
        *reinterpret_cast<Packed<W, T>*>(out + slice * inner + at) = v;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) gather(T* __restrict__ out, const T* __restrict__ x,
        const Index* __restrict__ index, const Index outer, const Index length, const Index count, const Index inner) {
    if (inner % LANES == 0 && (misaligned(out) | misaligned(x)) == 0) {
        gather_slices<LANES>(out, x, index, outer, length, count, inner);
    } else {
        gather_slices<1>(out, x, index, outer, length, count, inner);
    }
}

// out[:, targets[s]] += dy[:, permutation[j]] for j = starts[s], …, starts[s + 1] − 1, one after the other: in R,
// rounded to T at the end, so that float32 and float64 have the bits of numpy.add.at on an index sorted stably.
template <int W>
DEVICE void add_segments(T* __restrict__ out, const T* __restrict__ dy, const Index* __restrict__ permutation,
        const Index* __restrict__ starts, const Index* __restrict__ targets, Index segments, Index outer, Index length,
        Index count, Index inner) {
    constexpr int DEPTH = 4;  // vectors under way together
    each<W>(outer * segments, inner, [&](Index slice, Index at) {
        const Index line = slice / segments, segment = slice - line * segments, end = starts[segment + 1];
        const T* const from = dy + line * count * inner + at;
        T* const to = out + (line * length + targets[segment]) * inner + at;
        Vector<W> sum = load<W>(to), v[DEPTH];
        for (Index j = starts[segment]; j < end; j += DEPTH) {
            UNROLL for (int k = 0; k < DEPTH; ++k) {
                if (j + k < end) v[k] = load<W>(from + permutation[j + k] * inner);
            }
            UNROLL for (int k = 0; k < DEPTH; ++k) {
                if (j + k >= end) break;
                UNROLL for (int lane = 0; lane < W; ++lane) sum[lane] += v[k][lane];
            }
        }
        store(to, sum);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_add(T* __restrict__ out, const T* __restrict__ dy,
        const Index* __restrict__ permutation, const Index* __restrict__ starts, const Index* __restrict__ targets,
        const Index segments, const Index outer, const Index length, const Index count, const Index inner) {
    if (inner % LANES == 0 && (misaligned(out) | misaligned(dy)) == 0) {
        add_segments<LANES>(out, dy, permutation, starts, targets, segments, outer, length, count, inner);
    } else {
        add_segments<1>(out, dy, permutation, starts, targets, segments, outer, length, count, inner);
    }
}

// out[:, index[i]] += dy[:, i], one after the other in R: the first slice of a target adds up all of them, the others
// nothing. The bits are those of scatter_add.
template <int W>
DEVICE void add_equal(T* __restrict__ out, const T* __restrict__ dy, const Index* __restrict__ index, Index outer,
        Index length, Index count, Index inner) {
    each<W>(outer * count, inner, [&](Index slice, Index at) {
        const Index line = slice / count, first = slice - line * count, target = index[first];
        ROLLED for (Index j = 0; j < first; ++j) {
            if (index[j] == target) return;
        }
        const T* const from = dy + line * count * inner + at;
        T* const to = out + (line * length + target) * inner + at;
        Vector<W> sum = load<W>(to);
        ROLLED for (Index j = first; j < count; ++j) {
            if (index[j] != target) continue;
            const Vector<W> v = load<W>(from + j * inner);
            UNROLL for (int lane = 0; lane < W; ++lane) sum[lane] += v[lane];
        }
        store(to, sum);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_add_live(T* __restrict__ out, const T* __restrict__ dy,
        const Index* __restrict__ index, const Index outer, const Index length, const Index count, const Index inner) {
    if (inner % LANES == 0 && (misaligned(out) | misaligned(dy)) == 0) {
        add_equal<LANES>(out, dy, index, outer, length, count, inner);
    } else {
        add_equal<1>(out, dy, index, outer, length, count, inner);
    }
}

}  // namespace gpubackprop
