// The arguments of attention's backward pass, checked, for the kernel of Hopper.
#include "attention_backward.cuh"
#include "products.h"

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
    return sm90::attention_backward(all, static_cast<int>(width), static_cast<cudaStream_t>(stream));
}
