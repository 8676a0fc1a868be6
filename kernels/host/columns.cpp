// y = its graph for every element of (members, rows, columns) arrays, and sums (+)= Σ_rows y, of (members, columns).
//
// Rows are added up in blocks, and the blocks in order: how many rows a block has depends on the shape alone.
//
// job: y, unless it is an input and only added up; the inputs; scalars; sums; partials (members, blocks, columns);
// members; rows; columns; rows of a block; whether to add to sums.
#include "host.h"

namespace gpubackprop {

template <typename Row>
static inline void add_rows(const Index* extents, Index cost, const Row& row) {
    R *sums = pointer<R>(extents[0]), *partials = pointer<R>(extents[1]);
    const Index members = extents[2], rows = extents[3], columns = extents[4], height = extents[5];
    const bool accumulate = extents[6] != 0;
    const Index blocks = (rows + height - 1) / height;
    each(members * blocks, worth(members * rows * columns, cost), [&](Index i) {
        const Index member = i / blocks, first = i % blocks * height;
        const Index last = first + height < rows ? first + height : rows;
        R* const partial = partials + i * columns;
        memset(partial, 0, size_t(columns) * sizeof(R));
        for (Index r = first; r < last; ++r) row((member * rows + r) * columns, columns, partial);
    });
    for (Index member = 0; member < members; ++member) {
        R *sum = sums + member * columns, *total = partials + member * blocks * columns;
        for (const R* block = total + columns; block < total + blocks * columns; block += columns) {
            LOOP for (Index c = 0; c < columns; ++c) total[c] += block[c];
        }
        LOOP for (Index c = 0; c < columns; ++c) sum[c] = accumulate ? sum[c] + total[c] : total[c];
    }
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

// $what
KERNEL($name) {
    add_rows(job + $arguments, $cost, [job](const Index at, const Index count, R* const partial) {
        $pointers
        LOOP for (Index i = 0; i < count; ++i) {
            $loads
            $compute
            $stores
            partial[i] += y0;
        }
    });
}
