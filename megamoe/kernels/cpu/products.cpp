// Products of rows with expert weights by vectors, in an order of summation that depends on K alone.
//
// For output o of row r, with w a weight before its scale, s the scale of 32 weights, and fma rounded once:
//
//     sum = 0
//     for each 32 values of K, ascending:
//         part = 0
//         for each k of them, ascending: part = fma(x[r][k], w[o][k], part)    (pairs of k: see vectors.h)
//         sum = fma(part, s[o][these 32], sum)
//     out[r][o] = sum, rounded once to BF16, or as it is
//
// BF16 weights have s = 1. Where neither x nor s is extreme, w * s is multiplied in place of w, and part added as it is:
// s is a power of two, so each rounding is that of the above times s.
//
// Neither the number of rows, nor a row's place, nor tiles, threads or the width of vectors enter: each output has a
// chain of its own. The two ways below, for few rows and for many, differ in what they keep in registers and in nothing
// else.
//
// Weights are held in blocks of 32 outputs (layout.py). For each 4 of K a block has 64 bytes of E2M1, or 2 x 32 pairs of
// BF16. What is decoded at once, a unit, is one vector of those bytes: 4 values of K for two vectors of outputs.
#include <algorithm>
#include <vector>

#include "out.h"
#include "library.h"

namespace megamoe {
namespace {

constexpr int BLOCK = 32;               // outputs
constexpr int GROUP = 32;               // values of K under one scale, and of one partial sum
constexpr int UNITS = BLOCK / 2 / LANES;  // of a block
constexpr int UNIT = 2 * LANES;         // outputs
constexpr int AHEAD = 4096;             // bytes, by which the memory is asked before they are read
constexpr int CHAINS = 8;               // of additions side by side, where each addition waits for the one before
constexpr int FEW = 4;                  // rows, whose sums stay in registers with those of a group
// Rows for which weights are decoded anew for each FEW.
constexpr int FEW_DECODED = STEP == 1 ? 8 : HELD_ROWS == TILE_ROWS ? 24 : 12;
constexpr int DEPTH = 8 * GROUP;        // of K, that a decoded tile holds: 16 KB for each 8 lanes
constexpr int PANEL_ROWS = STEP == 1 ? 192 : 288;  // whose tokens, as elements and DEPTH deep, stay in the second cache
constexpr int PANEL_UNITS = 8;          // whose sums for these rows stay there too

// Not extreme: scales 2^-48 to 2^48, and values of x that are 0 or 2^-64 to 2^64 (as bits without the sign). Products
// with E2M1 are then multiples of 2^-72, and sums of 32 below 2^72; times a scale they are normal numbers still.
constexpr uint8_t LEAST_SCALE = 127 - 48, MOST_SCALE = 127 + 48;
constexpr uint16_t LEAST_X = (127 - 64) << 7, MOST_X = (127 + 64) << 7;

// First output, of its block, of the first or second vector of a unit.
constexpr int output_of(int unit, int second) { return second * (BLOCK / 2) + unit * LANES; }

// A block of weights. pairs(): a unit's values of K 4 * four to 4 * four + 3, as DecodeE2M1 has them. BYTES: of
// four values of K, all outputs.
struct E2M1 {
    static constexpr int BYTES = 64;
    static constexpr bool SCALED = true, AS_TILES = false;
    const uint8_t* packed;
    const uint8_t* scales;

    void pairs(const DecodeE2M1& decode, int64_t four, int unit, Words out[4]) const {
        decode(packed + four * 64 + unit * LANES * 4, out);
    }
    Vector scale(int64_t group, int output) const { return load_e8m0(scales + group * BLOCK + output); }

    // No scale of these groups is extreme.
    bool is_moderate(int64_t first, int groups) const {
        uint8_t least = MOST_SCALE, most = LEAST_SCALE;
        for (const uint8_t* at = scales + first * BLOCK; at < scales + (first + groups) * BLOCK; at++)
            least = std::min(least, *at), most = std::max(most, *at);
        return least >= LEAST_SCALE && most <= MOST_SCALE;
    }
};

struct BF16 {
    static constexpr int BYTES = 256;
    static constexpr bool SCALED = false, AS_TILES = STEP == 2 && UNITS == 1;  // whether values lie as tiles have them
    const uint8_t* packed;

    void pairs(const DecodeE2M1&, int64_t four, int unit, Words out[4]) const {
        for (int j = 0; j < 4; j++) out[j] = load_words(packed + four * 256 + j / 2 * 128 + output_of(unit, j % 2) * 4);
    }
    Vector scale(int64_t, int) const { return broadcast(1.0f); }
};

struct Rows {
    const uint16_t* x;
    int64_t stride, depth;
    const int64_t* source;

    // No value begin to end - 1 of these rows is extreme.
    bool is_moderate(int64_t first, int num_rows, int64_t begin, int64_t end) const {
        uint16_t least = 0xFFFF, most = 0;  // least: of value - 1, where 0 is the largest
        for (int r = 0; r < num_rows; r++) {
            const uint16_t* from = row(first + r);
            for (int64_t k = begin; k < std::min(end, depth); k++) {
                const uint16_t value = from[k] & 0x7FFF;
                least = std::min<uint16_t>(least, value - 1), most = std::max(most, value);
            }
        }
        return least >= LEAST_X - 1 && most <= MOST_X;
    }

    const uint16_t* row(int64_t r) const { return x + (source ? source[r] : r) * stride; }

    // Elements of up to TILE_ROWS rows, [end - begin][num_rows] in values of K, zero beyond K. begin and end are
    // multiples of GROUP. What follows in `to`, up to LANES elements, is lost. soon: the row from which as many are asked
    // of the memory meanwhile.
    void spread(int64_t first, int num_rows, int64_t begin, int64_t end, Element* to, int64_t soon) const {
        constexpr int AT_ONCE = LANES * STEP;
        const uint16_t *of_row[TILE_ROWS], *of_soon[TILE_ROWS];
        for (int r = 0; r < num_rows; r++) of_row[r] = row(first + r), of_soon[r] = row(soon + r);
        const int64_t whole = std::min(end, depth) / STEP * STEP;
        for (; begin + AT_ONCE <= whole; begin += AT_ONCE) {
            Words square[LANES];
            for (int r = 0; r < num_rows; r++) MEGAMOE_PREFETCH(of_soon[r] + begin);
            for (int r = 0; r < LANES; r++) square[r] = r < num_rows ? load_elements(of_row[r] + begin) : Words{};
            transpose(square);
            for (int k = 0; k < LANES; k++, to += num_rows) store_words(to, square[k]);
        }
        for (int r = 0; r < num_rows; r++) {
            const uint16_t* from = of_row[r];
            Element* at = to + r;
            int64_t k = begin;
            for (; k < whole; k += STEP, at += num_rows) *at = element(from + k);
            if (k < std::min(end, depth)) {  // half a pair
                const uint16_t last[2] = {from[k], 0};
                *at = element(last);
                k += STEP, at += num_rows;
            }
            for (; k < end; k += STEP, at += num_rows) *at = Element(0);
        }
    }
};

// What a thread works in, kept from call to call.
class Scratch {
    std::vector<Element> x, tile;
    std::vector<float> scales, sums;

    // At least `size` of a buffer, from the start of a cache line on, so that no vector lies across two.
    template <class T>
    static T* take(std::vector<T>& buffer, size_t size) {
        constexpr size_t LINE = 64;
        if (buffer.size() < size + LINE / sizeof(T)) buffer.resize(size + LINE / sizeof(T));
        const auto at = reinterpret_cast<uintptr_t>(buffer.data());
        return reinterpret_cast<T*>((at + LINE - 1) / LINE * LINE);
    }

public:
    Element* take_x(int64_t rows, int64_t depth) { return take(x, size_t(rows * depth / STEP) + LANES); }
    Element* take_tile() { return take(tile, DEPTH / STEP * UNIT); }
    float* take_scales() { return take(scales, DEPTH / GROUP * UNIT); }
    float* take_sums() { return take(sums, PANEL_UNITS * PANEL_ROWS * UNIT); }
};
thread_local Scratch scratch;

// An expert's rows, and the part of its blocks that a thread computes.
struct Share {
    Rows rows;
    Out out;
    int64_t first, count;  // rows
    int64_t begin, end;    // blocks
    int64_t groups;        // of K
};

// The i-th of as few parts of `whole` as have at most `most` each, of even sizes: where it begins. It ends where the
// next does.
int64_t part_of(int64_t whole, int64_t most, int64_t i) {
    const int64_t parts = (whole + most - 1) / most;
    return whole * i / parts;
}

// ---- few rows: weights go from memory to the sums through registers alone ----

// The sums of NUM units side by side for ROWS rows: x [K / STEP][ROWS], sums [NUM][2][ROWS][LANES].
template <int ROWS, int NUM, class Weights>
void sum_few(const Weights (&weights)[NUM], const int (&units)[NUM], const Element* x, int64_t groups,
             float* sums) {
    const DecodeE2M1 decode;
    Vector total[NUM][2][ROWS];
    for (auto& unit : total)
        for (auto& half : unit)
            for (Vector& each : half) each = zero();
    for (int64_t group = 0; group < groups; group++) {
        Vector part[NUM][2][ROWS];
        for (auto& unit : part)
            for (auto& half : unit)
                for (Vector& each : half) each = zero();
#pragma GCC unroll 1
        for (int four = 0; four < GROUP / 4; four++) {
            const Element* at = x + (group * GROUP + four * 4) / STEP * ROWS;
#pragma GCC unroll 8
            for (int n = 0; n < NUM; n++) {
                Words pairs[4];
                for (int line = 0; line < Weights::BYTES / UNITS; line += 64)
                    MEGAMOE_PREFETCH(weights[n].packed + (group * (GROUP / 4) + four) * Weights::BYTES + AHEAD + line);
                weights[n].pairs(decode, group * (GROUP / 4) + four, units[n], pairs);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k += STEP) {
#pragma GCC unroll 2
                    for (int half = 0; half < 2; half++) {
                        const Weight weight = weight_of(pairs[k / 2 * 2 + half], k);
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; r++)
                            part[n][half][r] = add_product(at[k / STEP * ROWS + r], weight, part[n][half][r]);
                    }
                }
            }
        }
        for (int n = 0; n < NUM; n++)
            for (int half = 0; half < 2; half++) {
                const Vector scale = weights[n].scale(group, output_of(units[n], half));
                for (int r = 0; r < ROWS; r++) total[n][half][r] = fma(part[n][half][r], scale, total[n][half][r]);
            }
    }
    for (const auto& unit : total)
        for (const auto& half : unit)
            for (const Vector& each : half) {
                store(sums, each);
                sums += LANES;
            }
}

// NUM units from `unit` on, for the share's rows first to first + ROWS - 1.
template <int ROWS, int NUM, class At>
void run_units(const Share& share, int first, int64_t unit, const Element* x, const At& at) {
    std::decay_t<decltype(at(0))> weights[NUM];
    int units[NUM];
    float sums[NUM * ROWS * UNIT];
    for (int n = 0; n < NUM; n++) {
        weights[n] = at((unit + n) / UNITS);
        units[n] = int((unit + n) % UNITS);
    }
    sum_few<ROWS, NUM>(weights, units, x, share.groups, sums);
    const float* from = sums;
    for (int n = 0; n < NUM; n++)
        for (int half = 0; half < 2; half++)
            for (int r = 0; r < ROWS; r++, from += LANES)
                share.out.write<LANES>(share.first + first + r,
                                       (unit + n) / UNITS * BLOCK + output_of(units[n], half), from);
}

// NUM units from `unit` on for `rows` rows, as run_units().
template <int NUM, int ROWS, class At>
void run_rows(int rows, const Share& share, int first, int64_t unit, const Element* x, const At& at) {
    if (rows == ROWS) {
        run_units<ROWS, NUM>(share, first, unit, x, at);
    } else if constexpr (ROWS > 1) {
        run_rows<NUM, ROWS - 1>(rows, share, first, unit, x, at);
    }
}

// NUM units side by side for all rows, MOST of them at a time, then the next units; what more rows read is in a cache.
template <int NUM, int MOST, class At>
void run_few(const Share& share, const At& at) {
    const int64_t depth = share.groups * GROUP, end = share.end * UNITS;
    const int rows = int(share.count), parts = (rows + MOST - 1) / MOST;
    const auto row_of = [=](int part) { return int(part_of(rows, MOST, part)); };
    Element* x = scratch.take_x(rows, depth);
    for (int part = 0; part < parts; part++)
        share.rows.spread(share.first + row_of(part), row_of(part + 1) - row_of(part), 0, depth,
                          x + depth / STEP * row_of(part), share.first + row_of(part));
    int64_t unit = share.begin * UNITS;
    const auto run = [&](auto num) {
        for (; unit + num <= end; unit += num)
            for (int part = 0; part < parts; part++)
                run_rows<num, MOST>(row_of(part + 1) - row_of(part), share, row_of(part), unit,
                                   x + depth / STEP * row_of(part), at);
    };
    run(std::integral_constant<int, NUM>());
    run(std::integral_constant<int, 1>());
}

// ---- many rows: weights are decoded into a tile, which all rows of a panel read ----

// Adds to the sums of ROWS rows [ROWS][UNIT], or to zero where it begins, what `groups` groups of K bring:
// x [K / STEP][ROWS], tile [K / STEP][UNIT], scales [groups][UNIT], or null where all are 1. soon: what is asked of the
// memory meanwhile, as much as the tile.
template <int ROWS, bool SCALED>
void sum_tile(const Element* x, const Element* tile, const float* scales, int groups, float* sums, bool begins,
              const Element* soon) {
    constexpr bool HOLDS_SUMS = ROWS <= HELD_ROWS;
    Vector total[ROWS][2];
    const auto load_sums = [&] {
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) total[r][half] = load(sums + r * UNIT + half * LANES);
    };
    const auto store_sums = [&] {
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) store(sums + r * UNIT + half * LANES, total[r][half]);
    };
    if (begins) std::fill_n(sums, ROWS * UNIT, 0.0f);
    if constexpr (HOLDS_SUMS) load_sums();
    for (int group = 0; group < groups; group++) {
        Vector part[ROWS][2];
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) part[r][0] = part[r][1] = zero();
#pragma GCC unroll 2
        for (int k = 0; k < GROUP; k += STEP) {
            const Weight first = load_weight(tile), second = load_weight(tile + LANES);
            MEGAMOE_PREFETCH_NEXT(soon);
            MEGAMOE_PREFETCH_NEXT(soon + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                part[r][0] = add_product(x[r], first, part[r][0]);
                part[r][1] = add_product(x[r], second, part[r][1]);
            }
            tile += UNIT;
            soon += UNIT;
            x += ROWS;
        }
        if constexpr (!HOLDS_SUMS) {
            MEGAMOE_IN_MEMORY();  // the sums, for which registers have no room before
            load_sums();
        }
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) {
                Vector& sum = total[r][half];
                sum = SCALED ? fma(part[r][half], load(scales + half * LANES), sum) : add(part[r][half], sum);
            }
        if constexpr (SCALED) scales += UNIT;
        if constexpr (!HOLDS_SUMS) store_sums();
    }
    if constexpr (HOLDS_SUMS) store_sums();
}

template <bool SCALED, int ROWS = TILE_ROWS>
void sum_rows(int rows, const Element* x, const Element* tile, const float* scales, int groups, float* sums,
              bool begins, const Element* soon) {
    if (rows == ROWS) {
        sum_tile<ROWS, SCALED>(x, tile, scales, groups, sums, begins, soon);
    } else if constexpr (ROWS > 1) {
        sum_rows<SCALED, ROWS - 1>(rows, x, tile, scales, groups, sums, begins, soon);
    }
}

// One unit's values of `groups` groups as elements [K / STEP][UNIT], times their scales (FOLDED), or else the scales
// beside them [groups][UNIT], if they have any. soon: what is asked of the memory meanwhile, as many bytes as are read.
template <bool FOLDED, class Weights>
void decode_unit(const Weights& weights, int unit, int64_t first, int groups, Element* tile, float* scales,
                 const uint8_t* soon) {
    const DecodeE2M1 decode;
    for (int group = 0; group < groups; group++, scales += UNIT) {
        Scales by[2];
        for (int half = 0; half < 2; half++) {
            if constexpr (FOLDED) {
                by[half] = load_scales(weights.scales + (first + group) * BLOCK + output_of(unit, half));
            } else if constexpr (Weights::SCALED) {
                store(scales + half * LANES, weights.scale(first + group, output_of(unit, half)));
            }
        }
        for (int four = 0; four < GROUP / 4; four++) {
            Words pairs[4];
            for (int line = 0; line < Weights::BYTES; line += 64, soon += 64) MEGAMOE_PREFETCH(soon);
            weights.pairs(decode, (first + group) * (GROUP / 4) + four, unit, pairs);
            for (int k = 0; k < 4; k += STEP, tile += UNIT)
                for (int half = 0; half < 2; half++) {
                    const Weight weight = weight_of(pairs[k / 2 * 2 + half], k);
                    if constexpr (FOLDED) {
                        store_weight(tile + half * LANES, folded(weight, by[half]));
                    } else {
                        store_weight(tile + half * LANES, weight);
                    }
                }
        }
    }
}

// Rows of a tile at most, of so many: as many as have their sums in registers if that fills all tiles.
constexpr int tile_rows(int rows) {
    const int held = HELD_ROWS ? (rows + HELD_ROWS - 1) / HELD_ROWS : 0;
    return HELD_ROWS && held * HELD_ROWS - rows <= held / 8 ? HELD_ROWS : TILE_ROWS;
}

// A panel of rows by all of the share's blocks: some units, DEPTH of K of each, then the next DEPTH of the same units.
template <class At>
void run_panel(const Share& share, int64_t first, int rows, const At& at) {
    using Weights = std::decay_t<decltype(at(0))>;
    constexpr int GROUPS = DEPTH / GROUP;
    const int64_t depth = share.groups * GROUP, last = share.end * UNITS;
    const int most = tile_rows(rows), tiles = (rows + most - 1) / most;
    const int size = rows / tiles, larger = rows % tiles;  // tiles, which come first and have a row more
    const auto row_of = [=](int tile) { return tile * size + std::min(tile, larger); };
    const auto packed_of = [&](int64_t unit, int64_t group) {
        return at(unit / UNITS).packed + group * (GROUP / 4) * Weights::BYTES;
    };
    Element *x = scratch.take_x(rows, depth), *decoded = scratch.take_tile();
    float *scales = scratch.take_scales(), *sums = scratch.take_sums();
    bool moderate = Weights::SCALED;
    for (int64_t k = 0; k < depth; k += DEPTH)
        for (int tile = 0; tile < tiles; tile++) {
            const int64_t row = row_of(tile), more = row_of(tile + 1) - row, deep = std::min<int64_t>(DEPTH, depth - k);
            const int64_t soon = std::min(row + more, rows - more);
            if (moderate) moderate = share.rows.is_moderate(first + row, int(more), k, k + deep);
            share.rows.spread(first + row, int(more), k, k + deep, x + (rows * k + row * deep) / STEP, first + soon);
        }
    for (int64_t begin = share.begin * UNITS; begin < last; begin += PANEL_UNITS) {
        const int64_t end = std::min(begin + PANEL_UNITS, last);
        for (int64_t group = 0; group < share.groups; group += GROUPS) {
            const int groups = int(std::min<int64_t>(GROUPS, share.groups - group));
            for (int64_t unit = begin; unit < end; unit++) {
                // what is read next
                const uint8_t* soon = unit + 1 < end                 ? packed_of(unit + 1, group)
                                      : group + GROUPS < share.groups ? packed_of(begin, group + GROUPS)
                                                                      : packed_of(end, 0);
                const Element* values = decoded;
                bool folds = false;
                if constexpr (Weights::AS_TILES) {
                    values = reinterpret_cast<const Element*>(packed_of(unit, group));
                } else {
                    const Weights weights = at(unit / UNITS);
                    if constexpr (Weights::SCALED) {
                        folds = moderate && weights.is_moderate(group, groups);
                        if (folds) decode_unit<true>(weights, int(unit % UNITS), group, groups, decoded, scales, soon);
                    }
                    if (!folds) decode_unit<false>(weights, int(unit % UNITS), group, groups, decoded, scales, soon);
                }
                const auto sum = folds ? sum_rows<false> : sum_rows<Weights::SCALED>;
                const bool ends = group + groups == share.groups;
                const int64_t output = unit / UNITS * BLOCK + output_of(int(unit % UNITS), 0),
                              second = output + output_of(0, 1);
                for (int tile = 0; tile < tiles; tile++) {
                    const int64_t row = row_of(tile), more = row_of(tile + 1) - row;
                    const bool asks = Weights::AS_TILES && (!tile || tile + 1 == tiles);
                    float* of_tile = sums + ((unit - begin) * rows + row) * UNIT;
                    if (ends) share.out.prefetch(first + row, int(more), output);
                    sum(int(more), x + (rows * group + row * groups) * GROUP / STEP, values, scales, groups, of_tile,
                        !group, asks ? reinterpret_cast<const Element*>(soon) : values);
                    if (ends) share.out.write_unit(first + row, int(more), output, second, of_tile);
                }
            }
        }
    }
}

template <class At>
void run_share(const Share& share, const At& at) {
    using Weights = std::decay_t<decltype(at(0))>;
    if (share.count == 1) return run_few<CHAINS / 2, 1>(share, at);
    if (share.count == 2) return run_few<CHAINS / 4, 2>(share, at);
    if (share.count <= (Weights::AS_TILES ? FEW : FEW_DECODED)) return run_few<1, FEW>(share, at);
    for (int64_t panel = 0; part_of(share.count, PANEL_ROWS, panel) < share.count; panel++) {
        const int64_t row = part_of(share.count, PANEL_ROWS, panel), end = part_of(share.count, PANEL_ROWS, panel + 1);
        run_panel(share, share.first + row, int(end - row), at);
    }
}

}  // namespace
}  // namespace megamoe

// Rows sorted by expert times each expert's matrix.
//   x [., k] bfloat16 of that stride; source[r] is the row of x that row r reads, null for r itself
//   packed, scales: of the first expert, with the bytes from one expert to the next; scales null for BF16 weights
//   counts [experts]: rows of each; out [., n] of that stride, bfloat16 or (wide) float32; goes[r] as source, for out
extern "C" void megamoe_products(const uint16_t* x, int64_t x_stride, const int64_t* source, int64_t k,
                                 const uint8_t* packed, const uint8_t* scales, int64_t packed_bytes,
                                 int64_t scales_bytes, int64_t n, const int64_t* counts, int64_t experts, void* out,
                                 int64_t out_stride, const int64_t* goes, int wide, int threads) {
    using namespace megamoe;
    const int64_t groups = (k + GROUP - 1) / GROUP, blocks = (n + BLOCK - 1) / BLOCK;
    const int64_t block_bytes = groups * GROUP * BLOCK * (scales ? 1 : 4) / 2, block_scales = groups * BLOCK;
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
#pragma omp parallel for num_threads(int(shares)) schedule(static, 1) if (shares > 1)
    for (int64_t part = 0; part < shares; part++) {
        const RoundToNearest state;
        int64_t first = 0;
        for (int64_t expert = 0; expert < experts; first += counts[expert++]) {
            if (!counts[expert]) continue;
            const Share share{{x, x_stride, k, source}, {out, out_stride, n, goes, wide != 0}, first, counts[expert],
                              blocks * part / shares, blocks * (part + 1) / shares, groups};
            const uint8_t* at = packed + expert * packed_bytes;
            if (scales) {
                const uint8_t* scale = scales + expert * scales_bytes;
                run_share(share, [=](int64_t b) { return E2M1{at + b * block_bytes, scale + b * block_scales}; });
            } else {
                run_share(share, [=](int64_t b) { return BF16{at + b * block_bytes}; });
            }
        }
    }
}
