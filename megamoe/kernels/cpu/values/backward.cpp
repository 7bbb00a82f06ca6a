// What surrounds the products of a backward: the activation's derivative, and rows turned into columns. Each value is a
// correctly rounded operation on values of its own row, in the order that is written, as in rows.cpp.
#include <algorithm>

#include "../state.h"
#include "mxfp8.h"

using namespace megamoe;

namespace {

// The tables and numbers of an activation, as training/derivatives.py has them; null where there is none.
struct Activation {
    const float *gate, *gate_slope, *up, *up_slope;
    float limit, shift;
    bool gated;

    float factor(uint16_t code) const {
        if (!gated) return 1.0f;
        if (up) return up[code];
        const float value = from_bf16(code), below = value > limit ? limit : value;
        const float clamped = below < -limit ? -limit : below;
        return shift != 0 ? clamped + shift : clamped;
    }
};

// `count` of a group's values at most GROUP: gradient [GROUP] float32; lanes gets gradient * p of each.
inline void backward_group(const Activation& a, const uint16_t* gates, const uint16_t* ups, float weight,
                           const float* gradient, int count, float* lanes, float* activated, uint16_t* of_gate,
                           uint16_t* of_up) {
    for (int i = 0; i < count; i++) {
        const uint16_t gate = gates[i], up = ups[i];
        const float value = a.gate[gate], slope = a.gate_slope[gate], incoming = gradient[i];
        const float scaled = incoming * weight;
        if (a.gated) {
            const float factor = a.factor(up), product = value * factor;
            lanes[i] += incoming * product;
            activated[i] = product * weight;
            of_gate[i] = to_bf16(scaled * factor * slope);
            const float through = scaled * value;
            of_up[i] = to_bf16(a.up_slope ? through * a.up_slope[up] : through);
        } else {
            lanes[i] += incoming * value;
            activated[i] = value * weight;
            of_gate[i] = to_bf16(scaled * slope);
        }
    }
}

// out[c][r] = from[source[r]][c] for GROUP columns and GROUP rows; rows beyond `rows` are zeros.
void turn_tile(const uint16_t* from, int64_t stride, const int64_t* source, int64_t first, int64_t rows, int columns,
               uint16_t* out, int64_t pitch) {
    alignas(64) uint32_t pairs[GROUP / 2][GROUP] = {};  // of two rows, by column
    for (int p = 0; p < GROUP / 2; p++) {
        const int64_t r = first + 2 * p;
        if (r >= rows) break;
        const uint16_t* even = from + (source ? source[r] : r) * stride;
        const uint16_t* odd = r + 1 < rows ? from + (source ? source[r + 1] : r + 1) * stride : nullptr;
        for (int c = 0; c < columns; c++) pairs[p][c] = even[c] | (odd ? uint32_t(odd[c]) << 16 : 0);
    }
    for (int c = 0; c < columns; c++) {
        alignas(64) uint32_t column[GROUP / 2];
        for (int p = 0; p < GROUP / 2; p++) column[p] = pairs[p][c];
        std::memcpy(out + c * pitch + first, column, sizeof column);
    }
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
    for (int64_t c = 0; c < width; c += GROUP)
        for (int64_t r = 0; r < pitch; r += GROUP)
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
