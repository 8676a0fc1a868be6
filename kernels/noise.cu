// Noise: out = x + sigma · N(0, 1), the uniform words, the two uniforms of an element and its normal number in one pass
// (Box & Muller, "A Note on the Generation of Random Normal Deviates"). The backward pass hands dy on.
//
// Bytes per element: noise T + T. It is bound by arithmetic rather than memory: a normal number takes half a block of
// Philox (in float64 a whole one), a logarithm, a square root and a cosine. It is not fused into the product that reads
// x, because that reads every element many times.
//
// The lanes of an element are bits of the site, as in gpubackprop/backends/philox.py. The step is that of `state`, or
// `step` where state is NULL.
//
// Geometry (draws_geometry in backends/geometry.py): any grid of blocks along x; a share for each thread.
#include "draws.cuh"
#include "trigonometry.cuh"

namespace gpubackprop {

struct Noisy {
    R noise[SHARE];
    DEVICE R operator()(R x, int i) const { return x + noise[i]; }
};

struct Uniforms {
    R at[SHARE];
};

DEVICE Uniforms uniforms(Long seed, Word site, Word step, Index first) {
    Uniforms u;
    const Words high = words(seed, site, step, first);
#ifdef FLOAT64
    const Words low = words(seed, site | LOW, step, first);
    UNROLL for (int i = 0; i < SHARE; ++i) u.at[i] = uniform(high.word[i], low.word[i]);
#else
    UNROLL for (int i = 0; i < SHARE; ++i) u.at[i] = uniform(high.word[i]);
#endif
    return u;
}

extern "C" __global__ void __launch_bounds__(BOUNDS) noise(T* __restrict__ out, const T* __restrict__ x,
        const Long seed, const Word site, const Index* __restrict__ state, const Word step, const R sigma,
        const Index size) {
    const Word now = current(state, step);
    const auto draw = [=](Index first) {
        const Uniforms u = uniforms(seed, site, now, first), v = uniforms(seed, site | SECOND, now, first);
        Noisy n;
        UNROLL for (int i = 0; i < SHARE; ++i) {
            const R angle = v.at[i] * TURN;  // too small for the way that large ones go
            n.noise[i] = sigma * (sqrt(R(-2) * log(R(1) - u.at[i])) * cosine(near_angle(angle)));
        }
        return n;
    };
    map_shares(out, x, draw, false, size);
}

}  // namespace gpubackprop
