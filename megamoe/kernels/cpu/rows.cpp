// What surrounds the products: MXFP8 rounding, the activation, the sum of slots. Each value is a correctly rounded
// operation on values of its own row, in the order that is written, so no row's bits depend on its company.
#include <algorithm>

#include "library.h"
#include "values/mxfp8.h"

namespace megamoe {
namespace {

// NaN stays NaN.
inline float clamp(float value, float limit) {
    const float below = value > limit ? limit : value;
    return below < -limit ? -limit : below;
}

#if defined(MEGAMOE_AVX512)
inline Vector clamp(Vector value, float limit) {
    return _mm512_max_ps(broadcast(-limit), _mm512_min_ps(broadcast(limit), value));
}

// LANES values by a table over the bits of BF16. A gather takes twice the time on a Zen 5.
inline Vector look_up(const float* table, const uint16_t* codes) {
    const auto four = [=](int i) {
        __m128 found = _mm_load_ss(table + codes[i]);
        found = _mm_insert_ps(found, _mm_load_ss(table + codes[i + 1]), 0x10);
        found = _mm_insert_ps(found, _mm_load_ss(table + codes[i + 2]), 0x20);
        return _mm_insert_ps(found, _mm_load_ss(table + codes[i + 3]), 0x30);
    };
    const auto eight = [=](int i) { return _mm256_insertf128_ps(_mm256_castps128_ps256(four(i)), four(i + 4), 1); };
    return _mm512_insertf32x8(_mm512_castps256_ps512(eight(0)), eight(8), 1);
}
#endif

// What multiplies f(gate): 32 values of up, `count` of them there; or a vector of it.
struct Clamped {
    const uint16_t* up;
    float limit;

    void times(float* group, int64_t k, int count) const {
        uint16_t values[GROUP] = {};
        std::memcpy(values, up + k, count * sizeof *values);
        for (int i = 0; i < GROUP; i++) group[i] = group[i] * clamp(from_bf16(values[i]), limit);
    }
#if defined(MEGAMOE_AVX512)
    Vector times(Vector f, int64_t k) const { return multiply(f, clamp(upper(widened(up + k)), limit)); }
#endif
};

struct ClampedAndShifted {
    const uint16_t* up;
    float limit, shift;

    void times(float* group, int64_t k, int count) const {
        uint16_t values[GROUP] = {};
        std::memcpy(values, up + k, count * sizeof *values);
        for (int i = 0; i < GROUP; i++) group[i] = group[i] * (clamp(from_bf16(values[i]), limit) + shift);
    }
#if defined(MEGAMOE_AVX512)
    Vector times(Vector f, int64_t k) const {
        return multiply(f, add(clamp(upper(widened(up + k)), limit), broadcast(shift)));
    }
#endif
};

struct FromTable {
    const uint16_t* up;
    const float* table;

    void times(float* group, int64_t k, int count) const {
        for (int i = 0; i < count; i++) group[i] = group[i] * table[up[k + i]];
    }
#if defined(MEGAMOE_AVX512)
    Vector times(Vector f, int64_t k) const { return multiply(f, look_up(table, up + k)); }
#endif
};

struct Alone {
    void times(float*, int64_t, int) const {}
#if defined(MEGAMOE_AVX512)
    Vector times(Vector f, int64_t) const { return f; }
#endif
};

// `count` of a group's values, at most GROUP; inlined, so that where it is known to be GROUP loops have that length.
template <class Up>
inline void activate_group(const uint16_t* gates, const Up& up, float weight, int64_t k, int count, const float* table,
                           bool quantized, uint16_t* out) {
#if defined(MEGAMOE_AVX512)
    if (count == GROUP) {
        const auto vector = [&](int64_t at) {
            return multiply(up.times(look_up(table, gates + at), at), broadcast(weight));
        };
        const Vector low = vector(k), high = vector(k + LANES);
        if (quantized) {
            round_group(Group(low, high), out + k);
        } else if (!store_two(out + k, low, high)) {
            store_bf16(out + k, low), store_bf16(out + k + LANES, high);
        }
        return;
    }
#endif
    float group[GROUP] = {};
    for (int i = 0; i < count; i++) group[i] = table[gates[k + i]];
    up.times(group, k, count);
    for (int i = 0; i < GROUP; i++) group[i] = group[i] * weight;
    if (quantized) {
        round_group(group, out + k);
    } else {
        uint16_t rounded[GROUP];
        for (int i = 0; i < GROUP; i++) rounded[i] = to_bf16(group[i]);
        std::memcpy(out + k, rounded, count * sizeof *rounded);
    }
}

template <class Up>
void activate_row(const uint16_t* gates, const Up& up, float weight, int64_t width, const float* table, bool quantized,
                  uint16_t* out) {
    int64_t k = 0;
    for (; k + GROUP <= width; k += GROUP) activate_group(gates, up, weight, k, GROUP, table, quantized, out);
    if (k < width) activate_group(gates, up, weight, k, int(width - k), table, quantized, out);
}

// Rows of which some are summed in their order: value by value, and their sum rounded once.
struct BF16Rows {
    const uint16_t* rows;
    int64_t stride;

    // [stride] of the rows that `positions` has, `count` of them
    void sum(const int64_t* positions, int64_t count, uint16_t* out) const {
        constexpr int VECTORS = 8, AT_ONCE = VECTORS * LANES;  // whose sums stay in registers
        int64_t k = 0;
        for (; k + AT_ONCE <= stride; k += AT_ONCE) {
            Vector sums[VECTORS];
            for (Vector& each : sums) each = zero();
            for (int64_t i = 0; i < count; i++) {
                const uint16_t* from = rows + positions[i] * stride + k;
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sums[v] = add(sums[v], upper(widened(from + v * LANES)));
            }
            for (int v = 0; v < VECTORS; v++) store_bf16(out + k + v * LANES, sums[v]);
        }
        for (; k < stride; k++) {
            float sum = 0;
            for (int64_t i = 0; i < count; i++) sum += from_bf16(rows[positions[i] * stride + k]);
            out[k] = to_bf16(sum);
        }
    }
};

struct MXFP8Rows {
    const uint8_t* values;
    int64_t values_stride;
    const uint8_t* scales;
    int64_t scales_stride, width;

    const uint8_t* codes(int64_t row, int64_t k) const { return values + row * values_stride + k; }
    uint8_t scale(int64_t row, int64_t k) const { return scales[row * scales_stride + k / GROUP]; }

    void sum(const int64_t* positions, int64_t count, uint16_t* out) const {
        for (int64_t k = 0; k < width; k += GROUP) {
#if defined(MEGAMOE_AVX512)
            bool moderate = true;
            for (int64_t i = 0; i < count; i++) moderate &= is_moderate(scale(positions[i], k));
            if (moderate) {  // so that BF16 has each value exactly
                Vector low = zero(), high = zero();
                for (int64_t i = 0; i < count; i++) {
                    uint16_t group[GROUP];
                    dequantize_group(codes(positions[i], k), scale(positions[i], k), group);
                    low = add(low, upper(widened(group))), high = add(high, upper(widened(group + LANES)));
                }
                store_bf16(out + k, low), store_bf16(out + k + LANES, high);
                continue;
            }
#endif
            float sums[GROUP] = {};
            for (int64_t i = 0; i < count; i++) {  // a code times a power of two is exact
                const uint8_t *of_row = codes(positions[i], k), by = scale(positions[i], k);
                const float factor = by == 255 ? as_float(0x7FC00000) : from_e8m0(by);
                for (int j = 0; j < GROUP; j++) sums[j] += from_e4m3(of_row[j]) * factor;
            }
            for (int j = 0; j < GROUP; j++) out[k + j] = to_bf16(sums[j]);
        }
    }
};

template <class Rows>
void sum_slots(const Rows& rows, int64_t width, const int64_t* positions, int64_t tokens, int64_t topk, uint16_t* out,
               int threads) {
    const int workers = threads_for(tokens * topk * width, threads);
#pragma omp parallel for num_threads(workers) if (workers > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const RoundToNearest state;
        rows.sum(positions + t * topk, topk, out + t * width);
    }
}

}  // namespace
}  // namespace megamoe

using namespace megamoe;

// x [rows, width] bfloat16 -> values [., width] E4M3 and scales [., width / 32] E8M0, each of its stride; row r goes to
// row goes[r], null for r itself.
extern "C" void megamoe_quantize(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t width, uint8_t* values,
                                 int64_t values_stride, uint8_t* scales, int64_t scales_stride, const int64_t* goes,
                                 int threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, threads)) if (threads_for(rows * width, threads) > 1)
    for (int64_t r = 0; r < rows; r++) {
        const RoundToNearest state;
        const int64_t to = goes ? goes[r] : r;
        for (int64_t k = 0; k < width; k += GROUP)
            quantize_group(x + r * x_stride + k, values + to * values_stride + k,
                           scales + to * scales_stride + k / GROUP);
    }
}

// The inverse -> out [rows, width] bfloat16
extern "C" void megamoe_dequantize(const uint8_t* values, int64_t values_stride, const uint8_t* scales,
                                   int64_t scales_stride, int64_t rows, int64_t width, uint16_t* out,
                                   int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, threads)) if (threads_for(rows * width, threads) > 1)
    for (int64_t r = 0; r < rows; r++) {
        const RoundToNearest state;
        for (int64_t k = 0; k < width; k += GROUP)
            dequantize_group(values + r * values_stride + k, scales[r * scales_stride + k / GROUP],
                             out + r * out_stride + k);
    }
}

// x [rows, width] bfloat16 rounded to MXFP8 and back -> out [rows, width] bfloat16
extern "C" void megamoe_round(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t width, uint16_t* out,
                              int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, threads)) if (threads_for(rows * width, threads) > 1)
    for (int64_t r = 0; r < rows; r++) {
        const RoundToNearest state;
        for (int64_t k = 0; k < width; k += GROUP) round_group(x + r * x_stride + k, out + r * out_stride + k);
    }
}

// f(gate) * up's factor * weight, rounded to MXFP8 and back (quantized) or to BF16.
//   gate_up [rows, 2 * width] bfloat16, gate first, or, not gated, [rows, width]; weights [rows] float32
//   table [65536] float32: f of each BF16 value; up_table likewise up's factor, null where that is clamp(up) + shift
//   limit: of up's magnitude, infinite where there is none; out [rows, width] bfloat16
extern "C" void megamoe_activate(const uint16_t* gate_up, const float* weights, int64_t rows, int64_t width, int gated,
                                 const float* table, const float* up_table, float limit, float shift, int quantized,
                                 uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads_for(rows * width, threads)) if (threads_for(rows * width, threads) > 1)
    for (int64_t r = 0; r < rows; r++) {
        const RoundToNearest state;
        const uint16_t* from = gate_up + r * (gated ? 2 : 1) * width;
        uint16_t* to = out + r * width;
        if (!gated) {
            activate_row(from, Alone(), weights[r], width, table, quantized, to);
        } else if (up_table) {
            activate_row(from, FromTable{from + width, up_table}, weights[r], width, table, quantized, to);
        } else if (shift != 0) {
            activate_row(from, ClampedAndShifted{from + width, limit, shift}, weights[r], width, table, quantized, to);
        } else {
            activate_row(from, Clamped{from + width, limit}, weights[r], width, table, quantized, to);
        }
    }
}

// out[goes[r]] = sums[r] + bias of r's expert, times weights[r] where there are weights, rounded once; goes null for r.
//   sums [., width] float32, rows sorted by expert; bias [experts, width] float32; counts [experts]
//   out [., width] bfloat16 of that stride
extern "C" void megamoe_add_bias(const float* sums, int64_t width, const float* bias, const int64_t* counts,
                                 int64_t experts, const float* weights, uint16_t* out, int64_t out_stride,
                                 const int64_t* goes, int threads) {
    int64_t rows = 0;
    for (int64_t expert = 0; expert < experts; expert++) rows += counts[expert];
    if (!rows) return;
    const int shares = threads_for(rows * width, threads);
#pragma omp parallel for num_threads(shares) if (shares > 1)
    for (int share = 0; share < shares; share++) {
        const RoundToNearest state;
        const int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
        int64_t expert = 0, last = counts[0];  // where the expert's rows end
        for (int64_t r = begin; r < end; r++) {
            while (r >= last) last += counts[++expert];
            const float *from = sums + r * width, *added = bias + expert * width;
            uint16_t* to = out + (goes ? goes[r] : r) * out_stride;
            if (weights) {
                for (int64_t i = 0; i < width; i++) to[i] = to_bf16(from[i] + weights[r] * added[i]);
            } else {
                for (int64_t i = 0; i < width; i++) to[i] = to_bf16(from[i] + added[i]);
            }
        }
    }
}

// out[t] = sum over slots, ascending, of rows[positions[t][slot]], in FP32 from zero, rounded once.
//   rows [., width] bfloat16; positions [tokens, topk]; out [tokens, width] bfloat16
extern "C" void megamoe_reduce_slots(const uint16_t* rows, int64_t width, const int64_t* positions, int64_t tokens,
                                     int64_t topk, uint16_t* out, int threads) {
    sum_slots(BF16Rows{rows, width}, width, positions, tokens, topk, out, threads);
}

// The same of rows that are values [., width] E4M3 and scales [., width / 32] E8M0, each of its stride.
extern "C" void megamoe_reduce_mxfp8_slots(const uint8_t* values, int64_t values_stride, const uint8_t* scales,
                                           int64_t scales_stride, int64_t width, const int64_t* positions,
                                           int64_t tokens, int64_t topk, uint16_t* out, int threads) {
    sum_slots(MXFP8Rows{values, values_stride, scales, scales_stride, width}, width, positions, tokens, topk, out, threads);
}

// Reads `words` words and does nothing else with them: the ceiling of what reads weights, for a benchmark.
extern "C" uint64_t megamoe_read(const uint64_t* from, int64_t words) {
    uint64_t kept[32] = {};
    for (int64_t i = 0; i + 32 <= words; i += 32)
        for (int j = 0; j < 32; j++) kept[j] ^= from[i + j];
    uint64_t all = 0;
    for (uint64_t each : kept) all ^= each;
    return all;
}
