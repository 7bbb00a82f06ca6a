// Where products are written: a row of the output for each row, wherever it lies.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace megamoe {

//   to [., width] of that stride, bfloat16 or (wide) FP32; row r goes to its row goes[r], null for r itself
struct Out {
    void* to;
    int64_t stride, width;
    const int64_t* goes;
    bool wide;

    // Outputs first to first + COUNT - 1 of row r; those beyond the width are left out.
    // COUNT is a multiple of LANES.
    template <int COUNT>
    void write(int64_t r, int64_t first, const float* sums) const {
        const int64_t at = (goes ? goes[r] : r) * stride + first;
        const int64_t count = std::min<int64_t>(COUNT, width - first);
        if (wide) {
            if (count > 0) std::memcpy(static_cast<float*>(to) + at, sums, count * sizeof *sums);
        } else if (count == COUNT) {
            for (int i = 0; i < COUNT; i += LANES) store_bf16(static_cast<uint16_t*>(to) + at + i, load(sums + i));
        } else {
            for (int i = 0; i < count; i++) static_cast<uint16_t*>(to)[at + i] = to_bf16(sums[i]);
        }
    }
};

}  // namespace megamoe
