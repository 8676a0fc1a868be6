// total = Σ of a graph over all elements, and each other output = its graph.
//
// Pieces of GRAIN elements are added up, then their sums in order.
//
// job: the outputs; the inputs; scalars; total; partials, one for each piece; loss, bad_step (or 0: no tally), the
// step table; elements.
#include "host.h"

namespace gpubackprop {

template <typename Part>
static inline void add_up(const Index* rest, Index cost, const Part& part) {
    R* const partials = pointer<R>(rest[1]);
    const Index size = rest[5], pieces = (size + GRAIN - 1) / GRAIN;
    each(pieces, worth(size, cost), [&](Index i) {
        partials[i] = part(i * GRAIN, (i + 1) * GRAIN < size ? GRAIN : size - i * GRAIN);
    });
    const R total = sum_of(partials, pieces);
    *pointer<R>(rest[0]) = total;
    if (rest[2] != 0) add_to({pointer<double>(rest[2]), pointer<Index>(rest[3]), nullptr}, total, *pointer<Steps>(rest[4]));
}

}  // namespace gpubackprop

// ---- for each kernel ------------------------------------------------------------------------------------------------

// $what
KERNEL($name) {
    add_up(job + $arguments, $cost, [job](const Index at, const Index count) {
        $pointers
        return sum_each(count, [=](const Index i) {
            $loads
            $compute
            $stores
            return y0;
        });
    });
}
