// The C functions of the weight gradient: arguments are checked here.

#include "products.h"
#include "weight_gradient_plan.h"

namespace cavmae {
namespace {

// The plan for the current device, which runs clusters of two blocks.
int planned(Plan& plan, Device& device, const int64_t* rows, int streams, int64_t width, int64_t depth) {
    if (const int code = current_device(device)) return code;
    if (device.major != 9) return CAVMAE_BAD_DEVICE;
    plan = make_plan(rows, streams, width, depth, device.multiprocessors / 2);
    return 0;
}

int64_t bytes_of(const Plan& plan) { return (plan.results() + plan.sums()) * static_cast<int64_t>(sizeof(float)); }

}  // namespace
}  // namespace cavmae

int cavmae_weight_gradient_workspace(int64_t* bytes, const int64_t* rows, int streams, int64_t width, int64_t depth) {
    using namespace cavmae;
    if (any_null(bytes, rows)) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, streams, width, depth, CAVMAE_BF16)) return code;
    Plan plan;
    Device device;
    if (const int code = planned(plan, device, rows, streams, width, depth)) return code;
    *bytes = bytes_of(plan);
    return 0;
}

int cavmae_weight_gradient(void* dw, float* db, void* workspace, int64_t workspace_bytes, const void* dout, const void* x,
                           const int64_t* rows, int streams, int64_t width, int64_t depth, int dtype, void* stream) {
    using namespace cavmae;
    if (any_null(dw, workspace, dout, x, rows)) return CAVMAE_NULL_POINTER;
    if (const int code = refused(rows, streams, width, depth, dtype)) return code;
    if (any_misaligned(dw, db, workspace, dout, x)) return CAVMAE_MISALIGNED;
    Plan plan;
    Device device;
    if (const int code = planned(plan, device, rows, streams, width, depth)) return code;
    if (workspace_bytes < bytes_of(plan)) return CAVMAE_BAD_SIZE;
    const WeightGradient call{dw, db, static_cast<float*>(workspace), dout, x, rows, static_cast<int>(width),
                              static_cast<int>(depth)};
    return sm90::weight_gradient(call, plan, device.multiprocessors, static_cast<cudaStream_t>(stream));
}
