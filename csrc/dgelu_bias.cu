// Backward of bias + erf GELU in one pass over its inputs:
//
//     dpre = dact * (Phi(pre) + pre * phi(pre)),    partial[b] = sum of dpre over the rows of block b
//
// Memory sets the speed: three accesses of 16 bytes for every 8 elements of bf16. The arithmetic costs nothing as long as it
// can be hidden behind them: estimated, about 40 instructions per element on Hopper. erff and expf would take most of
// these, gelu_derivative takes half.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cavmae.h"
#include "gelu.cuh"

namespace {

constexpr int LANES = 32;           // threads along a row: a warp reads 512 contiguous bytes
constexpr int ROW_LANES = 8;        // rows a block reads at once
constexpr int ROWS_PER_BLOCK = 64;  // partial sums are 1/32 of the bytes of a bf16 input
constexpr int UNROLL = 4;           // loads in flight: 2 * UNROLL * 16 bytes per thread

__device__ float load(float x) { return x; }
__device__ float load(__half x) { return __half2float(x); }
__device__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float& to, float x) { to = x; }
__device__ void store(__half& to, float x) { to = __float2half_rn(x); }
__device__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <typename T> struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    T value[SIZE];
};

template <typename T>
__global__ __launch_bounds__(LANES* ROW_LANES) void dgelu_bias_kernel(T* dpre, float* partial, const T* dact,
                                                                      const T* pre, int64_t rows, int64_t width) {
    using Vec = Vector<T>;
    __shared__ float sums[ROW_LANES][Vec::SIZE * (LANES + 1)];
    const int64_t column = (int64_t(blockIdx.y) * LANES + threadIdx.x) * Vec::SIZE;
    const int64_t first = int64_t(blockIdx.x) * ROWS_PER_BLOCK;
    float total[Vec::SIZE] = {};
    if (column < width) {
        for (int step = 0; step < ROWS_PER_BLOCK; step += ROW_LANES * UNROLL) {
            Vec z[UNROLL], g[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int64_t row = first + step + u * ROW_LANES + threadIdx.y;
                if (row < rows) {
                    z[u] = *reinterpret_cast<const Vec*>(pre + row * width + column);
                    g[u] = *reinterpret_cast<const Vec*>(dact + row * width + column);
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int64_t row = first + step + u * ROW_LANES + threadIdx.y;
                if (row < rows) {
                    Vec result;
#pragma unroll
                    for (int i = 0; i < Vec::SIZE; ++i) {
                        const float d = load(g[u].value[i]) * gelu_derivative(load(z[u].value[i]));
                        total[i] += d;
                        store(result.value[i], d);
                    }
                    *reinterpret_cast<Vec*>(dpre + row * width + column) = result;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < Vec::SIZE; ++i) sums[threadIdx.y][i * (LANES + 1) + threadIdx.x] = total[i];
    __syncthreads();
    // Every thread adds up one column (or fewer), always in the order of the rows.
    for (int c = threadIdx.y * LANES + threadIdx.x; c < LANES * Vec::SIZE; c += LANES * ROW_LANES) {
        const int64_t out = int64_t(blockIdx.y) * LANES * Vec::SIZE + c;
        const int slot = (c % Vec::SIZE) * (LANES + 1) + c / Vec::SIZE;
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < ROW_LANES; ++r) sum += sums[r][slot];
        if (out < width) partial[int64_t(blockIdx.x) * width + out] = sum;
    }
}

template <typename T>
int launch(void* dpre, float* partial, const void* dact, const void* pre, int64_t rows, int64_t width,
           cudaStream_t stream) {
    const int64_t row_blocks = (rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
    const int64_t columns = LANES * Vector<T>::SIZE;
    const int64_t column_blocks = (width + columns - 1) / columns;
    if (width % Vector<T>::SIZE != 0 || row_blocks > INT32_MAX || column_blocks > 65535) return CAVMAE_BAD_SIZE;
    const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(column_blocks));
    dgelu_bias_kernel<T><<<grid, dim3(LANES, ROW_LANES), 0, stream>>>(
        static_cast<T*>(dpre), partial, static_cast<const T*>(dact), static_cast<const T*>(pre), rows, width);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace

int cavmae_dgelu_bias_rows_per_block() { return ROWS_PER_BLOCK; }

int cavmae_dgelu_bias(void* dpre, float* partial, const void* dact, const void* pre, int64_t rows, int64_t width,
                      int dtype, void* stream) {
    if (!dpre || !partial || !dact || !pre) return CAVMAE_NULL_POINTER;
    if (rows < 1 || width < 1) return CAVMAE_BAD_SIZE;
    const auto bits = reinterpret_cast<uintptr_t>(dpre) | reinterpret_cast<uintptr_t>(dact) |
                      reinterpret_cast<uintptr_t>(pre);
    if (bits % 16 != 0) return CAVMAE_MISALIGNED;
    const auto s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case CAVMAE_FP32: return launch<float>(dpre, partial, dact, pre, rows, width, s);
        case CAVMAE_FP16: return launch<__half>(dpre, partial, dact, pre, rows, width, s);
        case CAVMAE_BF16: return launch<__nv_bfloat16>(dpre, partial, dact, pre, rows, width, s);
        default: return CAVMAE_BAD_DTYPE;
    }
}
