#include <cuda_runtime.h>

#include "cavmae.h"

int cavmae_abi_version() { return CAVMAE_ABI_VERSION; }

const char* cavmae_error_string(int code) {
    switch (code) {
        case CAVMAE_NULL_POINTER: return "a pointer is null";
        case CAVMAE_BAD_SIZE: return "a size is out of range, or a row is no multiple of 16 bytes";
        case CAVMAE_BAD_DTYPE: return "the kernel does not take this dtype";
        case CAVMAE_MISALIGNED: return "a pointer is no multiple of 16 bytes";
        case CAVMAE_BAD_DEVICE: return "the kernel is not for a GPU of this compute capability";
        default: return cudaGetErrorString(static_cast<cudaError_t>(code));
    }
}
