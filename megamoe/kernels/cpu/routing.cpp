// Where rows go: index arithmetic of one call, which costs a few tokens more than their rows in torch's operations.
// And calls of few tokens as a whole, whose products cost less than the arithmetic around them would in Python.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "library.h"
#include "vectors.h"

namespace {

template <class Count>
void count_rows(const int64_t* ids, int64_t tokens, int64_t topk, const int64_t* rank_of, int64_t experts, Count* pairs,
                Count* firsts) {
    thread_local std::vector<int64_t> own;
    own.resize(topk);
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t k = 0; k < topk; k++)
            own[k] = std::min(std::max<int64_t>(ids[t * topk + k], -1), experts - 1);
        std::sort(own.begin(), own.end());
        int64_t last = -1;  // ranks of masked slots and before the first
        for (const int64_t expert : own) {
            if (expert < 0) continue;
            pairs[expert]++;
            if (rank_of[expert] != last) firsts[expert]++;
            last = rank_of[expert];
        }
    }
}

}  // namespace

// Rows for each expert, and tokens whose first expert on its rank that is: see messages.count_rows().
//   ids [tokens, topk], -1 masks; rank_of [experts]; pairs, firsts [experts], zero before
extern "C" void megamoe_count_rows(const int64_t* ids, int64_t tokens, int64_t topk, const int64_t* rank_of,
                                   int64_t experts, int64_t* pairs, int64_t* firsts) {
    count_rows(ids, tokens, topk, rank_of, experts, pairs, firsts);
}

// Slots in the order in which their rows travel: see rows.Route and rows.route_rows().
//   place_of [experts + 1]: an expert's place in that order, the last entry that of masked slots
//   tokens_of, weights_of [rows]; positions [tokens, topk], `rows` for a masked slot
extern "C" void megamoe_sort_slots(const int64_t* ids, const float* weights, int64_t tokens, int64_t topk,
                                   const int64_t* place_of, int64_t experts, int64_t rows, int64_t* tokens_of,
                                   float* weights_of, int64_t* positions) {
    std::vector<int64_t> next(experts + 2);
    const int64_t slots = tokens * topk;
    auto place = [&](int64_t slot) { return place_of[ids[slot] < 0 ? experts : ids[slot]]; };
    for (int64_t slot = 0; slot < slots; slot++) next[place(slot) + 1]++;
    for (int64_t i = 1; i <= experts; i++) next[i] += next[i - 1];
    for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t row = next[place(slot)]++;
        positions[slot] = std::min(row, rows);
        if (row < rows) {
            tokens_of[row] = slot / topk;
            weights_of[row] = weights[slot];
        }
    }
}

// Of the rows that leave, which tokens go along, each once to a rank, and where each row's token lies in the receiver's
// inbox: see permutation._Sending.
//   lengths, ranks, bases [segments]; seen [tokens * num_ranks], -1 before; unique: tokens that go along; places [rows]
extern "C" void megamoe_send_once(const int64_t* tokens_of, const int64_t* lengths, const int64_t* ranks,
                                  const int64_t* bases, int64_t segments, int64_t num_ranks, int64_t* seen,
                                  int64_t* unique, int32_t* places) {
    int64_t row = 0, number = 0;
    for (int64_t segment = 0; segment < segments; segment++)
        for (const int64_t end = row + lengths[segment]; row < end; row++) {
            int64_t& place = seen[tokens_of[row] * num_ranks + ranks[segment]];
            if (place < 0) {
                unique[number++] = tokens_of[row];
                place = bases[segment] + number;
            }
            places[row] = int32_t(place);
        }
}

// ---- calls of few tokens: see execution/small_call.py ----

namespace {

// A matrix of all experts of this rank, as megamoe_products() takes it, with its bias, if there is one.
struct Matrix {
    const uint8_t *packed, *scales;
    int64_t packed_bytes, scales_bytes, outputs;
    const float* bias;
};

// What a rank brings lies in one piece, in memory that its peers read: the expert of each slot, int32 [tokens, topk],
// their weights, float [tokens, topk], then from the next multiple of 64 bytes on the tokens, rows of the wire.
struct Brought {
    uint8_t* begin;
    int64_t tokens, topk;

    int32_t* experts() const { return reinterpret_cast<int32_t*>(begin); }
    float* weights() const { return reinterpret_cast<float*>(begin + 4 * tokens * topk); }
    uint8_t* rows() const { return begin + (8 * tokens * topk + 63) / 64 * 64; }
};

}  // namespace

// small_call._FewTokens, field by field. A slot's number is its place among the slots of all ranks, by rank and token.
struct megamoe_few {
    int64_t ranks, rank, topk, num_experts, first, experts;  // first expert of this rank, and how many it has
    int64_t width, inner, row_bytes, mxfp8, rounds;          // rounds: a BF16 wire to experts that take MXFP8
    Matrix gate_up, down;
    int64_t gated, quantized;
    const float *table, *up_table;
    float limit, shift;
    const int64_t* rank_of;  // [num_experts]
    const int64_t *place_of, *column_of, *expert_at;  // landing.Order: [num_experts + 1] twice, [num_experts]; or null
    uint8_t** brought;       // [ranks]
    const int64_t* tokens;   // [ranks]
    uint16_t** results;      // [ranks]: the rows that each rank has computed, [., width], by rank, token and slot
    int64_t* owed;           // [2, ranks]: rows that each rank computes for this one, and this one for each
    int64_t* starts;         // [ranks]: which row of each rank's results is the first for this one
    // of one call
    int64_t threads, num_rows;
    const uint16_t* hidden;
    const int64_t* ids;
    const float* topk_weights;
    int32_t* pairs;  // [3, num_experts]
    int64_t* counts;  // [experts]
    int64_t *sources, *goes;  // [num_rows]: the row's token among those of all ranks, its row of the results
    int64_t* places;          // [tokens of this rank, topk]: a slot's row of those that its rank computes for this one
    float* weights;           // [num_rows]
    uint8_t* wanted;          // [tokens of all ranks]
    uint16_t *x, *linear1, *activated, *out;
    float* sums;
    int64_t stage_ns[3];
};

// For whoever fills one in elsewhere: two layouts that differ would be read as each other.
extern "C" int megamoe_few_bytes() { return int(sizeof(megamoe_few)); }

// Tokens that land for each expert's sake -> the third row of pairs.
static void count_landed(const megamoe_few& c, int64_t tokens) {
    thread_local std::vector<int64_t> first;  // by column: the least place of a token's experts in it
    for (int64_t t = 0; t < tokens; t++) {
        first.assign(c.ranks, c.num_experts);
        for (int64_t k = 0; k < c.topk; k++) {
            const int64_t expert = c.ids[t * c.topk + k];
            if (expert < 0) continue;
            int64_t& least = first[c.column_of[expert]];
            least = std::min(least, c.place_of[expert]);
        }
        for (const int64_t place : first)
            if (place < c.num_experts) c.pairs[2 * c.num_experts + c.expert_at[place]]++;
    }
}

// Puts this rank's slots and tokens where its peers read them, and counts pairs and firsts as megamoe_count_rows() does,
// and what lands for an expert's sake as landing.land() does, where the order for it is given. Whether all ids are
// experts or -1, and all weights of experts finite.
extern "C" int megamoe_few_bring(megamoe_few* call) {
    const megamoe_few& c = *call;
    const int64_t tokens = c.tokens[c.rank], slots = tokens * c.topk;
    const Brought own{c.brought[c.rank], tokens, c.topk};
    for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t id = c.ids[slot];
        if (id < -1 || id >= c.num_experts || (id >= 0 && !std::isfinite(c.topk_weights[slot]))) return 0;
        own.experts()[slot] = int32_t(id);
    }
    std::memcpy(own.weights(), c.topk_weights, slots * sizeof(float));
    std::fill(c.pairs, c.pairs + 3 * c.num_experts, 0);
    count_rows(c.ids, tokens, c.topk, c.rank_of, c.num_experts, c.pairs, c.pairs + c.num_experts);
    if (c.place_of != nullptr) count_landed(c, tokens);
    if (c.mxfp8) {
        megamoe_quantize(c.hidden, c.width, tokens, c.width, own.rows(), c.row_bytes, own.rows() + c.width, c.row_bytes,
                         nullptr, int(c.threads));
    } else {
        for (int64_t t = 0; t < tokens; t++)
            std::memcpy(own.rows() + t * c.row_bytes, c.hidden + t * c.width, c.width * sizeof(uint16_t));
    }
    return 1;
}

// The rows of this rank's experts among the slots of all ranks, by expert and slot: counts, sources, goes, weights,
// wanted, num_rows; and whose results are where: owed, starts, places.
extern "C" void megamoe_few_route(megamoe_few* call) {
    megamoe_few& c = *call;
    thread_local std::vector<int64_t> next;
    next.assign(c.experts + 1, 0);
    std::fill(c.counts, c.counts + c.experts, 0);
    std::fill(c.owed, c.owed + 2 * c.ranks, 0);
    std::fill(c.starts, c.starts + c.ranks, 0);
    auto each = [&](auto&& take) {
        for (int64_t rank = 0, slot = 0; rank < c.ranks; rank++) {
            const Brought brought{c.brought[rank], c.tokens[rank], c.topk};
            for (int64_t i = 0; i < c.tokens[rank] * c.topk; i++, slot++) {
                const int64_t expert = int64_t(brought.experts()[i]) - c.first;
                if (expert >= 0 && expert < c.experts) take(expert, rank, slot, brought.weights()[i]);
            }
        }
    };
    each([&](int64_t expert, int64_t rank, int64_t, float) {
        c.counts[expert]++;
        c.owed[c.ranks + rank]++;
    });
    for (int64_t rank = 0; rank < c.rank; rank++) {
        const int32_t* ids = Brought{c.brought[rank], c.tokens[rank], c.topk}.experts();
        for (int64_t i = 0; i < c.tokens[rank] * c.topk; i++)
            if (ids[i] >= 0) c.starts[c.rank_of[ids[i]]]++;
    }
    for (int64_t i = 0; i < c.tokens[c.rank] * c.topk; i++)
        if (c.ids[i] >= 0) c.places[i] = c.owed[c.rank_of[c.ids[i]]]++;
    for (int64_t expert = 0; expert < c.experts; expert++) next[expert + 1] = next[expert] + c.counts[expert];
    c.num_rows = next[c.experts];
    int64_t all = 0;
    for (int64_t rank = 0; rank < c.ranks; rank++) all += c.tokens[rank];
    std::fill(c.wanted, c.wanted + all, 0);
    int64_t result = 0;
    each([&](int64_t expert, int64_t, int64_t slot, float weight) {
        const int64_t row = next[expert]++;
        c.sources[row] = slot / c.topk;
        c.goes[row] = result++;
        c.weights[row] = weight;
        c.wanted[slot / c.topk] = 1;
    });
}

// The tokens that this rank's experts want, as they take them, run by run.
static void read_tokens(const megamoe_few& c) {
    const int threads = int(c.threads);
    int64_t token = 0;
    for (int64_t rank = 0; rank < c.ranks; rank++) {
        const uint8_t* row = Brought{c.brought[rank], c.tokens[rank], c.topk}.rows();
        for (const int64_t end = token + c.tokens[rank]; token < end;) {
            int64_t run = 0;
            while (token + run < end && c.wanted[token + run]) run++;
            uint16_t* to = c.x + token * c.width;
            const auto* values = reinterpret_cast<const uint16_t*>(row);
            if (c.mxfp8) {
                megamoe_dequantize(row, c.row_bytes, row + c.width, c.row_bytes, run, c.width, to, c.width, threads);
            } else if (c.rounds) {
                megamoe_round(values, c.row_bytes / 2, run, c.width, to, c.width, threads);
            } else {
                for (int64_t t = 0; t < run; t++)
                    std::memcpy(to + t * c.width, row + t * c.row_bytes, c.width * sizeof *to);
            }
            run = std::max<int64_t>(run, 1);
            token += run, row += run * c.row_bytes;
        }
    }
}

// A product and its bias, which is added to the FP32 sum before it is rounded.
static void multiply(const megamoe_few& c, const Matrix& matrix, const uint16_t* x, const int64_t* source, int64_t depth,
                     const float* weights, uint16_t* out, const int64_t* goes) {
    const bool biased = matrix.bias != nullptr;
    megamoe_products(x, depth, source, depth, matrix.packed, matrix.scales, matrix.packed_bytes, matrix.scales_bytes,
                     matrix.outputs, c.counts, c.experts, biased ? static_cast<void*>(c.sums) : out, matrix.outputs,
                     biased ? nullptr : goes, biased, int(c.threads));
    if (biased)
        megamoe_add_bias(c.sums, matrix.outputs, matrix.bias, c.counts, c.experts, weights, out, matrix.outputs, goes,
                         int(c.threads));
}

// The experts on the rows that were routed, their results by rank, token and slot. stage_ns: Linear-1, activation, Linear-2.
extern "C" void megamoe_few_compute(megamoe_few* call) {
    megamoe_few& c = *call;
    using Clock = std::chrono::steady_clock;
    auto begun = Clock::now();
    auto lap = [&](int stage) {
        const auto now = Clock::now();
        c.stage_ns[stage] = std::chrono::duration_cast<std::chrono::nanoseconds>(now - begun).count();
        begun = now;
    };
    read_tokens(c);
    multiply(c, c.gate_up, c.x, c.sources, c.width, nullptr, c.linear1, nullptr);
    lap(0);
    megamoe_activate(c.linear1, c.weights, c.num_rows, c.inner, int(c.gated), c.table, c.up_table, c.limit, c.shift,
                     int(c.quantized), c.activated, int(c.threads));
    lap(1);
    multiply(c, c.down, c.activated, nullptr, c.inner, c.weights, c.results[c.rank], c.goes);
    lap(2);
}

// Sums the slots of this rank's tokens in ascending order in FP32 from zero, rounded once, from where the ranks that
// computed them have them -> out [tokens, width]. A masked slot adds zero, which changes no bit: such a sum is never -0.
extern "C" void megamoe_few_reduce(megamoe_few* call) {
    const megamoe_few& c = *call;
    constexpr int64_t CHUNK = 512, AT_ONCE = 16384;  // values, below which a second thread is not worth waking
    const int64_t tokens = c.tokens[c.rank], values = tokens * c.topk * c.width;
    const int threads = int(std::max<int64_t>(1, std::min(c.threads, values / AT_ONCE)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const megamoe::RoundToNearest state;
        for (int64_t begin = 0; begin < c.width; begin += CHUNK) {
            float sums[CHUNK] = {};
            const int64_t count = std::min(CHUNK, c.width - begin);
            for (int64_t k = 0; k < c.topk; k++) {
                const int64_t slot = t * c.topk + k, expert = c.ids[slot];
                if (expert < 0) continue;
                const int64_t rank = c.rank_of[expert], result = c.starts[rank] + c.places[slot];
                const uint16_t* row = c.results[rank] + result * c.width + begin;
                for (int64_t i = 0; i < count; i++) sums[i] += megamoe::from_bf16(row[i]);
            }
            for (int64_t i = 0; i < count; i++) c.out[t * c.width + begin + i] = megamoe::to_bf16(sums[i]);
        }
    }
}
