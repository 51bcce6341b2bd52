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
}  // namespace cavmae

int64_t cavmae_attention_longest(int64_t width) {
    return width == 32 || width == 64 ? cavmae::most_queries(static_cast<int>(width)) : 0;
}

int cavmae_attention_backward(void* dq, void* dk, void* dv, const void* q, const void* k, const void* v, const void* dout,
                              const void* out, const float* lse, int64_t q_stride, int64_t k_stride,
                              const int64_t* q_lengths, const int64_t* lengths, int streams, int64_t batch, int64_t heads,
                              int64_t width, int dtype, void* stream) {
    using namespace cavmae;
    if (any_null(dq, dk, dv, q, k, v, dout, out, lse, q_lengths, lengths)) return CAVMAE_NULL_POINTER;
    if (dtype != CAVMAE_BF16) return CAVMAE_BAD_DTYPE;
    const int64_t longest = cavmae_attention_longest(width);
    if (streams < 1 || streams > CAVMAE_MAX_STREAMS || longest == 0) return CAVMAE_BAD_SIZE;
    if (heads < 1 || heads > MAX_WIDTH / width || batch < 1 || batch > INT32_MAX / (heads * streams)) return CAVMAE_BAD_SIZE;
    for (const int64_t stride : {q_stride, k_stride})
        if (stride < heads * width || stride % VECTOR != 0 || stride > 3 * MAX_WIDTH) return CAVMAE_BAD_SIZE;
    for (int s = 0; s < streams; ++s)
        if (q_lengths[s] < 1 || q_lengths[s] > longest || lengths[s] < 1 || lengths[s] > INT32_MAX / 2) return CAVMAE_BAD_SIZE;
    if (any_misaligned(dq, dk, dv, q, k, v, dout, out, lse)) return CAVMAE_MISALIGNED;
    Device device;
    if (const int code = current_device(device)) return code;
    if (device.major != 9) return CAVMAE_BAD_DEVICE;
    const AttentionStreams all = streams_of(dq, dk, dv, q, k, v, dout, out, lse, q_stride, k_stride, q_lengths, lengths,
                                            streams, batch, heads, width);
    return (width == 32 ? launch<32> : launch<64>)(all, static_cast<cudaStream_t>(stream));
}
