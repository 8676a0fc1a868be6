// A batch's rows of the training data and their targets, gathered through the order of the epoch in one launch:
//     x[i] = scale · source_x[j],    y[i] = source_y[j],    j = permutation[offset + i].
// state = (row of the step table, row of the steps applied, number of the first step, counted from 1, last row); the
// batch's offset is offsets[state[0]].
//
// Bytes per element: feed S + O. Conversion and scale are fused: from uint8 to float32 that is 5, not 1 + 4 + 4 + 4.
// Each row costs 8 more for its place, and its target. Targets are of any one type (TARGET: labels of 64 bits, or numbers)
// and copied bit by bit; y may be NULL.
//
// Geometry (feed_geometry in backends/geometry.py): any grid of any blocks, vectors along x and rows along y. Rows that
// are no whole number of vectors, or do not start at the boundary of one, go element by element.
#include "prelude.cuh"

#ifndef TARGET
#define TARGET T
#endif

namespace gpubackprop {

using Y = TARGET;

// Whether vectors of W elements make up the rows of an array of so many columns.
template <int W, typename E>
DEVICE bool fit(const E* x, Index columns) {
    return columns % W == 0 && reinterpret_cast<size_t>(x) % alignof(Packed<W, E>) == 0;
}

template <int W, typename To, typename From, typename Convert>
DEVICE void gather_vectors(To* __restrict__ to, const From* __restrict__ source, const Index* __restrict__ batch,
        Index rows, Index columns, Convert convert) {
    const Index first = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * W, across = Index(gridDim.x) * blockDim.x * W;
    const Index top = blockIdx.y * Index(blockDim.y) + threadIdx.y, down = Index(gridDim.y) * blockDim.y;
    for (Index row = top; row < rows; row += down) {
        const From* const from = source + batch[row] * columns;
        ROLLED for (Index column = first; column < columns; column += across) {  // unrolled, the vectors fall apart
            const Packed<W, From> read = *reinterpret_cast<const Packed<W, From>*>(from + column);
            Packed<W, To> made;
            UNROLL for (int lane = 0; lane < W; ++lane) made.at[lane] = convert(read.at[lane]);
            *reinterpret_cast<Packed<W, To>*>(to + row * columns + column) = made;
        }
    }
}

// to[i] = convert(source[batch[i]]).
template <typename To, typename From, typename Convert>
DEVICE void gather_rows(To* __restrict__ to, const From* __restrict__ source, const Index* __restrict__ batch,
        Index rows, Index columns, Convert convert) {
    constexpr int W = 16 / (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
    if (fit<W>(to, columns) && fit<W>(source, columns)) gather_vectors<W>(to, source, batch, rows, columns, convert);
    else gather_vectors<1>(to, source, batch, rows, columns, convert);
}

extern "C" __global__ void __launch_bounds__(BOUNDS) feed(O* __restrict__ x, Y* __restrict__ y,
        const S* __restrict__ source_x, const Y* __restrict__ source_y, const Index* __restrict__ permutation,
        const Index* __restrict__ offsets, const Index* __restrict__ state, const R scale, const Index rows,
        const Index columns_x, const Index columns_y) {
    const Index* __restrict__ const batch = permutation + offsets[state[0]];
    gather_rows(x, source_x, batch, rows, columns_x, [=](S v) { return O(R(v) * scale); });
    if (y != nullptr) gather_rows(y, source_y, batch, rows, columns_y, [](Y v) { return v; });
}

}  // namespace gpubackprop
