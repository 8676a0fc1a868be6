// Softmax and cross-entropy where each row counts by its weight w, as softmax_cross_entropy.cu has it where all count
// alike:
//     dx = w · s · (Σt · softmax(x) − t),    total = Σ_rows w · Σ_k −t · log softmax(x);
// where w is 0, so is the row's part, whatever its logits are.
//
// Bytes per element: softmax_cross_entropy_labels_weighted T + T, softmax_cross_entropy_rows_weighted T + R + T. Weights
// cost R more for each row. Geometry: see softmax_cross_entropy.cuh.
#include "softmax_cross_entropy.cuh"

namespace gpubackprop {

extern "C" __global__ void __launch_bounds__(BOUNDS) softmax_cross_entropy_labels_weighted(T* __restrict__ dx,
        R* __restrict__ total, R* __restrict__ partials, Word* __restrict__ ticket, R* __restrict__ loss,
        Index* __restrict__ events, const T* __restrict__ x, const Index* __restrict__ labels,
        const R* __restrict__ weights, const R* __restrict__ table, const Index* __restrict__ state,
        const R* __restrict__ scale, const int width, const int share_at, const Index rows, const Index classes) {
    const R s = share(table, state, width, share_at, scale);
    const bool aligned = (misaligned(dx) | misaligned(x)) == 0;
    softmax_cross_entropy<Label>(
            dx, total, partials, ticket, loss, events, x, labels, Weighed{weights}, s, state, rows, classes, aligned);
}

extern "C" __global__ void __launch_bounds__(BOUNDS) softmax_cross_entropy_rows_weighted(T* __restrict__ dx,
        R* __restrict__ total, R* __restrict__ partials, Word* __restrict__ ticket, R* __restrict__ loss,
        Index* __restrict__ events, const T* __restrict__ x, const R* __restrict__ target,
        const R* __restrict__ weights, const R* __restrict__ table, const Index* __restrict__ state,
        const R* __restrict__ scale, const int width, const int share_at, const Index rows, const Index classes) {
    const R s = share(table, state, width, share_at, scale);
    const bool aligned = (misaligned(dx) | misaligned(x) | misaligned(target)) == 0;
    softmax_cross_entropy<Shares>(
            dx, total, partials, ticket, loss, events, x, target, Weighed{weights}, s, state, rows, classes, aligned);
}

}  // namespace gpubackprop
