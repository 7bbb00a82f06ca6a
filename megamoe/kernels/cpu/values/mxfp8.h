// MXFP8 rounding of one group of values, which quantising, activations and the backward share.
#pragma once

#include <algorithm>

#include "../vectors.h"

namespace megamoe {
namespace {

constexpr int GROUP = 32;           // values under one scale
constexpr int64_t AT_ONCE = 16384;  // values, below which a second thread is not worth waking

int threads_for(int64_t values, int threads) {
    return int(std::max<int64_t>(1, std::min<int64_t>(threads, values / AT_ONCE)));
}

// Scale byte of 2^ceil(log2(max(amax, 1e-4) / 448)), 448 = 1.75 * 2^8; 255 where a value is NaN or infinite.
uint8_t scale_of(const float* values) {
    uint32_t most = 0;  // magnitudes order as their bits do, and NaN comes last
    for (int i = 0; i < GROUP; i++) most = std::max(most, as_bits(values[i]) & 0x7FFFFFFF);
    if (most >= 0x7F800000) return 255;
    most = std::max(most, as_bits(1e-4f));
    return uint8_t(((most + 0x1FFFFF) >> 23) - 8);
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

void quantize_group(const float* values, uint8_t* codes, uint8_t* scale) {
    *scale = scale_of(values);
    if (*scale == 255) {
        std::fill(codes, codes + GROUP, uint8_t(0x7F));
        return;
    }
    const float inverse = inverse_of(*scale);
    for (int i = 0; i < GROUP; i++) codes[i] = to_e4m3(values[i] * inverse);
}

void dequantize_group(const uint8_t* codes, uint8_t scale, uint16_t* out) {
    const float factor = scale == 255 ? as_float(0x7FC00000) : from_e8m0(scale);
    for (int i = 0; i < GROUP; i++) out[i] = to_bf16(from_e4m3(codes[i]) * factor);
}

// The value of to_e4m3(value), without going through its code.
inline float round_e4m3(float value) {
    const uint32_t bits = as_bits(value);
    const ByStep by(bits & 0x7FFFFFFF);
    return as_float(as_bits(as_float(by.sum) - as_float(by.to)) | (bits & 0x80000000));
}

// quantize_group() and dequantize_group() in one.
void round_group(const float* values, uint16_t* out) {
    const uint8_t scale = scale_of(values);
    if (scale == 255) {
        std::fill(out, out + GROUP, uint16_t(0x7FC0));
        return;
    }
    const float inverse = inverse_of(scale), factor = from_e8m0(scale);
    for (int i = 0; i < GROUP; i++) out[i] = uint16_t(as_bits(round_e4m3(values[i] * inverse) * factor) >> 16);  // exact
}

void widen_group(const uint16_t* from, float* to) {
    for (int i = 0; i < GROUP; i++) to[i] = from_bf16(from[i]);
}

}  // namespace
}  // namespace megamoe
