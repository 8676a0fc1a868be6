// Elementwise kernels. codegen.py fills the $placeholders from a graph of formulas and repeats what follows the marker
// for each kernel; the comment it puts in front says the bytes per element, which are the floor: each operand once.
//
// Operands are (members, rows, columns) in row-major order; or (members, columns), broadcast over the rows; or one
// element; or a column of the step table, at the row that `state` says, and with `groups` (a byte for 64 columns)
// `stride` columns further on for each group. Without a (members, columns) operand all is one row of n columns.
//
// Geometry: any grid of any blocks; x runs over vectors of columns, y over rows, z over members.
#include "prelude.cuh"

// ---- for each kernel ------------------------------------------------------------------------------------------------

namespace gpubackprop {

$header
$element

// From column `start` on, W columns to a thread; what is given per column stays in registers down the rows.
template <int W>
DEVICE void ${name}_columns($inner_parameters, const Index member, const Index start) {
    $values
    const Index first = blockIdx.x * Index(blockDim.x) + threadIdx.x, across = gridDim.x * Index(blockDim.x);
    const Index top = blockIdx.y * Index(blockDim.y) + threadIdx.y, down = gridDim.y * Index(blockDim.y);
    for (Index column = start + first * W; column + W <= columns; column += across * W) {
        $column_values
        for (Index row = top; row < rows; row += down) {
            const Index at = (member * rows + row) * columns + column;
            $loads
            $compute
            $stores
        }
    }
}

extern "C" __global__ void __launch_bounds__(BOUNDS) $name($parameters) {
    const bool aligned = ($misaligned) == 0;
    const bool vectors = aligned && (rows * members == 1 || columns % LANES == 0);
    for (Index member = blockIdx.z; member < members; member += gridDim.z) {
        if (vectors) ${name}_columns<LANES>($inner_arguments, member, 0);
        ${name}_columns<1>($inner_arguments, member, vectors ? columns / LANES * LANES : 0);
    }
    $advance
}

}  // namespace gpubackprop
