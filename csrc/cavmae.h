// The C ABI of libcavmae: plain functions of pointers, sizes and a stream. Nothing of torch or Python.
//
// A function returns 0, or a negative code for an argument it refuses (nothing was launched), or a positive cudaError_t.
#pragma once

#include <cstdint>

#define CAVMAE_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or the meaning of an argument changes; cavmae_fast/ops/native.py holds the same number.
#define CAVMAE_ABI_VERSION 2

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

// dpre = dact * gelu'(pre), and the column sums of dpre over each `cavmae_dgelu_bias_rows_per_block()` rows.
// dpre, dact, pre [rows, width] in `dtype`; partial [ceil(rows / rows_per_block), width] fp32. Rows must be a multiple of
// 16 bytes long and start at multiples of 16 bytes. dpre may be dact.
CAVMAE_API int cavmae_dgelu_bias_rows_per_block();
CAVMAE_API int cavmae_dgelu_bias(void* dpre, float* partial, const void* dact, const void* pre, int64_t rows,
                                 int64_t width, int dtype, void* stream);

// The MLP's products on Hopper (sm_90a), in bf16. Pointers are multiples of 16 bytes, width and depth of 8 elements.
//
// pre = x weight^T + bias, y = gelu(pre) of pre as it is stored; x [rows, depth], weight [width, depth], bias [width] fp32,
// y and pre [rows, width]. pre may be null: it is not stored then.
CAVMAE_API int cavmae_linear_gelu(void* y, void* pre, const void* x, const void* weight, const float* bias, int64_t rows,
                                  int64_t width, int64_t depth, int dtype, void* stream);

// dpre = (dout weight) * gelu'(pre), and the column sums of dpre over each `cavmae_product_tile_rows()` rows; dout [rows,
// depth], weight [depth, width], pre and dpre [rows, width]; partial [ceil(rows / tile_rows), width] fp32, its rows a multiple
// of 256 apart: [ceil(rows / tile_rows), ceil(width / 256) * 256].
CAVMAE_API int cavmae_product_tile_rows();
CAVMAE_API int cavmae_hidden_gradient(void* dpre, float* partial, const void* dout, const void* pre, const void* weight,
                                      int64_t rows, int64_t width, int64_t depth, int dtype, void* stream);
