// The C ABI of libcavmae: plain functions of pointers, sizes and a stream. Nothing of torch or Python.
//
// A function returns 0, or a negative code for an argument it refuses (nothing was launched), or a positive cudaError_t.
#pragma once

#include <cstdint>

#define CAVMAE_API extern "C" __attribute__((visibility("default")))

// Raised whenever a signature or the meaning of an argument changes; cavmae_fast/ops/native.py holds the same number.
#define CAVMAE_ABI_VERSION 1

enum cavmae_dtype { CAVMAE_FP32 = 0, CAVMAE_FP16 = 1, CAVMAE_BF16 = 2 };

enum cavmae_error {
    CAVMAE_NULL_POINTER = -1,
    CAVMAE_BAD_SIZE = -2,
    CAVMAE_BAD_DTYPE = -3,
    CAVMAE_MISALIGNED = -4,
};

CAVMAE_API int cavmae_abi_version();
CAVMAE_API const char* cavmae_error_string(int code);

// dpre = dact * gelu'(pre), and the column sums of dpre over each `cavmae_dgelu_bias_rows_per_block()` rows.
// dpre, dact, pre [rows, width] in `dtype`; partial [ceil(rows / rows_per_block), width] fp32. Rows must be a multiple of
// 16 bytes long and start at multiples of 16 bytes. dpre may be dact.
CAVMAE_API int cavmae_dgelu_bias_rows_per_block();
CAVMAE_API int cavmae_dgelu_bias(void* dpre, float* partial, const void* dact, const void* pre, int64_t rows,
                                 int64_t width, int dtype, void* stream);
