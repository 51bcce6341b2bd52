// What the products share: the products of a call, one for each stream, and the kernels of each architecture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
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

struct AttentionStreams;
struct Plan;

struct WeightGradient {
    void* dw;
    float *db, *workspace;
    const void *dout, *x;
    const int64_t* rows;
    int width, depth;
};

inline int64_t padded(int64_t width) { return (width + PARTIAL_COLUMNS - 1) / PARTIAL_COLUMNS * PARTIAL_COLUMNS; }

// How arguments are checked, before anything is asked of a device.
template <typename... Pointers> inline bool any_null(Pointers... pointers) { return (... || (pointers == nullptr)); }

template <typename... Pointers> inline bool any_misaligned(Pointers... pointers) {
    return (... || (reinterpret_cast<uintptr_t>(pointers) % 16 != 0));
}

inline int refused(const int64_t* rows, int streams, int64_t width, int64_t depth, int dtype) {
    if (dtype != CAVMAE_BF16) return CAVMAE_BAD_DTYPE;
    if (streams < 1 || streams > CAVMAE_MAX_STREAMS) return CAVMAE_BAD_SIZE;
    for (int s = 0; s < streams; ++s) {
        if (rows[s] < 1 || rows[s] > INT32_MAX) return CAVMAE_BAD_SIZE;
    }
    for (const int64_t size : {width, depth}) {
        if (size < 1 || size % VECTOR != 0 || size > MAX_WIDTH) return CAVMAE_BAD_SIZE;
    }
    return 0;
}

struct Device {
    int major = 0, multiprocessors = 0;
};

// The current device; returns 0 or CUDA's error.
inline int current_device(Device& device) {
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    }
    return static_cast<int>(error);
}

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
int weight_gradient(const WeightGradient& call, const Plan& plan, int multiprocessors, cudaStream_t stream);
int attention_backward(const AttentionStreams& streams, int width, cudaStream_t stream);
}  // namespace sm90

}  // namespace cavmae
