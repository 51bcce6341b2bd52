// The MLP's matrix products for Ampere and what runs its code (8.x and 12.x), with what follows them done as each tile is
// finished (CUTLASS 2: cp.async, mma.sync). The formulas are those of mlp_sm90.cu; each stream is a launch of its own.
//
// A block has 128 threads, 48 KB of shared memory and at most 255 registers a thread, so that two blocks share a
// multiprocessor on 8.0 (163 KB) as on 8.6 and 8.9 (99 KB): the last step of one overlaps the products of the other.

#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
// CUTLASS's visitors take for granted what the headers above declare.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "mlp_epilogue.cuh"
#include "products.h"

namespace cavmae::sm80 {

using namespace cute;
namespace epilogue = cutlass::epilogue::threadblock;
using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Tile = cutlass::gemm::GemmShape<TILE_ROWS, 128, 32>;
using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;
constexpr int STAGES = 3;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;

using Map = epilogue::OutputTileThreadLayout<Tile, WarpTile, Element, VECTOR, 1>;
using Rows = Stride<int64_t, _1, _0>;
using Loaded = epilogue::VisitorAuxLoad<Map, Element, Rows>;
using Stored = epilogue::VisitorAuxStore<Map, Element, ROUND, Rows>;

// Stores nothing where there is no pointer.
struct StoredIfAsked : Stored {
    using Stored::Stored;

    template <class ProblemShape>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
        if (params_ptr->ptr_aux == nullptr) shape = ProblemShape{0, 0, 0};
        return Stored::get_callbacks(tile, thread, shape);
    }
};

// Where CUTLASS adds a block's sums to those of others, ours has a place of its own.
template <typename T> struct Put {
    CUTLASS_DEVICE void operator()(T* to, T value) const { *to = value; }
};

// Row `i` of the sums is at `i` strides from the first; a tile writes at its first row, so the stride is that between the
// sums of two tiles divided by the rows of a tile.
using Sums = epilogue::VisitorRowReduction<cutlass::plus, Put, Map, float, float, ROUND, Rows>;
inline int64_t stride_of_sums(int width) { return padded(width) / TILE_ROWS; }
static_assert(PARTIAL_COLUMNS % TILE_ROWS == 0, "the stride of the sums is a whole number");

template <template <class> class Function, typename... Inputs>
using Compute = epilogue::Sm80EVT<epilogue::VisitorCompute<Function, float, float, ROUND>, Inputs...>;

using Bias = epilogue::VisitorRowBroadcast<Map, float, Stride<_0, _1, _0>>;
using Pre = epilogue::Sm80EVT<StoredIfAsked, Compute<cutlass::plus, epilogue::VisitorAccFetch, Bias>>;
using BiasGelu = epilogue::Sm80EVT<Stored, Compute<StoredGelu, Pre>>;

using Gradient = Compute<TimesGeluDerivative, epilogue::VisitorAccFetch, Loaded>;
using GradientAndSums = epilogue::Sm80EVT<Stored, epilogue::Sm80EVT<Sums, Gradient>>;

template <typename WeightLayout, typename Fusion> struct MlpProduct {
    using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
        Element, RowMajor, cutlass::ComplexTransform::kNone, VECTOR, Element, WeightLayout,
        cutlass::ComplexTransform::kNone, VECTOR, Element, RowMajor, VECTOR, float, float,
        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, WarpTile, Instruction, Fusion, Swizzle, STAGES,
        cutlass::arch::OpMultiplyAdd, 1>::GemmKernel;
    static_assert(sizeof(typename Kernel::SharedStorage) <= 49 * 1024, "two blocks share 99 KB, of which each loses 1 KB");

    static int run(int rows, int width, int depth, const void* a, const void* weight, int weight_stride,
                   typename Fusion::Arguments fusion, cudaStream_t stream) {
        using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
        typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {rows, width, depth}, 1, fusion, a,
                                           weight, nullptr, nullptr, 0, 0, 0, 0, depth, weight_stride, width, width);
        if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return CAVMAE_BAD_SIZE;
        Gemm gemm;
        if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
            gemm.run(stream) != cutlass::Status::kSuccess) {
            return launch_error();
        }
        return 0;
    }
};

int linear_gelu(const LinearGelu* products, int streams, int width, int depth, cudaStream_t stream) {
    for (const LinearGelu* p = products; p != products + streams; ++p) {
        // The arguments of a node come after those of what it is made from.
        const Rows rows{width, _1{}, _0{}};
        typename BiasGelu::Arguments fusion{
            {{{{}, {p->bias, 0.f, {}}, {}}, {static_cast<Element*>(p->pre), rows}}, {}},
            {static_cast<Element*>(p->y), rows}};
        if (const int code = MlpProduct<ColumnMajor, BiasGelu>::run(p->rows, width, depth, p->x, p->weight, depth, fusion,
                                                                    stream)) {
            return code;
        }
    }
    return 0;
}

int hidden_gradient(const HiddenGradient* products, int streams, int width, int depth, cudaStream_t stream) {
    for (const HiddenGradient* p = products; p != products + streams; ++p) {
        const Rows rows{width, _1{}, _0{}};
        auto* pre = static_cast<Element*>(const_cast<void*>(p->pre));
        typename GradientAndSums::Arguments fusion{
            {{{}, {pre, Element(0), rows}, {}}, {p->partial, 0.f, {stride_of_sums(width), _1{}, _0{}}}},
            {static_cast<Element*>(p->dpre), rows}};
        if (const int code = MlpProduct<RowMajor, GradientAndSums>::run(p->rows, width, depth, p->dout, p->weight, width,
                                                                        fusion, stream)) {
            return code;
        }
    }
    return 0;
}

}  // namespace cavmae::sm80
