// What the CUDA launchers of the sampler steps take: raw pointers, no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dit {

// In the order of STEPS in kernels/sampler_steps.py; sampler_steps.cuh has the formulas.
enum class SamplerStep : int64_t { kAddNoise, kFlowToX0, kRenoise, kCfgEulerStep };

struct Sigma {
  const float* table;  // null: the number
  float number;
  unsigned rows;  // consecutive rows of x that share an element of the table
};

struct SamplerForward {
  SamplerStep step;
  const void *x, *y, *z;  // z may be null
  void* out;
  Sigma s, t;
  float guidance;
  unsigned R;    // rows
  int64_t n;     // values of a row
  bool aligned;  // every 8 values of a row start at a multiple of 16 bytes
};

struct SamplerBackward {
  SamplerStep step;
  char of;  // 'x', 'y' or 'z'
  const void* dout;
  void* grad;
  Sigma s, t;
  float guidance;
  unsigned R;    // rows
  int64_t n;     // values of a row
  bool aligned;  // every 8 values of a row start at a multiple of 16 bytes
};

// y and z, or grad, are `branch`; x and out, or dout, are `branch` or fp32.
cudaError_t sampler_step_fwd(const SamplerForward& a, Dtype branch, bool x_as_branch, cudaStream_t stream);
cudaError_t sampler_step_bwd(const SamplerBackward& a, Dtype branch, bool dout_as_branch, cudaStream_t stream);

}  // namespace dit
