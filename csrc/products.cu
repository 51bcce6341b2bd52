// The MLP's matrix products for Hopper, with what follows them done as each tile is finished (CUTLASS: TMA, wgmma):
//
//     linear_gelu:      pre = x W^T + b,   y = gelu(pre)
//     hidden_gradient:  dpre = (dout W) * gelu'(pre),   partial[t] = sum of dpre over the rows of tile t
//
// Two warp groups multiply while a third fetches tiles; programs stay and take tile after tile, so the last step of one
// overlaps the products of the next. Nothing is added atomically, so runs repeat.

#include <cuda_runtime.h>

#include "cavmae.h"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gelu.cuh"

namespace {

using namespace cute;
using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Tile = Shape<_128, _256, _64>;
using Cluster = Shape<_2, _1, _1>;  // two blocks share the weights' tiles
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
constexpr int VECTOR = 8;           // elements in 16 bytes
constexpr int TILE_ROWS = 128;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;

// Of the value as it is stored, as in two passes.
template <typename T> struct StoredGelu;

template <int N> struct StoredGelu<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& values) const {
        cutlass::Array<float, N> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
            const float z = static_cast<float>(Element(values[i]));
            result[i] = 0.5f * z * (1.f + erff(z * 0.70710678f));
        }
        return result;
    }
};

template <> struct StoredGelu<float> {};

template <typename T> struct TimesGeluDerivative;

template <int N> struct TimesGeluDerivative<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& gradient,
                                                       cutlass::Array<float, N> const& pre) const {
        cutlass::Array<float, N> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) result[i] = gradient[i] * gelu_derivative(pre[i]);
        return result;
    }
};

template <> struct TimesGeluDerivative<float> {};

// `Fusion` is what is done with a finished tile, `Source` the element of a matrix that it reads (void: none).
template <typename WeightLayout, typename Source, typename Fusion> struct MlpProduct {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Row, VECTOR, Element, Row, VECTOR,
        EpilogueSchedule, Fusion>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, VECTOR, Element, WeightLayout, VECTOR, float,
        Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static_assert(Kernel::SharedStorageSize <= 227 * 1024, "a block has no more shared memory on Hopper");
};

using BiasGelu = cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<Row, StoredGelu, Element, float, Element, float,
                                                                       void>;
using LinearGelu = MlpProduct<Column, void, BiasGelu>;

namespace fusion = cutlass::epilogue::fusion;
using Gradient = fusion::Sm90EVT<fusion::Sm90Compute<TimesGeluDerivative, float, float, ROUND>, fusion::Sm90AccFetch,
                                 fusion::Sm90SrcFetch<Element>>;
using Sums = fusion::Sm90EVT<fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float,
                                                      ROUND, Stride<_0, _1, _0>, 4, true, false>,
                             Gradient>;
using GradientAndSums = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Element, float, ROUND>, Sums>;
using HiddenGradient = MlpProduct<Row, Element, GradientAndSums>;

int refused(int64_t rows, int64_t width, int64_t depth, int dtype) {
    if (dtype != CAVMAE_BF16) return CAVMAE_BAD_DTYPE;
    if (rows < 1 || width < 1 || depth < 1 || width % VECTOR != 0 || depth % VECTOR != 0) return CAVMAE_BAD_SIZE;
    if (rows > INT32_MAX || width > INT32_MAX || depth > INT32_MAX) return CAVMAE_BAD_SIZE;
    return 0;
}

template <typename Gemm> int run(typename Gemm::Arguments& arguments, cudaStream_t stream) {
    arguments.hw_info.sm_count = 1;  // so that CUTLASS does not look for a device before its arguments are known to fit
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return CAVMAE_BAD_SIZE;
    if (Gemm::get_workspace_size(arguments) != 0) return CAVMAE_BAD_SIZE;
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount, device);
    }
    if (error != cudaSuccess) return static_cast<int>(error);
    if (major != 9) return CAVMAE_BAD_DEVICE;
    arguments.hw_info.device_id = device;
    Gemm gemm;
    if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
        gemm.run(stream) != cutlass::Status::kSuccess) {
        error = cudaGetLastError();
        return error == cudaSuccess ? CAVMAE_BAD_SIZE : static_cast<int>(error);
    }
    return 0;
}

}  // namespace

int cavmae_product_tile_rows() { return TILE_ROWS; }

int cavmae_linear_gelu(void* y, void* pre, const void* x, const void* weight, const float* bias, int64_t rows,
                       int64_t width, int64_t depth, int dtype, void* stream) {
    if (!y || !x || !weight || !bias) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, width, depth, dtype)) return code;
    const auto bits = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(pre) |
                      reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(weight) |
                      reinterpret_cast<uintptr_t>(bias);
    if (bits % 16 != 0) return CAVMAE_MISALIGNED;
    using Gemm = LinearGelu::Gemm;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(rows), static_cast<int>(width), static_cast<int>(depth), 1},
        {static_cast<const Element*>(x), {depth, _1{}, 0}, static_cast<const Element*>(weight), {depth, _1{}, 0}},
        {{}, nullptr, {width, _1{}, 0}, static_cast<Element*>(y), {width, _1{}, 0}}};
    arguments.epilogue.thread.bias_ptr = bias;
    arguments.epilogue.thread.aux_ptr = static_cast<Element*>(pre);
    arguments.epilogue.thread.dAux = {width, _1{}, 0};
    return run<Gemm>(arguments, static_cast<cudaStream_t>(stream));
}

int cavmae_hidden_gradient(void* dpre, float* partial, const void* dout, const void* pre, const void* weight, int64_t rows,
                           int64_t width, int64_t depth, int dtype, void* stream) {
    if (!dpre || !partial || !dout || !pre || !weight) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, width, depth, dtype)) return code;
    const auto bits = reinterpret_cast<uintptr_t>(dpre) | reinterpret_cast<uintptr_t>(partial) |
                      reinterpret_cast<uintptr_t>(dout) | reinterpret_cast<uintptr_t>(pre) |
                      reinterpret_cast<uintptr_t>(weight);
    if (bits % 16 != 0) return CAVMAE_MISALIGNED;
    using Gemm = HiddenGradient::Gemm;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(rows), static_cast<int>(width), static_cast<int>(depth), 1},
        {static_cast<const Element*>(dout), {depth, _1{}, 0}, static_cast<const Element*>(weight), {_1{}, width, 0}},
        {{{{{}, {}, {}}, {partial, 0.f, {}}}, {}},
         static_cast<const Element*>(pre),
         {width, _1{}, 0},
         static_cast<Element*>(dpre),
         {width, _1{}, 0}}};
    return run<Gemm>(arguments, static_cast<cudaStream_t>(stream));
}
