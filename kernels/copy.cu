// Copies and fills. Reads S, writes O: the same type keeps its bits, others pass through R; out += x adds in R.
//
// Bytes per element: copy S + O, copy_flat S + O, transpose S + O, fill O. (One more O where it accumulates.) Vectors
// are 16 bytes of the wider type. For vectors, copy needs `out` contiguous along the last dimension, x contiguous or
// constant, and all other strides, and the length, multiples of a vector; else it moves single elements, and one that
// is strided along that dimension costs the 32 bytes it lies in. transpose moves single elements, 32 side by side.
//
// Geometry. copy_flat, fill (flat_geometry in backends/geometry.py): any grid of blocks along x. copy
// (slices_geometry): any grid; blocks along x and threads along y have rows, blocks along y and threads along x the
// vectors of a row. transpose (transpose_geometry): blocks of (32, 8) threads, any number along x.
#include "reduce.cuh"

namespace gpubackprop {

constexpr int WIDER = sizeof(S) > sizeof(O) ? sizeof(S) : sizeof(O);
constexpr int WIDE = LANES * sizeof(T) / WIDER;

template <typename To, typename From>
struct Convert {
    static DEVICE To of(From x) { return To(R(x)); }
};
template <typename E>
struct Convert<E, E> {
    static DEVICE E of(E x) { return x; }
};

template <int W>
DEVICE void assign(O* out, const Packed<W, S> x, int accumulate) {
    Packed<W, O>& to = *reinterpret_cast<Packed<W, O>*>(out);
    Packed<W, O> y;
    if (accumulate) {
        const Packed<W, O> old = to;
        UNROLL for (int lane = 0; lane < W; ++lane) y.at[lane] = O(R(old.at[lane]) + R(x.at[lane]));
    } else {
        UNROLL for (int lane = 0; lane < W; ++lane) y.at[lane] = Convert<O, S>::of(x.at[lane]);
    }
    to = y;
}

// ---- contiguous -----------------------------------------------------------------------------------------------------

// f(at) for W elements at a time from `start` on, as far as there are W.
template <int W, typename F>
DEVICE void each(Index start, Index size, F f) {
    const Index threads = Index(blockDim.x) * blockDim.y, step = gridDim.x * threads * W;
    for (Index at = start + (blockIdx.x * threads + thread()) * W; at + W <= size; at += step) f(at);
}

template <int W>
DEVICE void copy_from(Index start, O* __restrict__ out, const S* __restrict__ x, int accumulate, Index size) {
    each<W>(start, size, [&](Index at) {
        assign<W>(out + at, *reinterpret_cast<const Packed<W, S>*>(x + at), accumulate);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_flat(O* __restrict__ out, const S* __restrict__ x,
        const int accumulate, const Index size) {
    const bool aligned = (misaligned(out) | misaligned(x)) == 0;
    const Index tail = aligned ? size / WIDE * WIDE : 0;
    if (aligned) copy_from<WIDE>(0, out, x, accumulate, size);
    copy_from<1>(tail, out, x, accumulate, size);
}

template <int W>
DEVICE void fill_from(Index start, O* __restrict__ out, R value, Index size) {
    Packed<W, O> y;
    UNROLL for (int lane = 0; lane < W; ++lane) y.at[lane] = O(value);
    each<W>(start, size, [&](Index at) { *reinterpret_cast<Packed<W, O>*>(out + at) = y; });
}

extern "C" __global__ void __launch_bounds__(THREADS) fill(O* __restrict__ out, const R value, const Index size) {
    constexpr int W = 16 / sizeof(O);
    const Index tail = misaligned(out) == 0 ? size / W * W : 0;
    if (misaligned(out) == 0) fill_from<W>(0, out, value, size);
    fill_from<1>(tail, out, value, size);
}

// ---- strided --------------------------------------------------------------------------------------------------------

// Up to eight dimensions, the innermost last, and strides in elements.
struct Layout {
    Index dims, shape[8], out[8], x[8];
};

// W elements of a row at a time, a row being a run of the last dimension, where x has stride 1 or repeats one element.
template <int W>
DEVICE void copy_rows(O* __restrict__ out, const S* __restrict__ x, const Layout& layout, int accumulate) {
    const int last = int(layout.dims) - 1;
    const Index columns = layout.shape[last], out_step = W > 1 ? 1 : layout.out[last], x_step = layout.x[last];
    const Index first = (blockIdx.y * Index(blockDim.x) + threadIdx.x) * W, across = gridDim.y * Index(blockDim.x) * W;
    Index rows = 1;
    ROLLED for (int d = 0; d < last; ++d) rows *= layout.shape[d];
    for (Index row = blockIdx.x * Index(blockDim.y) + threadIdx.y; row < rows; row += gridDim.x * Index(blockDim.y)) {
        O* to = out;
        const S* from = x;
        Index rest = row;
        ROLLED for (int d = last - 1; rest > 0; --d) {
            const Index above = d > 0 ? rest / layout.shape[d] : 0, place = rest - above * layout.shape[d];
            to += place * layout.out[d];
            from += place * layout.x[d];
            rest = above;
        }
        ROLLED for (Index column = first; column < columns; column += across) {
            Packed<W, S> v;
            if (W > 1 && x_step == 1) {
                v = *reinterpret_cast<const Packed<W, S>*>(from + column);
            } else {
                UNROLL for (int lane = 0; lane < W; ++lane) v.at[lane] = from[column * x_step];
            }
            assign(to + column * out_step, v, accumulate);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) copy(O* __restrict__ out, const S* __restrict__ x,
        const Layout layout, const int accumulate) {
    const int last = int(layout.dims) - 1;
    const bool repeats = layout.x[last] == 0;
    size_t off = misaligned(out) | size_t(layout.out[last] - 1) | size_t(layout.shape[last] % WIDE);
    if (!repeats) off |= misaligned(x) | size_t(layout.x[last] - 1);
    ROLLED for (int d = 0; d < last; ++d) {
        off |= size_t(layout.out[d] % WIDE) | (repeats ? 0 : size_t(layout.x[d] % WIDE));
    }
    if (off == 0) {
        copy_rows<WIDE>(out, x, layout, accumulate);
    } else {
        copy_rows<1>(out, x, layout, accumulate);
    }
}

// out (columns, rows) = the transpose of x (rows, columns), by tiles in shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) transpose(O* __restrict__ out, const S* __restrict__ x,
        const int accumulate, const Index rows, const Index columns) {
    constexpr int SIDE = 32, DOWN = THREADS / SIDE;
    __shared__ S tile[SIDE][SIDE + 1];  // one more, so that what lies one below another is in different banks
    const Index across = (columns - 1) / SIDE + 1, tiles = ((rows - 1) / SIDE + 1) * across;
    const int i = int(threadIdx.x), j = int(threadIdx.y);
    for (Index number = blockIdx.x; number < tiles; number += gridDim.x) {
        const Index top = number / across * SIDE, left = number % across * SIDE;
        __syncthreads();  // the tile before has been read
        UNROLL for (int k = 0; k < SIDE; k += DOWN) {
            const Index row = top + j + k, column = left + i;
            if (row < rows && column < columns) tile[j + k][i] = x[row * columns + column];
        }
        __syncthreads();
        UNROLL for (int k = 0; k < SIDE; k += DOWN) {
            const Index row = top + i, column = left + j + k;
            if (row < rows && column < columns) assign<1>(out + column * rows + row, {{tile[i][j + k]}}, accumulate);
        }
    }
}

}  // namespace gpubackprop
