// attention_backward.cuh on Hopper, a block for each head of a sample.
#include "attention_backward.cuh"
#include "products.h"

namespace cavmae {
namespace {

static_assert(shared_bytes(32, most_queries(32)) <= MOST_SHARED_BYTES);
static_assert(shared_bytes(64, most_queries(64)) <= MOST_SHARED_BYTES);

template <int W>
__global__ __launch_bounds__(ATTENTION_THREADS, 1) void attention_backward_kernel(const AttentionStreams streams) {
    extern __shared__ __align__(16) char memory[];
    Block<W> block(memory);
    attention_backward<W>(block, streams.head(blockIdx.x, W));
}

template <int W>
int launch(const AttentionStreams& streams, cudaStream_t stream) {
    const int bytes = shared_bytes(W, streams.longest);
    if (const auto error =
            cudaFuncSetAttribute(attention_backward_kernel<W>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
    const int blocks = streams.streams * streams.batch * streams.heads;
    attention_backward_kernel<W><<<blocks, ATTENTION_THREADS, bytes, stream>>>(streams);
    return cudaGetLastError();
}

}  // namespace

int sm90::attention_backward(const AttentionStreams& streams, int width, cudaStream_t stream) {
    return (width == 32 ? launch<32> : launch<64>)(streams, stream);
}

}  // namespace cavmae
