// Gated residual on the CPU: out = x + gate * y.
// x, y [B, L, C]; gate [B, F, C] fp32, token l uses row l / (L / F). All contiguous; Python has checked them.
#include <vector>

#include "common/norm_rows.h"
#include "common/tensors_cpu.h"

namespace dit {
namespace {

struct Forward {
  const void *x, *y;
  const float* gate;
  void* out;
  int64_t C, group;
};

template <typename T>
DIT_INLINE void forward_tokens(const Forward& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T *x = static_cast<const T*>(a.x) + token * a.C, *y = static_cast<const T*>(a.y) + token * a.C;
    const float* gate = a.gate + token / a.group * a.C;
    T* __restrict out = static_cast<T*>(a.out) + token * a.C;
#pragma omp simd
    for (int64_t c = 0; c < a.C; ++c) narrow(widen(x[c]) + gate[c] * widen(y[c]), out[c]);
  }
}

DIT_MULTIVERSION void forward_f32(const Forward& a, int64_t begin, int64_t end) { forward_tokens<float>(a, begin, end); }
DIT_MULTIVERSION void forward_bf16(const Forward& a, int64_t begin, int64_t end) { forward_tokens<bfloat16>(a, begin, end); }

struct Backward {
  const void *dout, *y;
  const float* gate;
  void* dy;
  float* dgate;  // one row [C] per chunk
  Chunks cut;
};

template <typename T>
DIT_INLINE void backward_chunks(const Backward& a, int64_t begin, int64_t end) {
  const int64_t C = a.cut.C;
  std::vector<float> wide(C);
  for (int64_t item = begin; item < end; ++item) {
    float* dgate = a.dgate + item * C;
    std::fill_n(dgate, C, 0.f);
    for (int64_t token = a.cut.first(item); token < a.cut.last(item); ++token) {
      const float* dout = load_row(static_cast<const T*>(a.dout) + token * C, wide.data(), C);
      gate_row_backward(dout, static_cast<const T*>(a.y) + token * C, a.gate + a.cut.row_group(item) * C,
                        static_cast<T*>(a.dy) + token * C, dgate, C);
    }
  }
}

DIT_MULTIVERSION void backward_f32(const Backward& a, int64_t begin, int64_t end) { backward_chunks<float>(a, begin, end); }
DIT_MULTIVERSION void backward_bf16(const Backward& a, int64_t begin, int64_t end) { backward_chunks<bfloat16>(a, begin, end); }

}  // namespace

Tensor gated_residual_fwd(const Tensor& x, const Tensor& y, const Tensor& gate) {
  Tensor out = torch::stable::empty_like(x);
  const Forward a{x.const_data_ptr(),     y.const_data_ptr(), data<float>(gate),
                  out.mutable_data_ptr(), x.size(2),          x.size(1) / gate.size(1)};
  const auto run = is_bfloat16(x, "gated_residual") ? forward_bf16 : forward_f32;
  over_items(x.size(0) * x.size(1), x.size(2), [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

Tensors2 gated_residual_bwd(const Tensor& dout, const Tensor& y, const Tensor& gate) {
  const Chunks cut(y, gate.size(1));
  Tensor dy = torch::stable::empty_like(y), dgate = cut.new_partial(y);
  const Backward a{dout.const_data_ptr(), y.const_data_ptr(),         data<float>(gate),
                   dy.mutable_data_ptr(), mutable_data<float>(dgate), cut};
  const auto run = is_bfloat16(y, "gated_residual") ? backward_bf16 : backward_f32;
  over_items(cut.items(), cut.elements(), [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {dy, sum_chunks(dgate, cut)};
}

}  // namespace dit
