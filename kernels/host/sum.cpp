// total = Σ of a graph over all elements, and each other output = its graph.
//
// Pieces of GRAIN elements are added up, then their sums in order.
//
// job: the outputs; the inputs; scalars; total; partials, one for each piece; loss, bad_step (or 0: no tally), the
// step table; elements; columns, if an input has one element for each row.
#include "host.h"

namespace gpubackprop {

// part(job, at, count) is the sum of the `count` elements from `at` on; the loops around it are compiled once.
using Part = R (*)(const Index* job, Index at, Index count);

[[gnu::noinline]] static void add_up(const Index* job, const Index* rest, Index cost, Part part) {
    R* const partials = pointer<R>(rest[1]);
    const Index size = rest[5], pieces = (size + GRAIN - 1) / GRAIN;
    each(pieces, worth(size, cost), [&](Index i) {
        partials[i] = part(job, i * GRAIN, (i + 1) * GRAIN < size ? GRAIN : size - i * GRAIN);
    });
    const R total = sum_of(partials, pieces);
    *pointer<R>(rest[0]) = total;
    if (rest[2] != 0) add_to({pointer<double>(rest[2]), pointer<Index>(rest[3]), nullptr}, total, *pointer<Steps>(rest[4]));
}

// Σ value(i, the x of the row that element first + i is in).
template <typename Value>
static inline R sum_rows(const R* x, Index columns, Index first, Index count, const Value& value) {
    R of_rows[LENGTH];
    Index row = first / columns, left = (row + 1) * columns - first;
    return sum_filled(count, [&](R* values, Index at, Index n) {
        for (Index i = 0; i < n;) {
            if (left == 0) ++row, left = columns;
            const Index end = left < n - i ? i + left : n;
            left -= end - i;
            for (; i < end; ++i) of_rows[i] = x[row];
        }
        LOOP for (Index i = 0; i < n; ++i) values[i] = value(at + i, of_rows[i]);
    });
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

// $what
KERNEL($name) {
    add_up(job, job + $arguments, $cost, [](const Index* job, const Index at, const Index count) {
        $pointers
        return $sum_up {
            $loads
            $compute
            $stores
            return y0;
        });
    });
}
