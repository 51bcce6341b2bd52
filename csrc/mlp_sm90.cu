// The MLP's matrix products for Hopper, with what follows them done as each tile is finished (CUTLASS: TMA, wgmma):
//
//     linear_gelu:      pre = x W[s]^T + b[s],   y = gelu(pre)                                     s: the stream of the row
//     hidden_gradient:  dpre = (dout W[s]) * gelu'(pre),   partial[t] = sum of dpre over the rows of tile t
//
// All streams are one launch. The parts are CUTLASS's own, and so is their order (its cooperative kernel); what is ours is
// that the tiles are those of several products, one after the other, each with its own pointers. Nothing is added
// atomically, so runs repeat.

#include "persistent_sm90.cuh"

#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "mlp_epilogue.cuh"

namespace cavmae::sm90 {

using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;

// `Fusion` is what is done with a finished tile, `Source` the element of a matrix that it reads (void: none).
template <typename WeightLayout, typename Source, typename Fusion> struct MlpProducts {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Row, VECTOR, Element, Row, VECTOR,
        EpilogueSchedule, Fusion>::CollectiveOp;
    using Mainloop = MainloopOf<Row, WeightLayout, static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
    using LoadPipeline = typename Epilogue::LoadPipeline;
    using StorePipeline = typename Epilogue::StorePipeline;
    using Order = cutlass::OrderedSequenceBarrier<1, 2>;  // the first tile is fetched before what its last step reads
    static constexpr uint32_t MaxThreadsPerBlock = THREADS, MinBlocksPerMultiprocessor = 1;

    struct SharedStorage {
        alignas(16) typename Mainloop::PipelineStorage tiles;
        alignas(16) typename Epilogue::PipelineStorage source;
        alignas(16) typename Order::SharedStorage order;
        typename Epilogue::TensorStorage epilogue;
        typename Mainloop::TensorStorage mainloop;
    };

    struct Stream {
        typename Mainloop::Params mainloop;
        typename Epilogue::Params epilogue;
        int rows, end;  // end: how many pieces of work there are up to this stream's last
    };

    // A piece of work is two tiles, one below the other; those of the same rows follow one another.
    struct Params {
        Stream streams[CAVMAE_MAX_STREAMS];
        int width, depth, tiles_n, work;
    };

    struct Work {
        int stream, m, n;

        CUTLASS_DEVICE Work(Params const& params, int index) : stream(0) {
            while (index >= params.streams[stream].end) ++stream;
            if (stream > 0) index -= params.streams[stream - 1].end;
            m = 2 * (index / params.tiles_n) + int(cute::block_rank_in_cluster());
            n = index % params.tiles_n;
        }

        CUTLASS_DEVICE auto shape(Params const& params) const {
            return make_shape(params.streams[stream].rows, params.width, params.depth, 1);
        }

        CUTLASS_DEVICE auto tile() const { return make_coord(m, n, _, 0); }
    };

    CUTLASS_DEVICE void operator()(Params const& params, char* memory) {
        auto& storage = *reinterpret_cast<SharedStorage*>(memory);
        const int warp = cutlass::canonical_warp_idx_sync();
        const bool fetches_tiles = warp == 0, fetches_source = warp == 2;
        const bool multiplies = cutlass::canonical_warp_group_idx() > 0;
        auto tiles = tiles_pipeline<Mainloop>(storage.tiles, fetches_tiles, multiplies);

        typename LoadPipeline::Params of_source;
        if (fetches_source) of_source.role = LoadPipeline::ThreadCategory::Producer;
        if (multiplies) of_source.role = LoadPipeline::ThreadCategory::Consumer;
        of_source.dst_blockid = cute::block_rank_in_cluster();
        of_source.producer_arv_count = cutlass::NumThreadsPerWarp;
        of_source.consumer_arv_count = MULTIPLIERS;
        of_source.transaction_bytes = params.streams[0].epilogue.tma_transaction_bytes;
        LoadPipeline source(storage.source, of_source);

        typename StorePipeline::Params of_store;
        of_store.always_wait = true;
        StorePipeline store(of_store);

        typename Order::Params of_order;
        of_order.group_id = fetches_tiles ? 0 : 1;
        of_order.group_size = cutlass::NumThreadsPerWarp;
        Order order(storage.order, of_order);

        cute::cluster_arrive_relaxed();  // the other block's barriers are ready, too
        cute::cluster_wait();

        const int first = blockIdx.x / size(Cluster{}), stride = gridDim.x / size(Cluster{});
        if (!multiplies) {
            cutlass::arch::warpgroup_reg_dealloc<FETCHER_REGISTERS>();
            if (fetches_tiles) fetch_tiles(params, storage, tiles, order, first, stride);
            if (fetches_source) fetch_source(params, storage, source, order, first, stride);
        } else {
            cutlass::arch::warpgroup_reg_alloc<MULTIPLIER_REGISTERS>();
            multiply(params, storage, tiles, source, store, first, stride);
        }
    }

    template <class Tiles>
    CUTLASS_DEVICE static void fetch_tiles(Params const& params, SharedStorage& storage, Tiles& tiles, Order& order, int first,
                                           int stride) {
        Mainloop mainloop;
        auto state = cutlass::make_producer_start_state<Tiles>();
        const int steps = ceil_div(params.depth, size<2>(Tile{}));
        for (int index = first; index < params.work; index += stride) {
            const Work work(params, index);
            auto const& of_stream = params.streams[work.stream].mainloop;
            auto inputs = mainloop.load_init(work.shape(params), of_stream);
            auto range = shape<3>(get<0>(inputs));
            mainloop.load(of_stream, tiles, state, inputs, work.tile(), cute::make_coord_iterator(idx2crd(0, range), range),
                          steps, cutlass::canonical_lane_idx(), cute::block_rank_in_cluster(), storage.mainloop);
            state.advance(steps);
            if (index == first) order.arrive();
        }
        mainloop.load_tail(tiles, state);
    }

    CUTLASS_DEVICE static void fetch_source(Params const& params, SharedStorage& storage, LoadPipeline& source, Order& order,
                                            int first, int stride) {
        if (!Epilogue(params.streams[0].epilogue, storage.epilogue).is_producer_load_needed()) return;
        typename Mainloop::TiledMma tiled_mma;
        auto state = cutlass::make_producer_start_state<LoadPipeline>();
        order.wait();
        for (int index = first; index < params.work; index += stride) {
            const Work work(params, index);
            Epilogue epilogue(params.streams[work.stream].epilogue, storage.epilogue);
            state = epilogue.load(source, state, work.shape(params), Tile{}, work.tile(), tiled_mma,
                                  cutlass::canonical_lane_idx(), storage.epilogue);
        }
        Epilogue(params.streams[0].epilogue, storage.epilogue).load_tail(source, state);
    }

    template <class Tiles>
    CUTLASS_DEVICE static void multiply(Params const& params, SharedStorage& storage, Tiles& tiles, LoadPipeline& source,
                                        StorePipeline& store, int first, int stride) {
        Mainloop mainloop;
        typename Mainloop::TiledMma tiled_mma;
        typename Mainloop::PipelineState tile_state;
        typename Epilogue::LoadPipelineState source_state;
        auto store_state = cutlass::make_producer_start_state<StorePipeline>();
        const int thread = threadIdx.x % MULTIPLIERS, steps = ceil_div(params.depth, size<2>(Tile{}));
        for (int index = first; index < params.work; index += stride) {
            const Work work(params, index);
            auto accumulators = partition_fragment_C(tiled_mma, take<0, 2>(Tile{}));
            mainloop.mma(tiles, tile_state, accumulators, steps, thread, storage.mainloop, params.streams[0].mainloop);
            mainloop.mma_tail(tiles, tile_state, steps);
            tile_state.advance(steps);
            Epilogue epilogue(params.streams[work.stream].epilogue, storage.epilogue);
            auto [next_source, next_store] = epilogue.store(source, source_state, store, store_state, work.shape(params),
                                                            Tile{}, work.tile(), accumulators, tiled_mma, thread,
                                                            storage.epilogue);
            source_state = next_source;
            store_state = next_store;
        }
        Epilogue(params.streams[0].epilogue, storage.epilogue).store_tail(source, source_state, store, store_state);
    }

    // `arguments(product, mainloop, epilogue)` sets those of a stream.
    template <typename Product, typename Arguments>
    static int run(const Product* products, int streams, int width, int depth, Arguments arguments, cudaStream_t stream) {
        Device device;
        if (const int code = current_device(device)) return code;
        Params params{};
        params.width = width;
        params.depth = depth;
        params.tiles_n = ceil_div(width, size<1>(Tile{}));
        int64_t work = 0;
        for (int s = 0; s < streams; ++s) {
            const auto shape = make_shape(products[s].rows, width, depth, 1);
            typename Mainloop::Arguments mainloop{};
            typename Epilogue::Arguments epilogue{};
            arguments(products[s], mainloop, epilogue);
            if (!Mainloop::can_implement(shape, mainloop) || !Epilogue::can_implement(shape, epilogue)) return CAVMAE_BAD_SIZE;
            work += int64_t(ceil_div(products[s].rows, 2 * TILE_ROWS)) * params.tiles_n;
            if (work > INT32_MAX / 2) return CAVMAE_BAD_SIZE;
            params.streams[s] = {Mainloop::to_underlying_arguments(shape, mainloop, nullptr),
                                 Epilogue::to_underlying_arguments(shape, epilogue, nullptr), products[s].rows,
                                 static_cast<int>(work)};
        }
        params.work = static_cast<int>(work);
        return launch<MlpProducts>(params, work, device.multiprocessors, stream);
    }
};

using BiasGelu = cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<Row, StoredGelu, Element, float, Element, float,
                                                                       void>;

namespace fusion = cutlass::epilogue::fusion;
using Gradient = fusion::Sm90EVT<fusion::Sm90Compute<TimesGeluDerivative, float, float, ROUND>, fusion::Sm90AccFetch,
                                 fusion::Sm90SrcFetch<Element>>;
using Sums = fusion::Sm90EVT<fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float,
                                                      ROUND, Stride<_0, _1, _0>, 4, true, false>,
                             Gradient>;
using GradientAndSums = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Element, float, ROUND>, Sums>;

int linear_gelu(const LinearGelu* products, int streams, int width, int depth, cudaStream_t stream) {
    using Products = MlpProducts<Column, void, BiasGelu>;
    const auto arguments = [=](const LinearGelu& p, typename Products::Mainloop::Arguments& mainloop,
                               typename Products::Epilogue::Arguments& epilogue) {
        mainloop = {static_cast<const Element*>(p.x), {depth, _1{}, 0}, static_cast<const Element*>(p.weight), {depth, _1{}, 0}};
        epilogue = {{}, nullptr, {width, _1{}, 0}, static_cast<Element*>(p.y), {width, _1{}, 0}};
        epilogue.thread.bias_ptr = p.bias;
        epilogue.thread.aux_ptr = static_cast<Element*>(p.pre);
        epilogue.thread.dAux = {width, _1{}, 0};
    };
    return Products::run(products, streams, width, depth, arguments, stream);
}

int hidden_gradient(const HiddenGradient* products, int streams, int width, int depth, cudaStream_t stream) {
    using Products = MlpProducts<Row, Element, GradientAndSums>;
    const auto arguments = [=](const HiddenGradient& p, typename Products::Mainloop::Arguments& mainloop,
                               typename Products::Epilogue::Arguments& epilogue) {
        mainloop = {static_cast<const Element*>(p.dout), {depth, _1{}, 0}, static_cast<const Element*>(p.weight), {_1{}, width, 0}};
        epilogue = {{{{{}, {}, {}}, {p.partial, 0.f, {}}}, {}},
                    static_cast<const Element*>(p.pre), {width, _1{}, 0},
                    static_cast<Element*>(p.dpre), {width, _1{}, 0}};
    };
    return Products::run(products, streams, width, depth, arguments, stream);
}

}  // namespace cavmae::sm90
