// The MLP's matrix products for Hopper, with what follows them done as each tile is finished (CUTLASS: TMA, wgmma):
//
//     linear_gelu:      pre = x W^T + b,   y = gelu(pre)
//     hidden_gradient:  dpre = (dout W) * gelu'(pre),   partial[t] = sum of dpre over the rows of tile t
//
// Two warp groups multiply while a third fetches tiles; programs stay and take tile after tile, so the last step of one
// overlaps the products of the next. Nothing is added atomically, so runs repeat.

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "mlp_epilogue.cuh"
#include "products.h"

namespace cavmae::sm90 {

using namespace cute;
using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Tile = Shape<_128, _256, _64>;
using Cluster = Shape<_2, _1, _1>;  // two blocks share the weights' tiles
using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;

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
using LinearGeluGemm = MlpProduct<Column, void, BiasGelu>;

namespace fusion = cutlass::epilogue::fusion;
using Gradient = fusion::Sm90EVT<fusion::Sm90Compute<TimesGeluDerivative, float, float, ROUND>, fusion::Sm90AccFetch,
                                 fusion::Sm90SrcFetch<Element>>;
using Sums = fusion::Sm90EVT<fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float,
                                                      ROUND, Stride<_0, _1, _0>, 4, true, false>,
                             Gradient>;
using GradientAndSums = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Element, float, ROUND>, Sums>;
using HiddenGradientGemm = MlpProduct<Row, Element, GradientAndSums>;

template <typename Gemm> int run(typename Gemm::Arguments& arguments, cudaStream_t stream) {
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return CAVMAE_BAD_SIZE;
    Gemm gemm;
    if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
        gemm.run(stream) != cutlass::Status::kSuccess) {
        return launch_error();
    }
    return 0;
}

int linear_gelu(const LinearGelu* products, int streams, int width, int depth, cudaStream_t stream) {
    using Gemm = LinearGeluGemm::Gemm;
    for (const LinearGelu* p = products; p != products + streams; ++p) {
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p->rows, width, depth, 1},
            {static_cast<const Element*>(p->x), {depth, _1{}, 0}, static_cast<const Element*>(p->weight), {depth, _1{}, 0}},
            {{}, nullptr, {width, _1{}, 0}, static_cast<Element*>(p->y), {width, _1{}, 0}}};
        arguments.epilogue.thread.bias_ptr = p->bias;
        arguments.epilogue.thread.aux_ptr = static_cast<Element*>(p->pre);
        arguments.epilogue.thread.dAux = {width, _1{}, 0};
        if (const int code = run<Gemm>(arguments, stream)) return code;
    }
    return 0;
}

int hidden_gradient(const HiddenGradient* products, int streams, int width, int depth, cudaStream_t stream) {
    using Gemm = HiddenGradientGemm::Gemm;
    for (const HiddenGradient* p = products; p != products + streams; ++p) {
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p->rows, width, depth, 1},
            {static_cast<const Element*>(p->dout), {depth, _1{}, 0}, static_cast<const Element*>(p->weight), {_1{}, width, 0}},
            {{{{{}, {}, {}}, {p->partial, 0.f, {}}}, {}},
             static_cast<const Element*>(p->pre),
             {width, _1{}, 0},
             static_cast<Element*>(p->dpre),
             {width, _1{}, 0}}};
        if (const int code = run<Gemm>(arguments, stream)) return code;
    }
    return 0;
}

}  // namespace cavmae::sm90
