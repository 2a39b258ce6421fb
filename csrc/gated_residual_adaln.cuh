// Gated residual and the next norm: x' = x + gate * y in x's dtype, then h = adaln of that x' (adaln.cuh).
// x, y, x', h [B, L, C]; gate, scale, shift [B, F, C]; one block per token (forward) or per chunk of tokens (backward).
#pragma once

#include "adaln.cuh"
#include "gated_residual_adaln.h"

namespace dit {

template <typename T, typename TT, int ITEMS, int THREADS>
__global__ void __launch_bounds__(THREADS) gated_residual_adaln_fwd_kernel(const GatedResidualAdalnForward a) {
  constexpr int N = kVector<T>;
  const int64_t b = blockIdx.y, l = blockIdx.x, at = (b * a.norm.L + l) * a.norm.C;
  const TT* gate = row_of<TT>(a.gate, b, l / a.norm.group);
  float v[ITEMS][N] = {};
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c >= a.norm.C) continue;
    float y[N], g[N];
    load(static_cast<const T*>(a.norm.x) + at + c, v[k]);
    load(static_cast<const T*>(a.y) + at + c, y);
    if (gate) load(gate + c, g);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T rounded;  // the norm sees x' as it is stored
      narrow(v[k][i] + (gate ? g[i] * y[i] : y[i]), rounded);
      v[k][i] = widen(rounded);
    }
    store(static_cast<T*>(a.x_new) + at + c, v[k]);
  }
  store_adaln<T, TT>(a.norm, v, b, l);
}

// d = dx' + (gradient of the norm), dx = d, dy = gate * d, dgate = sum of d * y
template <typename T, typename TT, int ITEMS, int THREADS>
__global__ void __launch_bounds__(THREADS) gated_residual_adaln_bwd_kernel(const GatedResidualAdalnBackward a) {
  constexpr int N = kVector<T>;
  const AdalnBackward& n = a.norm;
  __shared__ float2 slots[2][32];
  const int64_t b = blockIdx.y, f = blockIdx.x / n.chunks, chunk = blockIdx.x % n.chunks;
  const int64_t first = f * n.group + chunk * n.tokens, last = min(first + n.tokens, (f + 1) * n.group);
  const TT *scale = row_of<TT>(n.scale, b, f), *gate = row_of<TT>(a.gate, b, f), *weight = static_cast<const TT*>(n.weight);

  float dh_xhat[ITEMS][N] = {}, dh_sum[ITEMS][N] = {}, dgate[ITEMS][N] = {};
  for (int64_t l = first; l < last; ++l) {
    const int64_t token = b * n.L + l, at = token * n.C;
    const float mean = n.mean[token], rstd = n.rstd[token];
    float xhat[ITEMS][N], g[ITEMS][N];
    float2 sums = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int c = (k * blockDim.x + threadIdx.x) * N;
      if (c >= n.C) continue;
      float gain[N];
      load(static_cast<const T*>(n.x) + at + c, xhat[k]);
      load(static_cast<const T*>(n.dy) + at + c, g[k]);
      load_gain(weight, scale, c, gain);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        xhat[k][i] = (xhat[k][i] - mean) * rstd;
        dh_xhat[k][i] += g[k][i] * xhat[k][i];
        dh_sum[k][i] += g[k][i];
        g[k][i] *= gain[i];
        sums.x += g[k][i];
        sums.y += g[k][i] * xhat[k][i];
      }
    }
    sums = block_sum(sums, slots[(l - first) % 2]);
    const float g_mean = n.rms ? 0.f : sums.x / n.C, xhat_share = sums.y / n.C;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int c = (k * blockDim.x + threadIdx.x) * N;
      if (c >= n.C) continue;
      float d[N];
      load(static_cast<const T*>(a.dx_new) + at + c, d);
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] += rstd * (g[k][i] - g_mean - xhat[k][i] * xhat_share);
      store(static_cast<T*>(n.dx) + at + c, d);
      if (gate) {
        float y[N], dy[N];
        load(static_cast<const T*>(a.y) + at + c, y);
        load(gate + c, dy);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          dy[i] *= d[i];
          dgate[k][i] += d[i] * y[i];
        }
        store(static_cast<T*>(a.dy) + at + c, dy);
      }
    }
  }

  const int64_t row = (b * gridDim.x + blockIdx.x) * n.C;
#pragma unroll
  for (int k = 0; k < ITEMS; ++k) {
    const int c = (k * blockDim.x + threadIdx.x) * N;
    if (c >= n.C) continue;
    store(n.dy_xhat + row + c, dh_xhat[k]);
    store(n.dy_sum + row + c, dh_sum[k]);
    if (gate) store(a.dgate + row + c, dgate[k]);
  }
}

}  // namespace dit
