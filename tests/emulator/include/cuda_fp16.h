// __half as a storage type: conversions from and to float, rounding to nearest, ties to even.
#ifndef EMULATED_FP16
#define EMULATED_FP16

#include <stdint.h>
#include <string.h>

struct __half {
    uint16_t bits;

    __half() = default;
    explicit __half(float v) {
        uint32_t word;
        memcpy(&word, &v, 4);
        const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
        uint32_t rounded;
        if (magnitude > 0x7f800000) {
            rounded = 0x7fff;  // NaN
        } else if (magnitude >= 0x477ff000) {
            rounded = 0x7c00;  // from half a step above 65504 on, infinity
        } else if (magnitude < 0x38800000) {
            const float shifted = (v < 0 ? -v : v) + 0.5f;  // a step of 0.5f is the least half
            memcpy(&rounded, &shifted, 4);
            rounded -= 0x3f000000;
        } else {
            rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
        }
        bits = uint16_t(sign | rounded);
    }
    explicit operator float() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
        uint32_t word;
        if (magnitude < 0x400) {
            const float least = 0x1p-24f, v = float(magnitude) * least;
            memcpy(&word, &v, 4);
        } else {
            word = (magnitude << 13) + ((magnitude < 0x7c00 ? 112u : 224u) << 23);
        }
        word |= sign;
        float v;
        memcpy(&v, &word, 4);
        return v;
    }
};

#endif
