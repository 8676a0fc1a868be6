// Products by the BLAS that NumPy has loaded: one more kernel, so that a whole step is one call.
#include "host.h"

namespace gpubackprop {
namespace {

// out (+)= op(a) · op(b), row by row, for each matrix of a stack.
struct Product {
    using Blas = void (*)(int, int, int, Index, Index, Index, R, const R*, Index, const R*, Index, R, R*, Index);
    Blas blas;  // cblas_?gemm with 64-bit integers
    R* out;
    const R *a, *b;
    Index transpose_a, transpose_b, stride_a, stride_b;
    Index count, m, n, k, accumulate;

    enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };  // CBLAS's numbers
    static int op(Index transpose) { return transpose ? TRANSPOSED : AS_IT_IS; }

    void run() const {
        for (Index i = 0; i < count; ++i) {
            blas(ROW_MAJOR, op(transpose_a), op(transpose_b), m, n, k, R(1), a + i * stride_a, transpose_a ? m : k,
                 b + i * stride_b, transpose_b ? k : n, R(accumulate), out + i * m * n, n);
        }
    }
};

}  // namespace

KERNEL(gemm) { reinterpret_cast<const Product*>(job)->run(); }

}  // namespace gpubackprop
