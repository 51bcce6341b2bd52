// What the MLP's products do with their values before they store them, in the form in which CUTLASS's epilogues call it.
#pragma once

#include "gelu.cuh"
#include "cutlass/array.h"
#include "cutlass/numeric_types.h"

namespace cavmae {

// gelu of the value as it is stored, as in two passes.
template <typename T> struct StoredGelu;

template <int N> struct StoredGelu<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& values) const {
        cutlass::Array<float, N> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
            const float z = static_cast<float>(cutlass::bfloat16_t(values[i]));
            result[i] = 0.5f * z * (1.f + erff(z * 0.70710678f));
        }
        return result;
    }
};

template <> struct StoredGelu<float> {};

template <typename T> struct TimesGeluDerivative;

template <int N> struct TimesGeluDerivative<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& gradient,
                                                       cutlass::Array<float, N> const& pre) const {
        cutlass::Array<float, N> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) result[i] = gradient[i] * gelu_derivative(pre[i]);
        return result;
    }
};

template <> struct TimesGeluDerivative<float> {};

}  // namespace cavmae
