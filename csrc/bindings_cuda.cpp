// The CUDA launchers as torch ops in dit_ops_cuda: same names and signatures as in kernels/.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "adaln.h"
#include "gated_residual_adaln.h"
#include "sampler_steps.h"

namespace dit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Table = std::optional<Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

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

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Tokens that a block of a backward pass sums: two waves of 132 SMs; the partial sums are under 5 % of the traffic.
int64_t chunk_tokens(int64_t B, int64_t L) { return B * L < 16384 ? 16 : 32; }

Tensor sum_chunks(const Tensor& partial) {
  const int64_t axis[] = {2};
  return torch::stable::sum(partial, {{axis, 1}});
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
  const int64_t tokens = chunk_tokens(B, L), chunks = (group + tokens - 1) / tokens;
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
  return {dx, sum_chunks(dy_xhat), sum_chunks(dy_sum)};
}

Tensors4 gated_residual_adaln_forward(const Tensor& x, const Tensor& y, const Table& gate, const Table& scale,
                                      const Table& shift, const Table& weight, const Table& bias, bool rms, double eps) {
  const char* op = "gated_residual_adaln";
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2);
  const int64_t F = gate ? gate->size(1) : scale ? scale->size(1) : shift ? shift->size(1) : 1;
  Tensor x_new = torch::stable::empty_like(x), h = torch::stable::empty_like(x);
  Tensor mean = new_float(x, {B, L}), rstd = new_float(x, {B, L});
  check_aligned(op, "x", x);
  check_aligned(op, "y", y);
  const AdalnForward norm{x.const_data_ptr(),
                          rows(op, "scale", scale),
                          rows(op, "shift", shift),
                          pointer(op, "weight", weight),
                          pointer(op, "bias", bias),
                          h.mutable_data_ptr(),
                          floats(mean),
                          floats(rstd),
                          B,
                          L,
                          L / F,
                          static_cast<int>(C),
                          static_cast<float>(eps),
                          rms};
  const GatedResidualAdalnForward a{norm, y.const_data_ptr(), rows(op, "gate", gate), x_new.mutable_data_ptr()};
  const bool tables_as_x = tables_as(x, {&gate, &scale, &shift, &weight, &bias});
  STD_CUDA_CHECK(gated_residual_adaln_fwd(a, dtype_of(x, op), tables_as_x, current_stream(x)));
  return {x_new, h, mean, rstd};
}

// Without a gate dy is dx, and the dy and dgate returned are empty.
Tensors5 gated_residual_adaln_backward(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
                                       const Table& gate, const Table& scale, const Table& weight, const Tensor& mean,
                                       const Tensor& rstd, int64_t F, bool rms) {
  const char* op = "gated_residual_adaln";
  torch::stable::accelerator::DeviceGuard guard(x_new.get_device_index());
  const int64_t B = x_new.size(0), L = x_new.size(1), C = x_new.size(2), group = L / F;
  const int64_t tokens = chunk_tokens(B, L), chunks = (group + tokens - 1) / tokens;
  Tensor dx = torch::stable::empty_like(x_new);
  Tensor dh_xhat = new_float(x_new, {B, F, chunks, C}), dh_sum = new_float(x_new, {B, F, chunks, C});
  Tensor dy = gate ? torch::stable::empty_like(x_new) : torch::stable::new_empty(x_new, {0});
  Tensor dgate = gate ? new_float(x_new, {B, F, chunks, C}) : new_float(x_new, {0});
  check_aligned(op, "the gradient of x'", dx_new);
  check_aligned(op, "the gradient of h", dh);
  check_aligned(op, "y", y);
  const AdalnBackward norm{dh.const_data_ptr(),
                           x_new.const_data_ptr(),
                           rows(op, "scale", scale),
                           pointer(op, "weight", weight),
                           static_cast<const float*>(mean.const_data_ptr()),
                           static_cast<const float*>(rstd.const_data_ptr()),
                           dx.mutable_data_ptr(),
                           floats(dh_xhat),
                           floats(dh_sum),
                           B,
                           L,
                           group,
                           static_cast<int>(chunks),
                           static_cast<int>(tokens),
                           static_cast<int>(C),
                           rms};
  const GatedResidualAdalnBackward a{norm,          dx_new.const_data_ptr(), y.const_data_ptr(), rows(op, "gate", gate),
                                     dy.mutable_data_ptr(), floats(dgate)};
  const bool tables_as_x = tables_as(x_new, {&gate, &scale, &weight});
  STD_CUDA_CHECK(gated_residual_adaln_bwd(a, dtype_of(x_new, op), tables_as_x, current_stream(x_new)));
  return {dx, dy, gate ? sum_chunks(dgate) : dgate, sum_chunks(dh_xhat), sum_chunks(dh_sum)};
}

// The finest rows that the tables divide x into, and where the values of one can be accessed by eights.
struct SamplerRows {
  int64_t R, n;
  bool aligned;

  SamplerRows(const Tensor& x, std::initializer_list<const Table*> tables, std::initializer_list<const void*> pointers) {
    R = 1;
    for (const Table* table : tables) R = *table ? std::max(R, (*table)->numel()) : R;
    n = x.numel() / R;
    aligned = n % 8 == 0;
    for (const void* pointer : pointers) aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }

  Sigma sigma(const Table& table, double number) const {
    if (!table) return {nullptr, static_cast<float>(number), 1};
    return {static_cast<const float*>(table->const_data_ptr()), 0.f, static_cast<unsigned>(R / table->numel())};
  }
};

Tensor sampler_step_forward(int64_t step, const Tensor& x, const Tensor& y, const Table& z, const Table& sigma,
                            const Table& sigma_next, double s, double t, double guidance) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::empty_like(x);
  const void* third = z ? z->const_data_ptr() : nullptr;
  const SamplerRows rows(x, {&sigma, &sigma_next}, {x.const_data_ptr(), y.const_data_ptr(), third, out.const_data_ptr()});
  const SamplerForward a{static_cast<SamplerStep>(step),
                         x.const_data_ptr(),
                         y.const_data_ptr(),
                         third,
                         out.mutable_data_ptr(),
                         rows.sigma(sigma, s),
                         rows.sigma(sigma_next, t),
                         static_cast<float>(guidance),
                         static_cast<unsigned>(rows.R),
                         rows.n,
                         rows.aligned};
  const bool as_branch = x.scalar_type() == y.scalar_type();
  STD_CUDA_CHECK(sampler_step_fwd(a, dtype_of(y, "sampler_step"), as_branch, current_stream(x)));
  return out;
}

void sampler_step_backward(int64_t step, int64_t of, const Tensor& dout, Tensor grad, const Table& sigma,
                           const Table& sigma_next, double s, double t, double guidance) {
  torch::stable::accelerator::DeviceGuard guard(dout.get_device_index());
  const SamplerRows rows(dout, {&sigma, &sigma_next}, {dout.const_data_ptr(), grad.const_data_ptr()});
  const SamplerBackward a{static_cast<SamplerStep>(step),
                          "xyz"[of],
                          dout.const_data_ptr(),
                          grad.mutable_data_ptr(),
                          rows.sigma(sigma, s),
                          rows.sigma(sigma_next, t),
                          static_cast<float>(guidance),
                          static_cast<unsigned>(rows.R),
                          rows.n,
                          rows.aligned};
  const bool as_branch = dout.scalar_type() == grad.scalar_type();
  STD_CUDA_CHECK(sampler_step_bwd(a, dtype_of(grad, "sampler_step"), as_branch, current_stream(dout)));
}

}  // namespace
}  // namespace dit

STABLE_TORCH_LIBRARY(dit_ops_cuda, m) {
  m.def("adaln_fwd(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, bool rms, float eps)"
        " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor mean, Tensor rstd, int F, bool rms)"
        " -> (Tensor dx, Tensor dy_xhat, Tensor dy_sum)");
  m.def("gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
        " bool rms, float eps) -> (Tensor x_new, Tensor h, Tensor mean, Tensor rstd)");
  m.def("gated_residual_adaln_bwd(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? gate, Tensor? scale,"
        " Tensor? weight, Tensor mean, Tensor rstd, int F, bool rms)"
        " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dh_xhat, Tensor dh_sum)");
  m.def("sampler_step_fwd(int step, Tensor x, Tensor y, Tensor? z, Tensor? sigma, Tensor? sigma_next, float s, float t,"
        " float guidance) -> Tensor");
  m.def("sampler_step_bwd(int step, int of, Tensor dout, Tensor(a!) grad, Tensor? sigma, Tensor? sigma_next, float s, float t,"
        " float guidance) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_ops_cuda, CUDA, m) {
  m.impl("adaln_fwd", TORCH_BOX(&dit::adaln_forward));
  m.impl("adaln_bwd", TORCH_BOX(&dit::adaln_backward));
  m.impl("gated_residual_adaln_fwd", TORCH_BOX(&dit::gated_residual_adaln_forward));
  m.impl("gated_residual_adaln_bwd", TORCH_BOX(&dit::gated_residual_adaln_backward));
  m.impl("sampler_step_fwd", TORCH_BOX(&dit::sampler_step_forward));
  m.impl("sampler_step_bwd", TORCH_BOX(&dit::sampler_step_backward));
}
