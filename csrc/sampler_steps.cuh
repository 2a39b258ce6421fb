// The elementwise steps of samplers in fp32, x, y, z -> out, with s, t the rows of sigma and sigma_next:
//   add_noise  (1 - s) x + s y                  flow_to_x0      x - s y
//   renoise    (1 - t) (x - s y) + t z          cfg_euler_step  x + (t - s) (z + guidance (y - z)), or x + (t - s) y
// All are linear in x, y, z, so that a gradient is a number per row times dout.
// x, y, z, out [R, n] contiguous. A thread takes N values of a row: 8, or 1 where rows do not fall into aligned eights.
#pragma once

#include "common/vec.cuh"
#include "sampler_steps.h"

namespace dit {

constexpr int kSamplerThreads = 128;

inline int64_t sampler_blocks(int64_t n, int N) { return (n + N * kSamplerThreads - 1) / (N * kSamplerThreads); }

__device__ __forceinline__ float value_of(const Sigma& sigma, unsigned row) {
  return sigma.table ? sigma.table[row / sigma.rows] : sigma.number;
}

// T: y and z; TX: x and out
template <typename T, typename TX, int N>
__global__ void __launch_bounds__(kSamplerThreads) sampler_step_fwd_kernel(const SamplerForward a) {
  const unsigned blocks = gridDim.x / a.R, row = blockIdx.x / blocks;
  const int64_t first = (static_cast<int64_t>(blockIdx.x % blocks) * kSamplerThreads + threadIdx.x) * N, at = row * a.n + first;
  if (first >= a.n) return;
  const float s = value_of(a.s, row), t = value_of(a.t, row);
  float x[N], y[N], z[N] = {};
  load(static_cast<const TX*>(a.x) + at, x);
  load(static_cast<const T*>(a.y) + at, y);
  if (a.z) load(static_cast<const T*>(a.z) + at, z);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    switch (a.step) {
      case SamplerStep::kAddNoise:
        x[i] = (1.f - s) * x[i] + s * y[i];
        break;
      case SamplerStep::kFlowToX0:
        x[i] -= s * y[i];
        break;
      case SamplerStep::kRenoise:
        x[i] = (1.f - t) * (x[i] - s * y[i]) + t * z[i];
        break;
      case SamplerStep::kCfgEulerStep:
        x[i] += (t - s) * (a.z ? z[i] + a.guidance * (y[i] - z[i]) : y[i]);
        break;
    }
  }
  store(static_cast<TX*>(a.out) + at, x);
}

// d out / d of
__device__ __forceinline__ float slope(SamplerStep step, char of, float s, float t, float guidance) {
  switch (step) {
    case SamplerStep::kAddNoise:
      return of == 'x' ? 1.f - s : s;
    case SamplerStep::kFlowToX0:
      return of == 'x' ? 1.f : -s;
    case SamplerStep::kRenoise:
      return of == 'x' ? 1.f - t : of == 'y' ? (t - 1.f) * s : t;
    default:
      return of == 'x' ? 1.f : (t - s) * (of == 'y' ? guidance : 1.f - guidance);
  }
}

// T: grad; TX: dout
template <typename T, typename TX, int N>
__global__ void __launch_bounds__(kSamplerThreads) sampler_step_bwd_kernel(const SamplerBackward a) {
  const unsigned blocks = gridDim.x / a.R, row = blockIdx.x / blocks;
  const int64_t first = (static_cast<int64_t>(blockIdx.x % blocks) * kSamplerThreads + threadIdx.x) * N, at = row * a.n + first;
  if (first >= a.n) return;
  const float k = slope(a.step, a.of, value_of(a.s, row), value_of(a.t, row), a.guidance);
  float v[N];
  load(static_cast<const TX*>(a.dout) + at, v);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] *= k;
  store(static_cast<T*>(a.grad) + at, v);
}

}  // namespace dit
