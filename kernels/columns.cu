// Elementwise kernels that add up the columns of what they write, in the same pass: activation' ⊙ gradient with the
// bias gradient. codegen.py fills the $placeholders and repeats what follows the marker for each kernel; the comment it
// puts in front says the bytes per element, which are the floor: each operand once, and nothing else of
// O(rows · columns). A kernel whose output is the array it reads stores nothing.
//
// Operands are (members, rows, columns), or one element; sums is (members, columns), in R. A block takes a member's tile
// of blockDim.x · LANES columns and every gridDim.y-th group of blockDim.y rows; its sums go to partials (members,
// gridDim.y, columns), and the last block of a tile to arrive at its ticket, one of (tiles, members), adds those up.
// Every order is fixed: a thread's rows from the top, what adding them up rounds off beside their sum, then halves of the
// block, then the same over the partials.
//
// Geometry: columns_geometry in geometry.py, from the shape alone. blockDim.y is a power of two; grid (tiles of columns
// · members, splits of the rows); with one split neither partials nor tickets are touched.
#include "reduce.cuh"

namespace gpubackprop {

// The sums of `rows` rows (a power of two) of `width` values each, in the place of the first row.
DEVICE void add_rows(R* values, int rows, int width) {
    for (int half = rows / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int i = thread(); i < half * width; i += rows * int(blockDim.x)) values[i] += values[i + half * width];
    }
    __syncthreads();
}

// sums (+)= what the blocks of this tile of columns have in `values` (blockDim.y, width).
DEVICE void add_blocks(R* sums, R* partials, Word* tickets, int accumulate, Index columns, Word members, R* values) {
    const int height = int(blockDim.y), width = int(blockDim.x) * LANES, threads = int(blockDim.x) * height;
    const Index splits = gridDim.y, member = blockIdx.x % members, first = Index(blockIdx.x / members) * width;
    add_rows(values, height, width);
    if (splits > 1) {
        R* const own = partials + (member * splits + blockIdx.y) * columns;
        for (int i = thread(); i < width && first + i < columns; i += threads) own[first + i] = values[i];
        if (!last_block(tickets + blockIdx.x, gridDim.y)) return;
        for (int i = thread(); i < height * width; i += threads) {
            const Index column = first + i % width;
            R sum = 0, low = 0;
            for (Index split = i / width; column < columns && split < splits; split += height)
                add_to(sum, low, partials[(member * splits + split) * columns + column]);
            values[i] = both(sum, low);
        }
        add_rows(values, height, width);
    }
    for (int i = thread(); i < width && first + i < columns; i += threads) {
        R& sum = sums[member * columns + first + i];
        sum = accumulate ? sum + values[i] : values[i];
    }
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

namespace gpubackprop {

$header
$element

// This thread's columns of the tile, W at a time; its sums of them go to `values`.
template <int W>
DEVICE void ${name}_tile($inner_parameters, R* values) {
    $values
    const Word member = blockIdx.x % members, tile = blockIdx.x / members;
    const Index top = blockIdx.y * Index(blockDim.y) + threadIdx.y, down = gridDim.y * Index(blockDim.y);
    for (int part = 0; part < LANES / W; ++part) {
        // One product: a sum in it, such as blockIdx.x % n is, and NVRTC 13 stores the elements one by one.
        const Index column = ((Index(tile) * (LANES / W) + part) * blockDim.x + threadIdx.x) * W;
        Vector<W> sum = {}, low = {};
        for (Index row = top; column < columns && row < rows; row += down) {
            const Index at = (member * rows + row) * columns + column;
            $loads
            $compute
            $stores
            UNROLL for (int lane = 0; lane < W; ++lane) add_to(sum[lane], low[lane], ${key}_[lane]);
        }
        const int place = int((threadIdx.y * (LANES / W) + part) * blockDim.x + threadIdx.x) * W;
        UNROLL for (int lane = 0; lane < W; ++lane) values[place + lane] = both(sum[lane], low[lane]);
    }
}

extern "C" __global__ void __launch_bounds__(BOUNDS) $name($parameters) {
    __shared__ R values[THREADS * LANES];
    const bool vectors = ($misaligned) == 0 && columns % LANES == 0;
    if (vectors) ${name}_tile<LANES>($inner_arguments, values);
    else ${name}_tile<1>($inner_arguments, values);
    add_blocks(sums, partials, tickets, accumulate, columns, members, values);
}

}  // namespace gpubackprop
