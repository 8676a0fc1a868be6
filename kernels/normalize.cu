// Layer norm and batch norm, forward and backward, each in one launch:
//     out = gain · x̂ + bias  with  x̂ = (x − mean) · rstd,  rstd = 1 / √(variance + eps);
//     dx = rstd · (d − mean(d) − x̂ · mean(d · x̂))  with  d = gain · dy;  dgain = Σ_rows dy · x̂,  dbias = Σ_rows dy,
// the statistics along the rows of (rows, columns) for layer norm, along the columns for batch norm. x̂ is computed
// again rather than stored, from halves, whose difference does not overflow. dx, dgain and dbias may be NULL.
//
// The mean is that of the differences from a line's first element, corrected by the mean of what it leaves, and the
// variance is corrected by the same (Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance"). So a line of
// equal elements has its element as mean and 0 as variance. A line whose squares overflow is summed again, scaled by a
// power of two; its variance is at most the largest number.
//
// Bytes per element: layer_norm_forward T + T, layer_norm_backward T + T + T, batch_norm_forward T + T,
// batch_norm_backward T + T + T. This is so while registers hold what a thread owns of a line: HELD elements of x, or
// of x and dy. Longer lines are read once more for each sum that needs the one before it: from a cache, while the lines
// in flight fit there; from memory it would be 4 T forward and 5 T backward.
//
// Layer norm (layer_norm_geometry, layer_norm_backward_geometry in backends/geometry.py). A team has a row: part of a
// warp (a power of two) up to 32 · HELD columns (1024; at float64 512), then a block of 128 or 256 threads. Rows of
// more than 256 · HELD columns (8192; at float64 4096) are longer than the registers. Forward, there are as many blocks
// as the rows need. Backward, up to 256 blocks walk over the rows, and each thread adds up dgain and dbias of its
// columns as it goes, for long rows in `partials`. Block b leaves its sums in partials[b] (2, columns); the last of
// GROUP blocks adds up theirs and the last of those all: `tickets` has one for these and one for each group.
//
// Batch norm (batch_norm_geometry). A block has all rows of 32 to 128 bytes of columns, because a block cannot wait for
// another's sums: few columns keep few multiprocessors busy. Registers hold 128 · K rows of 32 bytes (1024; at 16 bits
// 512), and backward half of these.
#include "teams.cuh"

namespace gpubackprop {

constexpr int W = LANES;               // consecutive columns that a thread has
constexpr int HELD = 128 / sizeof(R);  // elements of an array that it keeps in registers
constexpr int K = HELD / W;
constexpr Word GROUP = 16;
constexpr R HALF = R(0.5);
#ifdef FLOAT64
constexpr R SMALL = R(0x1p-768), LARGEST = R(0x1.fffffffffffffp1023);
#else
constexpr R SMALL = R(0x1p-96), LARGEST = R(0x1.fffffep127);
#endif

// The statistics of a line from sums over all of x times `unit`: of x − centre, and of its squares.
struct Statistics {
    R mean, variance, rstd;
    DEVICE void set(R centre, R sum, R squares, R share, R eps, R unit) {
        const R rest = sum * share, spread = (squares - sum * rest) * share, v = spread / unit / unit;
        mean = (centre + rest) / unit;
        variance = v > LARGEST ? LARGEST : v;
        rstd = unit / sqrt(spread + eps * unit * unit);
    }
};

// ---- layer norm -----------------------------------------------------------------------------------------------------

template <bool VECTORS, bool WHOLE>
DEVICE void layer_norm_rows(T* out, R* mean, R* variance, R* rstd, const T* x, const T* gain, const T* bias,
        const R eps, const Index rows, const int columns) {
    constexpr int N = !WHOLE ? 2 : VECTORS ? K : K / 2;
    const int first = int(threadIdx.x) * W, step = int(blockDim.x) * W;
    const R share = R(1) / R(columns);
    const Index row = blockIdx.x * Index(blockDim.y) + threadIdx.y, start = row * columns;
    const int end = row < rows ? columns : 0;  // all threads take part in the sums
    Packed<W, T> v[N];
    bool held = false;
    const auto fetch = [&](int k, int at) {
        if (!held) v[k] = read<VECTORS, W>(x + start + at, end - at);
    };
    R unit = 1, first_mean, rest, squares;
    ROLLED for (int turn = 0; turn < 2; ++turn) {
        const R top = end > 0 ? R(x[start]) * unit : R(0);
        R sum = 0;
        rest = squares = 0;
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, int at) {
            const Vector<W> from = values(v[k]);
            UNROLL for (int lane = 0; lane < W; ++lane) {
                if (VECTORS || at + lane < end) sum += from[lane] * unit - top;
            }
        });
        held = WHOLE;
        first_mean = top + across_team(sum, Add(), R(0)) * share;
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, int at) {
            const Vector<W> from = values(v[k]);
            UNROLL for (int lane = 0; lane < W; ++lane) {
                const R d = VECTORS || at + lane < end ? from[lane] * unit - first_mean : R(0);
                rest += d;
                squares += d * d;
            }
        });
        rest = across_team(rest, Add(), R(0));
        squares = across_team(squares, Add(), R(0));
        const bool again = !(squares < R(INFINITY));
        // teams of a warp go on together, and the warps of a team are alike
        if (turn == 1 || !__any_sync(ALL, again)) break;
        if (again) unit = SMALL;
    }
    Statistics of_row;
    of_row.set(first_mean, rest, squares, share, eps, unit);
    const R centre = of_row.mean * HALF, scale = of_row.rstd * 2;
    sweep<N, WHOLE>(first, step, end, fetch, [&](int k, int at) {
        const Vector<W> g = load<VECTORS, W>(gain + at, end - at), b = load<VECTORS, W>(bias + at, end - at);
        Vector<W> y = values(v[k]);
        UNROLL for (int lane = 0; lane < W; ++lane) y[lane] = (y[lane] * HALF - centre) * scale * g[lane] + b[lane];
        put<VECTORS>(out + start + at, y, end - at);
    });
    if (end == 0 || threadIdx.x > 0) return;
    mean[row] = of_row.mean;
    variance[row] = of_row.variance;
    rstd[row] = of_row.rstd;
}

extern "C" __global__ void __launch_bounds__(BOUNDS) layer_norm_forward(T* __restrict__ out, R* __restrict__ mean,
        R* __restrict__ variance, R* __restrict__ rstd, const T* __restrict__ x, const T* __restrict__ gain,
        const T* __restrict__ bias, const R eps, const Index rows, const Index columns) {
    const size_t off = misaligned(out) | misaligned(x) | misaligned(gain) | misaligned(bias);
    branch(columns % W == 0 && off == 0, [&](auto vectors) {
        constexpr bool VECTORS = decltype(vectors)::value;
        branch(columns <= (VECTORS ? K : K / 2) * Index(blockDim.x) * W, [&](auto whole) {
            layer_norm_rows<VECTORS, decltype(whole)::value>(
                out, mean, variance, rstd, x, gain, bias, eps, rows, int(columns));
        });
    });
}

// sums (columns) = what the teams of a block have in v.
DEVICE void add_teams(R* sums, const Vector<W> (&v)[K], const int columns) {
    __shared__ Vector<W> all[K][THREADS];
    const int team = int(blockDim.x), threads = team * int(blockDim.y);
    __syncthreads();  // an earlier call's values have been read
    UNROLL for (int k = 0; k < K; ++k) all[k][thread()] = v[k];
    __syncthreads();
    for (int column = thread(); column < columns; column += threads) {
        const int vector = column / W;
        R sum = 0;
        for (int at = vector % team; at < threads; at += team) sum += all[vector / team][at][column % W];
        sums[column] = sum;
    }
}

// dx of this block's rows, and their part of dgain and dbias in sums (2, columns) unless that is NULL.
template <bool VECTORS, bool WHOLE>
DEVICE void layer_norm_backward_rows(T* dx, R* sums, const T* dy, const T* x, const R* mean, const R* rstd,
        const T* gain, const int accumulate, const Index rows, const int columns) {
    constexpr int N = WHOLE ? K : 2;
    const int first = int(threadIdx.x) * W, step = int(blockDim.x) * W;
    const Index start = blockIdx.x * Index(blockDim.y);
    const R share = R(1) / R(columns);
    Vector<W> to_gain[N] = {}, to_bias[N] = {};
    for (Index top = start; top < rows; top += gridDim.x * Index(blockDim.y)) {
        const Index row = top + threadIdx.y, base = row * columns;
        const int end = row < rows ? columns : 0;  // all threads take part in the sums
        const R centre = end > 0 ? mean[row] * HALF : R(0), scale = end > 0 ? rstd[row] : R(0), twice = scale * 2;
        Packed<W, T> of_x[N], of_dy[N];
        bool held = false;
        const auto fetch = [&](int k, int at) {
            if (held) return;
            of_x[k] = read<VECTORS, W>(x + base + at, end - at);
            of_dy[k] = read<VECTORS, W>(dy + base + at, end - at);
        };
        R sum = 0, product = 0;
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, int at) {
            const Vector<W> a = values(of_x[k]), b = values(of_dy[k]), g = load<VECTORS, W>(gain + at, end - at);
            if constexpr (!WHOLE) {
                const bool more = sums != nullptr && top > start;
                to_gain[k] = more ? load<VECTORS, W>(sums + at, end - at) : Vector<W>();
                to_bias[k] = more ? load<VECTORS, W>(sums + columns + at, end - at) : Vector<W>();
            }
            UNROLL for (int lane = 0; lane < W; ++lane) {
                const R xhat = VECTORS || at + lane < end ? (a[lane] * HALF - centre) * twice : R(0);
                const R d = b[lane] * g[lane];
                sum += d;
                product += d * xhat;
                to_gain[k][lane] += b[lane] * xhat;
                to_bias[k][lane] += b[lane];
            }
            if constexpr (!WHOLE) {
                if (sums == nullptr) return;
                put<VECTORS>(sums + at, to_gain[k], end - at);
                put<VECTORS>(sums + columns + at, to_bias[k], end - at);
            }
        });
        if (dx == nullptr) continue;
        held = WHOLE;
        sum = across_team(sum, Add(), R(0)) * share;
        product = across_team(product, Add(), R(0)) * share;
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, int at) {
            const Vector<W> a = values(of_x[k]), b = values(of_dy[k]), g = load<VECTORS, W>(gain + at, end - at);
            Vector<W> v;
            UNROLL for (int lane = 0; lane < W; ++lane) {
                const R xhat = (a[lane] * HALF - centre) * twice;
                v[lane] = (b[lane] * g[lane] - sum - xhat * product) * scale;
            }
            put<VECTORS>(dx + base + at, v, end - at, accumulate);
        });
    }
    if constexpr (WHOLE) {
        if (sums == nullptr) return;
        add_teams(sums, to_gain, columns);
        add_teams(sums + columns, to_bias, columns);
    }
}

// dgain and dbias from the sums of all blocks.
DEVICE void add_blocks(R* dgain, R* dbias, R* partials, Word* tickets, int accumulate_dgain, int accumulate_dbias,
        Index columns) {
    const Word group = blockIdx.x / GROUP, groups = (gridDim.x + GROUP - 1) / GROUP, start = group * GROUP;
    const Word end = start + GROUP < gridDim.x ? start + GROUP : gridDim.x;
    const Index width = 2 * columns, threads = Index(blockDim.x) * blockDim.y;
    const auto sum = [&](Index at, Word first, Word last, Word step) {
        R v = 0;
        for (Word block = first; block < last; block += step) v += partials[block * width + at];
        return v;
    };
    if (!last_block(tickets + 1 + group, end - start)) return;
    for (Index at = thread(); at < width; at += threads) partials[start * width + at] = sum(at, start, end, 1);
    if (!last_block(tickets, groups)) return;
    for (Index at = thread(); at < width; at += threads) {
        R* const out = at < columns ? dgain : dbias;
        if (out == nullptr) continue;
        R& to = out[at % columns];
        const R v = sum(at, 0, gridDim.x, GROUP);
        to = (at < columns ? accumulate_dgain : accumulate_dbias) ? to + v : v;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_backward(T* __restrict__ dx, R* __restrict__ dgain,
        R* __restrict__ dbias, R* __restrict__ partials, Word* __restrict__ tickets, const T* __restrict__ dy,
        const T* __restrict__ x, const R* __restrict__ mean, const R* __restrict__ rstd, const T* __restrict__ gain,
        const int accumulate_dx, const int accumulate_dgain, const int accumulate_dbias, const Index rows,
        const Index columns) {
    const bool summed = dgain != nullptr || dbias != nullptr;
    R* const sums = summed ? partials + blockIdx.x * (2 * columns) : nullptr;
    const size_t off = misaligned(dx) | misaligned(dy) | misaligned(x) | misaligned(gain) | misaligned(sums);
    branch(columns % W == 0 && off == 0, [&](auto vectors) {
        branch(columns <= K * Index(blockDim.x) * W, [&](auto whole) {
            layer_norm_backward_rows<decltype(vectors)::value, decltype(whole)::value>(
                dx, sums, dy, x, mean, rstd, gain, accumulate_dx, rows, int(columns));
        });
    });
    if (summed) add_blocks(dgain, dbias, partials, tickets, accumulate_dgain, accumulate_dbias, columns);
}

// ---- batch norm -----------------------------------------------------------------------------------------------------

template <bool VECTORS, bool WHOLE>
DEVICE void batch_norm_columns(T* out, R* mean, R* variance, R* rstd, const T* x, const T* gain, const T* bias,
        const R eps, const Index rows, const Index columns) {
    constexpr int N = WHOLE ? K : 4;
    const Index column = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * W;
    const int left = columns - column < W ? int(columns - column) : W;
    const Index first = threadIdx.y * columns + column, step = blockDim.y * columns;
    const Index end = left > 0 ? rows * columns : 0;
    const R share = R(1) / R(rows);
    Packed<W, T> v[N];
    bool held = false;
    const auto fetch = [&](int k, Index at) {
        if (!held) v[k] = read<VECTORS, W>(x + at, left);
    };
    Vector<W> centre, rest, squares;
    int scaled = 0;  // a bit for each lane
    const auto unit = [&](int lane) { return scaled >> lane & 1 ? SMALL : R(1); };
    ROLLED for (int turn = 0; turn < 2; ++turn) {
        Vector<W> top = load<false, W>(x + column, left);
        UNROLL for (int lane = 0; lane < W; ++lane) top[lane] *= unit(lane);
        centre = {};
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, Index) {
            const Vector<W> from = values(v[k]);
            UNROLL for (int lane = 0; lane < W; ++lane) centre[lane] += from[lane] * unit(lane) - top[lane];
        });
        held = WHOLE;
        centre = down(centre, Add());
        UNROLL for (int lane = 0; lane < W; ++lane) centre[lane] = top[lane] + centre[lane] * share;
        rest = squares = {};
        sweep<N, WHOLE>(first, step, end, fetch, [&](int k, Index) {
            const Vector<W> from = values(v[k]);
            UNROLL for (int lane = 0; lane < W; ++lane) {
                const R d = from[lane] * unit(lane) - centre[lane];
                rest[lane] += d;
                squares[lane] += d * d;
            }
        });
        rest = down(rest, Add());
        squares = down(squares, Add());
        bool again = false;
        UNROLL for (int lane = 0; lane < W; ++lane) again = again || !(squares[lane] < R(INFINITY));
        // all threads take part in the sums
        if (turn == 1 || across_block(R(again), Maximum(), R(0)) == 0) break;
        UNROLL for (int lane = 0; lane < W; ++lane) scaled |= int(!(squares[lane] < R(INFINITY))) << lane;
    }
    if (left <= 0) return;
    Vector<W> scale;
    UNROLL for (int lane = 0; lane < W; ++lane) {
        Statistics of_column;
        of_column.set(centre[lane], rest[lane], squares[lane], share, eps, unit(lane));
        centre[lane] = of_column.mean * HALF;
        scale[lane] = of_column.rstd * 2;
        if (threadIdx.y > 0 || lane >= left) continue;
        mean[column + lane] = of_column.mean;
        variance[column + lane] = of_column.variance;
        rstd[column + lane] = of_column.rstd;
    }
    const Vector<W> g = load<VECTORS, W>(gain + column, left), b = load<VECTORS, W>(bias + column, left);
    sweep<N, WHOLE>(first, step, end, fetch, [&](int k, Index at) {
        Vector<W> y = values(v[k]);
        UNROLL for (int lane = 0; lane < W; ++lane) {
            y[lane] = (y[lane] * HALF - centre[lane]) * scale[lane] * g[lane] + b[lane];
        }
        put<VECTORS>(out + at, y, left);
    });
}

extern "C" __global__ void __launch_bounds__(BOUNDS) batch_norm_forward(T* __restrict__ out, R* __restrict__ mean,
        R* __restrict__ variance, R* __restrict__ rstd, const T* __restrict__ x, const T* __restrict__ gain,
        const T* __restrict__ bias, const R eps, const Index rows, const Index columns) {
    const size_t off = misaligned(out) | misaligned(x) | misaligned(gain) | misaligned(bias);
    branch(columns % W == 0 && off == 0, [&](auto vectors) {
        branch(rows <= K * Index(blockDim.y), [&](auto whole) {
            batch_norm_columns<decltype(vectors)::value, decltype(whole)::value>(
                out, mean, variance, rstd, x, gain, bias, eps, rows, columns);
        });
    });
}

template <bool VECTORS, bool WHOLE>
DEVICE void batch_norm_backward_columns(T* dx, R* dgain, R* dbias, const T* dy, const T* x, const R* mean,
        const R* rstd, const T* gain, const int accumulate_dx, const int accumulate_dgain, const int accumulate_dbias,
        const Index rows, const Index columns) {
    constexpr int N = K / 2;
    const Index column = (blockIdx.x * Index(blockDim.x) + threadIdx.x) * W;
    const int left = columns - column < W ? int(columns - column) : W;
    const Index first = threadIdx.y * columns + column, step = blockDim.y * columns;
    const Index end = left > 0 ? rows * columns : 0;
    const R share = R(1) / R(rows);
    const Vector<W> scale = load<false, W>(rstd + column, left);
    Vector<W> centre = load<false, W>(mean + column, left), twice = scale;
    UNROLL for (int lane = 0; lane < W; ++lane) {
        centre[lane] *= HALF;
        twice[lane] *= 2;
    }
    Packed<W, T> of_x[N], of_dy[N];
    bool held = false;
    const auto fetch = [&](int k, Index at) {
        if (held) return;
        of_x[k] = read<VECTORS, W>(x + at, left);
        of_dy[k] = read<VECTORS, W>(dy + at, left);
    };
    Vector<W> sum = {}, product = {};
    sweep<N, WHOLE>(first, step, end, fetch, [&](int k, Index) {
        const Vector<W> a = values(of_x[k]), b = values(of_dy[k]);
        UNROLL for (int lane = 0; lane < W; ++lane) {
            sum[lane] += b[lane];
            product[lane] += b[lane] * ((a[lane] * HALF - centre[lane]) * twice[lane]);
        }
    });
    held = WHOLE;
    sum = down(sum, Add());
    product = down(product, Add());
    if (left <= 0) return;
    if (threadIdx.y == 0) {
        if (dgain != nullptr) put<false>(dgain + column, product, left, accumulate_dgain);
        if (dbias != nullptr) put<false>(dbias + column, sum, left, accumulate_dbias);
    }
    if (dx == nullptr) return;
    const Vector<W> g = load<VECTORS, W>(gain + column, left);
    UNROLL for (int lane = 0; lane < W; ++lane) {
        sum[lane] *= g[lane] * share;
        product[lane] *= g[lane] * share;
    }
    sweep<N, WHOLE>(first, step, end, fetch, [&](int k, Index at) {
        const Vector<W> a = values(of_x[k]), b = values(of_dy[k]);
        Vector<W> v;
        UNROLL for (int lane = 0; lane < W; ++lane) {
            const R xhat = (a[lane] * HALF - centre[lane]) * twice[lane];
            v[lane] = (b[lane] * g[lane] - sum[lane] - xhat * product[lane]) * scale[lane];
        }
        put<VECTORS>(dx + at, v, left, accumulate_dx);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_norm_backward(T* __restrict__ dx, R* __restrict__ dgain,
        R* __restrict__ dbias, const T* __restrict__ dy, const T* __restrict__ x, const R* __restrict__ mean,
        const R* __restrict__ rstd, const T* __restrict__ gain, const int accumulate_dx, const int accumulate_dgain,
        const int accumulate_dbias, const Index rows, const Index columns) {
    const size_t off = misaligned(dx) | misaligned(dy) | misaligned(x) | misaligned(gain);
    branch(columns % W == 0 && off == 0, [&](auto vectors) {
        branch(rows <= K / 2 * Index(blockDim.y), [&](auto whole) {
            batch_norm_backward_columns<decltype(vectors)::value, decltype(whole)::value>(dx, dgain, dbias, dy, x, mean,
                rstd, gain, accumulate_dx, accumulate_dgain, accumulate_dbias, rows, columns);
        });
    });
}

}  // namespace gpubackprop
