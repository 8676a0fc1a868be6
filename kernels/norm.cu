// The norm of the whole gradient, and what the update needs to know of it, in one launch and without the host:
//     n = ‖g‖₂ / scale,    ok = n is finite,    factor = min(1, clip / n) / scale, or 0 if not ok.
// g is the gradient of the loss times `scale`. If `dynamic`, the next step's scale is halved after a gradient that is
// not finite, down to 1, and doubled after `growth` good ones in a row, up to 2^24.
//
// Bytes per element: gradient_norm R. control = (scale, factor, ok, good steps since the scale changed). clip may be
// infinite. A gradient whose squares overflow counts as not finite: elements of 10^19 at float32.
//
// Geometry (norm_geometry in backends/geometry.py): blocks of THREADS along x; `partials` has one R for each; there is
// one ticket. A thread adds up runs of 16 bytes, whether or not it can load them as vectors, so that the bits depend on
// the size alone.
#include "control.cuh"
#include "reduce.cuh"

namespace gpubackprop {

constexpr int RUN = 16 / sizeof(R);

// Σ g² over this thread's runs from `start` on, as far as they hold W elements at a time; `start` is left at the next.
template <int W>
DEVICE R squares(const R* __restrict__ g, Index& start, Index size) {
    R sum = 0;
    for (; start + W <= size; start += Index(gridDim.x) * blockDim.x * RUN) {
        for (Index at = start; at < start + RUN && at + W <= size; at += W) {
            const Vector<W> v = load<W>(g + at);
            UNROLL for (int lane = 0; lane < W; ++lane) sum += v[lane] * v[lane];
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(BOUNDS) gradient_norm(R* __restrict__ control, R* __restrict__ partials,
        Word* __restrict__ ticket, const R* __restrict__ g, const R clip, const int dynamic, const R growth,
        const Index size) {
    Index start = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * RUN;
    R sum = misaligned(g) == 0 ? squares<RUN>(g, start, size) : R(0);
    sum += squares<1>(g, start, size);
    if (across_grid(sum, partials, ticket) && thread() == 0) follow(control, sqrt(sum), clip, dynamic, growth);
}

}  // namespace gpubackprop
