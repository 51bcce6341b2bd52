// What a warp does together: matrices of 8 x 8 bf16 between shared memory and registers, and their products.
//
// The same source is compiled twice. On the device a lane is a thread, and a function is an instruction. As plain C++ one
// thread stands for a whole warp: registers are arrays over the 32 lanes, and an instruction moves and multiplies what its
// documented layout says. So a kernel that is written with it can be run, and proven right, without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CAVMAE_DEVICE __device__ __forceinline__
#define CAVMAE_UNROLL _Pragma("unroll")
#define CAVMAE_EACH_LANE(lane) if (const int lane = threadIdx.x % 32; true)
#else
#define CAVMAE_DEVICE inline
#define CAVMAE_UNROLL
#define CAVMAE_EACH_LANE(lane) for (int lane = 0; lane < 32; ++lane)
#endif

namespace cavmae {

// A register of each lane.
template <class T>
struct PerLane {
#ifdef __CUDACC__
    T value;
    CAVMAE_DEVICE T& operator[](int) { return value; }
    CAVMAE_DEVICE const T& operator[](int) const { return value; }
#else
    T value[32];
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
#endif
};

struct alignas(16) Four {
    float x, y, z, w;
};

// Four 8 x 8 matrices of bf16, two elements in a word: lane 4 g + t has row g, columns 2 t and 2 t + 1.
struct Fragment {
    PerLane<uint32_t> word[4];
};

// 16 x 8 in fp32: lane 4 g + t has columns 2 t and 2 t + 1 of row g (x, y) and of row g + 8 (z, w).
using Accumulator = PerLane<Four>;

// A place in shared memory; and `hold`: the compiler keeps a value in registers from there on, and does not compute it again
// where it is needed.
#ifdef __CUDACC__
using Address = uint32_t;

CAVMAE_DEVICE Address address_of(char* memory) { return static_cast<Address>(__cvta_generic_to_shared(memory)); }
CAVMAE_DEVICE void hold(PerLane<Address>& address) { asm volatile("" : "+r"(address.value)); }
CAVMAE_DEVICE void hold(Accumulator& sum) {
    asm volatile("" : "+f"(sum.value.x), "+f"(sum.value.y), "+f"(sum.value.z), "+f"(sum.value.w));
}
#else
using Address = char*;

inline Address address_of(char* memory) { return memory; }
inline void hold(PerLane<Address>&) {}
inline void hold(Accumulator&) {}
#endif

CAVMAE_DEVICE Four load_four(Address from) {
    Four x;
#ifdef __CUDACC__
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
#else
    std::memcpy(&x, from, sizeof(x));
#endif
    return x;
}

CAVMAE_DEVICE void store_four(Address to, const Four& x) {
#ifdef __CUDACC__
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#else
    std::memcpy(to, &x, sizeof(x));
#endif
}

#ifndef __CUDACC__
inline float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, of two to the even one
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if (value != value) return 0x7fff;
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline float half_of(uint32_t word, int which) { return from_bf16(uint16_t(word >> (16 * which))); }
#endif

// Two numbers in a word, the first one in its low half.
CAVMAE_DEVICE uint32_t packed(float first, float second) {
#ifdef __CUDACC__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#else
    return to_bf16(first) | uint32_t(to_bf16(second)) << 16;
#endif
}

// The two numbers of a word.
CAVMAE_DEVICE float low_of(uint32_t word) {
#ifdef __CUDACC__
    return __uint_as_float(word << 16);
#else
    return half_of(word, 0);
#endif
}

CAVMAE_DEVICE float high_of(uint32_t word) {
#ifdef __CUDACC__
    return __uint_as_float(word & 0xffff0000u);
#else
    return half_of(word, 1);
#endif
}

CAVMAE_DEVICE float power_of_2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}

// Four matrices from shared memory; lane 8 i + j has the address of row j of matrix i, `offset` bytes before it. TRANSPOSED: of their transposes.
template <bool TRANSPOSED>
CAVMAE_DEVICE void load_matrices(Fragment& to, const PerLane<Address>& rows, int offset = 0) {
#ifdef __CUDACC__
    const uint32_t address = rows.value + offset;
    uint32_t &a = to.word[0].value, &b = to.word[1].value, &c = to.word[2].value, &d = to.word[3].value;
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "r"(address)
                     : "memory");
#else
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < 32; ++lane) {
            uint16_t pair[2];
            for (int half = 0; half < 2; ++half) {
                const int g = lane / 4, other = 2 * (lane % 4) + half;
                const int row = TRANSPOSED ? other : g, column = TRANSPOSED ? g : other;
                std::memcpy(&pair[half], rows[8 * i + row] + offset + 2 * column, 2);
            }
            to.word[i][lane] = pair[0] | uint32_t(pair[1]) << 16;
        }
#endif
}

// The reverse of load_matrices<false>.
CAVMAE_DEVICE void store_matrices(const PerLane<Address>& rows, int offset, const Fragment& from) {
#ifdef __CUDACC__
    const uint32_t address = rows.value + offset;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(from.word[0].value), "r"(from.word[1].value), "r"(from.word[2].value), "r"(from.word[3].value)
                 : "memory");
#else
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < 32; ++lane)
            std::memcpy(rows[8 * i + lane / 4] + offset + 4 * (lane % 4), &from.word[i][lane], 4);
#endif
}

// d = c + a b: a is 16 x 16, as the matrices (rows 0-7 | 8-15) x columns 0-7, then x columns 8-15; b is 16 x 8, as the
// transposes of its upper and its lower half.
CAVMAE_DEVICE void multiply(Accumulator& d, const Fragment& a, const PerLane<uint32_t>& b0, const PerLane<uint32_t>& b1,
                            const Accumulator& c) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d.value.x), "=f"(d.value.y), "=f"(d.value.z), "=f"(d.value.w)
        : "r"(a.word[0].value), "r"(a.word[1].value), "r"(a.word[2].value), "r"(a.word[3].value), "r"(b0.value),
          "r"(b1.value), "f"(c.value.x), "f"(c.value.y), "f"(c.value.z), "f"(c.value.w));
#else
    float first[16][16], second[16][8], sum[16][8];
    const PerLane<uint32_t>* halves[2] = {&b0, &b1};
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const int g = lane / 4, column = 2 * (lane % 4) + half;
            for (int i = 0; i < 4; ++i) first[g + 8 * (i % 2)][column + 8 * (i / 2)] = half_of(a.word[i][lane], half);
            for (int i = 0; i < 2; ++i) second[column + 8 * i][g] = half_of((*halves[i])[lane], half);
            sum[g][column] = half ? c[lane].y : c[lane].x;
            sum[g + 8][column] = half ? c[lane].w : c[lane].z;
        }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) sum[i][j] += first[i][k] * second[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, column = 2 * (lane % 4);
        d[lane] = {sum[g][column], sum[g][column + 1], sum[g + 8][column], sum[g + 8][column + 1]};
    }
#endif
}

}  // namespace cavmae
