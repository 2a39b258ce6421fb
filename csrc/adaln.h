// What the CUDA launchers of adaln take: raw pointers, no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dit {

struct AdalnRows {
  const void* data;  // null: absent
  int64_t stride_b, stride_f;
};

struct AdalnForward {
  const void* x;
  AdalnRows scale, shift;
  const void *weight, *bias;
  void* y;
  float *mean, *rstd;
  int64_t B, L, group;  // group = L / F tokens share one row
  int C;
  float eps;
  bool rms;
};

struct AdalnBackward {
  const void *dy, *x;
  AdalnRows scale;
  const void* weight;
  const float *mean, *rstd;
  void* dx;
  float *dy_xhat, *dy_sum;  // [B, F, chunks, C]
  int64_t B, L, group;
  int chunks, tokens;  // a group falls into chunks of `tokens`
  int C;
  bool rms;
};

// x is `dtype`; the tables are fp32, or `dtype` where tables_as_x. C is a multiple of 16 bytes and at most 8192.
cudaError_t adaln_fwd(const AdalnForward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream);
cudaError_t adaln_bwd(const AdalnBackward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream);

}  // namespace dit
