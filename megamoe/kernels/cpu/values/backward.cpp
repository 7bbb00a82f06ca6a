// What surrounds the products of a backward: the activation's derivative, and rows turned into columns. Each value is a
// correctly rounded operation on values of its own row, in the order that is written, as in rows.cpp.
#include <algorithm>

#include "../library.h"
#include "mxfp8.h"

using namespace megamoe;

namespace {

// The tables and numbers of an activation, as training/derivatives.py has them; null where there is none.
struct Activation {
    const float *gate, *gate_slope, *up, *up_slope;
    float limit, shift;
    bool gated;

    // Factors of `count` values of up and, where there are any, what their derivatives are multiplied by.
    void read_up(const uint16_t* ups, int count, float* factors, float* slopes) const {
        if (up) {
            for (int i = 0; i < count; i++) factors[i] = up[ups[i]];
        } else {
            for (int i = 0; i < count; i++) {
                const float value = from_bf16(ups[i]), below = value > limit ? limit : value;
                factors[i] = below < -limit ? -limit : below;
            }
            if (shift != 0)
                for (int i = 0; i < count; i++) factors[i] += shift;
        }
        if (up_slope)
            for (int i = 0; i < count; i++) slopes[i] = up_slope[ups[i]];
    }
};

// A group's values, `count` of GROUP: tables first, so that the arithmetic is loops over vectors.
//   lanes gets gradient * p of each, activated p * weight, of_gate and of_up the gradients
inline void backward_group(const Activation& a, const uint16_t* gates, const uint16_t* ups, float weight,
                           const float* gradient, int count, float* lanes, float* activated, uint16_t* of_gate,
                           uint16_t* of_up) {
    float value[GROUP] = {}, slope[GROUP] = {}, factor[GROUP] = {}, up_slope[GROUP] = {}, incoming[GROUP] = {};
    std::memcpy(incoming, gradient, count * sizeof *incoming);
    for (int i = 0; i < count; i++) value[i] = a.gate[gates[i]];
    for (int i = 0; i < count; i++) slope[i] = a.gate_slope[gates[i]];
    if (!a.gated) {
        for (int i = 0; i < count; i++) lanes[i] += incoming[i] * value[i];
        for (int i = 0; i < GROUP; i++) activated[i] = value[i] * weight;
        for (int i = 0; i < GROUP; i++) of_gate[i] = to_bf16(incoming[i] * weight * slope[i]);
        return;
    }
    a.read_up(ups, count, factor, up_slope);
    float product[GROUP], scaled[GROUP], through[GROUP];
    for (int i = 0; i < GROUP; i++) product[i] = value[i] * factor[i];
    for (int i = 0; i < GROUP; i++) scaled[i] = incoming[i] * weight;
    for (int i = 0; i < count; i++) lanes[i] += incoming[i] * product[i];
    for (int i = 0; i < GROUP; i++) activated[i] = product[i] * weight;
    for (int i = 0; i < GROUP; i++) of_gate[i] = to_bf16(scaled[i] * factor[i] * slope[i]);
    for (int i = 0; i < GROUP; i++) through[i] = scaled[i] * value[i];
    if (a.up_slope)
        for (int i = 0; i < GROUP; i++) through[i] *= up_slope[i];
    for (int i = 0; i < GROUP; i++) of_up[i] = to_bf16(through[i]);
}

// 16 words of each of 16 rows, turned: out[c][p] = in[p][c].
#if defined(MEGAMOE_AVX512)
inline void turn_words(const uint32_t (*in)[GROUP], uint32_t* out, int64_t pitch) {
    __m512i rows[16], half[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(in[i]);
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + 2 + j]);
        }
    // rows[4 g + c] has, in each quarter q, column 4 q + c of the rows 4 g to 4 g + 3
    for (int c = 0; c < 4; c++) {
        const __m512i ab = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88), cd = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
        const __m512i ef = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xDD), gh = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xDD);
        _mm512_storeu_si512(out + c * pitch, _mm512_shuffle_i32x4(ab, cd, 0x88));
        _mm512_storeu_si512(out + (4 + c) * pitch, _mm512_shuffle_i32x4(ef, gh, 0x88));
        _mm512_storeu_si512(out + (8 + c) * pitch, _mm512_shuffle_i32x4(ab, cd, 0xDD));
        _mm512_storeu_si512(out + (12 + c) * pitch, _mm512_shuffle_i32x4(ef, gh, 0xDD));
    }
}
#else
inline void turn_words(const uint32_t (*in)[GROUP], uint32_t* out, int64_t pitch) {
    for (int c = 0; c < 16; c++)
        for (int p = 0; p < 16; p++) out[c * pitch + p] = in[p][c];
}
#endif

// out[c][r] = from[source[r]][c] for GROUP columns and GROUP rows; rows beyond `rows` are zeros.
void turn_tile(const uint16_t* from, int64_t stride, const int64_t* source, int64_t first, int64_t rows, int columns,
               uint16_t* out, int64_t pitch) {
    alignas(64) uint32_t pairs[GROUP / 2][GROUP] = {};  // of two rows, by column
    for (int p = 0; p < GROUP / 2; p++) {
        const int64_t r = first + 2 * p;
        if (r >= rows) break;
        const uint16_t* even = from + (source ? source[r] : r) * stride;
        const uint16_t* odd = r + 1 < rows ? from + (source ? source[r + 1] : r + 1) * stride : nullptr;
        if (odd && columns == GROUP) {
            for (int c = 0; c < GROUP; c++) pairs[p][c] = even[c] | uint32_t(odd[c]) << 16;
        } else {
            for (int c = 0; c < columns; c++) pairs[p][c] = even[c] | (odd ? uint32_t(odd[c]) << 16 : 0);
        }
    }
    alignas(64) uint32_t turned[GROUP][GROUP / 2];
    turn_words(pairs, turned[0], GROUP / 2);
    for (int p = 0; p < GROUP / 2; p++) std::copy(pairs[p] + GROUP / 2, pairs[p] + GROUP, pairs[p]);
    turn_words(pairs, turned[GROUP / 2], GROUP / 2);
    for (int c = 0; c < columns; c++) std::memcpy(out + c * pitch + first, turned[c], sizeof turned[c]);
}

}  // namespace

// training/derivatives.activate_backward(): linear1 [rows, 2 * width] or, not gated, [rows, width] bfloat16 becomes its
// gradient; gradient [rows, width] float32; activated [rows, width] bfloat16, of_weights [rows] float32 are written.
extern "C" void megamoe_activate_backward(uint16_t* linear1, const float* weights, const float* gradient, int64_t rows,
                                          int64_t width, int gated, const float* gate, const float* gate_slope,
                                          const float* up, const float* up_slope, float limit, float shift,
                                          int quantized, uint16_t* activated, float* of_weights, int threads) {
    const Activation activation{gate, gate_slope, up, up_slope, limit, shift, gated != 0};
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * width / AT_ONCE)));
#pragma omp parallel for num_threads(workers) if (workers > 1)
    for (int64_t r = 0; r < rows; r++) {
        const RoundToNearest state;
        uint16_t *gates = linear1 + r * (gated ? 2 : 1) * width, *ups = gated ? gates + width : gates;
        float lanes[GROUP] = {};
        for (int64_t k = 0; k < width; k += GROUP) {
            const int count = int(std::min<int64_t>(GROUP, width - k));
            float group[GROUP] = {};
            uint16_t of_gate[GROUP], of_up[GROUP], rounded[GROUP];
            const float* incoming = gradient + r * width + k;
            if (count == GROUP) {  // of a length that the compiler knows
                backward_group(activation, gates + k, ups + k, weights[r], incoming, GROUP, lanes, group, of_gate, of_up);
            } else {
                backward_group(activation, gates + k, ups + k, weights[r], incoming, count, lanes, group, of_gate, of_up);
            }
            if (quantized) {
                round_group(group, rounded);
            } else {
                for (int i = 0; i < GROUP; i++) rounded[i] = to_bf16(group[i]);
            }
            std::memcpy(activated + r * width + k, rounded, count * sizeof *rounded);
            if (gated) std::memcpy(ups + k, of_up, count * sizeof *of_up);
            std::memcpy(gates + k, of_gate, count * sizeof *of_gate);
        }
        float sum = 0;
        for (int i = 0; i < GROUP; i++) sum += lanes[i];
        of_weights[r] = sum;
    }
}

// Rows as the left side of a product that sums over them: out [width, pitch] bfloat16, out[c][r] = from[source[r]][c],
// zeros from `rows` to pitch, the next multiple of 32. source [rows], null for rows as they lie.
extern "C" void megamoe_turn_rows(const uint16_t* from, int64_t stride, const int64_t* source, int64_t rows,
                                  int64_t width, uint16_t* out, int64_t pitch, int threads) {
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * width / AT_ONCE)));
#pragma omp parallel for num_threads(workers) if (workers > 1)
    for (int64_t r = 0; r < pitch; r += GROUP)
        for (int64_t c = 0; c < width; c += GROUP)
            turn_tile(from + c, stride, source, r, rows, int(std::min<int64_t>(GROUP, width - c)), out + c * pitch,
                      pitch);
}

// Rows as the right side, packed as layout.pack_bf16() packs their transpose: out [width / 32, pitch / 2, 32, 2].
extern "C" void megamoe_pack_rows(const uint16_t* from, int64_t stride, const int64_t* source, int64_t rows,
                                  int64_t width, uint16_t* out, int64_t pitch, int threads) {
    const int64_t blocks = (width + GROUP - 1) / GROUP;
    const int workers = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * width / AT_ONCE)));
#pragma omp parallel for num_threads(workers) if (workers > 1)
    for (int64_t part = 0; part < workers; part++)
        for (int64_t r = pitch / 2 * part / workers * 2; r < pitch / 2 * (part + 1) / workers * 2; r += 2) {
            const uint16_t* even = r < rows ? from + (source ? source[r] : r) * stride : nullptr;
            const uint16_t* odd = r + 1 < rows ? from + (source ? source[r + 1] : r + 1) * stride : nullptr;
            for (int64_t b = 0; b < blocks; b++) {
                const int count = int(std::min<int64_t>(GROUP, width - b * GROUP));
                uint32_t pairs[GROUP] = {};
                if (even && odd && count == GROUP) {
                    for (int i = 0; i < GROUP; i++)
                        pairs[i] = even[b * GROUP + i] | uint32_t(odd[b * GROUP + i]) << 16;
                } else {
                    for (int i = 0; i < count; i++)
                        pairs[i] = (even ? even[b * GROUP + i] : 0) | (odd ? uint32_t(odd[b * GROUP + i]) << 16 : 0);
                }
                std::memcpy(out + (b * pitch + r) * GROUP, pairs, sizeof pairs);
            }
        }
}
