// Dropout: out (+)= x · scale where Philox keeps the element, else 0, by selection: 0 · inf is NaN. The backward pass
// is the same launch on dy: the draws are made again, so that no mask is stored.
//
// Bytes per element: dropout T + T. (One more T where it accumulates.) It is not fused into the layer before, because
// that one's derivative needs its activation undropped.
//
// An element is kept if its word is below `threshold`, for which 2^32 keeps all. The step is that of `state`, or `step`
// where state is NULL.
//
// Geometry (draws_geometry in backends/geometry.py): any grid of blocks along x; a share for each thread.
#include "draws.cuh"

namespace gpubackprop {

struct Dropped {
    Words w;
    Long threshold;
    R scale;
    DEVICE R operator()(R x, int i) const { return w.word[i] < threshold ? x * scale : R(0); }
};

extern "C" __global__ void __launch_bounds__(BOUNDS) dropout(T* __restrict__ out, const T* __restrict__ x,
        const Long seed, const Word site, const Index* __restrict__ state, const Word step, const Long threshold,
        const R scale, const int accumulate, const Index size) {
    const Word now = current(state, step);
    const auto draw = [=](Index first) { return Dropped{words(seed, site, now, first), threshold, scale}; };
    map_shares(out, x, draw, accumulate, size);
}

}  // namespace gpubackprop
