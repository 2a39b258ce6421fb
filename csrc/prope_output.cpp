// P o in groups of 4 channels on the CPU; the backward is the same with P^T.
// o [B, L, N, D] with unit strides inside a token; P [B, F, 4, 4] fp32, contiguous. Python has checked them.
#include <algorithm>
#include <vector>

#include "common/norm_rows.h"
#include "common/project_rows.h"
#include "common/tensors_cpu.h"

namespace dit {
namespace {

struct Tokens {
  const void* o;
  int64_t stride_b, stride_l;
  const float* P;
  void* out;
  int64_t L, F, S, C;  // L = halves * F * S
};

template <typename T>
DIT_INLINE void forward_tokens(const Tokens& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(2 * a.C);
  float *wide = buffer.data(), *sum = wide + a.C;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.L, l = token % a.L;
    const float* o = load_row(static_cast<const T*>(a.o) + b * a.stride_b + l * a.stride_l, wide, a.C);
    std::fill_n(sum, a.C, 0.f);
    project_heads(o, a.P + (b * a.F + l / a.S % a.F) * 16, false, sum, a.C);
    store_row(sum, static_cast<T*>(a.out) + token * a.C, a.C);
  }
}

DIT_MULTIVERSION void forward_f32(const Tokens& a, int64_t begin, int64_t end) { forward_tokens<float>(a, begin, end); }
DIT_MULTIVERSION void forward_bf16(const Tokens& a, int64_t begin, int64_t end) { forward_tokens<bfloat16>(a, begin, end); }

}  // namespace

Tensor prope_output_fwd(const Tensor& o, const Tensor& P, int64_t halves) {
  const int64_t B = o.size(0), L = o.size(1), N = o.size(2), D = o.size(3), F = P.size(1);
  Tensor out = torch::stable::new_empty(o, {B, L, N, D});
  const Tokens a{o.const_data_ptr(), o.stride(0), o.stride(1), data<float>(P), out.mutable_data_ptr(),
                 L,                  F,           L / (halves * F), N * D};
  const auto run = is_bfloat16(o, "prope_output") ? forward_bf16 : forward_f32;
  over_items(B * L, a.C, [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

}  // namespace dit
