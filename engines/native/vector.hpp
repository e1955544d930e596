// Rows of numbers as long as the processor's registers, and 2^x of them.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace smooth_rt {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE = 8;  // rows that are multiplied at a time: 8 by 3 registers of the 32 hold their sums
#else
constexpr int LANES = 8;
constexpr int TILE = 4;  // 4 by 3 of the 16
#endif
constexpr int GROUPS = 3;  // registers side by side

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vec all(float value) { return value - Vec{}; }

// The larger ones; the second where either is not a number, so that one in the input shows in the output.
inline Vec larger(Vec one, Vec other) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)one, (__m256)other);
#else
    return one > other ? one : other;
#endif
}

// 2^x for x <= 0: of a polynomial on [-1/2, 1/2] (minimax, degree 5: 7.5e-8 off at most) and the whole part. With `SHORT`
// of degree 3 (7.5e-5), for what is rounded to the 8 bits of bf16 next.
template <bool SHORT>
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
    const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec part = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 of -inf
#else
    x = larger(all(-126.0f), x);
    const Vec round = all(12582912.0f);  // 1.5 * 2^23: added, it leaves the whole number in the lowest bits
    const Vec whole = x + round;
    const Vec part = x - (whole - round);
#endif
    Vec p;
    if constexpr (SHORT) {
        p = all(5.5171669e-2f);
        p = p * part + all(2.4261112e-1f);
        p = p * part + all(6.9326099e-1f);
        p = p * part + all(9.9992807e-1f);
    } else {
        p = all(1.3276472e-3f);
        p = p * part + all(9.6755413e-3f);
        p = p * part + all(5.5507133e-2f);
        p = p * part + all(2.4022120e-1f);
        p = p * part + all(6.9314697e-1f);
        p = p * part + all(1.0f);
    }
#if defined(__AVX512DQ__)
    return (Vec)_mm512_scalef_ps((__m512)p, whole);
#else
    return (Vec)((Bits)p + ((Bits)whole << 23));
#endif
}

inline int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace smooth_rt
