#pragma once

// Phi(z) + z phi(z). erfc(x) = exp(-x^2) t (a1 + t (a2 + ...)), t = 1 / (1 + p x), x = |z| / sqrt 2 is formula 7.1.26 of
// Abramowitz & Stegun: |error| <= 1.5e-7, about the spacing of fp32 at 1. One exponential serves both Phi and phi.
__device__ inline float gelu_derivative(float z) {
    const float gauss = __expf(-0.5f * z * z);
    const float t = __fdividef(1.f, fmaf(0.3275911f * 0.70710678f, fabsf(z), 1.f));
    float half_erfc = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
    half_erfc = fmaf(t, half_erfc, 0.5f * 1.421413741f);
    half_erfc = fmaf(t, half_erfc, 0.5f * -0.284496736f);
    half_erfc = fmaf(t, half_erfc, 0.5f * 0.254829592f) * t * gauss;
    return fmaf(z * 0.39894228f, gauss, z < 0.f ? half_erfc : 1.f - half_erfc);
}
