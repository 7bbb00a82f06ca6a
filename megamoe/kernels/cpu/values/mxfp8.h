// MXFP8 rounding of one group of values, which quantising, activations and the backward share.
#pragma once

#include <algorithm>

#include "../vectors.h"

namespace megamoe {
namespace {

constexpr int GROUP = 32;           // values under one scale
constexpr int64_t AT_ONCE = 16384;  // values, below which a second thread is not worth waking

inline int threads_for(int64_t values, int threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, values / AT_ONCE)));
}

// Scale byte of 2^ceil(log2(max(amax, 1e-4) / 448)), 448 = 1.75 * 2^8, from the bits of amax: magnitudes order as their
// bits do, and NaN comes last. 255 where a value is NaN or infinite.
inline uint8_t scale_for(uint32_t amax) {
    if (amax >= 0x7F800000) return 255;
    return uint8_t(((std::max(amax, as_bits(1e-4f)) + 0x1FFFFF) >> 23) - 8);
}

// What values are multiplied by before they are rounded, 1 / scale.
float inverse_of(uint8_t scale) { return as_float(uint32_t(254 - scale) << 23); }

// A magnitude of at most 448 and what it is added to, so that FP32 rounds the sum to E4M3, ties to even: FP32's step there
// is E4M3's at the magnitude, 2^-9 below 2^-6.
struct ByStep {
    uint32_t to, sum;

    explicit ByStep(uint32_t magnitude)
        : to(std::max(magnitude & 0x7F800000, 121u << 23) + (20u << 23)),
          sum(as_bits(as_float(magnitude) + as_float(to))) {}
};

// E4M3, ties to even, of a magnitude of at most 448.
inline uint8_t to_e4m3(float value) {
    const uint32_t bits = as_bits(value);
    const ByStep by(bits & 0x7FFFFFFF);
    return uint8_t((by.sum - by.to + ((by.to - (141u << 23)) >> 20)) | (bits >> 24 & 0x80));
}

inline float from_e4m3(uint8_t code) {
    const uint32_t magnitude = code & 0x7F, sign = uint32_t(code & 0x80) << 24;
    const float normal = as_float((magnitude << 20) + (120u << 23)), subnormal = float(magnitude) * 0x1p-9f;
    const float value = magnitude < 8 ? subnormal : normal;
    return magnitude == 0x7F ? as_float(0x7FC00000) : as_float(as_bits(value) | sign);
}

// The value of to_e4m3(value), without going through its code.
inline float round_e4m3(float value) {
    const uint32_t bits = as_bits(value);
    const ByStep by(bits & 0x7FFFFFFF);
    return as_float(as_bits(as_float(by.sum) - as_float(by.to)) | (bits & 0x80000000));
}

// Whether any code times this scale is a normal number of BF16, or zero or NaN.
inline bool is_moderate(uint8_t scale) { return scale >= 127 - 100 && scale <= 127 + 100; }

#if defined(MEGAMOE_AVX512)

// A group of FP32 or BF16 values, and the same steps as above on all of them.
struct Group {
    Words low, high;  // bits

    Group(Vector first, Vector second) : low(_mm512_castps_si512(first)), high(_mm512_castps_si512(second)) {}
    explicit Group(const float* values) : low(load_words(values)), high(load_words(values + LANES)) {}
    explicit Group(const uint16_t* values) : low(widened(values)), high(widened(values + LANES)) {}

    uint8_t scale() const {
        const Words magnitude = _mm512_set1_epi32(0x7FFFFFFF);
        return scale_for(_mm512_reduce_max_epu32(
            _mm512_max_epu32(_mm512_and_si512(low, magnitude), _mm512_and_si512(high, magnitude))));
    }
};

// Values times `inverse`, rounded to E4M3 by ByStep's sum.
struct Rounded {
    Words sign, to, sum;

    Rounded(Words values, float inverse) {
        const Words bits = _mm512_castps_si512(multiply(_mm512_castsi512_ps(values), broadcast(inverse)));
        const Words magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
        const Words exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7F800000));
        sign = _mm512_xor_si512(bits, magnitude);
        to = _mm512_add_epi32(_mm512_max_epu32(exponent, _mm512_set1_epi32(121 << 23)), _mm512_set1_epi32(20 << 23));
        sum = _mm512_castps_si512(add(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(to)));
    }

    void store_codes(uint8_t* codes) const {
        const Words steps = _mm512_srli_epi32(_mm512_sub_epi32(to, _mm512_set1_epi32(141 << 23)), 20);
        const Words code = _mm512_add_epi32(_mm512_sub_epi32(sum, to), steps);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                         _mm512_cvtepi32_epi8(_mm512_or_si512(code, _mm512_srli_epi32(sign, 24))));
    }

    Words times(float factor) const {
        const Vector value = _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_castsi512_ps(to));
        const Words signed_value = _mm512_or_si512(_mm512_castps_si512(value), sign);
        return _mm512_castps_si512(multiply(_mm512_castsi512_ps(signed_value), broadcast(factor)));
    }
};

template <class Value>
void quantize_group(const Value* values, uint8_t* codes, uint8_t* scale) {
    const Group group(values);
    const uint8_t found = group.scale();
    *scale = found;
    if (found == 255) {
        std::fill(codes, codes + GROUP, uint8_t(0x7F));
        return;
    }
    const Rounded low(group.low, inverse_of(found)), high(group.high, inverse_of(found));
    low.store_codes(codes), high.store_codes(codes + LANES);
}

// quantize_group() and dequantize_group() in one.
inline void round_group(const Group& group, uint16_t* out) {
    const uint8_t scale = group.scale();
    if (scale == 255) {
        std::fill(out, out + GROUP, uint16_t(0x7FC0));
        return;
    }
    const float inverse = inverse_of(scale), factor = from_e8m0(scale);
    const Words low = Rounded(group.low, inverse).times(factor), high = Rounded(group.high, inverse).times(factor);
    alignas(64) static constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    store_words(out, _mm512_permutex2var_epi16(low, load_words(UPPER), high));  // exact
}
inline void round_group(const float* values, uint16_t* out) { round_group(Group(values), out); }
inline void round_group(const uint16_t* values, uint16_t* out) { round_group(Group(values), out); }

inline void dequantize_group(const uint8_t* codes, uint8_t scale, uint16_t* out) {
    if (!is_moderate(scale)) {
        const float factor = scale == 255 ? as_float(0x7FC00000) : from_e8m0(scale);
        for (int i = 0; i < GROUP; i++) out[i] = to_bf16(from_e4m3(codes[i]) * factor);
        return;
    }
    alignas(64) static constexpr uint16_t SUBNORMAL[32] = {0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};
    const Words code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const Words magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
    const __mmask32 number = _mm512_cmpneq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F));
    Words value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
                                          load_words(SUBNORMAL));
    value = _mm512_mask_add_epi16(value, _mm512_test_epi16_mask(magnitude, magnitude), value,
                                  _mm512_set1_epi16(short((scale - 127) * 128)));
    value = _mm512_or_si512(value, _mm512_slli_epi16(_mm512_sub_epi16(code, magnitude), 8));
    store_words(out, _mm512_mask_mov_epi16(_mm512_set1_epi16(0x7FC0), number, value));
}

#else

inline uint8_t scale_of(const float* values) {
    uint32_t most = 0;
    for (int i = 0; i < GROUP; i++) most = std::max(most, as_bits(values[i]) & 0x7FFFFFFF);
    return scale_for(most);
}

inline void quantize_group(const float* values, uint8_t* codes, uint8_t* scale) {
    *scale = scale_of(values);
    if (*scale == 255) {
        std::fill(codes, codes + GROUP, uint8_t(0x7F));
        return;
    }
    const float inverse = inverse_of(*scale);
    for (int i = 0; i < GROUP; i++) codes[i] = to_e4m3(values[i] * inverse);
}

inline void dequantize_group(const uint8_t* codes, uint8_t scale, uint16_t* out) {
    const float factor = scale == 255 ? as_float(0x7FC00000) : from_e8m0(scale);
    for (int i = 0; i < GROUP; i++) out[i] = to_bf16(from_e4m3(codes[i]) * factor);
}

// quantize_group() and dequantize_group() in one.
inline void round_group(const float* values, uint16_t* out) {
    const uint8_t scale = scale_of(values);
    if (scale == 255) {
        std::fill(out, out + GROUP, uint16_t(0x7FC0));
        return;
    }
    const float inverse = inverse_of(scale), factor = from_e8m0(scale);
    for (int i = 0; i < GROUP; i++) out[i] = uint16_t(as_bits(round_e4m3(values[i] * inverse) * factor) >> 16);  // exact
}

// The same of BF16 values.
inline void quantize_group(const uint16_t* values, uint8_t* codes, uint8_t* scale) {
    float group[GROUP];
    for (int i = 0; i < GROUP; i++) group[i] = from_bf16(values[i]);
    quantize_group(group, codes, scale);
}

inline void round_group(const uint16_t* values, uint16_t* out) {
    float group[GROUP];
    for (int i = 0; i < GROUP; i++) group[i] = from_bf16(values[i]);
    round_group(group, out);
}

#endif

}  // namespace
}  // namespace megamoe
