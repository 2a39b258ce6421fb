// The rows of one tensor of heads on their way into attention: RMS norm, rotation, and projection by the camera of their frame.
#pragma once

#include "common/tensors_cpu.h"

namespace dit {

struct Rope {
  Tensor frame, height, width;   // [positions, D_axis / 2, 2] of (cos, sin), fp32
  int64_t F, H, W, start_frame;  // both halves of a sequence have the same positions
};

struct Camera {
  Tensor M;        // [B, F, 4, 4] fp32
  bool transpose;  // applies M^T
};

// n = x / rms(x) * weight (x itself without a weight). Returns the heads [0, N): n turned by rope (n itself without), and with
// a camera the heads [N, 2N): M n in groups of 4 channels; and 1 / rms [B, L, C / weight's length].
// x [B, L, N, D] with unit strides inside a token; weight [N * D] or [D] fp32; out: where to write the heads, made here if null.
Tensors2 heads_fwd(const Tensor& x, const Table& weight, const Rope& grid, bool rotate, const Camera* camera, double eps,
                   const char* op, const Tensor* out = nullptr);

// Gradients of x and weight (empty without a weight) for the gradient of heads_fwd's result.
Tensors2 heads_bwd(const Tensor& dout, const Tensor& x, const Table& weight, const Tensor& rstd, const Rope& grid, bool rotate,
                   const Camera* camera, const char* op);

}  // namespace dit
