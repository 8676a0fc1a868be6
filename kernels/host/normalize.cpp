// Layer norm (a row's own statistics) and batch norm (a column's), forward and backward; see Backend.normalize.
//
// The mean is that of the differences from a line's first element, corrected by the mean of what it leaves; the variance
// is corrected by the same (Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance"). So a line of equal
// elements has its element as mean and 0 as variance. A line whose squares overflow is seen once more, scaled by a power
// of two. Sums over the rows go in blocks of HEIGHT, and the blocks in order, in double.
#include "host.h"

namespace gpubackprop {
namespace {

constexpr Index HEIGHT = 64, WIDTH = 128;  // rows of a block; columns of a strip, which has a core of its own

constexpr R HALF = R(0.5);  // x − mean may overflow, half of each may not
#ifdef FLOAT64
constexpr R SMALL = R(0x1p-768), LARGEST = R(0x1.fffffffffffffp1023);
#else
constexpr R SMALL = R(0x1p-96), LARGEST = R(0x1.fffffep127);
#endif

// What is left of a line's sums: all of x times `scale`, `centre` the first mean, sums of the centred and their squares.
static inline void conclude(R& mean, R& variance, R& rstd, R centre, R sum, R squares, R share, R eps, R scale) {
    const R rest = sum * share, spread = (squares - sum * rest) * share, v = spread / scale / scale;
    mean = (centre + rest) / scale;
    variance = v > LARGEST ? LARGEST : v;
    rstd = scale / sqrt(spread + eps * scale * scale);
}

// Σ over all rows of value(row, column), for `width` columns, into sums.
template <typename Value>
static inline void sum_rows(Index rows, Index width, R* sums, const Value& value) {
    R block[WIDTH];
    double total[WIDTH] = {};
    for (Index first = 0; first < rows; first += HEIGHT) {
        for (Index c = 0; c < width; ++c) block[c] = 0;
        for (Index row = first; row < rows && row < first + HEIGHT; ++row) {
            LOOP for (Index c = 0; c < width; ++c) block[c] += value(row, c);
        }
        for (Index c = 0; c < width; ++c) total[c] += double(block[c]);
    }
    for (Index c = 0; c < width; ++c) sums[c] = R(total[c]);
}

// Σ value(row, column) and Σ value² in the same way.
template <typename Value>
static inline void sum_squares(Index rows, Index width, R* sums, R* squares, const Value& value) {
    R block[WIDTH], block_squares[WIDTH];
    double total[WIDTH] = {}, total_squares[WIDTH] = {};
    for (Index first = 0; first < rows; first += HEIGHT) {
        for (Index c = 0; c < width; ++c) block[c] = block_squares[c] = 0;
        for (Index row = first; row < rows && row < first + HEIGHT; ++row) {
            LOOP for (Index c = 0; c < width; ++c) {
                const R v = value(row, c);
                block[c] += v;
                block_squares[c] += v * v;
            }
        }
        for (Index c = 0; c < width; ++c) {
            total[c] += double(block[c]);
            total_squares[c] += double(block_squares[c]);
        }
    }
    for (Index c = 0; c < width; ++c) sums[c] = R(total[c]), squares[c] = R(total_squares[c]);
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
        each((rows + HEIGHT - 1) / HEIGHT, worth(rows * columns, 8), [&](Index i) {
            for (Index row = i * HEIGHT; row < rows && row < (i + 1) * HEIGHT; ++row) {
                const R* const from = x + row * columns;
                R* const to = out + row * columns;
                if (!of_row(row, R(1), [&](Index c) { return from[c]; })) {
                    of_row(row, SMALL, [&](Index c) { return from[c] * SMALL; });
                }
                const R m = mean[row] * HALF, r = rstd[row] * 2;
                LOOP for (Index c = 0; c < columns; ++c) to[c] = (from[c] * HALF - m) * r * gain[c] + bias[c];
            }
        });
    }

    // The statistics of a row from its elements times `scale`; whether its squares did not overflow.
    template <typename Element>
    bool of_row(Index row, R scale, const Element& element) const {
        const R share = R(1) / R(columns), top = element(0);
        const R centre = top + sum_each(columns, [&](Index c) { return element(c) - top; }) * share;
        R squares = 0;
        const R sum = sum_filled(columns, [&](R* values, Index at, Index n) {
            R of_values[LENGTH];
            LOOP for (Index i = 0; i < n; ++i) {
                values[i] = element(at + i) - centre;
                of_values[i] = values[i] * values[i];
            }
            squares += sum_of(of_values, n);
        });
        conclude(mean[row], variance[row], rstd[row], centre, sum, squares, share, *eps, scale);
        return squares < R(INFINITY);
    }

    void batch() const {
        strips(rows, columns, [&](Index first, Index width) {
            const R *from = x + first, *g = gain + first, *b = bias + first;
            R scale[WIDTH], m[WIDTH], r[WIDTH];
            for (Index c = 0; c < width; ++c) scale[c] = 1;
            if (!of_strip(first, width, scale, [&](Index row, Index c) { return from[row * columns + c]; })) {
                of_strip(first, width, scale, [&](Index row, Index c) { return from[row * columns + c] * scale[c]; });
            }
            LOOP for (Index c = 0; c < width; ++c) m[c] = mean[first + c] * HALF, r[c] = rstd[first + c] * 2;
            for (Index row = 0; row < rows; ++row) {
                const R* const in = from + row * columns;
                R* const to = out + row * columns + first;
                LOOP for (Index c = 0; c < width; ++c) to[c] = (in[c] * HALF - m[c]) * r[c] * g[c] + b[c];
            }
        });
    }

    // The statistics of a strip of columns from its elements times `scale`; whether no column's squares overflowed, else
    // with the scale to take for it.
    template <typename Element>
    bool of_strip(Index first, Index width, R* scale, const Element& element) const {
        const R share = R(1) / R(rows);
        R top[WIDTH], centre[WIDTH], sums[WIDTH], squares[WIDTH];
        for (Index c = 0; c < width; ++c) top[c] = element(0, c);
        sum_rows(rows, width, centre, [&](Index row, Index c) { return element(row, c) - top[c]; });
        LOOP for (Index c = 0; c < width; ++c) centre[c] = top[c] + centre[c] * share;
        sum_squares(rows, width, sums, squares, [&](Index row, Index c) { return element(row, c) - centre[c]; });
        bool good = true;
        for (Index c = 0; c < width; ++c) {
            const Index at = first + c;
            conclude(mean[at], variance[at], rstd[at], centre[c], sums[c], squares[c], share, *eps, scale[c]);
            if (!(squares[c] < R(INFINITY))) good = false, scale[c] = SMALL;
        }
        return good;
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
                const R m = mean[row] * HALF, r = rstd[row], twice = r * 2;
                LOOP for (Index c = 0; c < columns; ++c) {
                    of_gain[c] += d[c] * ((from[c] * HALF - m) * twice);
                    of_bias[c] += d[c];
                }
                if (dx == nullptr) continue;
                const R a = sum_each(columns, [&](Index c) { return d[c] * gain[c]; }) * share;
                const R b = sum_each(columns, [&](Index c) { return d[c] * gain[c] * ((from[c] * HALF - m) * twice); }) * share;
                assign(dx + row * columns, columns, [&](Index c) {
                    return (d[c] * gain[c] - a - (from[c] * HALF - m) * twice * b) * r;
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
            const R *d = dy + first, *from = x + first, *g = gain + first, *r = rstd + first;
            R of_gain[WIDTH], of_bias[WIDTH], a[WIDTH], b[WIDTH], m[WIDTH], twice[WIDTH];
            LOOP for (Index c = 0; c < width; ++c) m[c] = mean[first + c] * HALF, twice[c] = r[c] * 2;
            sum_rows(rows, width, of_bias, [&](Index row, Index c) { return d[row * columns + c]; });
            sum_rows(rows, width, of_gain, [&](Index row, Index c) {
                return d[row * columns + c] * ((from[row * columns + c] * HALF - m[c]) * twice[c]);
            });
            LOOP for (Index c = 0; c < width; ++c) a[c] = of_bias[c] * g[c] * share, b[c] = of_gain[c] * g[c] * share;
            for (Index c = 0; c < width; ++c) finish(first + c, of_gain[c], of_bias[c]);
            for (Index row = 0; row < rows && dx != nullptr; ++row) {
                const R *const in = from + row * columns, *const of = d + row * columns;
                assign(dx + row * columns + first, width, [&](Index c) {
                    return (of[c] * g[c] - a[c] - (in[c] * HALF - m[c]) * twice[c] * b[c]) * r[c];
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
