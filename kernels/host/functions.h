// The functions of the formula language for the CPU, without branch, table or fused product: loops over them vectorise,
// and give equal bits on every instruction set. Include them inside the namespace that they shall overload, after
// <math.h>, <stdint.h> and <string.h>; compile with -ffp-contract=off, never with -ffast-math.
#ifndef GPUBACKPROP_HOST_FUNCTIONS
#define GPUBACKPROP_HOST_FUNCTIONS

#define INLINE [[gnu::always_inline]] static inline

namespace elementary {

// first + x · (next + x · (…)), as Horner has it.
template <typename F>
INLINE F polynomial(F, F last) {
    return last;
}
template <typename F, typename... More>
INLINE F polynomial(F x, F first, More... more) {
    return first + x * polynomial(x, more...);
}

// What differs between the types. ROUNDS, added, leaves an integer in the lowest bits; an exponent times LN2_HIGH is
// exact. The polynomials and quotients are minimax, by Remez' algorithm, with coefficients as they are rounded here;
// the error is theirs alone, relative to the function they serve.
template <typename F>
struct Of;

template <>
struct Of<float> {
    using Bits = uint32_t;
    static constexpr int MANTISSA = 23, BIAS = 127;
    static constexpr float ROUNDS = 0x1.8p23f, LEAST_NORMAL = 0x1p-126f, SQRT_HALF = 0x1.6a09e6p-1f;
    static constexpr float LOG2_E = 0x1.715476p0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
    static constexpr float EXP_IS_0 = -104, EXP_IS_INFINITE = 89, TANH_IS_1 = 10;

    // (exp(r) - 1 - r) / r² where |r| <= log(2) / 2; to 2^-26 of expm1.
    INLINE float exp_rest(float r) {
        return polynomial(r, 0.49999997f, 0.16666539f, 0.0416677557f, 0.00836711843f, 0.00138358376f);
    }
    // (2 artanh(√z) / √z - 2) / z where √z <= 3 - √8; to 2^-30 of log.
    INLINE float log_rest(float z) { return polynomial(z, 0.666667759f, 0.399775803f, 0.298709273f); }
    // above / below = (1 - tanh(√z) / √z) / z where √z <= 0.625; to 2^-27 of tanh.
    INLINE float tanh_above(float z) { return polynomial(z, 0.333333075f, 0.00154156785f); }
    INLINE float tanh_below(float z) { return polynomial(z, 1.0f, 0.404612273f); }
};

template <>
struct Of<double> {
    using Bits = uint64_t;
    static constexpr int MANTISSA = 52, BIAS = 1023;
    static constexpr double ROUNDS = 0x1.8p52, LEAST_NORMAL = 0x1p-1022, SQRT_HALF = 0x1.6a09e667f3bcdp-1;
    static constexpr double LOG2_E = 0x1.71547652b82fep0;
    static constexpr double LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45;
    static constexpr double EXP_IS_0 = -746, EXP_IS_INFINITE = 710, TANH_IS_1 = 20;

    // to 2^-60
    INLINE double exp_rest(double r) {
        return polynomial(r, 0.5, 0.16666666666666677, 0.041666666666666692, 0.0083333333333217435,
                          0.0013888888888883338, 0.00019841269885335973, 2.4801587300394652e-05, 2.7557245148951727e-06,
                          2.7557312708588129e-07, 2.5108735969695784e-08, 2.0899070384917771e-09);
    }
    // to 2^-59
    INLINE double log_rest(double z) {
        return polynomial(z, 0.6666666666666734, 0.3999999999941653, 0.28571428742069288, 0.22222198599544551,
                          0.18183563193382976, 0.15314074846966788, 0.14795744515082726);
    }
    // to 2^-56
    INLINE double tanh_above(double z) {
        return polynomial(z, 0.33333333333333326, 0.020496785863995413, 0.00019908889901771364);
    }
    INLINE double tanh_below(double z) {
        return polynomial(z, 1.0, 0.46149035759197116, 0.023288647829338652, 0.00020643827086268507);
    }
};

template <typename F>
INLINE auto bits(F x) {
    typename Of<F>::Bits same;
    memcpy(&same, &x, sizeof x);
    return same;
}

template <typename F, typename Bits>
INLINE F from_bits(Bits same) {
    F x;
    memcpy(&x, &same, sizeof x);
    return x;
}

// 2^n, of an n in two's complement whose highest bits may be anything, if normal; 0 of the n below these.
template <typename F, typename Bits>
INLINE F power(Bits n) {
    return from_bits<F>((n << Of<F>::MANTISSA) + bits(F(1)));
}

INLINE float with_sign(float x, float sign) { return __builtin_copysignf(x, sign); }
INLINE double with_sign(double x, double sign) { return __builtin_copysign(x, sign); }

// exp(x) = 2^n (1 + r + rest), reduced as Cody and Waite have it, "Software Manual for the Elementary Functions".
template <typename F>
struct Exponential {
    using Bits = typename Of<F>::Bits;
    Bits n;  // in the lowest bits
    F r, rest;

    [[gnu::always_inline]] explicit Exponential(F x) {
        const F rounded = x * Of<F>::LOG2_E + Of<F>::ROUNDS, k = rounded - Of<F>::ROUNDS;
        const F high = x - k * Of<F>::LN2_HIGH, low = k * Of<F>::LN2_LOW;
        n = bits(rounded);
        r = high - low;
        rest = r * r * Of<F>::exp_rest(r) + ((high - r) - low);
    }
};

// x, but no further than where exp is 0 or infinite; NaN stays.
template <typename F>
INLINE F within_range(F x) {
    x = Of<F>::EXP_IS_0 > x ? Of<F>::EXP_IS_0 : x;
    return Of<F>::EXP_IS_INFINITE < x ? Of<F>::EXP_IS_INFINITE : x;
}

// 2^n in two factors: it may overflow or underflow where the result does not.
template <typename F>
INLINE F exp(F x) {
    const Exponential<F> e(within_range(x));
    const auto half = e.n >> 1;
    return (1 + (e.r + e.rest)) * power<F>(half) * power<F>(e.n - half);
}

// 2^n (r + rest) + (2^n - 1), with the same factors; lost is what rounding took from their difference.
template <typename F>
INLINE F expm1(F x) {
    const Exponential<F> e(within_range(x));
    const auto half = e.n >> 1;
    const F a = power<F>(half), b = power<F>(e.n - half), one = power<F>(half - e.n);
    const F difference = a - one, lost = (a - difference) - one;
    return with_sign(((difference + a * e.r) + (a * e.rest + lost)) * b, x);
}

// |x| - |x|³ p / q near zero, else 1 - 2 / (exp(2 |x|) + 1); one division serves both.
template <typename F>
INLINE F tanh(F x) {
    const F size = with_sign(x, F(1)), capped = size > Of<F>::TANH_IS_1 ? Of<F>::TANH_IS_1 : size, z = capped * capped;
    const Exponential<F> e(2 * capped);
    const F a = power<F>(e.n), above_1 = (a + 1) + a * (e.r + e.rest);
    const bool small = size < F(0.625);
    const F above = small ? capped * z * Of<F>::tanh_above(z) : 2, below = small ? Of<F>::tanh_below(z) : above_1;
    return with_sign((small ? capped : 1) - above / below, x);
}

// x = 2^k m, normal and positive, with m from √½ to √2.
template <typename F>
struct Split {
    using Bits = typename Of<F>::Bits;
    Bits biased;  // k + BIAS
    F m;

    [[gnu::always_inline]] explicit Split(F x) {
        const Bits shifted = bits(x) + (bits(F(1)) - bits(Of<F>::SQRT_HALF));
        biased = shifted >> Of<F>::MANTISSA;
        m = from_bits<F>((shifted & ((Bits(1) << Of<F>::MANTISSA) - 1)) + bits(Of<F>::SQRT_HALF));
    }
    // k - less
    [[gnu::always_inline]] F exponent(F less) const {
        return from_bits<F>(bits(Of<F>::ROUNDS) + biased) - (Of<F>::ROUNDS + Of<F>::BIAS + less);
    }
};

// k log(2) + log(1 + f + tail), with log(1 + f) = 2 artanh(s) = f - s (f - z rest), s = f / (2 + f), as FDLIBM has it.
template <typename F>
INLINE F log_sum(F k, F f, F tail) {
    const F s = f / (2 + f), z = s * s, half = F(0.5) * f * f;
    return k * Of<F>::LN2_HIGH + (f - (half - (s * (half + z * Of<F>::log_rest(z)) + (k * Of<F>::LN2_LOW + tail))));
}

// y where x is positive and finite, what log has elsewhere; in selects that GCC does not make branches of.
template <typename F>
INLINE F log_or_limit(F x, F y) {
    y = x < F(INFINITY) ? y : x;
    y = x < 0 ? F(NAN) : y;
    return x == 0 ? -F(INFINITY) : y;
}

template <typename F>
INLINE F log(F x) {
    const bool tiny = x < Of<F>::LEAST_NORMAL;
    const Split<F> split(tiny ? x / Of<F>::LEAST_NORMAL : x);
    const F k = split.exponent(tiny ? F(Of<F>::BIAS - 1) : 0);
    return log_or_limit(x, log_sum(k, split.m - 1, F(0)));
}

// log of 1 + x = u + error (Knuth, "The Art of Computer Programming", 4.2.2), both scaled by 2^-k.
template <typename F>
INLINE F log1p(F x) {
    const F u = 1 + x, part = u - 1, error = (1 - (u - part)) + (x - part);
    const Split<F> split(u);
    const F scaled = error * power<F>(Of<F>::BIAS + 1 - split.biased) * F(0.5);
    const F high = split.m - 1, f = high + scaled, tail = scaled - (f - high);
    return with_sign(log_or_limit(u, log_sum(split.exponent(0), f, tail)), x);
}

// size = (quadrant + r) π/2 modulo 2π, |r| <= ½, to 2^-53, for the size of a float (Payne and Hanek, "Radian Reduction
// for Trigonometric Functions"): of the bits of 2/π, those that make whole turns are passed over; the next 52 come in
// two parts, the products with which are exact; 53 follow.
struct Angle {
    uint64_t quadrant;  // in its lowest two bits
    double r;

    INLINE double choose(double size, double a, double b, double c, double d) {
        return size < 0x1p51 ? a : size < 0x1p77 ? b : size < 0x1p103 ? c : d;
    }

    [[gnu::always_inline]] explicit Angle(double size) {
        constexpr double ROUNDS = Of<double>::ROUNDS;
        constexpr double TWO_OVER_PI[] = {0x1.45f3068p-1, 0x1.7272208p-27, 0x1.4a7f09p-54, 0x1.abe8fa8p-79,
                                          0x1.a6ee06p-107};  // each the next 26 bits
        constexpr double AFTER[] = {0x1.4a7f09d5f47d5p-54, 0x1.abe8fa9a6ee07p-79, 0x1.a6ee06db14acdp-107,
                                    0x1.b6295993c439p-132};  // what two of them leave
        const double first = size * choose(size, TWO_OVER_PI[0], TWO_OVER_PI[1], TWO_OVER_PI[2], TWO_OVER_PI[3]);
        const double second = size * choose(size, TWO_OVER_PI[1], TWO_OVER_PI[2], TWO_OVER_PI[3], TWO_OVER_PI[4]);
        const double third = size * choose(size, AFTER[0], AFTER[1], AFTER[2], AFTER[3]);
        const double a = first + ROUNDS, b = second + ROUNDS;
        const double rest = (first - (a - ROUNDS)) + (second - (b - ROUNDS)), c = rest + third + ROUNDS;
        quadrant = bits(a) + bits(b) + bits(c);
        r = (rest - (c - ROUNDS)) + third;
    }
};

// sin(size + quarters π/2) with a sign, in double; the polynomials in r² are minimax to 2^-28 and 2^-34.
INLINE float sine(double size, uint64_t quarters, uint64_t sign) {
    const Angle angle(size);
    const double z = angle.r * angle.r;
    const double s = angle.r * polynomial(z, 1.5707963217001217, -0.64596345945925526, 0.079680022339828419,
                                          -0.0046016242921312414);
    const double c = polynomial(z, 0.9999999999438216, -1.2337005395473948, 0.25366918219741663,
                                -0.020859933145686488, 0.00090335654693537244);
    const uint64_t quadrant = angle.quadrant + quarters, odd = -(quadrant & 1);
    return float(from_bits<double>((bits(s) ^ ((bits(s) ^ bits(c)) & odd)) ^ ((quadrant & 2) << 62) ^ sign));
}
INLINE float sin(float x) { return sine(__builtin_fabs(double(x)), 0, bits(double(x)) & bits(-0.0)); }
INLINE float cos(float x) { return sine(__builtin_fabs(double(x)), 1, 0); }

}  // namespace elementary

#define FUNCTION(f)                                             \
    INLINE float f(float x) { return elementary::f<float>(x); } \
    INLINE double f(double x) { return elementary::f<double>(x); }
FUNCTION(exp)
FUNCTION(expm1)
FUNCTION(log)
FUNCTION(log1p)
FUNCTION(tanh)
#undef FUNCTION

// Of double, libm's: without a branch, each would go through all the 1100 bits of 2/π that the largest needs.
INLINE float sin(float x) { return elementary::sin(x); }
INLINE double sin(double x) { return ::sin(x); }
INLINE float cos(float x) { return elementary::cos(x); }
INLINE double cos(double x) { return ::cos(x); }

INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
INLINE double sqrt(double x) { return __builtin_sqrt(x); }
INLINE float abs(float x) { return __builtin_fabsf(x); }
INLINE double abs(double x) { return __builtin_fabs(x); }
INLINE float pow(float x, float y) { return ::powf(x, y); }
INLINE double pow(double x, double y) { return ::pow(x, y); }

#undef INLINE

#endif
