// Layer norm (a row's own statistics) and batch norm (a column's), forward and backward; see Backend.normalize.
//
// The variance is that of the centred elements. Sums over the rows go in blocks of HEIGHT, and the blocks in order.
#include "host.h"

namespace gpubackprop {
namespace {

constexpr Index HEIGHT = 64, WIDTH = 128;  // rows of a block; columns of a strip, which has a core of its own

// Σ over all rows of value(row, column), for `width` columns, into sums.
template <typename Value>
static inline void sum_rows(Index rows, Index width, R* sums, const Value& value) {
    R block[WIDTH];
    for (Index c = 0; c < width; ++c) sums[c] = 0;
    for (Index first = 0; first < rows; first += HEIGHT) {
        for (Index c = 0; c < width; ++c) block[c] = 0;
        for (Index row = first; row < rows && row < first + HEIGHT; ++row) {
            LOOP for (Index c = 0; c < width; ++c) block[c] += value(row, c);
        }
        for (Index c = 0; c < width; ++c) sums[c] += block[c];
    }
}

// body(first column, width) of each strip.
template <typename Body>
static inline void strips(Index rows, Index columns, const Body& body) {
    each((columns + WIDTH - 1) / WIDTH, worth(rows * columns, 8), [&](Index i) {
        body(i * WIDTH, columns - i * WIDTH < WIDTH ? columns - i * WIDTH : WIDTH);
    });
}

struct Normalize {
    R *out, *mean, *variance, *rstd;
    const R *x, *gain, *bias, *eps;
    Index rows, columns;

    void layer() const {
        const R share = R(1) / R(columns);
        each((rows + HEIGHT - 1) / HEIGHT, worth(rows * columns, 8), [&](Index i) {
            for (Index row = i * HEIGHT; row < rows && row < (i + 1) * HEIGHT; ++row) {
                const R* const from = x + row * columns;
                R* const to = out + row * columns;
                const R m = sum_each(columns, [&](Index c) { return from[c]; }) * share;
                const R v = sum_each(columns, [&](Index c) { return (from[c] - m) * (from[c] - m); }) * share;
                const R r = R(1) / sqrt(v + *eps);
                mean[row] = m, variance[row] = v, rstd[row] = r;
                LOOP for (Index c = 0; c < columns; ++c) to[c] = (from[c] - m) * r * gain[c] + bias[c];
            }
        });
    }

    void batch() const {
        const R share = R(1) / R(rows);
        strips(rows, columns, [&](Index first, Index width) {
            const R *from = x + first, *g = gain + first, *b = bias + first;
            R *m = mean + first, *v = variance + first, *r = rstd + first;
            sum_rows(rows, width, m, [&](Index row, Index c) { return from[row * columns + c]; });
            LOOP for (Index c = 0; c < width; ++c) m[c] *= share;
            sum_rows(rows, width, v, [&](Index row, Index c) {
                const R centred = from[row * columns + c] - m[c];
                return centred * centred;
            });
            LOOP for (Index c = 0; c < width; ++c) v[c] *= share, r[c] = R(1) / sqrt(v[c] + *eps);
            for (Index row = 0; row < rows; ++row) {
                const R* const in = from + row * columns;
                R* const to = out + row * columns + first;
                LOOP for (Index c = 0; c < width; ++c) to[c] = (in[c] - m[c]) * r[c] * g[c] + b[c];
            }
        });
    }
};

struct Backward {
    R *dx, *dgain, *dbias;  // or nullptr: not wanted
    const R *dy, *x, *gain, *mean, *rstd;
    R* partials;  // layer norm's, of dgain and dbias: (blocks, 2, columns)
    Index rows, columns, add_dx, add_dgain, add_dbias;

    void layer() const {
        const R share = R(1) / R(columns);
        const Index blocks = (rows + HEIGHT - 1) / HEIGHT;
        each(blocks, worth(rows * columns, 8), [&](Index i) {
            R *const of_gain = partials + 2 * i * columns, *const of_bias = of_gain + columns;
            memset(of_gain, 0, size_t(2 * columns) * sizeof(R));
            for (Index row = i * HEIGHT; row < rows && row < (i + 1) * HEIGHT; ++row) {
                const R *const d = dy + row * columns, *const from = x + row * columns;
                const R m = mean[row], r = rstd[row];
                LOOP for (Index c = 0; c < columns; ++c) {
                    of_gain[c] += d[c] * ((from[c] - m) * r);
                    of_bias[c] += d[c];
                }
                if (dx == nullptr) continue;
                const R a = sum_each(columns, [&](Index c) { return d[c] * gain[c]; }) * share;
                const R b = sum_each(columns, [&](Index c) { return d[c] * gain[c] * ((from[c] - m) * r); }) * share;
                assign(dx + row * columns, columns, [&](Index c) {
                    return (d[c] * gain[c] - a - (from[c] - m) * r * b) * r;
                });
            }
        });
        for (Index c = 0; c < columns; ++c) {
            R of_gain = 0, of_bias = 0;
            for (Index i = 0; i < blocks; ++i) {
                of_gain += partials[2 * i * columns + c], of_bias += partials[(2 * i + 1) * columns + c];
            }
            finish(c, of_gain, of_bias);
        }
    }

    void batch() const {
        const R share = R(1) / R(rows);
        strips(rows, columns, [&](Index first, Index width) {
            const R *d = dy + first, *from = x + first, *g = gain + first, *m = mean + first, *r = rstd + first;
            R of_gain[WIDTH], of_bias[WIDTH], a[WIDTH], b[WIDTH];
            sum_rows(rows, width, of_bias, [&](Index row, Index c) { return d[row * columns + c]; });
            sum_rows(rows, width, of_gain, [&](Index row, Index c) {
                return d[row * columns + c] * ((from[row * columns + c] - m[c]) * r[c]);
            });
            LOOP for (Index c = 0; c < width; ++c) a[c] = of_bias[c] * g[c] * share, b[c] = of_gain[c] * g[c] * share;
            for (Index c = 0; c < width; ++c) finish(first + c, of_gain[c], of_bias[c]);
            for (Index row = 0; row < rows && dx != nullptr; ++row) {
                const R *const in = from + row * columns, *const of = d + row * columns;
                assign(dx + row * columns + first, width, [&](Index c) {
                    return (of[c] * g[c] - a[c] - (in[c] - m[c]) * r[c] * b[c]) * r[c];
                });
            }
        });
    }

    // to (+)= value(c), for `width` columns.
    template <typename Value>
    void assign(R* to, Index width, const Value& value) const {
        if (add_dx) {
            LOOP for (Index c = 0; c < width; ++c) to[c] += value(c);
        } else {
            LOOP for (Index c = 0; c < width; ++c) to[c] = value(c);
        }
    }

    void finish(Index c, R of_gain, R of_bias) const {
        if (dgain != nullptr) dgain[c] = add_dgain ? dgain[c] + of_gain : of_gain;
        if (dbias != nullptr) dbias[c] = add_dbias ? dbias[c] + of_bias : of_bias;
    }
};

}  // namespace

KERNEL(layer_norm) { reinterpret_cast<const Normalize*>(job)->layer(); }
KERNEL(batch_norm) { reinterpret_cast<const Normalize*>(job)->batch(); }
KERNEL(layer_norm_backward) { reinterpret_cast<const Backward*>(job)->layer(); }
KERNEL(batch_norm_backward) { reinterpret_cast<const Backward*>(job)->batch(); }

}  // namespace gpubackprop
