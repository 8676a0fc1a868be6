// What follows from the norm of a gradient: see norm.cu.
#ifndef GPUBACKPROP_CONTROL
#define GPUBACKPROP_CONTROL

#include "prelude.cuh"

namespace gpubackprop {

constexpr R LARGEST_SCALE = R(1 << 24);

DEVICE void follow(R* control, R norm, R clip, bool dynamic, R growth) {
    const R scale = control[0], limit = clip * scale;
    const bool ok = norm < R(INFINITY);
    control[1] = ok ? (norm > limit ? limit / norm : R(1)) / scale : R(0);
    control[2] = ok ? R(1) : R(0);
    if (!dynamic) return;
    const R good = ok ? control[3] + R(1) : R(0);
    const bool grows = good >= growth;
    control[3] = grows ? R(0) : good;
    if (!ok) control[0] = maximum(scale / R(2), R(1));
    else if (grows) control[0] = minimum(scale * R(2), LARGEST_SCALE);
}

}  // namespace gpubackprop

#endif
