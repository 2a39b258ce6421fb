// From a dtype at run time to a type of the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"

namespace dit {

// f(first's type, second's type) as null pointers of those types; the second is the first or fp32.
template <typename F>
cudaError_t with_types(Dtype first, bool second_as_first, const F& f) {
  float* fp32 = nullptr;
  __nv_bfloat16* bf16 = nullptr;
  __half* fp16 = nullptr;
  if (first == Dtype::kFloat) return f(fp32, fp32);
  if (first == Dtype::kBfloat16) return second_as_first ? f(bf16, bf16) : f(bf16, fp32);
  return second_as_first ? f(fp16, fp16) : f(fp16, fp32);
}

}  // namespace dit
