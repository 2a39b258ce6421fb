// 16-byte global accesses, with the values in fp32 registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dit {

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // values of one access

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void narrow(float value, __half& out) { out = __float2half_rn(value); }

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// p must be aligned to N values, or to 16 bytes where they are longer.
template <typename T, int N>
__device__ __forceinline__ void load(const T* __restrict__ p, float (&v)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = widen(pack.values[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* __restrict__ p, const float (&v)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(v[i], pack.values[i]);
  if constexpr (sizeof(pack) % 16 == 0) {  // a plain store of 16-bit values may become four of 4 bytes
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
      __stwb(reinterpret_cast<uint4*>(p) + i, reinterpret_cast<const uint4*>(&pack)[i]);
    }
  } else {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  }
}

}  // namespace dit
