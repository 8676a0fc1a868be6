// Softmax and cross-entropy of rows, for kernels without and with weights:
//     dx = w · s · (Σt · softmax(x) − t),    total = Σ_rows w · Σ_k −t · log softmax(x),
// of logits x (rows, classes), targets t, given as labels or as rows of shares, and weights w of the rows (or 1).
//
// Geometry (softmax_geometry, top1_geometry in backends/geometry.py): blockDim.y teams of blockDim.x threads have a row
// each. Up to 32 · HELD classes (256; 128 at float64) a team is a warp, or the least power of two in it that takes one
// vector a thread: 8 for 10 classes, so that a warp reads 4 rows at once. A thread holds its part of the row in
// registers: little, for the sake of many warps. With more classes the block is the team, and reads the row twice: first
// with an online maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax"), then from a cache. Where
// the rows in flight do not fit one (some 10,000 classes, an estimate), that second read is above the floor. As many
// blocks as the rows need, up to a fixed number; `partials` has one R for each; there is one ticket.
//
// x − top is 0 where x is the top, also at infinity, and t · (x − top) is 0 where t is: inf − inf and 0 · inf are NaN.
//
// A vector is as wide as the classes divide by: 16 bytes, two elements, or one. Off the boundary of 16 bytes it is read
// element by element, so that the bits depend on the shape alone.
#ifndef GPUBACKPROP_SOFTMAX_CROSS_ENTROPY
#define GPUBACKPROP_SOFTMAX_CROSS_ENTROPY

#include "reduce.cuh"

namespace gpubackprop {

constexpr int HELD = 32 / sizeof(R);

// The first column of the k-th vector that this thread has of its row.
template <int W>
DEVICE int column_of(int k) {
    return (k * int(blockDim.x) + int(threadIdx.x)) * W;
}

// As load and store; `aligned` says whether the address is that of a vector.
template <int W, typename E>
DEVICE Vector<W> read(const E* x, bool aligned) {
    if (aligned) return load<W>(x);
    Vector<W> v;
    UNROLL for (int lane = 0; lane < W; ++lane) v[lane] = R(x[lane]);
    return v;
}

template <int W>
DEVICE void write(T* x, const Vector<W>& v, bool aligned) {
    if (aligned) return store(x, v);
    UNROLL for (int lane = 0; lane < W; ++lane) x[lane] = T(v[lane]);
}

// `v` combined over a team, which is the BLOCK or part of a warp; each of its threads gets the result.
template <bool BLOCK, typename Operation>
DEVICE R over_team(R v, Operation combine, R identity) {
    if constexpr (BLOCK) return across_block(v, combine, identity);
    else return across(v, combine, int(blockDim.x));
}

// x − top, of x up to top; 0 at the top itself.
DEVICE R below(R x, R top) { return x == top ? R(0) : x - top; }

// t · shifted, or 0 where t is.
DEVICE R part(R t, R shifted) { return t == R(0) ? R(0) : t * shifted; }

// ---- targets --------------------------------------------------------------------------------------------------------

// t = 1 in one column and 0 elsewhere.
template <bool BLOCK>
struct Label {
    int at;   // −1 if the label is no class: its loss is infinite, which is reported, and it is never right
    R logit;  // x there

    DEVICE Label(const Index* labels, Index row, const T* x, int classes) {
        const Index label = labels[row];
        at = label >= 0 && label < classes ? int(label) : -1;
        logit = at < 0 ? R(-INFINITY) : R(x[at]);
    }
    template <int W>
    DEVICE Vector<W> shares(int column, bool) const {
        Vector<W> t;
        UNROLL for (int lane = 0; lane < W; ++lane) t[lane] = column + lane == at ? R(1) : R(0);
        return t;
    }
    DEVICE R weight(R) const { return R(1); }
    DEVICE R product(R, R top) const { return at < 0 ? R(-INFINITY) : below(logit, top); }

    // Whether argmax would rather have the x of this column: the first of the largest, NaN being larger than all.
    DEVICE bool beaten(R x, int column) const {
        if (column < at) return !(x < logit) && (logit == logit || x != x);
        return !(x <= logit) && logit == logit;
    }
    DEVICE int right(bool beaten) const {
        const R any = over_team<BLOCK>(beaten ? R(1) : R(0), Maximum(), R(0));
        return at >= 0 && any == 0;
    }
};

// Any t. `weight` and `product` are given the sums of t and of t · (x − top) over this thread's columns.
template <bool BLOCK>
struct Shares {
    const R* t;

    DEVICE Shares(const R* target, Index row, const T*, int classes) : t(target + row * classes) {}
    template <int W>
    DEVICE Vector<W> shares(int column, bool aligned) const {
        return read<W>(t + column, aligned);
    }
    DEVICE R weight(R sum) const { return over_team<BLOCK>(sum, Add(), R(0)); }
    DEVICE R product(R sum, R) const { return over_team<BLOCK>(sum, Add(), R(0)); }
    DEVICE bool beaten(R, int) const { return true; }
    DEVICE int right(bool) const { return 0; }
};

// ---- weights --------------------------------------------------------------------------------------------------------

// All rows count alike: as without weights, to the bit and the instruction.
struct Alike {
    DEVICE R of(Index) const { return R(1); }
    DEVICE static R times(R factor, R v) { return factor * v; }
};

// A row that counts for nothing does no harm: 0 · NaN would be NaN.
struct Weighed {
    const R* w;

    DEVICE R of(Index row) const { return w[row]; }
    DEVICE static R times(R factor, R v) { return factor == R(0) ? R(0) : factor * v; }
};

// ---- one row --------------------------------------------------------------------------------------------------------

// The loss, and how many rows are right: of one row in all threads of its team, of several in the first one.
struct Sums {
    R loss;
    int right;
};

// A row of at most HELD elements a thread.
template <int W, typename Weights, typename Target>
DEVICE Sums held_row(T* dx, const T* x, const Target& target, R s, int classes, bool aligned) {
    constexpr int K = HELD / W;
    Vector<W> z[K], t[K];
    UNROLL for (int k = 0; k < K && column_of<W>(k) < classes; ++k) {
        z[k] = read<W>(x + column_of<W>(k), aligned);
        t[k] = target.template shares<W>(column_of<W>(k), aligned);
    }
    R top = R(-INFINITY), sum = 0, weight = 0, product = 0;
    bool beaten = false;
    UNROLL for (int k = 0; k < K && column_of<W>(k) < classes; ++k) {
        UNROLL for (int lane = 0; lane < W; ++lane) {
            top = maximum(top, z[k][lane]);
            beaten |= target.beaten(z[k][lane], column_of<W>(k) + lane);
        }
    }
    top = over_team<false>(top, Maximum(), R(-INFINITY));
    UNROLL for (int k = 0; k < K && column_of<W>(k) < classes; ++k) {
        UNROLL for (int lane = 0; lane < W; ++lane) {
            const R shifted = below(z[k][lane], top);
            weight += t[k][lane];
            product += part(t[k][lane], shifted);
            z[k][lane] = exp(shifted);
            sum += z[k][lane];
        }
    }
    sum = over_team<false>(sum, Add(), R(0));
    weight = target.weight(weight);
    const R factor = weight / sum;
    UNROLL for (int k = 0; k < K && column_of<W>(k) < classes; ++k) {
        UNROLL for (int lane = 0; lane < W; ++lane) z[k][lane] = Weights::times(s, z[k][lane] * factor - t[k][lane]);
        write(dx + column_of<W>(k), z[k], aligned);
    }
    return {log(sum) * weight - target.product(product, top), target.right(beaten)};
}

// A row of any length, read twice by the block.
template <int W, typename Weights, typename Target>
DEVICE Sums streamed_row(T* dx, const T* x, const Target& target, R s, int classes, bool aligned) {
    const int step = int(blockDim.x) * W;
    R own = R(-INFINITY), sum = 0, weight = 0, product = 0;  // own: this thread's largest x; sum = Σ exp(x − own)
    bool beaten = false;
    for (int column = column_of<W>(0); column < classes; column += step) {
        const Vector<W> z = read<W>(x + column, aligned), t = target.template shares<W>(column, aligned);
        R higher = own;
        UNROLL for (int lane = 0; lane < W; ++lane) {
            higher = maximum(higher, z[lane]);
            beaten |= target.beaten(z[lane], column + lane);
            weight += t[lane];
        }
        if (higher != own) sum *= exp(own - higher);
        UNROLL for (int lane = 0; lane < W; ++lane) sum += exp(below(z[lane], higher));
        own = higher;
    }
    const R top = over_team<true>(own, Maximum(), R(-INFINITY));
    sum = over_team<true>(sum * exp(below(own, top)), Add(), R(0));
    weight = target.weight(weight);
    const R factor = weight / sum;
    for (int column = column_of<W>(0); column < classes; column += step) {
        Vector<W> z = read<W>(x + column, aligned);
        const Vector<W> t = target.template shares<W>(column, aligned);
        UNROLL for (int lane = 0; lane < W; ++lane) {
            const R shifted = below(z[lane], top);
            product += part(t[lane], shifted);
            z[lane] = Weights::times(s, exp(shifted) * factor - t[lane]);
        }
        write(dx + column, z, aligned);
    }
    return {log(sum) * weight - target.product(product, top), target.right(beaten)};
}

// ---- all rows -------------------------------------------------------------------------------------------------------

template <bool BLOCK, int W, template <bool> class Target, typename Given, typename Weights>
DEVICE Sums by_row(T* __restrict__ dx, const T* __restrict__ x, const Given* __restrict__ target,
        const Weights& weights, R s, Index rows, int classes, bool aligned) {
    Sums sums = {0, 0};
    R low = 0;
    for (Index top = blockIdx.x * Index(blockDim.y); top < rows; top += gridDim.x * Index(blockDim.y)) {
        // A team without a row takes part in its warp's shuffles: it has row 0, but no column of it.
        const bool idle = top + threadIdx.y >= rows;
        const Index row = idle ? 0 : top + threadIdx.y, at = row * classes;
        const int end = idle ? 0 : classes;
        const Target<BLOCK> t(target, row, x + at, end);
        const R w = weights.of(row);
        Sums of_row;
        if constexpr (BLOCK) of_row = streamed_row<W, Weights>(dx + at, x + at, t, w * s, end, aligned);
        else of_row = held_row<W, Weights>(dx + at, x + at, t, w * s, end, aligned);
        if (threadIdx.x > 0 || idle) continue;
        add_to(sums.loss, low, Weights::times(w, of_row.loss));
        sums.right += of_row.right;
    }
    sums.loss = both(sums.loss, low);
    return sums;
}

template <int W, template <bool> class Target, typename Given, typename Weights>
DEVICE Sums by_length(T* __restrict__ dx, const T* __restrict__ x, const Given* __restrict__ target,
        const Weights& weights, R s, Index rows, int classes, bool aligned) {
    if (blockDim.x > WARP) return by_row<true, W, Target>(dx, x, target, weights, s, rows, classes, aligned);
    return by_row<false, W, Target>(dx, x, target, weights, s, rows, classes, aligned);
}

template <template <bool> class Target, typename Given, typename Weights>
DEVICE Sums by_width(T* __restrict__ dx, const T* __restrict__ x, const Given* __restrict__ target,
        const Weights& weights, R s, Index rows, int classes, bool aligned) {
    if (classes % LANES == 0) return by_length<LANES, Target>(dx, x, target, weights, s, rows, classes, aligned);
    if (classes % 2 == 0) return by_length<2, Target>(dx, x, target, weights, s, rows, classes, aligned);
    return by_length<1, Target>(dx, x, target, weights, s, rows, classes, aligned);
}

// count += the rows of a block that are right, in integers, whose order does not matter.
DEVICE void count_right(Index* count, int right) {
    const R of_block = across_block(R(right), Add(), R(0));  // exact: few rows fall to one block
    if (thread() == 0 && of_block > 0) atomicAdd(reinterpret_cast<Long*>(count), Long(of_block));
}

// s: what a row counts for in this step's gradient, times the loss scale; 1 if no column of the table is named.
DEVICE R share(const R* table, const Index* state, int width, int share_at, const R* scale) {
    if (share_at < 0) return R(1);
    const R of_step = table[state[0] * width + share_at];
    return scale != nullptr ? of_step * scale[0] : of_step;
}

// A kernel's own thread, from what the kernel was given.
template <template <bool> class Target, typename Given, typename Weights>
DEVICE void softmax_cross_entropy(T* dx, R* total, R* partials, Word* ticket, R* loss, Index* events, const T* x,
        const Given* target, const Weights& weights, R s, const Index* state, Index rows, Index classes, bool aligned) {
    const Sums sums = by_width<Target>(dx, x, target, weights, s, rows, int(classes), aligned);
    if (loss != nullptr) count_right(events + 1, sums.right);
    conclude(total, partials, ticket, loss, events, state, sums.loss);
}

}  // namespace gpubackprop

#endif
