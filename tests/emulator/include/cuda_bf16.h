// __nv_bfloat16 as a storage type: conversions from and to float, rounding to nearest, ties to even.
#ifndef EMULATED_BF16
#define EMULATED_BF16

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float v) {
        uint32_t word;
        memcpy(&word, &v, 4);
        const bool nan = (word & 0x7fffffff) > 0x7f800000;
        bits = nan ? 0x7fff : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    explicit operator float() const {
        const uint32_t word = uint32_t(bits) << 16;
        float v;
        memcpy(&v, &word, 4);
        return v;
    }
};

#endif
