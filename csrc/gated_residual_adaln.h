// What the CUDA launchers of gated_residual_adaln take: raw pointers, no torch.
#pragma once

#include "adaln.h"

namespace dit {

struct GatedResidualAdalnForward {
  AdalnForward norm;  // its x is the residual stream before the sum, its y is h
  const void* y;
  AdalnRows gate;
  void* x_new;
};

struct GatedResidualAdalnBackward {
  AdalnBackward norm;  // its dy is dh, its x is x', its dx is the gradient of x
  const void *dx_new, *y;
  AdalnRows gate;
  void* dy;      // not written without a gate: it is dx
  float* dgate;  // [B, F, chunks, C]
};

// x and y are `dtype`; the tables are fp32, or `dtype` where tables_as_x. C is a multiple of 16 bytes and at most 8192.
cudaError_t gated_residual_adaln_fwd(const GatedResidualAdalnForward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream);
cudaError_t gated_residual_adaln_bwd(const GatedResidualAdalnBackward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream);

}  // namespace dit
