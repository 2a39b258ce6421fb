// Gated residual and the next norm on the CPU, one pass over the tokens:
//   x' = x + gate * y, h = (norm(x') * weight + bias) * (1 + scale) + shift
// x, y [B, L, C]; gate, scale, shift [B, F, C] fp32, token l uses row l / (L / F); weight, bias [C] fp32.
// All contiguous; Python has checked them.
#include <vector>

#include "common/norm_rows.h"
#include "common/tensors_cpu.h"

namespace dit {
namespace {

struct Forward {
  const void *x, *y;
  const float *gate, *scale, *shift, *weight, *bias;
  void *x_new, *h;
  float *mean, *rstd;
  int64_t C, group;
  float eps;
  bool rms;
};

template <typename T>
DIT_INLINE void forward_tokens(const Forward& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  std::vector<float> buffer(3 * C);
  float *row = buffer.data(), *gain = row + C, *offset = gain + C;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = token / a.group * C;
    if (token == begin || token % a.group == 0) {
      fold_modulation(a.weight, a.bias, a.scale ? a.scale + at : nullptr, a.shift ? a.shift + at : nullptr, gain, offset, C);
    }
    const T *x = static_cast<const T*>(a.x) + token * C, *y = static_cast<const T*>(a.y) + token * C;
    residual_row(x, y, a.gate ? a.gate + at : nullptr, row, static_cast<T*>(a.x_new) + token * C, C);
    row_stats(row, C, a.eps, a.rms, a.mean[token], a.rstd[token]);
    norm_row(row, gain, offset, static_cast<T*>(a.h) + token * C, C, a.mean[token], a.rstd[token]);
  }
}

DIT_MULTIVERSION void forward_f32(const Forward& a, int64_t begin, int64_t end) { forward_tokens<float>(a, begin, end); }
DIT_MULTIVERSION void forward_bf16(const Forward& a, int64_t begin, int64_t end) { forward_tokens<bfloat16>(a, begin, end); }

struct Backward {
  const void *dx_new, *dh, *x_new, *y;
  const float *gate, *scale, *weight, *mean, *rstd;
  void *dx, *dy;
  float *dgate, *dh_xhat, *dh_sum;  // one row [C] per chunk
  Chunks cut;
  bool rms;
};

// d = dx' + (gradient of the norm), dx = d, dy = gate * d, dgate = sum of d * y
template <typename T>
DIT_INLINE void backward_chunks(const Backward& a, int64_t begin, int64_t end) {
  const int64_t C = a.cut.C;
  std::vector<float> buffer(5 * C);
  float *wide_x = buffer.data(), *wide_dh = wide_x + C, *d = wide_dh + C, *gain = d + C, *offset = gain + C;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t at = a.cut.row_group(item) * C;
    fold_modulation(a.weight, nullptr, a.scale ? a.scale + at : nullptr, nullptr, gain, offset, C);
    float *dgate = a.gate ? a.dgate + item * C : nullptr, *dh_xhat = a.dh_xhat + item * C, *dh_sum = a.dh_sum + item * C;
    std::fill_n(dh_xhat, C, 0.f);
    std::fill_n(dh_sum, C, 0.f);
    if (dgate) std::fill_n(dgate, C, 0.f);
    for (int64_t token = a.cut.first(item); token < a.cut.last(item); ++token) {
      const float* row = load_row(static_cast<const T*>(a.x_new) + token * C, wide_x, C);
      const float* dh = load_row(static_cast<const T*>(a.dh) + token * C, wide_dh, C);
      norm_row_backward(dh, row, gain, d, dh_xhat, dh_sum, C, a.mean[token], a.rstd[token], a.rms);
      const T* __restrict dx_new = static_cast<const T*>(a.dx_new) + token * C;
      T* __restrict dx = static_cast<T*>(a.dx) + token * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) {
        d[c] += widen(dx_new[c]);
        narrow(d[c], dx[c]);
      }
      if (dgate) {
        gate_row_backward(d, static_cast<const T*>(a.y) + token * C, a.gate + at, static_cast<T*>(a.dy) + token * C, dgate, C);
      }
    }
  }
}

DIT_MULTIVERSION void backward_f32(const Backward& a, int64_t begin, int64_t end) { backward_chunks<float>(a, begin, end); }
DIT_MULTIVERSION void backward_bf16(const Backward& a, int64_t begin, int64_t end) { backward_chunks<bfloat16>(a, begin, end); }

}  // namespace

Tensors4 gated_residual_adaln_fwd(const Tensor& x, const Tensor& y, const Table& gate, const Table& scale, const Table& shift,
                                  const Table& weight, const Table& bias, bool rms, double eps) {
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2);
  const int64_t F = gate ? gate->size(1) : scale ? scale->size(1) : shift ? shift->size(1) : 1;
  Tensor x_new = torch::stable::empty_like(x), h = torch::stable::empty_like(x);
  Tensor mean = new_float(x, {B, L}), rstd = new_float(x, {B, L});
  const Forward a{x.const_data_ptr(),
                  y.const_data_ptr(),
                  float_data(gate),
                  float_data(scale),
                  float_data(shift),
                  float_data(weight),
                  float_data(bias),
                  x_new.mutable_data_ptr(),
                  h.mutable_data_ptr(),
                  mutable_data<float>(mean),
                  mutable_data<float>(rstd),
                  C,
                  L / F,
                  static_cast<float>(eps),
                  rms};
  const auto run = is_bfloat16(x, "gated_residual_adaln") ? forward_bf16 : forward_f32;
  over_items(B * L, C, [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {x_new, h, mean, rstd};
}

// Without a gate dy is dx, and the dy and dgate returned are empty.
Tensors5 gated_residual_adaln_bwd(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
                                  const Table& gate, const Table& scale, const Table& weight, const Tensor& mean,
                                  const Tensor& rstd, int64_t F, bool rms) {
  const Chunks cut(x_new, F);
  Tensor dx = torch::stable::empty_like(x_new), dh_xhat = cut.new_partial(x_new), dh_sum = cut.new_partial(x_new);
  Tensor dy = gate ? torch::stable::empty_like(x_new) : torch::stable::new_empty(x_new, {0});
  Tensor dgate = gate ? cut.new_partial(x_new) : new_float(x_new, {0});
  const Backward a{dx_new.const_data_ptr(),
                   dh.const_data_ptr(),
                   x_new.const_data_ptr(),
                   y.const_data_ptr(),
                   float_data(gate),
                   float_data(scale),
                   float_data(weight),
                   data<float>(mean),
                   data<float>(rstd),
                   dx.mutable_data_ptr(),
                   dy.mutable_data_ptr(),
                   mutable_data<float>(dgate),
                   mutable_data<float>(dh_xhat),
                   mutable_data<float>(dh_sum),
                   cut,
                   rms};
  const auto run = is_bfloat16(x_new, "gated_residual_adaln") ? backward_bf16 : backward_f32;
  over_items(cut.items(), cut.elements(), [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {dx, dy, gate ? sum_chunks(dgate, cut) : dgate, sum_chunks(dh_xhat, cut), sum_chunks(dh_sum, cut)};
}

}  // namespace dit
