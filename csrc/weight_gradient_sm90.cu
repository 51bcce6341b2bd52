// The weight gradient of a linear layer for Hopper, with the bias gradient formed on the way (CUTLASS: TMA, wgmma):
//
//     dW[s] = dout[s]^T x[s],   db[s] = column sums of dout[s]          s: a stream, all of them in one launch
//
// Clusters of two blocks take unit after unit (weight_gradient_plan.h) and write it in fp32; a second kernel adds the splits
// up in their order and rounds once. Nothing is added atomically, so runs repeat. Warps that wait for their products add up
// the columns of the tile of dout that the products read from shared memory.

#include "persistent_sm90.cuh"

#include "cutlass/arch/memory.h"
#include "weight_gradient_plan.h"

namespace cavmae::sm90 {

static_assert(UNIT_HEIGHT == 2 * size<0>(Tile{}) && UNIT_WIDTH == size<1>(Tile{}) && STEP_ROWS == size<2>(Tile{}));
static_assert(WARP_SUMS * cutlass::NumThreadsPerWarp == MULTIPLIERS);

using Collective = MainloopOf<Column, Row, 1024>;

// CUTLASS's main loop, which also adds up the columns of dout.
struct Mainloop : Collective {
    using Pipeline = typename Collective::MainloopPipeline;
    using State = typename Collective::PipelineState;

    // Thread t adds 8 neighboring columns of dout, those from 8 (t % 16) on, over the rows 4 (t / 16) .. 4 (t / 16) + 3.
    template <class Matrix> CUTLASS_DEVICE static void add_columns(float (&sums)[VECTOR], Matrix const& tile, int thread) {
        const int column = thread % 16 * VECTOR, row = thread / 16 * 4;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
            cutlass::AlignedArray<Element, VECTOR> values;
            cutlass::arch::shared_load<sizeof(values)>(&values, cast_smem_ptr_to_uint(&tile(column, row + i)));
            CUTLASS_PRAGMA_UNROLL
            for (int j = 0; j < VECTOR; ++j) sums[j] += static_cast<float>(values[j]);
        }
    }

    template <class Accumulators>
    CUTLASS_DEVICE void mma(Pipeline pipeline, State read, Accumulators& accumulators, int steps, int thread,
                            typename Collective::TensorStorage& storage, bool with_sums, float (&sums)[VECTOR]) {
        Tensor sA = make_tensor(make_smem_ptr(storage.smem_A.data()), typename Collective::SmemLayoutA{});
        Tensor sB = make_tensor(make_smem_ptr(storage.smem_B.data()), typename Collective::SmemLayoutB{});
        typename Collective::TiledMma tiled_mma;
        const int group = __shfl_sync(0xFFFFFFFF, thread / GROUP, 0);
        auto slice = tiled_mma.get_slice(group * GROUP);
        Tensor a = slice.make_fragment_A(slice.partition_A(sA));  // (MMA, MMA_M, MMA_K, STAGE)
        Tensor b = slice.make_fragment_B(slice.partition_B(sB));  // (MMA, MMA_N, MMA_K, STAGE)
        State release = read;
        tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
        CUTLASS_PRAGMA_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
            pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
            const int stage = read.index();
            warpgroup_fence_operand(accumulators);
            warpgroup_arrive();
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < size<2>(a); ++k) {
                cute::gemm(tiled_mma, a(_, _, k, stage), b(_, _, k, stage), accumulators);
                tiled_mma.accumulate_ = GMMA::ScaleOut::One;
            }
            warpgroup_commit_batch();
            if (with_sums) {
                add_columns(sums, sA(_, _, stage), thread);
                // One thread gives the stage back for its whole group, so all of the group must have read it.
                cutlass::arch::NamedBarrier::sync(GROUP, group);
            }
            if (step > 0) {
                warpgroup_wait<1>();
                pipeline.consumer_release(release);
                ++release;
            }
            warpgroup_fence_operand(accumulators);
            ++read;
        }
        warpgroup_wait<0>();
        warpgroup_fence_operand(accumulators);
        pipeline.consumer_release(release);
    }
};

struct WeightGradientKernel {
    static constexpr uint32_t MaxThreadsPerBlock = THREADS, MinBlocksPerMultiprocessor = 1;

    struct SharedStorage {
        alignas(128) typename Mainloop::TensorStorage tensors;
        alignas(16) typename Mainloop::PipelineStorage pipeline;
    };

    struct Params {
        typename Mainloop::Params mainloop[CAVMAE_MAX_STREAMS];
        int rows[CAVMAE_MAX_STREAMS], width, depth;
        float *results, *sums;  // sums may be null
        Plan plan;
    };

    CUTLASS_DEVICE void operator()(Params const& params, char* memory) {
        auto& storage = *reinterpret_cast<SharedStorage*>(memory);
        const bool fetches = cutlass::canonical_warp_idx_sync() == 0, multiplies = cutlass::canonical_warp_group_idx() > 0;
        const int rank = cute::block_rank_in_cluster();
        Mainloop mainloop;
        auto pipeline = tiles_pipeline<Mainloop>(storage.pipeline, fetches, multiplies);
        cute::cluster_arrive_relaxed();  // the other block's barriers are ready, too
        cute::cluster_wait();

        const int first = blockIdx.x / size(Cluster{}), stride = gridDim.x / size(Cluster{}), units = params.plan.units();
        if (!multiplies) {
            cutlass::arch::warpgroup_reg_dealloc<FETCHER_REGISTERS>();
            if (!fetches) return;
            auto state = cutlass::make_producer_start_state<typename Mainloop::Pipeline>();
            for (int index = first; index < units; index += stride) {
                const Unit unit = params.plan.unit(index);
                auto const& of_stream = params.mainloop[unit.stream];
                auto inputs = mainloop.load_init(make_shape(params.width, params.depth, params.rows[unit.stream], 1), of_stream);
                auto steps = shape<3>(get<0>(inputs));
                mainloop.load(of_stream, pipeline, state, inputs, make_coord(2 * unit.tile_m + rank, unit.tile_n, _, 0),
                              cute::make_coord_iterator(idx2crd(unit.first_step, steps), steps), unit.steps,
                              cutlass::canonical_lane_idx(), rank, storage.tensors);
                state.advance(unit.steps);
            }
            mainloop.load_tail(pipeline, state);
        } else {
            cutlass::arch::warpgroup_reg_alloc<MULTIPLIER_REGISTERS>();
            const int multiplier = threadIdx.x - GROUP;
            typename Mainloop::TiledMma tiled_mma;
            typename Mainloop::State state;
            for (int index = first; index < units; index += stride) {
                const Unit unit = params.plan.unit(index);
                const int tile_m = 2 * unit.tile_m + rank;
                auto accumulators = partition_fragment_C(tiled_mma, take<0, 2>(Tile{}));
                float sums[VECTOR] = {};
                const bool with_sums = params.sums != nullptr && unit.tile_n == 0;
                mainloop.mma(pipeline, state, accumulators, unit.steps, multiplier, storage.tensors, with_sums, sums);
                state.advance(unit.steps);
                Tensor results = make_tensor(make_gmem_ptr(params.results + unit.slot * params.plan.width() * params.plan.depth()),
                                             make_shape(params.plan.width(), params.plan.depth()),
                                             make_stride(params.plan.depth(), _1{}));
                Tensor mine = tiled_mma.get_slice(multiplier).partition_C(
                    local_tile(results, take<0, 2>(Tile{}), make_coord(tile_m, unit.tile_n)));
                copy(AutoVectorizingCopyWithAssumedAlignment<64>{}, accumulators, mine);
                if (with_sums) store_sums(params, unit.slot, tile_m * size<0>(Tile{}), multiplier, sums);
            }
        }
    }

    // Both halves of a warp have the same columns.
    CUTLASS_DEVICE static void store_sums(Params const& params, int slot, int column, int thread, float (&sums)[VECTOR]) {
        CUTLASS_PRAGMA_UNROLL
        for (float& sum : sums) sum += __shfl_xor_sync(0xFFFFFFFF, sum, 16);
        if (thread % 32 >= 16) return;
        float* to = params.sums + (int64_t(slot) * WARP_SUMS + thread / 32) * params.plan.width() + column + thread % 16 * VECTOR;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < VECTOR; ++j) to[j] = sums[j];
    }
};

// A block adds up 4 * blockDim.x neighboring elements of row blockIdx.x of dW, in stream blockIdx.z, and one element of db.
__global__ void add_splits(Element* dw, float* db, const float* results, const float* sums, const __grid_constant__ Plan plan,
                           int depth) {
    const int stream = blockIdx.z, column = 4 * (blockIdx.y * blockDim.x + threadIdx.x);
    const int64_t row = blockIdx.x, width = gridDim.x, matrix = plan.width() * plan.depth();
    int first = 0;
    for (int s = 0; s < stream; ++s) first += plan.splits[s];
    const int splits = plan.splits[stream];
    if (column < depth) {
        const float* from = results + first * matrix + row * plan.depth() + column;
        float4 total = *reinterpret_cast<const float4*>(from);
        for (int split = 1; split < splits; ++split) {
            const float4 part = *reinterpret_cast<const float4*>(from + split * matrix);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        cutlass::AlignedArray<Element, 4> rounded;
        rounded[0] = Element(total.x), rounded[1] = Element(total.y);
        rounded[2] = Element(total.z), rounded[3] = Element(total.w);
        *reinterpret_cast<cutlass::AlignedArray<Element, 4>*>(dw + (stream * width + row) * depth + column) = rounded;
    }
    if (db != nullptr && column == 0) {
        float total = 0.f;
        for (int part = first * WARP_SUMS; part < (first + splits) * WARP_SUMS; ++part) total += sums[part * plan.width() + row];
        db[stream * width + row] = total;
    }
}

int weight_gradient(const WeightGradient& call, const Plan& plan, int multiprocessors, cudaStream_t stream) {
    using Kernel = WeightGradientKernel;
    typename Kernel::Params params{};
    params.width = call.width;
    params.depth = call.depth;
    params.results = call.workspace;
    params.sums = call.db != nullptr ? call.workspace + plan.results() : nullptr;
    params.plan = plan;
    int64_t first = 0;
    for (int s = 0; s < plan.streams; first += call.rows[s++]) {
        const auto* dout = static_cast<const Element*>(call.dout) + first * call.width;
        const auto* x = static_cast<const Element*>(call.x) + first * call.depth;
        params.rows[s] = static_cast<int>(call.rows[s]);
        params.mainloop[s] = Mainloop::to_underlying_arguments(
            make_shape(call.width, call.depth, params.rows[s], 1),
            typename Mainloop::Arguments{dout, {_1{}, call.width, 0}, x, {_1{}, call.depth, 0}}, nullptr);
    }
    if (const int code = launch<Kernel>(params, plan.units(), multiprocessors, stream)) return code;
    constexpr int BLOCK = 192;  // 768 columns
    const dim3 blocks(call.width, static_cast<unsigned>(divided(call.depth, 4 * BLOCK)), plan.streams);
    add_splits<<<blocks, BLOCK, 0, stream>>>(static_cast<Element*>(call.dw), call.db, params.results, params.sums, plan,
                                             call.depth);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace cavmae::sm90
