// The weight gradient of a linear layer for Hopper, with the bias gradient formed on the way (CUTLASS: TMA, wgmma):
//
//     dW[s] = dout[s]^T x[s],   db[s] = column sums of dout[s]          s: a stream, all of them in one launch
//
// Clusters of two blocks take unit after unit (weight_gradient_plan.h) and write it in fp32; a second kernel adds the splits
// up in their order and rounds once. Nothing is added atomically, so runs repeat. Warps that wait for their products add up
// the columns of the tile of dout that the products read from shared memory.

#include "cutlass/arch/memory.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/pipeline/pipeline.hpp"
#include "products.h"
#include "weight_gradient_plan.h"

namespace cavmae::sm90 {

using namespace cute;
using Element = cutlass::bfloat16_t;
using Tile = Shape<_128, _256, Int<STEP_ROWS>>;
using Cluster = Shape<_2, _1, _1>;  // two blocks share the tiles of x
static_assert(UNIT_HEIGHT == 2 * size<0>(Tile{}) && UNIT_WIDTH == size<1>(Tile{}));

using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::ColumnMajor, VECTOR, Element,
    cutlass::layout::RowMajor, VECTOR, float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<1024>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

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
        const int group = __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);
        auto slice = tiled_mma.get_slice(group * cutlass::NumThreadsPerWarpGroup);
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
                cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup, group);
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
    static constexpr int MULTIPLIERS = size(typename Mainloop::TiledMma{});
    static constexpr uint32_t MaxThreadsPerBlock = MULTIPLIERS + cutlass::NumThreadsPerWarpGroup;
    static constexpr uint32_t MinBlocksPerMultiprocessor = 1;
    static_assert(MULTIPLIERS / 32 == WARP_SUMS);

    struct SharedStorage {
        alignas(128) typename Mainloop::TensorStorage tensors;
        alignas(16) typename Mainloop::PipelineStorage pipeline;
    };
    static_assert(sizeof(SharedStorage) <= 227 * 1024, "a block has no more shared memory on Hopper");

    struct Params {
        typename Mainloop::Params mainloop[CAVMAE_MAX_STREAMS];
        int rows[CAVMAE_MAX_STREAMS], width, depth;
        float *results, *sums;  // sums may be null
        Plan plan;
    };
    static_assert(sizeof(Params) <= 4096, "arguments of a kernel");

    CUTLASS_DEVICE void operator()(Params const& params, char* memory) {
        auto& storage = *reinterpret_cast<SharedStorage*>(memory);
        const int thread = threadIdx.x, group = cutlass::canonical_warp_group_idx();
        const bool produces = group == 0;
        const int warp_of_group = cutlass::canonical_warp_idx_sync() % cutlass::NumWarpsPerWarpGroup;
        const uint32_t rank = cute::block_rank_in_cluster();
        Mainloop mainloop;

        typename Mainloop::Pipeline::Params settings;
        settings.role = produces ? Mainloop::Pipeline::ThreadCategory::Producer : Mainloop::Pipeline::ThreadCategory::Consumer;
        settings.is_leader = thread % cutlass::NumThreadsPerWarpGroup == 0;
        settings.num_consumers = MULTIPLIERS;
        settings.num_producers = Mainloop::NumProducerThreadEvents;
        settings.transaction_bytes = Mainloop::TmaTransactionBytes;
        typename Mainloop::Pipeline pipeline(storage.pipeline, settings, Cluster{});
        cute::cluster_arrive_relaxed();  // the other block's barriers are ready, too
        cute::cluster_wait();

        const int first = blockIdx.x / size(Cluster{}), stride = gridDim.x / size(Cluster{}), units = params.plan.units();
        if (produces) {
            cutlass::arch::warpgroup_reg_dealloc<40>();
            if (warp_of_group != 0) return;
            auto state = cutlass::make_producer_start_state<typename Mainloop::Pipeline>();
            for (int index = first; index < units; index += stride) {
                const Unit unit = params.plan.unit(index);
                auto const& of_stream = params.mainloop[unit.stream];
                auto inputs = mainloop.load_init(make_shape(params.width, params.depth, params.rows[unit.stream], 1), of_stream);
                auto steps = shape<3>(get<0>(inputs));
                mainloop.load(of_stream, pipeline, state, inputs, make_coord(2 * unit.tile_m + int(rank), unit.tile_n, _, 0),
                              cute::make_coord_iterator(idx2crd(unit.first_step, steps), steps), unit.steps,
                              cutlass::canonical_lane_idx(), rank, storage.tensors);
                state.advance(unit.steps);
            }
            mainloop.load_tail(pipeline, state);
        } else {
            cutlass::arch::warpgroup_reg_alloc<232>();
            const int multiplier = thread - cutlass::NumThreadsPerWarpGroup;
            typename Mainloop::TiledMma tiled_mma;
            typename Mainloop::State state;
            for (int index = first; index < units; index += stride) {
                const Unit unit = params.plan.unit(index);
                const int tile_m = 2 * unit.tile_m + int(rank);
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

// Block row s adds up stream s: four neighboring elements of dW a thread, then one of db.
__global__ void add_splits(Element* dw, float* db, const float* results, const float* sums, const __grid_constant__ Plan plan, int width,
                           int depth) {
    const int stream = blockIdx.y;
    int first = 0;
    for (int s = 0; s < stream; ++s) first += plan.splits[s];
    const int splits = plan.splits[stream];
    const int64_t vectors = int64_t(width) * depth / 4, index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index < vectors) {
        const int64_t row = index * 4 / depth, column = index * 4 % depth, matrix = plan.width() * plan.depth();
        const float* from = results + first * matrix + row * plan.depth() + column;
        float4 total = *reinterpret_cast<const float4*>(from);
        for (int split = 1; split < splits; ++split) {
            const float4 part = *reinterpret_cast<const float4*>(from + split * matrix);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        cutlass::AlignedArray<Element, 4> rounded;
        rounded[0] = Element(total.x), rounded[1] = Element(total.y);
        rounded[2] = Element(total.z), rounded[3] = Element(total.w);
        *reinterpret_cast<cutlass::AlignedArray<Element, 4>*>(dw + (stream * vectors + index) * 4) = rounded;
    } else if (db != nullptr && index - vectors < width) {
        const int64_t column = index - vectors;
        float total = 0.f;
        for (int part = first * WARP_SUMS; part < (first + splits) * WARP_SUMS; ++part) total += sums[part * plan.width() + column];
        db[stream * width + column] = total;
    }
}

int weight_gradient(const WeightGradient& call, const Plan& plan, int clusters, cudaStream_t stream) {
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
    const void* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
    const int shared = sizeof(typename Kernel::SharedStorage);
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
        return static_cast<int>(error);
    }
    const int used = plan.units() < clusters ? plan.units() : clusters;
    void* arguments[] = {&params};
    if (cutlass::ClusterLauncher::launch(dim3(2 * used), dim3(2), dim3(Kernel::MaxThreadsPerBlock), shared, stream, kernel,
                                         arguments) != cutlass::Status::kSuccess) {
        return launch_error();
    }
    constexpr int THREADS = 256;
    const int64_t threads = int64_t(call.width) * call.depth / 4 + (call.db != nullptr ? call.width : 0);
    const dim3 blocks(static_cast<unsigned>(divided(threads, THREADS)), plan.streams);
    add_splits<<<blocks, THREADS, 0, stream>>>(static_cast<Element*>(call.dw), call.db, params.results, params.sums, plan,
                                               call.width, call.depth);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace cavmae::sm90
