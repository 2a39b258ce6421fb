// The floating types of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

namespace dit {

enum class Dtype { kFloat, kBfloat16, kHalf };

}  // namespace dit
