// The C functions of the MLP's products: arguments are checked here, and the device says whose kernels run.

#include "products.h"

namespace cavmae {
namespace {

// The address of the row `rows` of a matrix of bf16; null stays null.
template <typename Pointer> Pointer* at_row(Pointer* matrix, int64_t rows, int64_t width) {
    using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
    return matrix ? static_cast<Byte*>(matrix) + rows * width * 2 : nullptr;
}

// Runs what the current device has the instructions for.
template <typename Product>
int run(int (*ampere)(const Product*, int, int, int, cudaStream_t), int (*hopper)(const Product*, int, int, int, cudaStream_t),
        const Product* products, int streams, int64_t width, int64_t depth, void* stream) {
    Device device;
    if (const int code = current_device(device)) return code;
    if (device.major != 8 && device.major != 9 && device.major != 12) return CAVMAE_BAD_DEVICE;
    return (device.major == 9 ? hopper : ampere)(products, streams, static_cast<int>(width), static_cast<int>(depth),
                                          static_cast<cudaStream_t>(stream));
}

}  // namespace
}  // namespace cavmae

int cavmae_product_tile_rows() { return cavmae::TILE_ROWS; }

int cavmae_linear_gelu(void* y, void* pre, const void* x, const void* const* weights, const float* const* biases,
                       const int64_t* rows, int streams, int64_t width, int64_t depth, int dtype, void* stream) {
    using namespace cavmae;
    if (any_null(y, x, weights, biases, rows)) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, streams, width, depth, dtype)) return code;
    if (any_misaligned(y, pre, x)) return CAVMAE_MISALIGNED;
    LinearGelu products[CAVMAE_MAX_STREAMS];
    int64_t first = 0;
    for (int s = 0; s < streams; first += rows[s++]) {
        if (any_null(weights[s], biases[s])) return CAVMAE_NULL_POINTER;
        if (any_misaligned(weights[s], biases[s])) return CAVMAE_MISALIGNED;
        products[s] = {at_row(y, first, width), at_row(pre, first, width), at_row(x, first, depth),
                       weights[s], biases[s], static_cast<int>(rows[s])};
    }
    return run(sm80::linear_gelu, sm90::linear_gelu, products, streams, width, depth, stream);
}

int cavmae_hidden_gradient(void* dpre, float* partial, const void* dout, const void* pre, const void* const* weights,
                           const int64_t* rows, int streams, int64_t width, int64_t depth, int dtype, void* stream) {
    using namespace cavmae;
    if (any_null(dpre, partial, dout, pre, weights, rows)) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, streams, width, depth, dtype)) return code;
    if (any_misaligned(dpre, partial, dout, pre)) return CAVMAE_MISALIGNED;
    HiddenGradient products[CAVMAE_MAX_STREAMS];
    int64_t first = 0;
    for (int s = 0; s < streams; first += rows[s++]) {
        if (!weights[s]) return CAVMAE_NULL_POINTER;
        if (any_misaligned(weights[s])) return CAVMAE_MISALIGNED;
        products[s] = {at_row(dpre, first, width), partial, at_row(dout, first, depth), at_row(pre, first, width),
                       weights[s], static_cast<int>(rows[s])};
        partial += (rows[s] + TILE_ROWS - 1) / TILE_ROWS * padded(width);
    }
    return run(sm80::hidden_gradient, sm90::hidden_gradient, products, streams, width, depth, stream);
}
