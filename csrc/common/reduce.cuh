// Sums over a block in a fixed order: the same bits every run.
#pragma once

#include <cuda_runtime.h>

namespace dit {

// Returns the sum of `value` over the block to every thread. `slots` holds 32 values and must not be the one of the call
// before: with two in turn one barrier a call is enough.
__device__ __forceinline__ float2 block_sum(float2 value, float2* slots) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) {
    value.x += __shfl_xor_sync(~0u, value.x, lane);
    value.y += __shfl_xor_sync(~0u, value.y, lane);
  }
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  float2 total = slots[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) {
    total.x += slots[warp].x;
    total.y += slots[warp].y;
  }
  return total;
}

}  // namespace dit
