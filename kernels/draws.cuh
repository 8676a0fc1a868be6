// Random numbers of each element: a thread takes whole blocks of Philox and whole vectors, SHARE elements.
//
// Word e % 4 of block e / 4 is drawn for element e, its place in the whole array, as in gpubackprop/backends/philox.py.
#ifndef GPUBACKPROP_DRAWS
#define GPUBACKPROP_DRAWS

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

// The step of the table in force, or `step` where there is none.
DEVICE Word current(const Index* __restrict__ state, Word step) {
    return state == nullptr ? step : Word(state[2] + state[0]);
}

// out (+)= share(x, place in the share) for the first n elements of a share, W at a time.
template <int W, typename Share>
DEVICE void map_share(T* __restrict__ out, const T* __restrict__ x, const Share& share, bool accumulate, int n) {
    UNROLL for (int at = 0; at < SHARE; at += W) {
        if (at >= n) break;
        Vector<W> v = load<W>(x + at);
        UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = share(v[lane], at + lane);
        if (accumulate) {
            const Vector<W> before = load<W>(out + at);
            UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = before[lane] + v[lane];
        }
        store(out + at, v);
    }
}

// The same for all elements; draw(first) is the share that begins there.
template <typename Draw>
DEVICE void map_shares(T* __restrict__ out, const T* __restrict__ x, const Draw& draw, bool accumulate, Index size) {
    const bool aligned = (misaligned(out) | misaligned(x)) == 0;
    Index first = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * SHARE;
    for (; first < size; first += Index(gridDim.x) * blockDim.x * SHARE) {
        const auto share = draw(first);
        const int n = size - first < SHARE ? int(size - first) : SHARE;
        if (aligned && n == SHARE) map_share<LANES>(out + first, x + first, share, accumulate, SHARE);
        else map_share<1>(out + first, x + first, share, accumulate, n);
    }
}

}  // namespace gpubackprop

#endif
