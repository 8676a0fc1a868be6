// sin and cos, within 2 ulp. CUDA's own reduce a large argument through local memory, that of float in double besides.
#ifndef GPUBACKPROP_TRIGONOMETRY
#define GPUBACKPROP_TRIGONOMETRY

#include "prelude.cuh"

namespace gpubackprop {

// HALF_PI is π/2 in three parts, each the rounding of what the ones before it leave; TURNS the bits of 2/π after a word
// of zeros, as many as the largest number reaches.
#ifdef FLOAT64
using Bits = Long;
using Signed = Index;
constexpr int WORD = 64, MANTISSA = 52, BIAS = 1023;
constexpr R FAR = 0x1p30, TWO_OVER_PI = 0x1.45f306dc9c883p-1;
constexpr R HALF_PI[] = {0x1.921fb54442d18p0, 0x1.1a62633145c07p-54, -0x1.f1976b7ed8fbcp-110};
constexpr R SINE[] = {1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06,
                      -1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01};
constexpr R COSINE[] = {-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07,
                        2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02, -0.5, 1};
constexpr Bits TURNS[] = {
    0, 0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041, 0xfe5163abdebbc561, 0xb7246e3a424dd2e0,
    0x06492eea09d1921c, 0xfe1deb1cb129a73e, 0xe88235f52ebb4484, 0xe99c7026b45f7e41, 0x3991d639835339f4,
    0x9c845f8bbdf9283b, 0x1ff897ffde05980f, 0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7, 0x4f463f669e5fea2d,
    0x7527bac7ebe5f17b, 0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08, 0x56033046fc7b6bab};
#else
using Bits = Word;
using Signed = int;
constexpr int WORD = 32, MANTISSA = 23, BIAS = 127;
constexpr R FAR = 0x1p16f, TWO_OVER_PI = 0x1.45f306p-1f;
constexpr R HALF_PI[] = {0x1.921fb6p0f, -0x1.777a5cp-25f, -0x1.ee59dap-50f};
constexpr R SINE[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
constexpr R COSINE[] = {2.44331571e-5f, -1.38873162e-3f, 4.16666456e-2f, -0.5f, 1};
constexpr Bits TURNS[] = {
    0, 0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0, 0xdb629599, 0x3c439041, 0xfe5163ab};
#endif

DEVICE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return ::fma(a, b, c); }

template <int N>
DEVICE R polynomial(R x, const R (&coefficients)[N]) {
    R y = coefficients[0];
    UNROLL for (int i = 1; i < N; ++i) y = fused(y, x, coefficients[i]);
    return y;
}

DEVICE Bits bits(R x) {
    const union {
        R value;
        Bits bits;
    } both = {x};
    return both.bits;
}

// The upper half of a product.
DEVICE Word upper(Word a, Word b) { return Word(Long(a) * b >> 32); }
DEVICE Long upper(Long a, Long b) {
    const Long a0 = Word(a), a1 = a >> 32, b0 = Word(b), b1 = b >> 32;
    const Long middle = a1 * b0 + (a0 * b0 >> 32);
    return a1 * b1 + (middle >> 32) + ((a0 * b1 + Word(middle)) >> 32);
}

// quadrant · π/2 + r, with |r| not above π/4 but by rounding.
struct Angle {
    R r;
    Bits quadrant;
};

// 0 <= x < FAR in steps that are exact where they cancel (Cody and Waite, "Software Manual for the Elementary
// Functions"); NaN for what is not finite.
DEVICE Angle near_angle(R x) {
    constexpr R ROUNDS = R(3) * R(Bits(1) << (MANTISSA - 1));  // added, it leaves an integer in the low bits
    const R rounded = fused(x, TWO_OVER_PI, ROUNDS), n = rounded - ROUNDS;
    return {fused(n, -HALF_PI[2], fused(n, -HALF_PI[1], fused(n, -HALF_PI[0], x))), bits(rounded)};
}

// x >= FAR by those bits of 2/π that do not make whole turns (Payne and Hanek, "Radian Reduction for Trigonometric
// Functions").
DEVICE Angle far_angle(R x) {
    constexpr Bits ONE = Bits(1) << MANTISSA;
    const int skipped = int(bits(x) >> MANTISSA) - BIAS - MANTISSA + WORD - 2;
    Bits high = TURNS[0], middle = TURNS[1], low = TURNS[2], next = TURNS[3];
    UNROLL for (int i = 4; i < int(sizeof(TURNS) / sizeof(Bits)); ++i) {
        if (skipped >= (i - 3) * WORD) high = middle, middle = low, low = next, next = TURNS[i];
    }
    const int left = skipped % WORD, right = WORD - 1 - left;
    high = high << left | middle >> 1 >> right;
    middle = middle << left | low >> 1 >> right;
    low = low << left | next >> 1 >> right;

    // x · 2/π: two bits for the quadrant, then its fraction, in two words.
    const Bits mantissa = (bits(x) & (ONE - 1)) | ONE;
    const Bits second = mantissa * middle + upper(mantissa, low);
    const Bits first = mantissa * high + upper(mantissa, middle) + (second < mantissa * middle);
    const Bits quadrant = (first + (Bits(1) << (WORD - 3))) >> (WORD - 2);
    const Signed rest = Signed(first - (quadrant << (WORD - 2)));
    constexpr R UNIT = R(1) / R(Bits(1) << (WORD - 2));
    const R whole = R(rest), part = R(rest - Signed(whole)) + R(second) * (UNIT / 4);
    const R sum = whole + part, error = part - (sum - whole);
    return {fused(sum, HALF_PI[0] * UNIT, fused(sum, HALF_PI[1] * UNIT, error * (HALF_PI[0] * UNIT))), quadrant};
}

DEVICE Angle angle(R x) { return x >= FAR && x < R(INFINITY) ? far_angle(x) : near_angle(x); }

DEVICE R sine(Angle x) {
    const R z = x.r * x.r;
    const R y = x.quadrant & 1 ? polynomial(z, COSINE) : fused(polynomial(z, SINE), z * x.r, x.r);
    return x.quadrant & 2 ? -y : y;
}

DEVICE R cosine(Angle x) { return sine({x.r, x.quadrant + 1}); }

DEVICE R sin(R x) {
    const R y = sine(angle(abs(x)));
    return bits(x) >> (WORD - 1) ? -y : y;
}
DEVICE R cos(R x) { return cosine(angle(abs(x))); }

}  // namespace gpubackprop

#endif
