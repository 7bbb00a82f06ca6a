// Vectors of 32-bit floats and the few operations that the products need, once for each instruction set.
//
// Vectors have 16 lanes with AVX-512 and 8 with AVX2; elsewhere they are arrays of 8 that the compiler vectorises. All
// three fuse each multiplication with its addition, so all three give the same bits.
//
// MEGAMOE_FULL_WIDTH is for CPUs that begin two products of AVX-512 vectors in a cycle, not one: more sums then wait for
// each other, and a larger first cache has room for what comes next.
//
// MEGAMOE_BF16_DOT is another arithmetic, that of AVX512_BF16: an element of x and of a weight is then a pair of BF16, and
// one instruction adds both products, the upper first. Without AVX-512 the same is written out, to test what surrounds it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(MEGAMOE_AVX2) || defined(MEGAMOE_AVX512)
#include <immintrin.h>
#endif

namespace megamoe {

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Has the memory bring what is read later: next to the core, or no closer than the second cache, where the first is
// full of what is read now. GCC takes a function that does nothing else for one that does nothing.
#if defined(__GNUC__)
#define MEGAMOE_PREFETCH(from) __builtin_prefetch(from)
#define MEGAMOE_PREFETCH_SECOND(from) __builtin_prefetch(from, 0, 2)
#else
#define MEGAMOE_PREFETCH(from)
#define MEGAMOE_PREFETCH_SECOND(from)
#endif
#if defined(MEGAMOE_FULL_WIDTH)
#define MEGAMOE_PREFETCH_NEXT(from) MEGAMOE_PREFETCH(from)
#else
#define MEGAMOE_PREFETCH_NEXT(from) MEGAMOE_PREFETCH_SECOND(from)
#endif

// What is stored before is in memory here, and is loaded from there after: the compiler keeps none of it in registers.
#if defined(__GNUC__)
#define MEGAMOE_IN_MEMORY() asm volatile("" : : : "memory")
#else
#define MEGAMOE_IN_MEMORY()
#endif

inline float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

// Round to nearest, ties to even; every NaN becomes 0x7FC0.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : uint16_t(rounded);
}

// 2^(byte - 127); 2^-127 is subnormal and exact
inline float from_e8m0(uint8_t byte) { return as_float(byte ? uint32_t(byte) << 23 : 0x00400000u); }

#if defined(MEGAMOE_AVX512)

constexpr int LANES = 16;
#if defined(MEGAMOE_FULL_WIDTH)
constexpr int TILE_ROWS = 12;  // of a tile of sums, two vectors wide, that stays in registers
constexpr int HELD_ROWS = 8;   // of a tile for whose sums of all groups registers have room beside it
#else
constexpr int TILE_ROWS = 7, HELD_ROWS = 7;
#endif
using Vector = __m512;
using Words = __m512i;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Words load_words(const void* from) { return _mm512_loadu_si512(from); }
inline void store_words(void* to, Words w) { _mm512_storeu_si512(to, w); }
// of 16 values
inline Words widened(const uint16_t* from) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16);
}
// 16 x 16 words: row and column change places.
inline void transpose(Words w[LANES]) {
    Words pairs[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const Words a = _mm512_unpacklo_epi32(w[i], w[i + 1]), b = _mm512_unpackhi_epi32(w[i], w[i + 1]);
        const Words c = _mm512_unpacklo_epi32(w[i + 2], w[i + 3]), d = _mm512_unpackhi_epi32(w[i + 2], w[i + 3]);
        pairs[i] = _mm512_unpacklo_epi64(a, c), pairs[i + 1] = _mm512_unpackhi_epi64(a, c);
        pairs[i + 2] = _mm512_unpacklo_epi64(b, d), pairs[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Words a = _mm512_shuffle_i32x4(pairs[i], pairs[i + 4], 0x88);
        const Words b = _mm512_shuffle_i32x4(pairs[i], pairs[i + 4], 0xDD);
        const Words c = _mm512_shuffle_i32x4(pairs[i + 8], pairs[i + 12], 0x88);
        const Words d = _mm512_shuffle_i32x4(pairs[i + 8], pairs[i + 12], 0xDD);
        w[i] = _mm512_shuffle_i32x4(a, c, 0x88), w[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        w[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD), w[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}
// as to_bf16() rounds
inline void store_bf16(uint16_t* to, Vector v) {
    const Words bits = _mm512_castps_si512(v);
    const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Words sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const Words rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
// of each 32-bit word that holds two BF16 values: the lower, the upper
inline Vector lower(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
inline Vector upper(Words w) {
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xFFFF0000u))));
}
inline Vector load_e8m0(const uint8_t* from) {
    const Words bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const Words bits = _mm512_slli_epi32(bytes, 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x00400000)));
}

// A vector of bytes of E2M1, four values of K for each of two vectors of outputs, as pairs of BF16:
// the first outputs' values 0 and 1, the second outputs' values 0 and 1, then the same of values 2 and 3. See layout.py.
struct DecodeE2M1 {
    Words high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, char(0x80),
        char(0xBF), char(0xBF), char(0xBF), char(0xC0), char(0xC0), char(0xC0), char(0xC0)));
    Words low = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0), 0, 0, char(0x80), char(0xC0), 0, 0x40,
        char(0x80), char(0xC0)));
    Words nibble = _mm512_set1_epi8(15);

    inline void operator()(const uint8_t* from, Words pairs[4]) const {
        const Words bytes = load_words(from);
        const Words first = _mm512_and_si512(bytes, nibble);
        const Words second = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        const Words h0 = _mm512_shuffle_epi8(high, first), l0 = _mm512_shuffle_epi8(low, first);
        const Words h1 = _mm512_shuffle_epi8(high, second), l1 = _mm512_shuffle_epi8(low, second);
        pairs[0] = _mm512_unpacklo_epi8(l0, h0);
        pairs[1] = _mm512_unpackhi_epi8(l0, h0);
        pairs[2] = _mm512_unpacklo_epi8(l1, h1);
        pairs[3] = _mm512_unpackhi_epi8(l1, h1);
    }
};

#elif defined(MEGAMOE_AVX2)

constexpr int LANES = 8;
constexpr int TILE_ROWS = 6, HELD_ROWS = 0;
using Vector = __m256;
using Words = __m256i;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector v) { _mm256_storeu_ps(to, v); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Words load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store_words(void* to, Words w) { _mm256_storeu_si256(static_cast<__m256i*>(to), w); }
// of 8 values
inline Words widened(const uint16_t* from) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
}
// 8 x 8 words: row and column change places.
inline void transpose(Words w[LANES]) {
    Words pairs[LANES];
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
        const Words a = _mm256_unpacklo_epi32(w[i], w[i + 1]), b = _mm256_unpackhi_epi32(w[i], w[i + 1]);
        const Words c = _mm256_unpacklo_epi32(w[i + 2], w[i + 3]), d = _mm256_unpackhi_epi32(w[i + 2], w[i + 3]);
        pairs[i] = _mm256_unpacklo_epi64(a, c), pairs[i + 1] = _mm256_unpackhi_epi64(a, c);
        pairs[i + 2] = _mm256_unpacklo_epi64(b, d), pairs[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        w[i] = _mm256_permute2x128_si256(pairs[i], pairs[i + 4], 0x20);
        w[i + 4] = _mm256_permute2x128_si256(pairs[i], pairs[i + 4], 0x31);
    }
}
// as to_bf16() rounds
inline void store_bf16(uint16_t* to, Vector v) {
    const Words bits = _mm256_castps_si256(v);
    const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Words sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const Words rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0),
                                             _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
inline Vector lower(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
inline Vector upper(Words w) {
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xFFFF0000u))));
}
inline Vector load_e8m0(const uint8_t* from) {
    const Words bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const Words bits = _mm256_slli_epi32(bytes, 23);
    return _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(0x00400000)));
}

struct DecodeE2M1 {
    Words high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, char(0x80),
        char(0xBF), char(0xBF), char(0xBF), char(0xC0), char(0xC0), char(0xC0), char(0xC0)));
    Words low = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0), 0, 0, char(0x80), char(0xC0), 0, 0x40,
        char(0x80), char(0xC0)));
    Words nibble = _mm256_set1_epi8(15);

    inline void operator()(const uint8_t* from, Words pairs[4]) const {
        const Words bytes = load_words(from);
        const Words first = _mm256_and_si256(bytes, nibble);
        const Words second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const Words h0 = _mm256_shuffle_epi8(high, first), l0 = _mm256_shuffle_epi8(low, first);
        const Words h1 = _mm256_shuffle_epi8(high, second), l1 = _mm256_shuffle_epi8(low, second);
        pairs[0] = _mm256_unpacklo_epi8(l0, h0);
        pairs[1] = _mm256_unpackhi_epi8(l0, h0);
        pairs[2] = _mm256_unpacklo_epi8(l1, h1);
        pairs[3] = _mm256_unpackhi_epi8(l1, h1);
    }
};

#else

constexpr int LANES = 8;
constexpr int TILE_ROWS = 4, HELD_ROWS = 0;
struct Vector {
    float lane[LANES];
};
struct Words {
    uint32_t lane[LANES];
};

inline Vector broadcast(float value) {
    Vector v;
    for (float& each : v.lane) each = value;
    return v;
}
inline Vector zero() { return broadcast(0.0f); }
inline Vector load(const float* from) {
    Vector v;
    std::memcpy(v.lane, from, sizeof v);
    return v;
}
inline void store(float* to, const Vector& v) { std::memcpy(to, v.lane, sizeof v); }
inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return v;
}
inline Vector add(const Vector& a, const Vector& b) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = a.lane[i] + b.lane[i];
    return v;
}
inline Vector multiply(const Vector& a, const Vector& b) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = a.lane[i] * b.lane[i];
    return v;
}
inline void store_bf16(uint16_t* to, const Vector& v) {
    for (int i = 0; i < LANES; i++) to[i] = to_bf16(v.lane[i]);
}
inline void store_words(void* to, const Words& w) { std::memcpy(to, w.lane, sizeof w); }
inline Words widened(const uint16_t* from) {
    Words w;
    for (int i = 0; i < LANES; i++) w.lane[i] = uint32_t(from[i]) << 16;
    return w;
}
// LANES x LANES words: row and column change places.
inline void transpose(Words w[LANES]) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) std::swap(w[i].lane[j], w[j].lane[i]);
}
inline Words load_words(const void* from) {
    Words w;
    std::memcpy(w.lane, from, sizeof w);
    return w;
}
inline Vector lower(const Words& w) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = as_float(w.lane[i] << 16);
    return v;
}
inline Vector upper(const Words& w) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = as_float(w.lane[i] & 0xFFFF0000u);
    return v;
}
inline Vector load_e8m0(const uint8_t* from) {
    Vector v;
    for (int i = 0; i < LANES; i++) v.lane[i] = from_e8m0(from[i]);
    return v;
}

struct DecodeE2M1 {
    uint16_t value[16] = {0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                          0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

    inline void operator()(const uint8_t* from, Words pairs[4]) const {
        for (int i = 0; i < LANES; i++) {
            const uint8_t* bytes = from + 16 * (i / 4) + 2 * (i % 4);
            for (int second = 0; second < 2; second++) {
                const uint8_t a = bytes[8 * second], b = bytes[8 * second + 1];
                pairs[second].lane[i] = value[a & 15] | uint32_t(value[b & 15]) << 16;
                pairs[2 + second].lane[i] = value[a >> 4] | uint32_t(value[b >> 4]) << 16;
            }
        }
    }
};

#endif

// Two vectors beside each other, as to_bf16() rounds. False where they have values that are not rounded so.
inline bool store_two(uint16_t* to, const Vector& low, const Vector& high) {
#if defined(__AVX512BF16__)
    constexpr int NAN_OR_SUBNORMAL = 0x01 | 0x20 | 0x80;  // which the instruction rounds otherwise
    store_words(to, Words(_mm512_cvtne2ps_pbh(high, low)));
    return !(_mm512_fpclass_ps_mask(low, NAN_OR_SUBNORMAL) | _mm512_fpclass_ps_mask(high, NAN_OR_SUBNORMAL));
#else
    store_bf16(to, low), store_bf16(to + LANES, high);
    return true;
#endif
}

// ---- elements: what is broadcast of x and multiplied with a vector of weights ----
//
// folded(): weights times their scales, where neither x nor scales are extreme (products.cpp).

#if defined(MEGAMOE_BF16_DOT)

constexpr int STEP = 2;  // values of K in an element
using Element = uint32_t;
using Weight = Words;

inline Element element(const uint16_t* x) { return x[0] | uint32_t(x[1]) << 16; }
inline Words load_elements(const uint16_t* x) { return load_words(x); }
inline Weight weight_of(const Words& pair, int) { return pair; }
inline Weight load_weight(const Element* from) { return load_words(from); }
#if defined(MEGAMOE_AVX512)
inline void store_weight(Element* to, const Weight& w) { _mm512_storeu_si512(to, w); }
inline Vector add_product(Element x, const Weight& w, Vector part) {
    return _mm512_dpbf16_ps(part, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(x)));
}
using Scales = Words;  // what is added to the bits of both BF16 values of a word, unless they are zero
inline Scales load_scales(const uint8_t* from) {
    const Words bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_mullo_epi16(_mm512_sub_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 16)),
                                               _mm512_set1_epi16(127)), _mm512_set1_epi16(128));
}
inline Weight folded(const Weight& w, const Scales& scales) {
    return _mm512_mask_add_epi16(w, _mm512_test_epi16_mask(w, _mm512_set1_epi16(0x7FFF)), w, scales);
}
#else
inline void store_weight(Element* to, const Weight& w) { std::memcpy(to, &w, sizeof w); }
inline Vector add_product(Element x, const Weight& w, const Vector& part) {
    const Vector sum = fma(broadcast(as_float(x & 0xFFFF0000u)), upper(w), part);
    return fma(broadcast(as_float(x << 16)), lower(w), sum);
}
using Scales = const uint8_t*;
inline Scales load_scales(const uint8_t* from) { return from; }
inline Weight folded(const Weight& w, const Scales& scales) {
    uint16_t values[2 * LANES];
    std::memcpy(values, &w, sizeof w);
    for (int i = 0; i < 2 * LANES; i++)
        values[i] = to_bf16(from_bf16(values[i]) * from_e8m0(scales[i / 2]));
    return load_words(values);
}
#endif

#else

constexpr int STEP = 1;
using Element = float;
using Weight = Vector;

inline Element element(const uint16_t* x) { return from_bf16(*x); }
inline Words load_elements(const uint16_t* x) { return widened(x); }
inline Weight weight_of(const Words& pair, int k) { return k % 2 ? upper(pair) : lower(pair); }
inline Weight load_weight(const Element* from) { return load(from); }
inline void store_weight(Element* to, const Weight& w) { store(to, w); }
inline Vector add_product(Element x, const Weight& w, const Vector& part) { return fma(broadcast(x), w, part); }
using Scales = Vector;
inline Scales load_scales(const uint8_t* from) { return load_e8m0(from); }
inline Weight folded(const Weight& w, const Scales& scales) { return multiply(w, scales); }

#endif

}  // namespace megamoe
