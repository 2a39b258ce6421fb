// The heads of one token [C] times the 4x4 matrix of their frame.
#pragma once

#include "cpu.h"

namespace dit {

// Adds M n, or M^T n, in groups of 4 channels.
DIT_INLINE void project_heads(const float* __restrict n, const float* M, bool transpose, float* __restrict out, int64_t C) {
  float m[4][4];
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) m[i][j] = transpose ? M[4 * j + i] : M[4 * i + j];
  }
#pragma omp simd
  for (int64_t c = 0; c < C; c += 4) {
    const float x0 = n[c], x1 = n[c + 1], x2 = n[c + 2], x3 = n[c + 3];
    out[c] += m[0][0] * x0 + m[0][1] * x1 + m[0][2] * x2 + m[0][3] * x3;
    out[c + 1] += m[1][0] * x0 + m[1][1] * x1 + m[1][2] * x2 + m[1][3] * x3;
    out[c + 2] += m[2][0] * x0 + m[2][1] * x1 + m[2][2] * x2 + m[2][3] * x3;
    out[c + 3] += m[3][0] * x0 + m[3][1] * x1 + m[3][2] * x2 + m[3][3] * x3;
  }
}

}  // namespace dit
