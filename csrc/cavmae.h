// The C ABI of libcavmae: plain functions of pointers, sizes and a stream. Nothing of torch or Python.
//
// A function returns 0, or a negative code for an argument it refuses (nothing was launched), or a positive cudaError_t.
#pragma once

#include <cstdint>

#define CAVMAE_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or the meaning of an argument changes; cavmae_fast/ops/native.py holds the same number.
#define CAVMAE_ABI_VERSION 4

enum cavmae_dtype { CAVMAE_FP32 = 0, CAVMAE_FP16 = 1, CAVMAE_BF16 = 2 };

enum cavmae_error {
    CAVMAE_NULL_POINTER = -1,
    CAVMAE_BAD_SIZE = -2,
    CAVMAE_BAD_DTYPE = -3,
    CAVMAE_MISALIGNED = -4,
    CAVMAE_BAD_DEVICE = -5,
};

CAVMAE_API int cavmae_abi_version();
CAVMAE_API const char* cavmae_error_string(int code);

// The MLP's products in bf16, for GPUs of compute capability 8.x, 9.0 and 12.x. The rows of several streams follow one
// another, `rows[s]` of stream s, and each stream has its own weight and bias: `weights`, `biases` and `rows` are arrays of
// `streams` in the memory of the CPU. Pointers to the GPU's memory are multiples of 16 bytes, width and depth of 8 elements.
#define CAVMAE_MAX_STREAMS 3

// pre = x weight^T + bias, y = gelu(pre) of pre as it is stored; x [all rows, depth], weight [width, depth], bias [width]
// fp32, y and pre [all rows, width]. pre may be null: it is not stored then.
CAVMAE_API int cavmae_linear_gelu(void* y, void* pre, const void* x, const void* const* weights, const float* const* biases,
                                  const int64_t* rows, int streams, int64_t width, int64_t depth, int dtype, void* stream);

// dpre = (dout weight) * gelu'(pre), and the column sums of dpre over each `cavmae_product_tile_rows()` rows of a stream;
// dout [all rows, depth], weight [depth, width], pre and dpre [all rows, width]; partial fp32, for each stream
// [ceil(rows[s] / tile_rows), ceil(width / 256) * 256], of which the first `width` columns are sums. dpre may be no input.
CAVMAE_API int cavmae_product_tile_rows();
CAVMAE_API int cavmae_hidden_gradient(void* dpre, float* partial, const void* dout, const void* pre,
                                      const void* const* weights, const int64_t* rows, int streams, int64_t width,
                                      int64_t depth, int dtype, void* stream);

// dw = dout^T x and db = the column sums of dout, of each stream; dout [all rows, width], x [all rows, depth] in bf16; dw
// [streams, width, depth] in bf16, db [streams, width] in fp32. For GPUs of compute capability 9.0. db may be null: it is not
// formed then. `workspace` is memory of at least as many bytes as the first function says for the same sizes; both are called
// with the same device current.
CAVMAE_API int cavmae_weight_gradient_workspace(int64_t* bytes, const int64_t* rows, int streams, int64_t width,
                                                int64_t depth);
CAVMAE_API int cavmae_weight_gradient(void* dw, float* db, void* workspace, int64_t workspace_bytes, const void* dout,
                                      const void* x, const int64_t* rows, int streams, int64_t width, int64_t depth,
                                      int dtype, void* stream);

// The backward pass of attention over every (stream, sample, head), from the forward's out and lse; for GPUs of compute
// capability 9.0, in bf16. A stream has `batch` samples of q_lengths[s] queries and lengths[s] keys; streams and samples
// follow one another. q and dq are rows of q_stride elements, k, v, dk and dv of k_stride (a packed q k v: three times the
// width of all heads), dout and out [all queries, heads * width], lse [heads, all queries] fp32, in base 2. `width` of a head
// is 32 or 64. Queries of a head are kept in shared memory: of as many as the first function says at most, 0 for a width that
// the kernel does not take. Pointers are multiples of 16 bytes, strides of 8 elements.
CAVMAE_API int64_t cavmae_attention_longest(int64_t width);
CAVMAE_API int cavmae_attention_backward(void* dq, void* dk, void* dv, const void* q, const void* k, const void* v,
                                         const void* dout, const void* out, const float* lse, int64_t q_stride,
                                         int64_t k_stride, const int64_t* q_lengths, const int64_t* lengths, int streams,
                                         int64_t batch, int64_t heads, int64_t width, int dtype, void* stream);
