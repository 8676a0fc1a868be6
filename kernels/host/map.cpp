// Each output = its graph, for every element of arrays of one shape (…, rows, columns).
//
// job: the outputs; the inputs, of which those broadcast over the rows are (members, columns) or (columns); scalars;
// elements; columns, or 0 where nothing is broadcast; rows of a member, or 0 if one (columns) serves all.
#include "host.h"

namespace gpubackprop {

// run(job, at, column, count) over stretches that together are all the elements: those from `at` on, at which the arrays
// broadcast over the rows stand at `column`. The loops around it are compiled once.
using Run = void (*)(const Index* job, Index at, Index column, Index count);

[[gnu::noinline]] static void stretches(const Index* job, const Index* extents, Index cost, Run run) {
    const Index size = extents[0], columns = extents[1], rows = extents[2];
    const auto part = [&](Index begin, Index end) {
        if (columns == 0) return run(job, begin, Index(0), end - begin);
        Index row = begin / columns, column = begin - row * columns;
        for (Index at = begin; at < end; ++row, column = 0) {
            const Index count = columns - column < end - at ? columns - column : end - at;
            run(job, at, column + (rows > 0 ? row / rows * columns : 0), count);
            at += count;
        }
    };
    if (!worth(size, cost)) return part(0, size);
    each((size + GRAIN - 1) / GRAIN, true, [&](Index i) {
        part(i * GRAIN, (i + 1) * GRAIN < size ? (i + 1) * GRAIN : size);
    });
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

// $what
KERNEL($name) {
    stretches(job, job + $arguments, $cost, [](const Index* job, const Index at, const Index column, const Index count) {
        $pointers
        LOOP for (Index i = 0; i < count; ++i) {
            $loads
            $compute
            $stores
        }
        (void)column;
    });
}
