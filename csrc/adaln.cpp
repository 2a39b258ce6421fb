// adaLN on the CPU: y = (norm(x) * weight + bias) * (1 + scale) + shift.
// x [B, L, C]; scale, shift [B, F, C] fp32, token l uses row l / (L / F); weight, bias [C] fp32.
// All contiguous; Python has checked them.
#include <vector>

#include "common/norm_rows.h"
#include "common/tensors_cpu.h"

namespace dit {
namespace {

struct Forward {
  const void* x;
  const float *scale, *shift, *weight, *bias;
  void* y;
  float *mean, *rstd;
  int64_t C, group;  // group = L / F tokens share one modulation row
  float eps;
  bool rms;
};

template <typename T>
DIT_INLINE void forward_tokens(const Forward& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(3 * a.C);
  float *wide = buffer.data(), *gain = wide + a.C, *offset = gain + a.C;
  for (int64_t token = begin; token < end; ++token) {
    if (token == begin || token % a.group == 0) {
      const int64_t at = token / a.group * a.C;
      fold_modulation(a.weight, a.bias, a.scale ? a.scale + at : nullptr, a.shift ? a.shift + at : nullptr, gain, offset, a.C);
    }
    const float* row = load_row(static_cast<const T*>(a.x) + token * a.C, wide, a.C);
    row_stats(row, a.C, a.eps, a.rms, a.mean[token], a.rstd[token]);
    norm_row(row, gain, offset, static_cast<T*>(a.y) + token * a.C, a.C, a.mean[token], a.rstd[token]);
  }
}

DIT_MULTIVERSION void forward_f32(const Forward& a, int64_t begin, int64_t end) { forward_tokens<float>(a, begin, end); }
DIT_MULTIVERSION void forward_bf16(const Forward& a, int64_t begin, int64_t end) { forward_tokens<bfloat16>(a, begin, end); }

struct Backward {
  const void *dy, *x;
  const float *scale, *weight, *mean, *rstd;
  void* dx;
  float *dy_xhat, *dy_sum;  // one row [C] per chunk
  Chunks cut;
  bool rms;
};

template <typename T>
DIT_INLINE void backward_chunks(const Backward& a, int64_t begin, int64_t end) {
  const int64_t C = a.cut.C;
  std::vector<float> buffer(5 * C);
  float *wide_x = buffer.data(), *wide_dy = wide_x + C, *dx = wide_dy + C, *gain = dx + C, *offset = gain + C;
  for (int64_t item = begin; item < end; ++item) {
    fold_modulation(a.weight, nullptr, a.scale ? a.scale + a.cut.row_group(item) * C : nullptr, nullptr, gain, offset, C);
    float *dy_xhat = a.dy_xhat + item * C, *dy_sum = a.dy_sum + item * C;
    std::fill_n(dy_xhat, C, 0.f);
    std::fill_n(dy_sum, C, 0.f);
    for (int64_t token = a.cut.first(item); token < a.cut.last(item); ++token) {
      const float* row = load_row(static_cast<const T*>(a.x) + token * C, wide_x, C);
      const float* dy = load_row(static_cast<const T*>(a.dy) + token * C, wide_dy, C);
      norm_row_backward(dy, row, gain, dx, dy_xhat, dy_sum, C, a.mean[token], a.rstd[token], a.rms);
      store_row(dx, static_cast<T*>(a.dx) + token * C, C);
    }
  }
}

DIT_MULTIVERSION void backward_f32(const Backward& a, int64_t begin, int64_t end) { backward_chunks<float>(a, begin, end); }
DIT_MULTIVERSION void backward_bf16(const Backward& a, int64_t begin, int64_t end) { backward_chunks<bfloat16>(a, begin, end); }

}  // namespace

Tensors3 adaln_fwd(const Tensor& x, const Table& scale, const Table& shift, const Table& weight, const Table& bias, bool rms,
                   double eps) {
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2), F = scale ? scale->size(1) : shift ? shift->size(1) : 1;
  Tensor y = torch::stable::empty_like(x), mean = new_float(x, {B, L}), rstd = new_float(x, {B, L});
  const Forward a{x.const_data_ptr(),
                  float_data(scale),
                  float_data(shift),
                  float_data(weight),
                  float_data(bias),
                  y.mutable_data_ptr(),
                  mutable_data<float>(mean),
                  mutable_data<float>(rstd),
                  C,
                  L / F,
                  static_cast<float>(eps),
                  rms};
  const auto run = is_bfloat16(x, "adaln") ? forward_bf16 : forward_f32;
  over_items(B * L, C, [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {y, mean, rstd};
}

Tensors3 adaln_bwd(const Tensor& dy, const Tensor& x, const Table& scale, const Table& weight, const Tensor& mean,
                   const Tensor& rstd, int64_t F, bool rms) {
  const Chunks cut(x, F);
  Tensor dx = torch::stable::empty_like(x), dy_xhat = cut.new_partial(x), dy_sum = cut.new_partial(x);
  const Backward a{dy.const_data_ptr(),
                   x.const_data_ptr(),
                   float_data(scale),
                   float_data(weight),
                   data<float>(mean),
                   data<float>(rstd),
                   dx.mutable_data_ptr(),
                   mutable_data<float>(dy_xhat),
                   mutable_data<float>(dy_sum),
                   cut,
                   rms};
  const auto run = is_bfloat16(x, "adaln") ? backward_bf16 : backward_f32;
  over_items(cut.items(), cut.elements(), [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {dx, sum_chunks(dy_xhat, cut), sum_chunks(dy_sum, cut)};
}

}  // namespace dit
