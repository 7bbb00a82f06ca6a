// Where rows go: index arithmetic of one call, which costs a few tokens more than their rows in torch's operations.
#include <algorithm>
#include <cstdint>
#include <vector>

// Rows for each expert, and tokens whose first expert on its rank that is: see messages.count_rows().
//   ids [tokens, topk], -1 masks; rank_of [experts]; pairs, firsts [experts], zero before
extern "C" void megamoe_count_rows(const int64_t* ids, int64_t tokens, int64_t topk, const int64_t* rank_of,
                                   int64_t experts, int64_t* pairs, int64_t* firsts) {
    std::vector<int64_t> own(topk);
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
