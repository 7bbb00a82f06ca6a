// Where products are written: a row of the output for each row, wherever it lies.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace megamoe {

// What this thread has streamed is there for other threads.
inline void finish_streams() {
#if defined(MEGAMOE_AVX512)
    _mm_sfence();
#endif
}

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

    // Of `rows` rows from r on LANES outputs from `first` on and as many from `second` on: sums [rows][2][LANES].
    void write_unit(int64_t r, int rows, int64_t first, int64_t second, const float* sums) const {
        if (!wide && second == first + LANES && second + LANES <= width) {
            uint16_t* at = static_cast<uint16_t*>(to) + first;
            bool simple = true;
            for (int i = 0; i < rows; i++)
                simple &= store_two(at + (goes ? goes[r + i] : r + i) * stride, load(sums + i * 2 * LANES),
                                    load(sums + i * 2 * LANES + LANES));
            if (simple) return;
        }
        for (int i = 0; i < rows; i++, sums += 2 * LANES)
            write<LANES>(r + i, first, sums), write<LANES>(r + i, second, sums + LANES);
    }

    // Asks for the memory where output `first` of `rows` rows from r on will be.
    void prefetch(int64_t r, int rows, int64_t first) const {
        for (int i = 0; i < rows; i++)
            MEGAMOE_PREFETCH(static_cast<char*>(to) + ((goes ? goes[r + i] : r + i) * stride + first) * (wide ? 4 : 2));
    }

    // The same of `count` outputs that are rounded already, bfloat16. streams: past the caches; others may read them after
    // finish_streams().
    void copy(int64_t r, int64_t first, int64_t count, const uint16_t* rounded, [[maybe_unused]] bool streams) const {
        uint16_t* at = static_cast<uint16_t*>(to) + (goes ? goes[r] : r) * stride + first;
        count = std::min(count, width - first);
#if defined(MEGAMOE_AVX512)
        constexpr int LINE = 32;
        if (streams && reinterpret_cast<uintptr_t>(at) % 64 == 0 && count % LINE == 0) {
            for (int64_t i = 0; i < count; i += LINE)
                _mm512_stream_si512(reinterpret_cast<Words*>(at + i), _mm512_loadu_si512(rounded + i));
            return;
        }
#endif
        if (count > 0) std::memcpy(at, rounded, count * sizeof *at);
    }
};

}  // namespace megamoe
