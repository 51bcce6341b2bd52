// What the kernels for Hopper share: clusters of two blocks that stay and take one piece of work after the other. One warp of a
// block fetches tiles by TMA, two groups of four warps multiply them.
#pragma once

#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/pipeline/pipeline.hpp"
#include "products.h"

namespace cavmae::sm90 {

using namespace cute;
using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Tile = Shape<Int<TILE_ROWS>, _256, _64>;
using Cluster = Shape<_2, _1, _1>;  // two blocks, one below the other, share the tiles of the second factor
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;

constexpr int GROUP = cutlass::NumThreadsPerWarpGroup;
constexpr int MULTIPLIERS = 2 * GROUP;
constexpr int THREADS = GROUP + MULTIPLIERS;
constexpr int SHARED_MEMORY = 227 * 1024;  // of a block on Hopper
constexpr int MOST_ARGUMENTS = 32764;      // bytes that a kernel takes, from CUDA 12.1 on
constexpr int FETCHER_REGISTERS = 40, MULTIPLIER_REGISTERS = 232;

template <typename LayoutA, typename LayoutB, int REST>
using MainloopOf = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, VECTOR, Element, LayoutB, VECTOR, float, Tile,
    Cluster, cutlass::gemm::collective::StageCountAutoCarveout<REST>, Schedule>::CollectiveOp;

// The tiles' way from the warp that fetches to those that multiply.
template <typename Mainloop>
CUTLASS_DEVICE typename Mainloop::MainloopPipeline tiles_pipeline(typename Mainloop::PipelineStorage& storage, bool fetches,
                                                                  bool multiplies) {
    using Pipeline = typename Mainloop::MainloopPipeline;
    typename Pipeline::Params settings;
    if (fetches) settings.role = Pipeline::ThreadCategory::Producer;
    if (multiplies) settings.role = Pipeline::ThreadCategory::Consumer;
    settings.is_leader = threadIdx.x % GROUP == 0;
    settings.num_consumers = MULTIPLIERS;
    settings.num_producers = Mainloop::NumProducerThreadEvents;
    settings.transaction_bytes = Mainloop::TmaTransactionBytes;
    return Pipeline(storage, settings, Cluster{});
}

// Runs `Kernel` on as many clusters as there is work for and room.
template <typename Kernel> int launch(typename Kernel::Params& params, int64_t work, int multiprocessors, cudaStream_t stream) {
    static_assert(sizeof(typename Kernel::SharedStorage) <= SHARED_MEMORY);
    static_assert(sizeof(typename Kernel::Params) <= MOST_ARGUMENTS);
    const void* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
    const int shared = sizeof(typename Kernel::SharedStorage);
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
        return static_cast<int>(error);
    }
    const int64_t room = multiprocessors / size(Cluster{});
    const auto clusters = static_cast<unsigned>(work < room ? work : room);
    void* arguments[] = {&params};
    const auto status = cutlass::ClusterLauncher::launch(dim3(clusters * size(Cluster{})), dim3(size(Cluster{})), dim3(THREADS),
                                                         shared, stream, kernel, arguments);
    return status == cutlass::Status::kSuccess ? 0 : launch_error();
}

}  // namespace cavmae::sm90
