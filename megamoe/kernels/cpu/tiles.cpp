// Products of rows with expert weights by AMX, in an order of summation that depends on K alone.
//
// For output o of row r, w a weight with its scale, which BF16 holds exactly:
//
//     sum = 0
//     for each 32 values of K, ascending:
//         even = odd = 0
//         for each k of the 16 even ones, ascending: even = fma(x[r][k], w[o][k], even); odd likewise, of the odd ones
//         sum = sum + (even + odd)
//     out[r][o] = sum, rounded once to BF16, or as it is
//
// in FP32, to nearest, where operands and results of subnormal size count as zero. That is one TDPBF16PS for each 32 of K,
// for up to 16 rows and 16 outputs at once: one row or many, every product takes the same instruction on a tile of its
// number of rows, and K is filled up with zeros. The instruction heeds no state of the thread. A scale of 2^-127, which
// is subnormal itself, counts as zero.
//
// Weights of BF16 lie in memory as tiles have them (layout.py). MXFP4 is decoded to the same order: for few rows into a
// ring of a few KB on the way to the tiles, for more a panel of some blocks and some of K at once, which all rows then read.
#include <algorithm>
#include <numeric>
#include <vector>

#include "library.h"
#include "out.h"

#if defined(MEGAMOE_AMX)
#include <immintrin.h>
#endif

namespace megamoe {
namespace {

constexpr int BLOCK = 32;                    // outputs
constexpr int GROUP = 32;                    // values of K under one scale, and in one instruction
constexpr int TILE = 16;                     // rows of a tile of tokens; outputs of a tile of weights
constexpr int PAIR_ROW = BLOCK * 2;          // values: a pair of K for each output of a block
constexpr int SLICE = GROUP / 2 * PAIR_ROW;  // values: a group of K of a block
constexpr int RING = 4;                      // slices, decoded on the way to the tiles
constexpr int AHEAD = 8;                     // slices, by which the memory is asked before they are read
constexpr int ROWS_AHEAD = 2;                // likewise rows
constexpr int PANEL_ROWS = 256;              // whose tokens are in tiles at once
constexpr int PANEL_BLOCKS = 8;              // whose sums for these rows stay in the second cache: 256 KB
constexpr int DEPTH = 8;                     // groups of K of a panel: so deep, 32 rows stay in the first cache
constexpr int64_t STREAMED = 2 << 20;        // bytes of outputs, from which on the second cache could not keep them

// ---- tiles: 4 and 5 have tokens of the first and of the second rows, 6 and 7 weights of the first and of the second 16
// outputs of a block, 0 and 1 the sums of the first rows, 2 and 3 those of the second ----

#if defined(MEGAMOE_AMX)

// The tiles of this thread, which the system keeps for it once the process has asked (paths.py). They are given back.
class Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    int first = 0, second = 0;

public:
    ~Tiles() {
        if (first) asm volatile("tilerelease" ::: "memory");
    }

    // So many rows in the first and in the second tile of tokens.
    void shape(int first_rows, int second_rows) {
        if (first_rows == first && second_rows == second) return;
        first = first_rows, second = second_rows;
        Shapes shapes;
        const int rows[8] = {first, first, second, second, first, second, TILE, TILE};
        for (int t = 0; t < 8; t++) shapes.rows[t] = uint8_t(rows[t]), shapes.row_bytes[t] = rows[t] ? 64 : 0;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }

    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void store(void* to, int64_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
    }
    template <int SUMS, int TOKENS, int WEIGHTS>
    void add_products() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(TOKENS), "i"(WEIGHTS));
    }
};

#else

// The same written out, to test what surrounds the instructions where the CPU has none.
class Tiles {
    uint32_t tile[8][TILE][TILE];
    int rows[8];

    static float flush(float v) { return as_bits(v) & 0x7F800000 ? v : as_float(as_bits(v) & 0x80000000); }
    // A result is small by what it rounds to without a least exponent.
    static float rounded(double exact) {
        const float scaled = float(exact * 0x1p64);
        return std::fabs(scaled) < 0x1p-62f ? std::copysign(0.0f, scaled) : float(exact);
    }
    static float fused(uint16_t a, uint16_t b, float c) {
        return rounded(double(flush(from_bf16(a))) * flush(from_bf16(b)) + c);
    }

public:
    void shape(int first, int second) {
        const int of[8] = {first, first, second, second, first, second, TILE, TILE};
        std::copy(of, of + 8, rows);
    }
    template <int T>
    void zero() {
        std::memset(tile[T], 0, sizeof tile[T]);
    }
    template <int T>
    void load(const void* from, int64_t stride) {
        for (int r = 0; r < rows[T]; r++)
            std::memcpy(tile[T][r], static_cast<const char*>(from) + r * stride, sizeof tile[T][r]);
    }
    template <int T>
    void store(void* to, int64_t stride) const {
        for (int r = 0; r < rows[T]; r++)
            std::memcpy(static_cast<char*>(to) + r * stride, tile[T][r], sizeof tile[T][r]);
    }
    template <int SUMS, int TOKENS, int WEIGHTS>
    void add_products() {
        for (int r = 0; r < rows[SUMS]; r++)
            for (int o = 0; o < TILE; o++) {
                float even = 0, odd = 0;
                for (int pair = 0; pair < TILE; pair++) {
                    const uint32_t x = tile[TOKENS][r][pair], w = tile[WEIGHTS][pair][o];
                    even = fused(uint16_t(x), uint16_t(w), even);
                    odd = fused(uint16_t(x >> 16), uint16_t(w >> 16), odd);
                }
                uint32_t& sum = tile[SUMS][r][o];
                sum = as_bits(rounded(double(as_float(sum)) + rounded(double(even) + odd)));
            }
    }
};

#endif

// The sums of a block as BF16. No sum of tiles is subnormal, so that it does no harm that the instruction flushes those.
void round_block(uint16_t* to, const float* sums) {
#if defined(__AVX512BF16__)
    const Vector low = load(sums), high = load(sums + LANES);
    const __mmask32 nans = _mm512_kunpackw(_mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q),
                                           _mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q));
    const Words rounded = Words(_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(to, _mm512_mask_mov_epi16(rounded, nans, _mm512_set1_epi16(0x7FC0)));
#else
    for (int i = 0; i < BLOCK; i += LANES) store_bf16(to + i, load(sums + i));
#endif
}

// ---- weights ----

// An expert's BF16 weights: block by block, a block's slices as tiles read them.
struct BF16 {
    const uint16_t* values;
};

// MXFP4 likewise: for each 8 of K 2 x 64 bytes, of 16 outputs each. Word 2 o + p of them belongs to output o; its nibble i
// to value 2 i + p of the eight.
struct MXFP4 {
    const uint8_t* packed;
    const uint8_t* scales;
};

// A code's BF16 with the largest scale, 2^125; what a smaller scale is below that leaves the exponent. Subtraction stops
// at zero, so zero stays what it is and so does what is subnormal. Nothing is taken from a sign: scale 0 is refused first.
#if defined(MEGAMOE_AMX)

class Decode {
    __m512i table, shifts[3];

    static __m512i below(const uint8_t* scales) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
        const __m512i less = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(252), bytes), 7);
        return _mm512_mask_set1_epi32(_mm512_or_si512(less, _mm512_slli_epi32(less, 16)),
                                      _mm512_testn_epi32_mask(bytes, bytes), -1);
    }

    // Each word without its lowest nibbles; a shift would wait for the port that looks up and subtracts.
    template <int NIBBLES>
    __m512i shifted(__m512i words) const {
        return _mm512_multishift_epi64_epi8(shifts[NIBBLES - 1], words);
    }

public:
    Decode() {
        alignas(64) uint16_t words[32];
        constexpr uint16_t magnitudes[8] = {0, 0x7D80, 0x7E00, 0x7E40, 0x7E80, 0x7EC0, 0x7F00, 0x7F40};
        for (int code = 0; code < 32; code++)
            words[code] = uint16_t(magnitudes[code & 7] | (code & 8 && code & 7 ? 0x8000 : 0));
        table = _mm512_load_si512(words);
        for (int nibbles = 1; nibbles <= 3; nibbles++) {
            constexpr int64_t in_place = 0x3830282018100800, each = 0x0404040404040404;
            shifts[nibbles - 1] = _mm512_set1_epi64(in_place + nibbles * each);
            asm("" : "+v"(shifts[nibbles - 1]));  // else they are read from memory again for each use
        }
    }

    void operator()(const MXFP4& weights, int64_t slice, uint16_t* to) const {
        const uint8_t* from = weights.packed + slice * (SLICE / 2);
        for (int line = 0; line < SLICE / 2; line += 64) MEGAMOE_PREFETCH_SECOND(from + AHEAD * SLICE / 2 + line);
        MEGAMOE_PREFETCH_SECOND(weights.scales + (slice + 2 * AHEAD) * BLOCK);
        for (int half = 0; half < 2; half++) {
            const __m512i less = below(weights.scales + slice * BLOCK + half * TILE);
#pragma GCC unroll 4
            for (int eight = 0; eight < 4; eight++) {
                const __m512i words = _mm512_loadu_si512(from + eight * 128 + half * 64);
                // vpermw reads five bits of a word: the table is there twice, and what is above a nibble does no harm
                const __m512i codes[4] = {words, shifted<1>(words), shifted<2>(words), shifted<3>(words)};
#pragma GCC unroll 4
                for (int pair = 0; pair < 4; pair++)
                    _mm512_store_si512(to + (eight * 4 + pair) * PAIR_ROW + half * TILE * 2,
                                       _mm512_subs_epu16(_mm512_permutexvar_epi16(codes[pair], table), less));
            }
        }
    }
};

#else

struct Decode {
    void operator()(const MXFP4& weights, int64_t slice, uint16_t* to) const {
        constexpr uint16_t magnitudes[8] = {0, 0x7D80, 0x7E00, 0x7E40, 0x7E80, 0x7EC0, 0x7F00, 0x7F40};
        const uint8_t *from = weights.packed + slice * (SLICE / 2), *scales = weights.scales + slice * BLOCK;
        for (int k = 0; k < GROUP; k++)
            for (int o = 0; o < BLOCK; o++) {
                const int nibble = k / 2 % 4;
                const uint8_t byte = from[k / 8 * 128 + o / TILE * 64 + (o % TILE * 2 + k % 2) * 2 + nibble / 2];
                const int code = byte >> nibble % 2 * 4 & 15, less = scales[o] ? (252 - scales[o]) << 7 : 0xFFFF;
                const int value = std::max(magnitudes[code & 7] - less, 0);
                to[k / 2 * PAIR_ROW + o * 2 + k % 2] = uint16_t(value | (value && code & 8 ? 0x8000 : 0));
            }
    }
};

#endif

// ---- rows ----

struct Rows {
    const uint16_t* x;
    int64_t stride, depth;
    const int64_t* source;

    const uint16_t* row(int64_t r) const { return x + (source ? source[r] : r) * stride; }

    // Rows first to first + num_rows - 1 as tiles, [groups][num_rows][GROUP], zero beyond K. last: the last row there is.
    void to_tiles(int64_t first, int num_rows, int64_t last, int64_t groups, uint16_t* to) const {
        const int64_t whole = depth / GROUP, left = depth % GROUP;
        for (int r = 0; r < num_rows; r++, to += GROUP) {
            const uint16_t *from = row(first + r), *soon = row(std::min(first + r + ROWS_AHEAD, last));
            uint16_t* at = to;
            for (int64_t group = 0; group < whole; group++, at += num_rows * GROUP) {
                MEGAMOE_PREFETCH(soon + group * GROUP);
                std::memcpy(at, from + group * GROUP, GROUP * sizeof *at);
            }
            if (whole < groups) std::fill(std::copy_n(from + whole * GROUP, left, at), at + GROUP, uint16_t(0));
        }
    }
};

// What a thread works in, kept from call to call.
class Scratch {
    std::vector<uint16_t> tokens, weights, rounded;
    std::vector<float> sums;

    // At least `size` values, from the start of a cache line on.
    template <class T>
    static T* take(std::vector<T>& buffer, int64_t size) {
        constexpr size_t LINE = 64;
        if (buffer.size() < size + LINE / sizeof(T)) buffer.resize(size + LINE / sizeof(T));
        const auto at = reinterpret_cast<uintptr_t>(buffer.data());
        return reinterpret_cast<T*>((at + LINE - 1) / LINE * LINE);
    }

public:
    uint16_t* take_tokens(int64_t size) { return take(tokens, size); }
    uint16_t* take_weights(int64_t size) { return take(weights, size); }
    float* take_sums(int64_t size) { return take(sums, size); }
    uint16_t* take_rounded(int64_t size) { return take(rounded, size); }
};
thread_local Scratch scratch;

// An expert's rows, and the part of its blocks that a thread computes.
struct Share {
    Rows rows;
    Out out;
    int64_t first, count;  // rows
    int64_t begin, end;    // blocks
    int64_t groups;        // of K
    bool streams;          // whether outputs are written past the caches
};

// Up to 32 rows of a share as tiles: [groups][rows][GROUP] of the first 16, then of the others.
struct Pair {
    const uint16_t* tokens;
    int64_t row;  // of the share
    int rows;

    int first() const { return std::min(rows, TILE); }
    int second() const { return rows - first(); }
};

// What the groups begin to end bring to the sums [rows][BLOCK] of a pair of tiles of rows by a block, which begin at zero
// where begin is 0; at(group): the slice of weights.
template <bool SECOND, class At>
void sum_pair(Tiles& tiles, const Pair& pair, int64_t groups, int64_t begin, int64_t end, At at, float* sums) {
    const int first = pair.first() * GROUP, second = pair.second() * GROUP;
    const uint16_t *tokens = pair.tokens, *more = tokens + groups * first;
    float* below = sums + TILE * BLOCK;
    tiles.shape(pair.first(), pair.second());
    if (begin) {
        tiles.load<0>(sums, BLOCK * 4), tiles.load<1>(sums + TILE, BLOCK * 4);
        if constexpr (SECOND) tiles.load<2>(below, BLOCK * 4), tiles.load<3>(below + TILE, BLOCK * 4);
    } else {
        tiles.zero<0>(), tiles.zero<1>();
        if constexpr (SECOND) tiles.zero<2>(), tiles.zero<3>();
    }
    // a tile is loaded again as soon as the last product with it has begun
    const auto load_weights = [&](int64_t group) {
        const uint16_t* weights = at(group);
        tiles.load<6>(weights, PAIR_ROW * 2);
        return weights + TILE * 2;
    };
    const uint16_t* weights = load_weights(begin);
    tiles.load<4>(tokens + begin * first, GROUP * 2);
    tiles.load<7>(weights, PAIR_ROW * 2);
    if constexpr (SECOND) tiles.load<5>(more + begin * second, GROUP * 2);
    for (int64_t group = begin + 1; group < end; group++) {
        tiles.add_products<0, 4, 6>();
        tiles.add_products<1, 4, 7>();
        tiles.load<4>(tokens + group * first, GROUP * 2);
        if constexpr (SECOND) tiles.add_products<2, 5, 6>();
        weights = load_weights(group);
        if constexpr (SECOND) tiles.add_products<3, 5, 7>();
        tiles.load<7>(weights, PAIR_ROW * 2);
        if constexpr (SECOND) tiles.load<5>(more + group * second, GROUP * 2);
    }
    tiles.add_products<0, 4, 6>();
    tiles.add_products<1, 4, 7>();
    if constexpr (SECOND) tiles.add_products<2, 5, 6>(), tiles.add_products<3, 5, 7>();
    tiles.store<0>(sums, BLOCK * 4), tiles.store<1>(sums + TILE, BLOCK * 4);
    if constexpr (SECOND) tiles.store<2>(below, BLOCK * 4), tiles.store<3>(below + TILE, BLOCK * 4);
}

template <class At>
void sum_pair(Tiles& tiles, const Pair& pair, int64_t groups, int64_t begin, int64_t end, At at, float* sums) {
    if (pair.second()) {
        sum_pair<true>(tiles, pair, groups, begin, end, at, sums);
    } else {
        sum_pair<false>(tiles, pair, groups, begin, end, at, sums);
    }
}

// Sums [blocks][32][BLOCK] of a pair of tiles of rows, from `block` on, to the outputs.
void write_pair(const Share& share, const Pair& pair, int64_t block, int64_t blocks, const float* sums) {
    constexpr int64_t OF_BLOCK = 2 * TILE * BLOCK;
    uint16_t* rounded = scratch.take_rounded(PANEL_BLOCKS * BLOCK);
    for (int r = 0; r < pair.rows; r++, sums += BLOCK) {
        const int64_t row = share.first + pair.row + r;
        if (share.out.wide) {
            for (int64_t b = 0; b < blocks; b++)
                share.out.write<BLOCK>(row, (block + b) * BLOCK, sums + b * OF_BLOCK);
            continue;
        }
        for (int64_t b = 0; b < blocks; b++) round_block(rounded + b * BLOCK, sums + b * OF_BLOCK);
        share.out.copy(row, block * BLOCK, blocks * BLOCK, rounded, share.streams);
    }
}

// ---- few rows: weights go from memory to the tiles once, through registers and the first cache ----

template <class At>
void run_few(const Share& share, Tiles& tiles, const Pair& pair, At at) {
    float* sums = scratch.take_sums(2 * TILE * BLOCK);
    for (int64_t block = share.begin; block < share.end; block++) {
        sum_pair(tiles, pair, share.groups, 0, share.groups,
                 [=, before = (block - share.begin) * share.groups](int64_t group) { return at(before + group); }, sums);
        write_pair(share, pair, block, 1, sums);
    }
}

void run_few(const Share& share, Tiles& tiles, const Pair& pair, const BF16& weights) {
    run_few(share, tiles, pair, [=](int64_t slice) { return weights.values + slice * SLICE; });
}

// The next slice is decoded while this one is multiplied.
void run_few(const Share& share, Tiles& tiles, const Pair& pair, const MXFP4& weights) {
    const Decode decode;
    const int64_t last = (share.end - share.begin) * share.groups - 1;
    uint16_t* ring = scratch.take_weights(RING * SLICE);
    decode(weights, 0, ring);
    run_few(share, tiles, pair, [&](int64_t slice) {
        const int64_t next = std::min(slice + 1, last);
        decode(weights, next, ring + next % RING * SLICE);
        return ring + slice % RING * SLICE;
    });
}

// ---- many rows: a panel of weights stays in the second cache while all rows go by ----

// The groups begin to end of some blocks as tiles read them; those of one block are `stride` apart from the next's.
struct Panel {
    const uint16_t* values;
    int64_t stride;
};

Panel panel_of(const Share& share, const BF16& weights, int64_t block, int64_t, int64_t begin, int64_t) {
    return {weights.values + ((block - share.begin) * share.groups + begin) * SLICE, share.groups * SLICE};
}

Panel panel_of(const Share& share, const MXFP4& weights, int64_t block, int64_t blocks, int64_t begin, int64_t end) {
    const Decode decode;
    uint16_t *decoded = scratch.take_weights(blocks * (end - begin) * SLICE), *to = decoded;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t group = begin; group < end; group++, to += SLICE)
            decode(weights, (block + b - share.begin) * share.groups + group, to);
    return {decoded, (end - begin) * SLICE};
}

template <class Weights>
void run_many(const Share& share, Tiles& tiles, const uint16_t* tokens, int64_t first, int rows,
              const Weights& weights) {
    constexpr int64_t OF_BLOCK = 2 * TILE * BLOCK, OF_PAIR = PANEL_BLOCKS * OF_BLOCK;
    const int64_t pairs = (rows + 2 * TILE - 1) / (2 * TILE), parts = (share.groups + DEPTH - 1) / DEPTH;
    float* sums = scratch.take_sums(pairs * OF_PAIR);
    for (int64_t block = share.begin; block < share.end; block += PANEL_BLOCKS) {
        const int64_t blocks = std::min<int64_t>(PANEL_BLOCKS, share.end - block);
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = share.groups * part / parts, end = share.groups * (part + 1) / parts;
            const Panel panel = panel_of(share, weights, block, blocks, begin, end);
            for (int64_t p = 0; p < pairs; p++) {
                const int row = int(p) * 2 * TILE;
                const Pair pair{tokens + row * share.groups * GROUP, first + row, std::min(2 * TILE, rows - row)};
                for (int64_t b = 0; b < blocks; b++)
                    sum_pair(tiles, pair, share.groups, begin, end,
                             [from = panel.values + b * panel.stride - begin * SLICE](int64_t group) {
                                 return from + group * SLICE;
                             },
                             sums + p * OF_PAIR + b * OF_BLOCK);
                if (end == share.groups) write_pair(share, pair, block, blocks, sums + p * OF_PAIR);
            }
        }
    }
}

// weights: of the share's first block on
template <class Weights>
void run_share(const Share& share, Tiles& tiles, const Weights& weights) {
    for (int64_t first = 0; first < share.count; first += PANEL_ROWS) {
        const int rows = int(std::min<int64_t>(PANEL_ROWS, share.count - first));
        uint16_t* tokens = scratch.take_tokens(rows * share.groups * GROUP);
        for (int row = 0; row < rows; row += TILE)
            share.rows.to_tiles(share.first + first + row, std::min(TILE, rows - row), share.first + share.count - 1,
                                share.groups, tokens + row * share.groups * GROUP);
        if (rows <= 2 * TILE) {
            run_few(share, tiles, Pair{tokens, first, rows}, weights);
        } else {
            run_many(share, tiles, tokens, first, rows, weights);
        }
    }
}

}  // namespace
}  // namespace megamoe

// As megamoe_products() of products.cpp, weights in the order of words (layout.py).
extern "C" void megamoe_products(const uint16_t* x, int64_t x_stride, const int64_t* source, int64_t k,
                                 const uint8_t* packed, const uint8_t* scales, int64_t packed_bytes,
                                 int64_t scales_bytes, int64_t n, const int64_t* counts, int64_t experts, void* out,
                                 int64_t out_stride, const int64_t* goes, int wide, int threads) {
    using namespace megamoe;
    const int64_t groups = (k + GROUP - 1) / GROUP, blocks = (n + BLOCK - 1) / BLOCK;
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
    const bool streams = std::accumulate(counts, counts + experts, int64_t(0)) * n * 2 >= STREAMED;
#pragma omp parallel for num_threads(int(shares)) schedule(static, 1) if (shares > 1)
    for (int64_t part = 0; part < shares; part++) {
        Tiles tiles;
        int64_t first = 0;
        for (int64_t expert = 0; expert < experts; first += counts[expert++]) {
            if (!counts[expert]) continue;
            const Share share{{x, x_stride, k, source}, {out, out_stride, n, goes, wide != 0}, first, counts[expert],
                              blocks * part / shares, blocks * (part + 1) / shares, groups, streams};
            const int64_t slice = share.begin * groups;
            const uint8_t* at = packed + expert * packed_bytes;
            if (scales) {
                run_share(share, tiles, MXFP4{at + slice * SLICE / 2, scales + expert * scales_bytes + slice * BLOCK});
            } else {
                run_share(share, tiles, BF16{reinterpret_cast<const uint16_t*>(at) + slice * SLICE});
            }
        }
        if (streams) finish_streams();
    }
}
