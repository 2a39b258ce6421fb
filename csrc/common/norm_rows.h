// One row [C] of a layer or RMS norm, in fp32, forward and backward:
//   y = xhat * gain + offset,  xhat = (x - mean) * rstd,  gain = weight * (1 + scale),  offset = bias * (1 + scale) + shift
// with mean = 0 for the RMS norm. Absent tables are null pointers.
#pragma once

#include <cmath>

#include "cpu.h"

namespace dit {

// The row in fp32: itself, or widened into the buffer.
DIT_INLINE const float* load_row(const float* x, float*, int64_t) { return x; }

DIT_INLINE const float* load_row(const bfloat16* __restrict x, float* __restrict buffer, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) buffer[c] = widen(x[c]);
  return buffer;
}

template <typename T>
DIT_INLINE void store_row(const float* __restrict row, T* __restrict y, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) narrow(row[c], y[c]);
}

// row = x + gate * y, rounded to T as the next op would read it; stored in out. gate may be null.
template <typename T>
DIT_INLINE void residual_row(const T* __restrict x, const T* __restrict y, const float* __restrict gate, float* __restrict row,
                             T* __restrict out, int64_t C) {
  if (gate) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      narrow(widen(x[c]) + gate[c] * widen(y[c]), out[c]);
      row[c] = widen(out[c]);
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      narrow(widen(x[c]) + widen(y[c]), out[c]);
      row[c] = widen(out[c]);
    }
  }
}

// dy = gate * dout; adds dout * y to dgate.
template <typename T>
DIT_INLINE void gate_row_backward(const float* __restrict dout, const T* __restrict y, const float* __restrict gate,
                                  T* __restrict dy, float* __restrict dgate, int64_t C) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    narrow(gate[c] * dout[c], dy[c]);
    dgate[c] += dout[c] * widen(y[c]);
  }
}

DIT_INLINE void fold_modulation(const float* weight, const float* bias, const float* scale, const float* shift,
                                float* __restrict gain, float* __restrict offset, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const float one_plus_scale = scale ? 1.f + scale[c] : 1.f;
    gain[c] = weight ? weight[c] * one_plus_scale : one_plus_scale;
    offset[c] = (bias ? bias[c] * one_plus_scale : 0.f) + (shift ? shift[c] : 0.f);
  }
}

// A sum over a row has kLanes partial sums, so that no addition waits for the one before it.
constexpr int kLanes = 64;

// sum of (row - center) or of its square
template <bool SQUARED>
DIT_INLINE float sum_row(const float* __restrict row, int64_t C, float center) {
  float lanes[kLanes] = {};
  for (int64_t first = 0; first < C; first += kLanes) {
    if (C - first >= kLanes) {  // a number of turns that is known, so that the partial sums stay in registers
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const float centered = row[first + i] - center;
        lanes[i] += SQUARED ? centered * centered : centered;
      }
    } else {
#pragma omp simd
      for (int i = 0; i < C - first; ++i) {
        const float centered = row[first + i] - center;
        lanes[i] += SQUARED ? centered * centered : centered;
      }
    }
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

DIT_INLINE void row_stats(const float* __restrict row, int64_t C, float eps, bool rms, float& mean, float& rstd) {
  const float center = rms ? 0.f : sum_row<false>(row, C, 0.f) / static_cast<float>(C);
  mean = center;
  rstd = 1.f / std::sqrt(sum_row<true>(row, C, center) / static_cast<float>(C) + eps);
}

template <typename T>
DIT_INLINE void norm_row(const float* __restrict row, const float* __restrict gain, const float* __restrict offset,
                         T* __restrict y, int64_t C, float mean, float rstd) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) narrow((row[c] - mean) * rstd * gain[c] + offset[c], y[c]);
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * gain; adds dy * xhat and dy to the sums over rows.
DIT_INLINE void norm_row_backward(const float* __restrict dy, const float* __restrict row, const float* __restrict gain,
                                  float* __restrict dx, float* __restrict dy_xhat, float* __restrict dy_sum, int64_t C,
                                  float mean, float rstd, bool rms) {
  float g_sum = 0, g_xhat = 0;
#pragma omp simd reduction(+ : g_sum, g_xhat)
  for (int64_t c = 0; c < C; ++c) {
    const float xhat = (row[c] - mean) * rstd, product = dy[c] * xhat;
    dy_xhat[c] += product;
    dy_sum[c] += dy[c];
    g_sum += dy[c] * gain[c];
    g_xhat += product * gain[c];
  }
  const float g_mean = rms ? 0.f : g_sum / static_cast<float>(C), xhat_share = g_xhat / static_cast<float>(C);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const float xhat = (row[c] - mean) * rstd;
    dx[c] = rstd * (dy[c] * gain[c] - g_mean - xhat * xhat_share);
  }
}

}  // namespace dit
