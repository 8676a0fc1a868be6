// Products by the BLAS that NumPy has loaded: one more kernel, so that a whole step is one call.
#include "host.h"

namespace gpubackprop {
namespace {

enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };  // CBLAS's numbers
[[maybe_unused]] constexpr Index LEAST = 1200000;  // multiply-adds; products of fewer may have a kernel of their own

// out (+)= op(a) · op(b), row by row, for each matrix of a stack; in blocks of `height` rows and `width` columns, each
// by one thread. Where there are more threads than blocks, these are cut again, into multiples of `tile` rows, which
// leave the bits as they are; unless that is 0.
struct Product {
    using Blas = void (*)(int, int, int, Index, Index, Index, R, const R*, Index, const R*, Index, R, R*, Index);
    Blas blas;  // cblas_?gemm with 64-bit integers
    R* out;
    const R *a, *b;
    Index transpose_a, transpose_b, stride_a, stride_b;
    Index count, m, n, k, accumulate, height, width, tile;

    static int op(Index transpose) { return transpose ? TRANSPOSED : AS_IT_IS; }

    void multiply(Index i, Index row, Index rows, Index column, Index columns) const {
        blas(ROW_MAJOR, op(transpose_a), op(transpose_b), rows, columns, k, R(1),
             a + i * stride_a + (transpose_a ? row : row * k), transpose_a ? m : k,
             b + i * stride_b + (transpose_b ? column * k : column), transpose_b ? k : n,
             R(accumulate), out + i * m * n + row * n + column, n);
    }

    // Rows of a piece of a block: all, or fewer for so many more threads, but not so few that BLAS treats them apart.
    Index rows(Index threads) const {
        if (threads < 2 || tile == 0) return height;
        const Index part = (height + threads * tile - 1) / (threads * tile) * tile;
        const Index last = m % height ? m % height : height, rest = last % part ? last % part : part;
        const Index least = height % part && height % part < rest ? height % part : rest;
        return part < height && least * width * k >= LEAST ? part : height;
    }

    void run() const {
        const OneBlasThread guard;
        const Index down = (m + height - 1) / height, across = (n + width - 1) / width, blocks = count * down * across;
        const bool shared = 2 * m * n * k * count > 1000000;
        const Index part = shared ? rows((sharers() + blocks - 1) / blocks) : height, parts = (height + part - 1) / part;
        each(blocks * parts, shared, [&](Index i) {
            const Index block = i / parts, column = block % across * width, first = block / across % down * height;
            const Index row = first + i % parts * part, end = first + height < m ? first + height : m;
            if (row >= end) return;
            multiply(block / (down * across), row, part < end - row ? part : end - row, column,
                     width < n - column ? width : n - column);
        });
    }
};

// y (+)= op(a) · x of a matrix, in blocks of `height` elements of y.
struct VectorProduct {
    using Blas = void (*)(int, int, Index, Index, R, const R*, Index, const R*, Index, R, R*, Index);
    Blas blas;  // cblas_?gemv with 64-bit integers
    R* y;
    const R *a, *x;
    Index transpose, size, depth, accumulate, height;

    void run() const {
        const OneBlasThread guard;
        each((size + height - 1) / height, 2 * size * depth > 1000000, [&](Index i) {
            const Index at = i * height, count = height < size - at ? height : size - at;
            if (transpose) {  // a is (depth, size)
                blas(ROW_MAJOR, TRANSPOSED, depth, count, R(1), a + at, size, x, 1, R(accumulate), y + at, 1);
            } else {
                blas(ROW_MAJOR, AS_IT_IS, count, depth, R(1), a + at * depth, depth, x, 1, R(accumulate), y + at, 1);
            }
        });
    }
};

}  // namespace

KERNEL(gemm) { reinterpret_cast<const Product*>(job)->run(); }

KERNEL(gemv) { reinterpret_cast<const VectorProduct*>(job)->run(); }

}  // namespace gpubackprop
