// What the products share: the products of a call, one for each stream, and the kernels of each architecture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cavmae.h"

namespace cavmae {

constexpr int VECTOR = 8;             // elements of bf16 in 16 bytes
constexpr int TILE_ROWS = 128;        // rows of a tile of the MLP's products, on every architecture
constexpr int PARTIAL_COLUMNS = 256;  // rows of partial sums are whole multiples of this
constexpr int64_t MAX_WIDTH = 1 << 20;

struct LinearGelu {
    void *y, *pre;
    const void *x, *weight;
    const float* bias;
    int rows;
};

struct HiddenGradient {
    void* dpre;
    float* partial;
    const void *dout, *pre, *weight;
    int rows;
};

inline int64_t padded(int64_t width) { return (width + PARTIAL_COLUMNS - 1) / PARTIAL_COLUMNS * PARTIAL_COLUMNS; }

// What a launch that failed returns.
inline int launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? CAVMAE_BAD_SIZE : static_cast<int>(error);
}

// `streams` products of the same width and depth, whose arguments have been checked. Each returns 0 or a code as cavmae.h.
namespace sm80 {
int linear_gelu(const LinearGelu* products, int streams, int width, int depth, cudaStream_t stream);
int hidden_gradient(const HiddenGradient* products, int streams, int width, int depth, cudaStream_t stream);
}  // namespace sm80
namespace sm90 {
int linear_gelu(const LinearGelu* products, int streams, int width, int depth, cudaStream_t stream);
int hidden_gradient(const HiddenGradient* products, int streams, int width, int depth, cudaStream_t stream);
}  // namespace sm90

}  // namespace cavmae
