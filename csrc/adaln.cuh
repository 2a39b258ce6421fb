// adaLN: y = xhat * gain + offset, xhat = (x - mean) * rstd (mean = 0 for the RMS norm), gain = weight * (1 + scale),
// offset = bias * (1 + scale) + shift.
// x, y [B, L, C]; scale, shift [B, F, C] with unit stride over C, token l uses row l / (L / F); weight, bias [C];
// mean, rstd [B, L] fp32. Absent tables are null. One block per token (forward) or per chunk of tokens (backward), a whole row
// in registers: thread t holds the vectors t, t + blockDim, ... of kVector<T> channels.
#pragma once

#include "adaln.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace dit {

// Threads of a block that holds a row of `vectors` in `items` vectors a thread: whole warps, as few as there can be.
inline int threads(int vectors, int items) { return (vectors + items * 32 - 1) / (items * 32) * 32; }

template <typename TT>
__device__ __forceinline__ const TT* row_of(const AdalnRows& rows, int64_t b, int64_t f) {
  return rows.data ? static_cast<const TT*>(rows.data) + b * rows.stride_b + f * rows.stride_f : nullptr;
}

template <typename TT, int N>
__device__ __forceinline__ void load_gain(const TT* weight, const TT* scale, int c, float (&gain)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) gain[i] = 1.f;
  if (weight) load(weight + c, gain);
  if (scale) {
    float s[N];
    load(scale + c, s);
#pragma unroll
    for (int i = 0; i < N; ++i) gain[i] *= 1.f + s[i];
  }
}

// adaln of token l of sample b, whose row v is in registers: zero beyond C, lost afterwards.
template <typename T, typename TT, int ITEMS>
__device__ __forceinline__ void store_adaln(const AdalnForward& a, float (&v)[ITEMS][kVector<T>], int64_t b, int64_t l) {
  constexpr int N = kVector<T>;
  __shared__ float2 slots[2][32];
  const int64_t token = b * a.L + l;

  float2 sum = {0.f, 0.f};
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum.x += v[k][i];
  }
  const float mean = a.rms ? 0.f : block_sum(sum, slots[0]).x / a.C;

  float2 squares = {0.f, 0.f};
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    if ((k * blockDim.x + threadIdx.x) * N < a.C) {
#pragma unroll
      for (int i = 0; i < N; ++i) squares.x += (v[k][i] - mean) * (v[k][i] - mean);
    }
  }
  const float rstd = 1.f / sqrtf(block_sum(squares, slots[1]).x / a.C + a.eps);

  const TT *scale = row_of<TT>(a.scale, b, l / a.group), *shift = row_of<TT>(a.shift, b, l / a.group);
  const TT *weight = static_cast<const TT*>(a.weight), *bias = static_cast<const TT*>(a.bias);
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c >= a.C) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] = (v[k][i] - mean) * rstd;
    float table[N];
    if (weight) {
      load(weight + c, table);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] *= table[i];
    }
    if (bias) {
      load(bias + c, table);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] += table[i];
    }
    if (scale) {
      load(scale + c, table);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] *= 1.f + table[i];
    }
    if (shift) {
      load(shift + c, table);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] += table[i];
    }
    store(static_cast<T*>(a.y) + token * a.C + c, v[k]);
  }
  if (threadIdx.x == 0) {
    a.mean[token] = mean;
    a.rstd[token] = rstd;
  }
}

template <typename T, typename TT, int ITEMS, int THREADS>
__global__ void __launch_bounds__(THREADS) adaln_fwd_kernel(const AdalnForward a) {
  constexpr int N = kVector<T>;
  const int64_t b = blockIdx.y, l = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + (b * a.L + l) * a.C;
  float v[ITEMS][N] = {};
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c < a.C) load(x + c, v[k]);
  }
  store_adaln<T, TT>(a, v, b, l);
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * gain; without mean(g) for the RMS norm.
// Block (f * chunks + n, b) takes chunk n of the tokens of modulation row f and writes its sums of dy * xhat and dy.
template <typename T, typename TT, int ITEMS, int THREADS>
__global__ void __launch_bounds__(THREADS) adaln_bwd_kernel(const AdalnBackward a) {
  constexpr int N = kVector<T>;
  __shared__ float2 slots[2][32];
  const int64_t b = blockIdx.y, f = blockIdx.x / a.chunks, n = blockIdx.x % a.chunks;
  const int64_t first = f * a.group + n * a.tokens, last = min(first + a.tokens, (f + 1) * a.group);

  float gain[ITEMS][N], dy_xhat[ITEMS][N] = {}, dy_sum[ITEMS][N] = {};
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c < a.C) load_gain(static_cast<const TT*>(a.weight), row_of<TT>(a.scale, b, f), c, gain[k]);
  }

  for (int64_t l = first; l < last; ++l) {
    const int64_t token = b * a.L + l;
    const float mean = a.mean[token], rstd = a.rstd[token];
    float xhat[ITEMS][N], g[ITEMS][N];
    float2 sums = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int c = (k * blockDim.x + threadIdx.x) * N;
      if (c >= a.C) continue;
      load(static_cast<const T*>(a.x) + token * a.C + c, xhat[k]);
      load(static_cast<const T*>(a.dy) + token * a.C + c, g[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        xhat[k][i] = (xhat[k][i] - mean) * rstd;
        dy_xhat[k][i] += g[k][i] * xhat[k][i];
        dy_sum[k][i] += g[k][i];
        g[k][i] *= gain[k][i];
        sums.x += g[k][i];
        sums.y += g[k][i] * xhat[k][i];
      }
    }
    sums = block_sum(sums, slots[(l - first) % 2]);
    const float g_mean = a.rms ? 0.f : sums.x / a.C, xhat_share = sums.y / a.C;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int c = (k * blockDim.x + threadIdx.x) * N;
      if (c >= a.C) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) g[k][i] = rstd * (g[k][i] - g_mean - xhat[k][i] * xhat_share);
      store(static_cast<T*>(a.dx) + token * a.C + c, g[k]);
    }
  }

  const int64_t row = (b * gridDim.x + blockIdx.x) * a.C;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c >= a.C) continue;
    store(a.dy_xhat + row + c, dy_xhat[k]);
    store(a.dy_sum + row + c, dy_sum[k]);
  }
}

}  // namespace dit
