// Dropout: out (+)= x · scale where Philox keeps the element, else 0, by selection: 0 · inf is NaN. The backward pass
// is the same launch on dy: the draws are made again, so that no mask is stored.
//
// Bytes per element: dropout T + T. (One more T where it accumulates.) It is not fused into the layer before, because
// that one's derivative needs its activation undropped.
//
// Word e % 4 of block e / 4 is drawn for element e, its place in the whole array, as in gpubackprop/backends/philox.py;
// the element is kept if the word is below `threshold`, for which 2^32 keeps all. A thread takes whole blocks of Philox
// and whole vectors, SHARE elements. The step is that of `state`, or `step` where state is NULL.
//
// Geometry (dropout_geometry in backends/geometry.py): any grid of blocks along x; a share for each thread.
#include "prelude.cuh"

namespace gpubackprop {

constexpr int DRAWN = 4;  // words of a block of Philox
constexpr int SHARE = LANES > DRAWN ? LANES : DRAWN;

struct Words {
    Word word[SHARE];
};

// The words of the share that begins at `first`.
DEVICE Words words(Long seed, Word site, Word step, Index first) {
    Words w;
    UNROLL for (int part = 0; part < SHARE; part += DRAWN) {
        const Block block = draw(seed, site, step, Long(first + part) / DRAWN);
        UNROLL for (int i = 0; i < DRAWN; ++i) w.word[part + i] = block.word[i];
    }
    return w;
}

// The first n elements of a share, W at a time.
template <int W>
DEVICE void drop(T* __restrict__ out, const T* __restrict__ x, const Words& w, Long threshold, R scale, bool accumulate,
        int n) {
    UNROLL for (int at = 0; at < SHARE; at += W) {
        if (at >= n) break;
        Vector<W> v = load<W>(x + at);
        UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = w.word[at + lane] < threshold ? v[lane] * scale : R(0);
        if (accumulate) {
            const Vector<W> before = load<W>(out + at);
            UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = before[lane] + v[lane];
        }
        store(out + at, v);
    }
}

extern "C" __global__ void __launch_bounds__(BOUNDS) dropout(T* __restrict__ out, const T* __restrict__ x,
        const Long seed, const Word site, const Index* __restrict__ state, const Word step, const Long threshold,
        const R scale, const int accumulate, const Index size) {
    const Word now = state == nullptr ? step : Word(state[2] + state[0]);
    const bool aligned = (misaligned(out) | misaligned(x)) == 0;
    Index first = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * SHARE;
    for (; first < size; first += Index(gridDim.x) * blockDim.x * SHARE) {
        const Words w = words(seed, site, now, first);
        const int n = size - first < SHARE ? int(size - first) : SHARE;
        if (aligned && n == SHARE) drop<LANES>(out + first, x + first, w, threshold, scale, accumulate, SHARE);
        else drop<1>(out + first, x + first, w, threshold, scale, accumulate, n);
    }
}

}  // namespace gpubackprop
