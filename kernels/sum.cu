// Sums over all elements with elementwise outputs in the same pass: a loss and its derivative. codegen.py fills the
// $placeholders and repeats what follows the marker for each kernel; the comment it puts in front says the bytes per
// element, which are the floor: each operand once.
//
// Operands are flat, or one element, or one for each row of `columns` elements, or a column of the step table at row
// state[0]. total = Σ, in R; if loss is given, it is tallied too (see tally in reduce.cuh). A thread takes every
// (gridDim.x · blockDim.x)-th run of LANES elements, whether or not it can load them as one vector, so that the bits
// depend on the size alone, and keeps what adding up the runs rounds off; the blocks' sums go to partials (gridDim.x),
// and the last block to arrive at the ticket adds them up.
//
// Geometry: sum_geometry in geometry.py, from the size alone: one-dimensional, blocks of whole warps.
#include "reduce.cuh"

namespace gpubackprop {

// For W elements from `at` on, the x of the row that each is in.
template <int W>
DEVICE Vector<W> of_rows(const R* __restrict__ x, Index at, Index columns) {
    Vector<W> v;
    Index row = at / columns, left = (row + 1) * columns - at;
    UNROLL for (int lane = 0; lane < W; ++lane, --left) {
        if (left == 0) ++row, left = columns;
        v[lane] = x[row];
    }
    return v;
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

namespace gpubackprop {

$header
$element

// This thread's runs from `start` on as far as they hold W elements at a time; `start` is left at the next.
template <int W>
DEVICE void ${name}_runs($inner_parameters, Index& start, R& sum, R& low) {
    $values
    for (; start + W <= size; start += Index(gridDim.x) * blockDim.x * LANES) {
        R run = 0;
        for (Index at = start; at < start + LANES && at + W <= size; at += W) {
            $loads
            $compute
            $stores
            UNROLL for (int lane = 0; lane < W; ++lane) run += total_[lane];
        }
        add_to(sum, low, run);
    }
}

extern "C" __global__ void __launch_bounds__(BOUNDS) $name($parameters) {
    Index start = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * LANES;
    R sum = 0, low = 0;
    if (($misaligned) == 0) ${name}_runs<LANES>($inner_arguments, start, sum, low);
    ${name}_runs<1>($inner_arguments, start, sum, low);
    conclude(total, partials, ticket, loss, events, state, both(sum, low));
}

}  // namespace gpubackprop
