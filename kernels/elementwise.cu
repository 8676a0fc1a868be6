// An elementwise kernel: codegen.py fills the $placeholders from a graph of formulas, and repeats what follows the
// include for each kernel.
//
// Operands are (rows, columns) in row-major order, or (columns,) and broadcast over the rows, or one element, or a
// column of the step table. Without a (columns,) operand the launch calls everything one row of n columns.
#include "prelude.cuh"

namespace gpubackprop {

$header
DEVICE void ${name}_element($element_parameters) {
$body
}

// From column `start` on, W columns to a thread; what is given per column stays in registers down the rows.
template <int W>
DEVICE void ${name}_columns($parameters, const Index start) {
$table_reads
    const Index first = blockIdx.x * Index(blockDim.x) + threadIdx.x, across = gridDim.x * Index(blockDim.x);
    const Index top = blockIdx.y * Index(blockDim.y) + threadIdx.y, down = gridDim.y * Index(blockDim.y);
    for (Index column = start + first * W; column + W <= columns; column += across * W) {
$column_loads
        for (Index row = top; row < rows; row += down) {
            const Index at = row * columns + column;
$loads
            UNROLL for (int lane = 0; lane < W; ++lane) {
                ${name}_element($element_arguments);
            }
$stores
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) $name($parameters) {
    const bool aligned = ($misaligned) == 0;
    const bool vectors = aligned && (rows == 1 || columns % LANES == 0);
    const Index tail = vectors ? columns / LANES * LANES : 0;
    if (vectors) ${name}_columns<LANES>($arguments, 0);
    ${name}_columns<1>($arguments, tail);
}

}  // namespace gpubackprop
