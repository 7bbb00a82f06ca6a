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
    template <int COUNT>
    void write(int64_t r, int64_t first, const float* sums) const {
        const int64_t at = (goes ? goes[r] : r) * stride + first;
        if (first + COUNT <= width) {
            put<COUNT>(at, sums, COUNT);
        } else {
            put<COUNT>(at, sums, int(std::max<int64_t>(width - first, 0)));
        }
    }

private:
    template <int COUNT>
    void put(int64_t at, const float* sums, int count) const {
        if (wide) {
            std::memcpy(static_cast<float*>(to) + at, sums, count * sizeof *sums);
        } else {
            uint16_t rounded[COUNT];
            for (int i = 0; i < COUNT; i++) rounded[i] = to_bf16(sums[i]);
            std::memcpy(static_cast<uint16_t*>(to) + at, rounded, count * sizeof *rounded);
        }
    }
};

}  // namespace megamoe
