// Softmax and cross-entropy, forward and backward in one launch, with the training step's loss and top-1 count:
//     dx = s · (Σt · softmax(x) − t),    total = Σ_rows Σ_k −t · log softmax(x),
// of logits x (rows, classes) and targets t, given as labels or as rows of shares; and top-1 alone, for evaluation.
//
// Bytes per element: softmax_cross_entropy_labels T + T, softmax_cross_entropy_rows T + R + T, top1 T. Each operand
// crosses the bus once. Shares are R, because 16-bit ones would not add up to 1. top1 reads once, with at most a warp
// for a row. Geometry: see softmax_cross_entropy.cuh.
#include "softmax_cross_entropy.cuh"

namespace gpubackprop {

extern "C" __global__ void __launch_bounds__(BOUNDS) softmax_cross_entropy_labels(T* __restrict__ dx,
        R* __restrict__ total, R* __restrict__ partials, Word* __restrict__ ticket, R* __restrict__ loss,
        Index* __restrict__ events, const T* __restrict__ x, const Index* __restrict__ labels,
        const R* __restrict__ table, const Index* __restrict__ state, const R* __restrict__ scale, const int width,
        const int share_at, const Index rows, const Index classes) {
    const R s = share(table, state, width, share_at, scale);
    const bool aligned = (misaligned(dx) | misaligned(x)) == 0;
    softmax_cross_entropy<Label>(
            dx, total, partials, ticket, loss, events, x, labels, Alike(), s, state, rows, classes, aligned);
}

extern "C" __global__ void __launch_bounds__(BOUNDS) softmax_cross_entropy_rows(T* __restrict__ dx,
        R* __restrict__ total, R* __restrict__ partials, Word* __restrict__ ticket, R* __restrict__ loss,
        Index* __restrict__ events, const T* __restrict__ x, const R* __restrict__ target, const R* __restrict__ table,
        const Index* __restrict__ state, const R* __restrict__ scale, const int width, const int share_at,
        const Index rows, const Index classes) {
    const R s = share(table, state, width, share_at, scale);
    const bool aligned = (misaligned(dx) | misaligned(x) | misaligned(target)) == 0;
    softmax_cross_entropy<Shares>(
            dx, total, partials, ticket, loss, events, x, target, Alike(), s, state, rows, classes, aligned);
}

// ---- top-1 ----------------------------------------------------------------------------------------------------------

template <int W>
DEVICE int rows_right(const T* __restrict__ x, const Index* __restrict__ labels, Index rows, int classes,
        bool aligned) {
    int right = 0;
    for (Index top = blockIdx.x * Index(blockDim.y); top < rows; top += gridDim.x * Index(blockDim.y)) {
        const bool idle = top + threadIdx.y >= rows;
        const Index row = idle ? 0 : top + threadIdx.y, at = row * classes;
        const int end = idle ? 0 : classes;
        const Label<false> label(labels, row, x + at, end);
        bool beaten = false;
        for (int column = column_of<W>(0); column < end; column += int(blockDim.x) * W) {
            const Vector<W> z = read<W>(x + at + column, aligned);
            UNROLL for (int lane = 0; lane < W; ++lane) beaten |= label.beaten(z[lane], column + lane);
        }
        const int of_row = label.right(beaten);
        if (threadIdx.x == 0) right += of_row;
    }
    return right;
}

// count += rows whose largest logit stands at the label.
extern "C" __global__ void __launch_bounds__(BOUNDS) top1(Index* __restrict__ count, const T* __restrict__ x,
        const Index* __restrict__ labels, const Index rows, const Index classes) {
    const int n = int(classes);
    const bool aligned = misaligned(x) == 0;
    int right = 0;
    if (n % LANES == 0) right = rows_right<LANES>(x, labels, rows, n, aligned);
    else if (n % 2 == 0) right = rows_right<2>(x, labels, rows, n, aligned);
    else right = rows_right<1>(x, labels, rows, n, aligned);
    count_right(count, right);
}

}  // namespace gpubackprop
