// SPDX-License-Identifier: Apache-2.0
// What kernels take from the GPU, behind small functions: tensor-core products, arithmetic on pairs
// of 16-bit floats, loads past the first-level cache. tests/native/simt.h has the same functions for
// the host, so that the bodies of the kernels run there as they are.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define HAL_DEVICE __device__ __forceinline__

struct Words4 {
  uint32_t w[4];
};

struct Words2 {
  uint32_t w[2];
};

// Weights are read once: they must not displace the activations.
HAL_DEVICE Words4 stream4(const uint32_t* at) {
  Words4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(at));
  return v;
}

HAL_DEVICE Words2 stream2(const uint32_t* at) {
  Words2 v;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
      : "=r"(v.w[0]), "=r"(v.w[1])
      : "l"(at));
  return v;
}

// Copies of COUNT words (4 or 2) to shared memory that nobody waits for. Those a thread has begun since
// its last commit() are a batch; arrived<LATE>() waits for all of its batches but the last LATE. Only
// what a thread copied itself is then there for it.
template <int COUNT>
HAL_DEVICE void copy(uint32_t* to, const uint32_t* from) {
  static_assert(COUNT == 4 || COUNT == 2, "16 or 8 bytes");
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  if constexpr (COUNT == 4) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
  }
}

HAL_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATE>
HAL_DEVICE void arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATE) : "memory");
}

HAL_DEVICE Words4 shared4(const uint32_t* at) {
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
}

HAL_DEVICE Words2 shared2(const uint32_t* at) {
  const uint2 v = *reinterpret_cast<const uint2*>(at);
  return {{v.x, v.y}};
}

HAL_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }

// Half of a warp as a team of csrc/team.h; its halves may go different ways.
HAL_DEVICE int team_lane() { return threadIdx.x % 16; }
HAL_DEVICE unsigned team_mask() { return 0xFFFFu << (threadIdx.x & 16); }
HAL_DEVICE float team_at(float x, int lane) { return __shfl_sync(team_mask(), x, lane, 16); }
HAL_DEVICE float team_xor(float x, int bit) { return __shfl_xor_sync(team_mask(), x, bit, 16); }
HAL_DEVICE bool team_any(bool x) { return __any_sync(team_mask(), x); }

struct Bf16 {
  // d [16, 8] += a [16, 16] b [16, 8]; fragments as the PTX manual has them for m16n8k16.
  static HAL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static HAL_DEVICE uint32_t pair(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static HAL_DEVICE uint32_t minus(uint32_t a, uint32_t b) {
    const __nv_bfloat162 v = __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a),
                                     *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static HAL_DEVICE float load(const void* at, int64_t i) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(at)[i]);
  }
  static HAL_DEVICE float number(uint16_t bits) { return bits_to_float((uint32_t)bits << 16); }
  static HAL_DEVICE void store(void* at, int64_t i, float v) {
    static_cast<__nv_bfloat16*>(at)[i] = __float2bfloat16(v);
  }
};

struct F16 {
  static HAL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static HAL_DEVICE uint32_t pair(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static HAL_DEVICE uint32_t minus(uint32_t a, uint32_t b) {
    const __half2 v =
        __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static HAL_DEVICE float load(const void* at, int64_t i) {
    return __half2float(static_cast<const __half*>(at)[i]);
  }
  static HAL_DEVICE float number(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static HAL_DEVICE void store(void* at, int64_t i, float v) {
    static_cast<__half*>(at)[i] = __float2half(v);
  }
};

#else
#include "simt.h"
#endif

struct F32 {
  static HAL_DEVICE float load(const void* at, int64_t i) { return static_cast<const float*>(at)[i]; }
};
