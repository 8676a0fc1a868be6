// The training step's own numbers, where no other launch carries them.
//
// Bytes per element: advance 0, accumulate_loss 0. Geometry (one_thread in backends/geometry.py): one thread.
#include "reduce.cuh"

namespace gpubackprop {

// On to the next row of the step table, up to the last one, state[3]; the row of the steps applied stands still where
// this one was skipped, or made no update.
extern "C" __global__ void __launch_bounds__(BOUNDS) advance(Index* __restrict__ state, const R* __restrict__ control,
        const int applies) {
    const bool applied = applies != 0 && (control == nullptr || control[2] != 0);
    if (state[0] < state[3]) state[0] += 1;
    if (applied && state[1] < state[3]) state[1] += 1;
}

// The tally += total.
extern "C" __global__ void __launch_bounds__(BOUNDS) accumulate_loss(R* __restrict__ loss, Index* __restrict__ events,
        const R* __restrict__ total, const Index* __restrict__ state) {
    tally(loss, events, state, total[0]);
}

}  // namespace gpubackprop
