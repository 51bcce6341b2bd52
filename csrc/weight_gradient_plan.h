// How the work of a weight gradient is divided: plain arithmetic, the same on the host and on the device.
//
// The result has few tiles (768 x 768: 18 of 128 x 256) and the sum over the rows is long, so the rows are split. A unit is
// two tiles, one below the other, over one split of one stream's rows: what a cluster of two blocks computes at a time. Units
// of the same split follow one another, so that those which run at once read the same rows, from the L2 cache.
#pragma once

#include <cstdint>

#include "cavmae.h"

#ifdef __CUDACC__
#define CAVMAE_BOTH __host__ __device__
#else
#define CAVMAE_BOTH
#endif

namespace cavmae {

constexpr int UNIT_HEIGHT = 256, UNIT_WIDTH = 256;  // of dW, by one split
constexpr int STEP_ROWS = 64;                       // rows that are multiplied at a time
constexpr int WARP_SUMS = 8;                        // sums of dout's columns that a unit writes: one for each warp
constexpr int64_t UNIT_STEPS = 16;                  // what a unit costs besides its steps, in steps: filling, storing, adding up
constexpr int64_t MOST_BYTES = 64 << 20;            // of partial results, where there is a choice

struct Unit {
    int stream, split, slot;  // slot: the split's number among all streams
    int tile_m, tile_n;       // in units of UNIT_HEIGHT and UNIT_WIDTH
    int first_step, steps;
};

struct Plan {
    int streams, tiles_m, tiles_n;
    int steps[CAVMAE_MAX_STREAMS], splits[CAVMAE_MAX_STREAMS];

    CAVMAE_BOTH int64_t width() const { return int64_t(tiles_m) * UNIT_HEIGHT; }
    CAVMAE_BOTH int64_t depth() const { return int64_t(tiles_n) * UNIT_WIDTH; }

    CAVMAE_BOTH int slots() const {
        int total = 0;
        for (int s = 0; s < streams; ++s) total += splits[s];
        return total;
    }

    CAVMAE_BOTH int units() const { return slots() * tiles_m * tiles_n; }

    CAVMAE_BOTH Unit unit(int index) const {
        Unit unit;
        const int tiles = tiles_m * tiles_n, tile = index % tiles;
        unit.slot = unit.split = index / tiles;
        unit.stream = 0;
        while (unit.split >= splits[unit.stream]) unit.split -= splits[unit.stream++];
        unit.tile_m = tile / tiles_n;
        unit.tile_n = tile % tiles_n;
        const int least = steps[unit.stream] / splits[unit.stream], longer = steps[unit.stream] % splits[unit.stream];
        unit.first_step = least * unit.split + (unit.split < longer ? unit.split : longer);
        unit.steps = least + (unit.split < longer);
        return unit;
    }

    // Elements of fp32: partial results first, then partial sums of dout's columns.
    CAVMAE_BOTH int64_t results() const { return slots() * width() * depth(); }
    CAVMAE_BOTH int64_t sums() const { return slots() * WARP_SUMS * width(); }
};

inline int64_t divided(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The plan whose slowest cluster has least to do, of those whose partial results are no larger than MOST_BYTES.
inline Plan make_plan(const int64_t* rows, int streams, int64_t width, int64_t depth, int clusters) {
    Plan best{}, plan{};
    plan.streams = streams;
    plan.tiles_m = static_cast<int>(divided(width, UNIT_HEIGHT));
    plan.tiles_n = static_cast<int>(divided(depth, UNIT_WIDTH));
    int64_t longest = 0, least = INT64_MAX;
    for (int s = 0; s < streams; ++s) {
        plan.steps[s] = static_cast<int>(divided(rows[s], STEP_ROWS));
        longest = plan.steps[s] > longest ? plan.steps[s] : longest;
    }
    for (int64_t parts = 1; parts <= 128 && parts <= longest; ++parts) {
        const int64_t chunk = divided(longest, parts);
        for (int s = 0; s < streams; ++s) plan.splits[s] = static_cast<int>(divided(plan.steps[s], chunk));
        if (parts > 1 && plan.results() * 4 > MOST_BYTES) break;
        const int64_t cost = divided(plan.units(), clusters) * (chunk + UNIT_STEPS);
        if (cost < least) {
            least = cost;
            best = plan;
        }
    }
    return best;
}

}  // namespace cavmae
