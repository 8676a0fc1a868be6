// Elementwise kernels whose operands broadcast over any dimensions: (n, 1) - (n, m), (m, 1, k) + (1, n, k). codegen.py
// fills the $placeholders and repeats what follows the marker for each kernel.
//
// Outputs are C-contiguous over up to 8 dimensions (size 1 in front of the fewer); a row is a run of the innermost one.
// Each other operand has strides, in elements, 0 where it broadcasts. The floor is each output and operand once, and
// is reached with accesses of 16 bytes where, along the rows, every operand is contiguous or constant and whole
// vectors fit: the division that finds a row's place costs once per row, none for two dimensions. What is repeated is
// read again from the caches. Rows that are no whole vectors, and operands strided along the rows (which read whole
// sectors of 32 bytes for an element), go element by element.
//
// Geometry: any grid of any blocks; x runs over vectors of a row, y over rows.
#include "prelude.cuh"

namespace gpubackprop {

// The sizes of the dimensions, and the strides of N operands.
template <int N>
struct Layout {
    Index shape[8], strides[N][8];
};

// Not 0 where an operand does not fit vectors: neither one for all of a row nor whole vectors of it.
DEVICE size_t unfit(const void* x, const Index* strides) {
    if (strides[7] == 0) return 0;
    size_t bits = misaligned(x) | size_t(strides[7] - 1);
    for (int d = 0; d < 7; ++d) bits |= size_t(strides[d] % LANES);
    return bits;
}

// W elements along a row: consecutive where the operand's stride is 1, else one for all.
template <int W, typename E>
DEVICE Vector<W> spread(const E* __restrict__ x, Index stride) {
    if (stride == 1) return load<W>(x);
    Vector<W> v;
    UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = R(x[0]);
    return v;
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

namespace gpubackprop {

$header
$element

// Every element, W to a thread.
template <int W>
DEVICE void ${name}_rows($inner_parameters) {
    $values
    const Index columns = layout.shape[7];
    const Index first = blockIdx.x * Index(blockDim.x) + threadIdx.x, across = gridDim.x * Index(blockDim.x);
    const Index top = blockIdx.y * Index(blockDim.y) + threadIdx.y, down = gridDim.y * Index(blockDim.y);
    for (Index row = top; row < rows; row += down) {
        $row_offsets
        for (Index column = first * W; column < columns; column += across * W) {
            const Index at = row * columns + column;
            $loads
            $compute
            $stores
        }
    }
}

extern "C" __global__ void __launch_bounds__(BOUNDS) $name($parameters) {
    const bool aligned = ($misaligned) == 0;
    if (aligned && layout.shape[7] % LANES == 0) ${name}_rows<LANES>($inner_arguments);
    else ${name}_rows<1>($inner_arguments);
}

}  // namespace gpubackprop
