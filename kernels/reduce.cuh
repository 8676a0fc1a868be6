// Sums over the threads of a sub-warp, a block and a grid, each in an order that the shape alone decides: the bits do
// not depend on timing, nor on the number of multiprocessors. No float atomics; the one integer ticket resets itself.
#ifndef GPUBACKPROP_REDUCE
#define GPUBACKPROP_REDUCE

#include "prelude.cuh"

namespace gpubackprop {

[[maybe_unused]] constexpr int WARP = 32;
[[maybe_unused]] constexpr Word ALL = 0xffffffffu;

// sum += v, and low += what that rounds off (Knuth's TwoSum): a running float sum drifts as it grows, the two do not.
DEVICE void add_to(R& sum, R& low, R v) {
    const R high = sum + v, part = high - sum;
    low += (sum - (high - part)) + (v - part);
    sum = high;
}
DEVICE R both(R sum, R low) { return low == low ? sum + low : sum; }  // beside an infinite sum low is NaN

// Each combines two values, and a value with all that came before it, which is in two parts.
struct Add {
    DEVICE R operator()(R a, R b) const { return a + b; }
    DEVICE void append(R& sum, R& low, R v) const { add_to(sum, low, v); }
    DEVICE R whole(R sum, R low) const { return both(sum, low); }
};
struct Maximum {
    DEVICE R operator()(R a, R b) const { return maximum(a, b); }
    DEVICE void append(R& top, R&, R v) const { top = maximum(top, v); }
    DEVICE R whole(R top, R) const { return top; }
};
struct Minimum {
    DEVICE R operator()(R a, R b) const { return minimum(a, b); }
    DEVICE void append(R& least, R&, R v) const { least = minimum(least, v); }
    DEVICE R whole(R least, R) const { return least; }
};

// This thread's number in its block.
DEVICE int thread() { return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)); }

// `v` combined over groups of `lanes` neighbours (a power of two up to WARP; every thread of the warp must call); each
// gets the result, in the same bits.
template <typename Operation>
DEVICE R across(R v, Operation combine, int lanes = WARP) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) v = combine(v, __shfl_xor_sync(ALL, v, offset));
    return v;
}

// `v` combined over a block of whole warps; each thread gets the result. `identity` combines to the other operand.
template <typename Operation>
DEVICE R across_block(R v, Operation combine, R identity) {
    __shared__ R of_warp[WARP];
    const int warps = int(blockDim.x * blockDim.y * blockDim.z) / WARP, lane = thread() % WARP;
    v = across(v, combine);
    __syncthreads();  // an earlier call's values have been read
    if (lane == 0) of_warp[thread() / WARP] = v;
    __syncthreads();
    return across(lane < warps ? of_warp[lane] : identity, combine);
}

// Whether this block is the last of `blocks` to arrive; then it sees all that the others wrote before they did.
DEVICE bool last_block(Word* ticket, Word blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (thread() == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
    __syncthreads();
    if (!last) return false;
    __threadfence();
    return true;
}

// Whether this block is the last of a grid along x to arrive; then `v` is the sum of the v of all its threads, in each.
// `partials` has one R for each block, `ticket` is one.
DEVICE bool across_grid(R& v, R* partials, Word* ticket) {
    v = across_block(v, Add(), R(0));
    if (thread() == 0) partials[blockIdx.x] = v;
    if (!last_block(ticket, gridDim.x)) return false;
    R sum = 0, low = 0;
    ROLLED for (int i = thread(); i < int(gridDim.x); i += int(blockDim.x * blockDim.y)) add_to(sum, low, partials[i]);
    v = across_block(both(sum, low), Add(), R(0));
    return true;
}

// What a training step adds up on the device. One thread calls it, once a step.
// loss: a sum in two parts, high and low, as exact as twice the bits; events: first bad step (0: none), and the rows
// right, which others count; state: see feed.cu.
DEVICE void tally(R* loss, Index* events, const Index* state, R total) {
    add_to(loss[0], loss[1], total);
    if (events[0] == 0 && !(abs(total) < R(INFINITY))) events[0] = state[2] + state[0];
}

// total = Σ v over the grid; tallied if loss is given.
DEVICE void conclude(R* total, R* partials, Word* ticket, R* loss, Index* events, const Index* state, R v) {
    if (!across_grid(v, partials, ticket) || thread() > 0) return;
    total[0] = v;
    if (loss != nullptr) tally(loss, events, state, v);
}

}  // namespace gpubackprop

#endif
