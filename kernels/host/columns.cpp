// y = its graph for every element of (members, rows, columns) arrays, and sums (+)= Σ_rows y, of (members, columns).
//
// A running sum in float drifts as it grows: RUN rows are added up in R, and what these come to in double, block by
// block, and the blocks in order. How many rows a block has depends on the shape alone.
//
// job: y, unless it is an input and only added up; the inputs; scalars; sums; totals in double and scratch in R, both
// (members, blocks, columns); members; rows; columns; rows of a block; whether to add to sums.
#include "host.h"

namespace gpubackprop {

constexpr Index RUN = 32;

// row(job, at, count, partial) adds the `count` elements from `at` on to partial; the loop around it is compiled once.
using Row = void (*)(const Index* job, Index at, Index count, R* partial);

[[gnu::noinline]] static void add_rows(const Index* job, const Index* extents, Index cost, Row row) {
    R *sums = pointer<R>(extents[0]), *scratch = pointer<R>(extents[2]);
    double* const totals = pointer<double>(extents[1]);
    const Index members = extents[3], rows = extents[4], columns = extents[5], height = extents[6];
    const bool accumulate = extents[7] != 0;
    const Index blocks = (rows + height - 1) / height;
    each(members * blocks, worth(members * rows * columns, cost), [&](Index i) {
        const Index member = i / blocks, first = i % blocks * height;
        const Index last = first + height < rows ? first + height : rows;
        R* const partial = scratch + i * columns;
        double* const total = totals + i * columns;
        for (Index r = first; r < last;) {
            const bool begins = r == first;
            const Index end = r + RUN < last ? r + RUN : last;
            memset(partial, 0, size_t(columns) * sizeof(R));
            for (; r < end; ++r) row(job, (member * rows + r) * columns, columns, partial);
            LOOP for (Index c = 0; c < columns; ++c) total[c] = (begins ? 0.0 : total[c]) + double(partial[c]);
        }
    });
    for (Index member = 0; member < members; ++member) {
        R* const sum = sums + member * columns;
        double* const total = totals + member * blocks * columns;
        for (const double* block = total + columns; block < total + blocks * columns; block += columns) {
            LOOP for (Index c = 0; c < columns; ++c) total[c] += block[c];
        }
        LOOP for (Index c = 0; c < columns; ++c) sum[c] = accumulate ? sum[c] + R(total[c]) : R(total[c]);
    }
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

// $what
KERNEL($name) {
    add_rows(job, job + $arguments, $cost, [](const Index* job, const Index at, const Index count, R* const partial) {
        $pointers
        LOOP for (Index i = 0; i < count; ++i) {
            $loads
            $compute
            $stores
            partial[i] += y0;
        }
    });
}
