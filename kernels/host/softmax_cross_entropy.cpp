// Softmax with cross-entropy: loss of a row = w (log Σ exp(x − m) · Σt − Σ t (x − m)), m its largest element, and
// dx = w · s · (Σt · softmax(x) − t); s = 1, or what a weight of 1 counts for in the mean, times the scale of the loss.
//
// x − m is 0 where x is m, also at infinity, and t (x − m) is 0 where t is: inf − inf and 0 · inf are NaN.
//
// Steps go over all rows of a piece, so that exp and log have long vectors however few the classes are.
//
// job: dx; total; x; labels or rows t; weights w (or 0: w = 1); scratch: losses of the rows, Σ exp of the rows, hits of the pieces; s's two
// factors (or 0: s = 1); loss, bad_step, correct (or 0: not tallied, not counted); the step table; rows; classes.
#include "host.h"

namespace gpubackprop {
namespace {

struct Softmax {
    R *dx, *total;
    const R* x;
    const void* target;
    const R* w;
    R *losses, *sums;
    Index* hits;
    const R *share, *scale;
    Tally tally;
    const Steps* steps;
    Index rows, classes;

    // dx = x − m, losses = −Σ t (x − m); `weights` = Σt, where t is not a label.
    template <bool LABELS>
    Index shift(Index first, Index last, R* weights) const {
        Index right = 0;
        for (Index row = first; row < last; ++row) {
            const R* const from = x + row * classes;
            R* const to = dx + row * classes;
            R top = from[0];
            for (Index c = 1; c < classes; ++c) top = maximum(from[c], top);
            LOOP for (Index c = 0; c < classes; ++c) to[c] = from[c] == top ? R(0) : from[c] - top;
            if constexpr (LABELS) {
                const Index label = static_cast<const Index*>(target)[row];
                losses[row] = -to[label];
                if (tally.correct != nullptr) right += stands_at(from, top, label);
            } else {
                const R* const t = static_cast<const R*>(target) + row * classes;
                weights[row - first] = sum_of(t, classes);
                losses[row] = -sum_each(classes, [=](Index c) { return t[c] == R(0) ? R(0) : t[c] * to[c]; });
            }
        }
        return right;
    }

    // Whether the label is the first place of the largest element, or of a NaN.
    static bool stands_at(const R* row, R top, Index label) {
        const auto best = [&](Index c) { return top == top ? row[c] == top : row[c] != row[c]; };
        for (Index c = 0; c < label; ++c) {
            if (best(c)) return false;
        }
        return best(label);
    }

    template <bool LABELS>
    void piece(Index number, Index first, Index last) const {
        R weights[LABELS ? 1 : ROWS];
        hits[number] = shift<LABELS>(first, last, weights);
        LOOP for (Index i = first * classes; i < last * classes; ++i) dx[i] = exp(dx[i]);
        for (Index row = first; row < last; ++row) sums[row] = sum_of(dx + row * classes, classes);
        LOOP for (Index row = first; row < last; ++row) {
            losses[row] += log(sums[row]) * (LABELS ? R(1) : weights[LABELS ? 0 : row - first]);
        }
        for (Index row = first; w != nullptr && row < last; ++row) {
            losses[row] = w[row] == R(0) ? R(0) : w[row] * losses[row];  // 0, whatever the logits are: 0 · NaN is NaN
        }
        const R of_one = share == nullptr ? R(1) : *share * *scale;
        for (Index row = first; row < last; ++row) {
            R* const to = dx + row * classes;
            const R sum = sums[row], s = w == nullptr ? of_one : w[row] * of_one;
            if (s == R(0)) {
                memset(to, 0, size_t(classes) * sizeof(R));
                continue;
            }
            if constexpr (LABELS) {
                LOOP for (Index c = 0; c < classes; ++c) to[c] = to[c] / sum;
                to[static_cast<const Index*>(target)[row]] -= R(1);
                LOOP for (Index c = 0; c < classes; ++c) to[c] *= s;
            } else {
                const R* const t = static_cast<const R*>(target) + row * classes;
                const R weight = weights[row - first];
                LOOP for (Index c = 0; c < classes; ++c) to[c] = (to[c] / sum * weight - t[c]) * s;
            }
        }
    }

    static constexpr Index ROWS = 256;  // of a piece, at most

    template <bool LABELS>
    void run() const {
        const Index fit = GRAIN / classes, height = fit < 1 ? 1 : fit > ROWS ? ROWS : fit;
        const Index pieces = (rows + height - 1) / height;
        each(pieces, worth(rows * classes, 16), [&](Index i) {
            piece<LABELS>(i, i * height, (i + 1) * height < rows ? (i + 1) * height : rows);
        });
        *total = sum_of(losses, rows);
        if (tally.loss != nullptr) add_to(tally, *total, *steps);
        if (tally.correct != nullptr) {
            for (Index i = 0; i < pieces; ++i) *tally.correct += hits[i];
        }
    }
};

}  // namespace

KERNEL(softmax_cross_entropy_labels) { reinterpret_cast<const Softmax*>(job)->run<true>(); }
KERNEL(softmax_cross_entropy_rows) { reinterpret_cast<const Softmax*>(job)->run<false>(); }

}  // namespace gpubackprop
