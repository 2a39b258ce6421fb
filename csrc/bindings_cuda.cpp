// The CUDA launchers as torch ops in dit_ops_cuda: same names and signatures as in kernels/.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "adaln.h"

namespace dit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Table = std::optional<Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Dtype dtype_of(const Tensor& x, const char* op) {
  if (x.scalar_type() == ScalarType::Float) return Dtype::kFloat;
  if (x.scalar_type() == ScalarType::BFloat16) return Dtype::kBfloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, op, ": the CUDA kernel takes fp32, bf16 and fp16");
  return Dtype::kHalf;
}

void check_aligned(const char* op, const char* name, const Tensor& t) {
  const int64_t bytes = t.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned &= t.size(i) == 1 || t.stride(i) * bytes % 16 == 0;
  STD_TORCH_CHECK(aligned, op, ": ", name, " must start at a multiple of 16 bytes in every row; clone it");
}

const void* pointer(const char* op, const char* name, const Table& table) {
  if (!table) return nullptr;
  check_aligned(op, name, *table);
  return table->const_data_ptr();
}

AdalnRows rows(const char* op, const char* name, const Table& table) {
  if (!table) return {nullptr, 0, 0};
  return {pointer(op, name, table), table->stride(0), table->stride(1)};
}

Tensor new_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Float);
}

bool tables_as(const Tensor& x, std::initializer_list<const Table*> tables) {
  for (const Table* table : tables) {
    if (*table) return (*table)->scalar_type() == x.scalar_type();
  }
  return true;
}

Tensors3 adaln_forward(const Tensor& x, const Table& scale, const Table& shift, const Table& weight, const Table& bias,
                       bool rms, double eps) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2), F = scale ? scale->size(1) : shift ? shift->size(1) : 1;
  Tensor y = torch::stable::empty_like(x), mean = new_float(x, {B, L}), rstd = new_float(x, {B, L});
  check_aligned("adaln", "x", x);
  const AdalnForward a{x.const_data_ptr(),
                       rows("adaln", "scale", scale),
                       rows("adaln", "shift", shift),
                       pointer("adaln", "weight", weight),
                       pointer("adaln", "bias", bias),
                       y.mutable_data_ptr(),
                       static_cast<float*>(mean.mutable_data_ptr()),
                       static_cast<float*>(rstd.mutable_data_ptr()),
                       B,
                       L,
                       L / F,
                       static_cast<int>(C),
                       static_cast<float>(eps),
                       rms};
  STD_CUDA_CHECK(adaln_fwd(a, dtype_of(x, "adaln"), tables_as(x, {&scale, &shift, &weight, &bias}), current_stream(x)));
  return {y, mean, rstd};
}

Tensors3 adaln_backward(const Tensor& dy, const Tensor& x, const Table& scale, const Table& weight, const Tensor& mean,
                        const Tensor& rstd, int64_t F, bool rms) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2), group = L / F;
  const int64_t tokens = B * L < 16384 ? 16 : 32;  // two waves of 132 SMs; partial sums under 5 % of the traffic
  const int64_t chunks = (group + tokens - 1) / tokens;
  Tensor dx = torch::stable::empty_like(x), dy_xhat = new_float(x, {B, F, chunks, C}), dy_sum = new_float(x, {B, F, chunks, C});
  check_aligned("adaln", "x", x);
  check_aligned("adaln", "dy", dy);
  const AdalnBackward a{dy.const_data_ptr(),
                        x.const_data_ptr(),
                        rows("adaln", "scale", scale),
                        pointer("adaln", "weight", weight),
                        static_cast<const float*>(mean.const_data_ptr()),
                        static_cast<const float*>(rstd.const_data_ptr()),
                        dx.mutable_data_ptr(),
                        static_cast<float*>(dy_xhat.mutable_data_ptr()),
                        static_cast<float*>(dy_sum.mutable_data_ptr()),
                        B,
                        L,
                        group,
                        static_cast<int>(chunks),
                        static_cast<int>(tokens),
                        static_cast<int>(C),
                        rms};
  STD_CUDA_CHECK(adaln_bwd(a, dtype_of(x, "adaln"), tables_as(x, {&scale, &weight}), current_stream(x)));
  const int64_t axis[] = {2};
  return {dx, torch::stable::sum(dy_xhat, {{axis, 1}}), torch::stable::sum(dy_sum, {{axis, 1}})};
}

}  // namespace
}  // namespace dit

STABLE_TORCH_LIBRARY(dit_ops_cuda, m) {
  m.def("adaln_fwd(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, bool rms, float eps)"
        " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor mean, Tensor rstd, int F, bool rms)"
        " -> (Tensor dx, Tensor dy_xhat, Tensor dy_sum)");
}

STABLE_TORCH_LIBRARY_IMPL(dit_ops_cuda, CUDA, m) {
  m.impl("adaln_fwd", TORCH_BOX(&dit::adaln_forward));
  m.impl("adaln_bwd", TORCH_BOX(&dit::adaln_backward));
}
