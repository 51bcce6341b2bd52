// The backward pass of attention, one head of one sample for a block, with everything of its queries in shared memory.
//
//     p = exp2(c q k^T - lse),    delta = rowsum(dout * out),    ds = p * (dout v^T - delta)
//     dv = p^T dout,    dk = scale ds^T q,    dq = scale ds k
//
// q, dout, lse, delta and the unfinished dq (fp32) stay in shared memory for the whole time. Blocks of keys are taken one
// after the other, and for each the queries pass by, STEP at a time. Scores are formed transposed, [keys, queries], so that p
// and ds are first factors of the products for dv and dk where they are, in registers. Four warps own 16 * TILES keys each,
// and a second four the same keys and every other 16 queries; their dk and dv are added up when the queries are through.
// For dq, ds goes through shared memory: after a barrier a warp owns 16 queries and half of the columns. It has two places
// for ds, so one barrier for a step is enough. The order of every sum is fixed, and each score is computed once.
//
// The functions of `AttentionWarp` hold no barrier. The caller puts them between (`Block`), which on the host are the ends of
// a loop over the warps.
#pragma once

#include "cavmae.h"
#include "warp.cuh"

#ifndef __CUDACC__
#include <vector>
#endif

namespace cavmae {

constexpr int ATTENTION_WARPS = 8, ATTENTION_THREADS = 32 * ATTENTION_WARPS;
constexpr int STEP = 64;                        // queries that pass by at a time
constexpr int SCRATCH_BYTES = 32768;            // keys and values as they come, then ds, then halves of dk and dv
constexpr int MOST_SHARED_BYTES = 227 * 1024;   // that a block may have on Hopper

// What a query takes of shared memory: q, dout, dq, lse and delta.
constexpr int query_bytes(int width) { return 2 * width + 2 * width + 4 * width + 8; }
constexpr int padded_queries(int queries) { return (queries + 15) / 16 * 16; }
constexpr int shared_bytes(int width, int queries) { return SCRATCH_BYTES + padded_queries(queries) * query_bytes(width); }
constexpr int most_queries(int width) { return (MOST_SHARED_BYTES - SCRATCH_BYTES) / query_bytes(width) / 16 * 16; }

// A head of a sample: its rows in global memory, bf16 as their bits, and what they are multiplied with.
struct AttentionHead {
    const uint16_t *q, *k, *v, *dout, *out;
    const float* lse;
    uint16_t *dq, *dk, *dv;
    int64_t q_stride, k_stride, out_stride;  // elements from row to row: of q and dq; of k, v, dk and dv; of dout and out
    int queries, keys;
    float c, scale;
};

struct alignas(16) Chunk {
    uint32_t word[4];
};

// Where 16 bytes of a row of 16 * CHUNKS bytes are kept, in bytes: any 8 rows one below the other, from a multiple of 8 on,
// have theirs in different banks.
template <int CHUNKS>
CAVMAE_DEVICE int place(int row, int chunk) {
    static_assert(CHUNKS == 4 || CHUNKS == 8);
    return (row * CHUNKS + (chunk ^ (CHUNKS == 8 ? row & 7 : row >> 1 & 3))) * 16;
}

// The rows of the four matrices that make up 16 rows from `row` on, a multiple of 16, by 2 chunks: (rows 0-7 | 8-15) of the
// first, then of the second chunk; ACROSS: (first | second chunk) of rows 0-7, then of rows 8-15. A product takes neighboring
// registers, so the order is chosen such that none has to be moved.
template <int CHUNKS, bool ACROSS>
CAVMAE_DEVICE PerLane<Address> matrices(Address tile, int row, int chunk) {
    PerLane<Address> rows;
    CAVMAE_EACH_LANE(lane) {
        const int lower = ACROSS ? lane / 16 : lane / 8 % 2, second = ACROSS ? lane / 8 % 2 : lane / 16;
        rows[lane] = tile + row * CHUNKS * 16 + place<CHUNKS>(lane % 8 + 8 * lower, chunk + second);
    }
    return rows;
}

CAVMAE_DEVICE void store_pair(uint16_t* to, float first, float second) {
    const uint32_t word = packed(first, second);
#ifdef __CUDACC__
    *reinterpret_cast<uint32_t*>(to) = word;
#else
    std::memcpy(to, &word, 4);
#endif
}

template <int W>
struct AttentionWarp {
    static constexpr int CHUNKS = W / 8, DEPTH = W / 16, TILES = 64 / W, KEYS = 4 * 16 * TILES;
    static constexpr int COLUMNS = W / 2;  // of dq, for a warp
    static_assert(2 * KEYS * W * 2 <= SCRATCH_BYTES && 2 * KEYS * STEP * 2 <= SCRATCH_BYTES);
    static_assert(4 * TILES * CHUNKS * 2 * 32 * int(sizeof(Four)) <= SCRATCH_BYTES);

    static constexpr int GROUP = 16 * query_bytes(W), DS = KEYS * STEP * 2;  // bytes of 16 queries, of a step's ds

    int index;
    char* memory;
    Address scratch;
    // Addresses for the first step: of the rows of q and, 32 W bytes behind, of dout, for both kinds of factors; of lse and
    // delta; where ds goes and where it is read; where dq is.
    PerLane<Address> across[DEPTH], down[DEPTH], statistics, ds_to[STEP / 32], ds_from, dq_at;
    Fragment key[TILES][DEPTH], value[TILES][DEPTH];  // [16 keys, 16 columns], first factors
    Fragment key_columns[KEYS / 16][COLUMNS / 16];    // [16 keys, 16 columns] of all keys, second factors for dq
    Accumulator start[TILES];                         // what sums of scores begin with: -inf for keys that are not there
    Accumulator dk[TILES][CHUNKS], dv[TILES][CHUNKS];

    CAVMAE_DEVICE int owner() const { return index % 4; }
    CAVMAE_DEVICE int half() const { return index / 4; }

    CAVMAE_DEVICE AttentionWarp(int index, char* memory) : index(index), memory(memory), scratch(address_of(memory)) {
        const Address rows = scratch + SCRATCH_BYTES;
        CAVMAE_UNROLL
        for (int k = 0; k < DEPTH; ++k) {
            across[k] = matrices<CHUNKS, true>(rows + half() * GROUP, 0, 2 * k);
            hold(across[k]);
            down[k] = matrices<CHUNKS, false>(rows + half() * GROUP, 0, 2 * k);
            hold(down[k]);
        }
        CAVMAE_UNROLL
        for (int i = 0; i < STEP / 32; ++i) {
            ds_to[i] = matrices<STEP / 8, false>(scratch, 16 * TILES * owner(), 2 * (half() + 2 * i));
            hold(ds_to[i]);
        }
        ds_from = matrices<STEP / 8, true>(scratch, 0, 2 * owner());
        hold(ds_from);
        CAVMAE_EACH_LANE(lane) {
            statistics[lane] = rows + half() * GROUP + 16 * 8 * W + lane % 4 * 16;
            dq_at[lane] = rows + owner() * GROUP + 16 * 4 * W + (half() * (COLUMNS / 8) * 32 + lane) * 16;
        }
        hold(statistics);
        hold(dq_at);
    }

    // Shared memory: the scratch, then of each 16 queries q, dout, dq as lanes hold it, and (lse, delta).
    CAVMAE_DEVICE char* group_at(int group) const { return memory + SCRATCH_BYTES + group * GROUP; }

    CAVMAE_DEVICE void load_queries(const AttentionHead& head) {
        const int padded = padded_queries(head.queries);
        for (int first = 32 * index; first < padded; first += ATTENTION_THREADS) CAVMAE_EACH_LANE(lane) {
                const int row = first + lane;
                if (row >= padded) continue;
                const bool inside = row < head.queries;
                char* group = group_at(row / 16);
                Four* dq = reinterpret_cast<Four*>(group + 16 * 4 * W);
                float* pair = reinterpret_cast<float*>(group + 16 * 8 * W) + 2 * (row % 16);
                float delta = 0;
                CAVMAE_UNROLL
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    Chunk q{}, dout{}, out{};
                    if (inside) {
                        q = reinterpret_cast<const Chunk*>(head.q + row * head.q_stride)[chunk];
                        dout = reinterpret_cast<const Chunk*>(head.dout + row * head.out_stride)[chunk];
                        out = reinterpret_cast<const Chunk*>(head.out + row * head.out_stride)[chunk];
                    }
                    CAVMAE_UNROLL
                    for (int i = 0; i < 4; ++i)
                        delta += low_of(dout.word[i]) * low_of(out.word[i]) + high_of(dout.word[i]) * high_of(out.word[i]);
                    *reinterpret_cast<Chunk*>(group + place<CHUNKS>(row % 16, chunk)) = q;
                    *reinterpret_cast<Chunk*>(group + 16 * 2 * W + place<CHUNKS>(row % 16, chunk)) = dout;
                    dq[2 * (row % 16 * CHUNKS + chunk)] = Four{0, 0, 0, 0};
                    dq[2 * (row % 16 * CHUNKS + chunk) + 1] = Four{0, 0, 0, 0};
                }
                pair[0] = inside ? head.lse[row] : 0.0f;
                pair[1] = delta;
            }
    }

    // Keys and values from row `first` on, 0 where there are none, into the scratch memory.
    CAVMAE_DEVICE void load_keys(const AttentionHead& head, int first) {
        CAVMAE_UNROLL
        for (int i = 0; i < KEYS * CHUNKS / ATTENTION_THREADS; ++i) CAVMAE_EACH_LANE(lane) {
                const int number = i * ATTENTION_THREADS + 32 * index + lane, row = number / CHUNKS, chunk = number % CHUNKS;
                Chunk k{}, v{};
                if (first + row < head.keys) {
                    k = reinterpret_cast<const Chunk*>(head.k + (first + row) * head.k_stride)[chunk];
                    v = reinterpret_cast<const Chunk*>(head.v + (first + row) * head.k_stride)[chunk];
                }
                *reinterpret_cast<Chunk*>(memory + place<CHUNKS>(row, chunk)) = k;
                *reinterpret_cast<Chunk*>(memory + KEYS * W * 2 + place<CHUNKS>(row, chunk)) = v;
            }
    }

    CAVMAE_DEVICE void take_keys(const AttentionHead& head, int first) {
        CAVMAE_UNROLL
        for (int m = 0; m < TILES; ++m) {
            const int row = 16 * (TILES * owner() + m);
            CAVMAE_UNROLL
            for (int k = 0; k < DEPTH; ++k) {
                load_matrices<false>(key[m][k], matrices<CHUNKS, false>(scratch, row, 2 * k));
                load_matrices<false>(value[m][k], matrices<CHUNKS, false>(scratch + KEYS * W * 2, row, 2 * k));
            }
            CAVMAE_EACH_LANE(lane) {
                const int upper = first + row + lane / 4;
                const float low = -INFINITY, a = upper < head.keys ? 0.0f : low, b = upper + 8 < head.keys ? 0.0f : low;
                start[m][lane] = Four{a, a, b, b};
            }
            hold(start[m]);
            CAVMAE_UNROLL
            for (int n = 0; n < CHUNKS; ++n) CAVMAE_EACH_LANE(lane) dk[m][n][lane] = dv[m][n][lane] = Four{0, 0, 0, 0};
        }
        CAVMAE_UNROLL
        for (int t = 0; t < KEYS / 16; ++t)
            CAVMAE_UNROLL
        for (int n = 0; n < COLUMNS / 16; ++n)
            load_matrices<true>(key_columns[t][n], matrices<CHUNKS, false>(scratch, 16 * t, half() * (COLUMNS / 8) + 2 * n));
    }

    // What the queries of a step add to dk and dv, and their ds. Keys that are not there have p = 0 and ds = 0.
    CAVMAE_DEVICE void scores(const AttentionHead& head, int step) {
        const int queries = padded_queries(head.queries) - step * STEP, of_step = step * (STEP / 16 * GROUP);
        CAVMAE_UNROLL
        for (int i = 0; i < STEP / 32; ++i)
            if (16 * (half() + 2 * i) < queries) add_queries(head.c, of_step + 2 * i * GROUP, ds_to[i], step % 2 * DS);
    }

    // 16 of them, whose rows begin `from` bytes behind the first ones, and the place for their ds `to` bytes behind `ds_rows`.
    CAVMAE_DEVICE void add_queries(float c, int from, const PerLane<Address>& ds_rows, int to) {
        Accumulator score[TILES][2], dp[TILES][2];
        Fragment p[TILES], ds[TILES], rows;
        CAVMAE_UNROLL
        for (int k = 0; k < DEPTH; ++k) {
            load_matrices<false>(rows, across[k], from);
            CAVMAE_UNROLL
            for (int m = 0; m < TILES; ++m)
                CAVMAE_UNROLL
            for (int n = 0; n < 2; ++n)
                multiply(score[m][n], key[m][k], rows.word[2 * n], rows.word[2 * n + 1], k == 0 ? start[m] : score[m][n]);
        }
        Accumulator zero;
        CAVMAE_EACH_LANE(lane) zero[lane] = Four{0, 0, 0, 0};
        CAVMAE_UNROLL
        for (int k = 0; k < DEPTH; ++k) {
            load_matrices<false>(rows, across[k], from + 16 * 2 * W);
            CAVMAE_UNROLL
            for (int m = 0; m < TILES; ++m)
                CAVMAE_UNROLL
            for (int n = 0; n < 2; ++n)
                multiply(dp[m][n], value[m][k], rows.word[2 * n], rows.word[2 * n + 1], k == 0 ? zero : dp[m][n]);
        }
        CAVMAE_UNROLL
        for (int n = 0; n < 2; ++n) CAVMAE_EACH_LANE(lane) {
                // lse and delta of this lane's two queries
                const Four of = load_four(statistics[lane] + from + n * 4 * 16);
                CAVMAE_UNROLL
                for (int m = 0; m < TILES; ++m) {
                    const Four s = score[m][n][lane], d = dp[m][n][lane];
                    const float a = power_of_2(s.x * c - of.x), b = power_of_2(s.y * c - of.z);
                    const float e = power_of_2(s.z * c - of.x), f = power_of_2(s.w * c - of.z);
                    p[m].word[2 * n][lane] = packed(a, b);
                    p[m].word[2 * n + 1][lane] = packed(e, f);
                    ds[m].word[2 * n][lane] = packed(a * (d.x - of.y), b * (d.y - of.w));
                    ds[m].word[2 * n + 1][lane] = packed(e * (d.z - of.y), f * (d.w - of.w));
                }
            }
        CAVMAE_UNROLL
        for (int m = 0; m < TILES; ++m)
            store_matrices(ds_rows, to + m * 16 * STEP * 2, ds[m]);
        add_product(dv, p, from + 16 * 2 * W);
        add_product(dk, ds, from);
    }

    // to += a x, with 16 rows of q or dout that begin `from` bytes behind the first ones of q.
    CAVMAE_DEVICE void add_product(Accumulator (&to)[TILES][CHUNKS], const Fragment (&a)[TILES], int from) {
        CAVMAE_UNROLL
        for (int k = 0; k < DEPTH; ++k) {
            Fragment rows;
            load_matrices<true>(rows, down[k], from);
            CAVMAE_UNROLL
            for (int m = 0; m < TILES; ++m)
                CAVMAE_UNROLL
            for (int n = 0; n < 2; ++n)
                multiply(to[m][2 * k + n], a[m], rows.word[2 * n], rows.word[2 * n + 1], to[m][2 * k + n]);
        }
    }

    // What this block of keys adds to dq of a step's queries.
    CAVMAE_DEVICE void add_keys(const AttentionHead& head, int step) {
        if (16 * owner() >= padded_queries(head.queries) - step * STEP) return;
        const int of_step = step * (STEP / 16 * GROUP);
        // Two sums of every other 16 keys: products that wait for one another are half as many.
        Accumulator sums[2][COLUMNS / 8];
        CAVMAE_UNROLL
        for (int n = 0; n < COLUMNS / 8; ++n) CAVMAE_EACH_LANE(lane) {
                sums[0][n][lane] = load_four(dq_at[lane] + of_step + n * 512);
                sums[1][n][lane] = Four{0, 0, 0, 0};
            }
        CAVMAE_UNROLL
        for (int t = 0; t < KEYS / 16; ++t) {
            Fragment ds;
            load_matrices<true>(ds, ds_from, step % 2 * DS + t * 16 * STEP * 2);
            CAVMAE_UNROLL
            for (int n = 0; n < COLUMNS / 8; ++n) {
                const Fragment& k = key_columns[t][n / 2];
                multiply(sums[t % 2][n], ds, k.word[n % 2 * 2], k.word[n % 2 * 2 + 1], sums[t % 2][n]);
            }
        }
        CAVMAE_UNROLL
        for (int n = 0; n < COLUMNS / 8; ++n)
            CAVMAE_EACH_LANE(lane) store_four(dq_at[lane] + of_step + n * 512, sum(sums[0][n][lane], sums[1][n][lane]));
    }

    CAVMAE_DEVICE void store_queries(const AttentionHead& head) {
        for (int group = index; group < padded_queries(head.queries) / 16; group += ATTENTION_WARPS)
            CAVMAE_UNROLL
        for (int n = 0; n < CHUNKS; ++n) CAVMAE_EACH_LANE(lane) {
                const Four dq = reinterpret_cast<const Four*>(group_at(group) + 16 * 4 * W)[32 * n + lane];
                store(head.dq + 8 * n, head.q_stride, 16 * group, head.queries, dq, head.scale, lane);
            }
    }

    // A lane's part of 16 x 8 numbers, of the rows that are there.
    static CAVMAE_DEVICE void store(uint16_t* to, int64_t stride, int row, int rows, const Four& x, float scale, int lane) {
        const int upper = row + lane / 4, column = 2 * (lane % 4);
        if (upper < rows) store_pair(to + upper * stride + column, x.x * scale, x.y * scale);
        if (upper + 8 < rows) store_pair(to + (upper + 8) * stride + column, x.z * scale, x.w * scale);
    }

    // The second four warps hand their dk and dv to the first four, which add and write them.
    CAVMAE_DEVICE void hand_over() {
        if (half() == 0) return;
        Four* to = reinterpret_cast<Four*>(memory) + owner() * (2 * TILES * CHUNKS * 32);
        CAVMAE_UNROLL
        for (int m = 0; m < TILES; ++m)
            CAVMAE_UNROLL
        for (int n = 0; n < CHUNKS; ++n) CAVMAE_EACH_LANE(lane) {
                to[(m * CHUNKS + n) * 64 + lane] = dk[m][n][lane];
                to[(m * CHUNKS + n) * 64 + 32 + lane] = dv[m][n][lane];
            }
    }

    CAVMAE_DEVICE void finish(const AttentionHead& head, int first) {
        if (half() == 1) return;
        const Four* from = reinterpret_cast<const Four*>(memory) + owner() * (2 * TILES * CHUNKS * 32);
        CAVMAE_UNROLL
        for (int m = 0; m < TILES; ++m)
            CAVMAE_UNROLL
        for (int n = 0; n < CHUNKS; ++n) CAVMAE_EACH_LANE(lane) {
                const int row = first + 16 * (TILES * owner() + m);
                const Four k = sum(dk[m][n][lane], from[(m * CHUNKS + n) * 64 + lane]);
                const Four v = sum(dv[m][n][lane], from[(m * CHUNKS + n) * 64 + 32 + lane]);
                store(head.dk + 8 * n, head.k_stride, row, head.keys, k, head.scale, lane);
                store(head.dv + 8 * n, head.k_stride, row, head.keys, v, 1.0f, lane);
            }
    }

    static CAVMAE_DEVICE Four sum(const Four& a, const Four& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
};

// The warps of a block. `phase` runs a function for each of them; what follows it sees all that it wrote.
template <int W>
struct Block {
#ifdef __CUDACC__
    AttentionWarp<W> warp;

    __device__ __forceinline__ explicit Block(char* memory) : warp(threadIdx.x / 32, memory) {}

    template <class Function>
    __device__ __forceinline__ void phase(Function function) {
        function(warp);
        __syncthreads();
    }
#else
    std::vector<AttentionWarp<W>> warps;
    bool backwards;  // the last warp first: a race would show

    Block(char* memory, bool backwards) : backwards(backwards) {
        for (int i = 0; i < ATTENTION_WARPS; ++i) warps.emplace_back(i, memory);
    }

    template <class Function>
    void phase(Function function) {
        for (int i = 0; i < ATTENTION_WARPS; ++i) function(warps[backwards ? ATTENTION_WARPS - 1 - i : i]);
    }
#endif
};

template <int W>
CAVMAE_DEVICE void attention_backward(Block<W>& block, const AttentionHead& head) {
    using Warp = AttentionWarp<W>;
    const int steps = (head.queries + STEP - 1) / STEP;
    block.phase([&](Warp& warp) { warp.load_queries(head); });
    for (int first = 0; first < head.keys; first += Warp::KEYS) {
        block.phase([&](Warp& warp) { warp.load_keys(head, first); });
        block.phase([&](Warp& warp) { warp.take_keys(head, first); });
        block.phase([&](Warp& warp) { warp.scores(head, 0); });
        for (int step = 0; step < steps; ++step) {
            block.phase([&](Warp& warp) {
                warp.add_keys(head, step);
                if (step + 1 < steps) warp.scores(head, step + 1);
            });
        }
        block.phase([&](Warp& warp) { warp.hand_over(); });
        block.phase([&](Warp& warp) { warp.finish(head, first); });
    }
    block.phase([&](Warp& warp) { warp.store_queries(head); });
}

// Streams of attention as they lie in memory, and which head a block works on.
struct AttentionStreams {
    AttentionHead all;  // the first row of everything; queries and keys are not set
    int64_t q_rows;
    int batch, heads, streams, longest;  // of its streams' queries
    int q_lengths[CAVMAE_MAX_STREAMS], lengths[CAVMAE_MAX_STREAMS];

    CAVMAE_DEVICE AttentionHead head(int block, int width) const {
        int stream = 0, sample = block / heads;
        const int64_t column = int64_t(block % heads) * width;
        int64_t q_first = 0, k_first = 0;
        while (sample >= batch) {
            sample -= batch;
            q_first += int64_t(batch) * q_lengths[stream];
            k_first += int64_t(batch) * lengths[stream++];
        }
        AttentionHead one = all;
        one.queries = q_lengths[stream];
        one.keys = lengths[stream];
        q_first += int64_t(sample) * one.queries;
        k_first += int64_t(sample) * one.keys;
        one.lse += int64_t(block % heads) * q_rows + q_first;
        one.q += q_first * one.q_stride + column;
        one.dq += q_first * one.q_stride + column;
        one.k += k_first * one.k_stride + column;
        one.v += k_first * one.k_stride + column;
        one.dk += k_first * one.k_stride + column;
        one.dv += k_first * one.k_stride + column;
        one.dout += q_first * one.out_stride + column;
        one.out += q_first * one.out_stride + column;
        return one;
    }
};

// From the arguments of cavmae_attention_backward, which have been checked.
inline AttentionStreams streams_of(void* dq, void* dk, void* dv, const void* q, const void* k, const void* v, const void* dout,
                                   const void* out, const float* lse, int64_t q_stride, int64_t k_stride,
                                   const int64_t* q_lengths, const int64_t* lengths, int streams, int64_t batch,
                                   int64_t heads, int64_t width) {
    const auto bits = [](const void* pointer) { return static_cast<const uint16_t*>(pointer); };
    const auto results = [](void* pointer) { return static_cast<uint16_t*>(pointer); };
    const double scale = 1 / std::sqrt(double(width)), log2e = 1.4426950408889634;
    AttentionStreams all{};
    all.all = {bits(q),     bits(k),  bits(v),  bits(dout),    bits(out), lse, results(dq),          results(dk),
               results(dv), q_stride, k_stride, heads * width, 0,         0,   float(log2e * scale), float(scale)};
    all.batch = int(batch);
    all.heads = int(heads);
    all.streams = streams;
    for (int s = 0; s < streams; ++s) {
        all.q_lengths[s] = int(q_lengths[s]);
        all.lengths[s] = int(lengths[s]);
        all.q_rows += batch * q_lengths[s];
        all.longest = all.q_lengths[s] > all.longest ? all.q_lengths[s] : all.longest;
    }
    return all;
}

}  // namespace cavmae
