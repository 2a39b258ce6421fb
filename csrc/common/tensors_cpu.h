// Between stable-ABI tensors and raw pointers, and how the rows of a tensor are shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu.h"

namespace dit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Table = std::optional<Tensor>;  // modulation rows [B, F, C] or affine [C] in fp32, or absent
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline const float* float_data(const Table& tensor) { return tensor ? data<float>(*tensor) : nullptr; }

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, ScalarType::Float);
}

inline bool is_bfloat16(const Tensor& x, const char* op) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || x.scalar_type() == ScalarType::Float, op, ": the CPU kernel takes fp32 and bf16");
  return half;
}

// Tokens that a backward pass sums before a second pass adds the sums up: fixed, so that the bits do not depend on threads.
constexpr int64_t kChunk = 64;

// Runs f(begin, end) over items of `elements` values each, with at least 32768 values to a thread.
template <typename F>
void over_items(int64_t items, int64_t elements, const F& f) {
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements)), f);
}

// How a backward pass cuts L tokens: F groups share a modulation row each, and a group falls into chunks of kChunk.
struct Chunks {
  int64_t B, groups, group, chunks, C;  // groups = B * F, group = L / F tokens

  Chunks(const Tensor& x, int64_t F)
      : B(x.size(0)), groups(B * F), group(x.size(1) / F), chunks((group + kChunk - 1) / kChunk), C(x.size(2)) {}
  int64_t items() const { return groups * chunks; }
  int64_t elements() const { return std::min(group, kChunk) * C; }
  int64_t row_group(int64_t item) const { return item / chunks; }
  int64_t first(int64_t item) const { return row_group(item) * group + item % chunks * kChunk; }
  int64_t last(int64_t item) const { return std::min(first(item) + kChunk, (row_group(item) + 1) * group); }
  Tensor new_partial(const Tensor& like) const { return new_float(like, {groups, chunks, C}); }
};

// partial sums [B * F, chunks, C] -> [B, F, C], added in the order of the chunks
inline Tensor sum_chunks(const Tensor& partial, const Chunks& cut) {
  const int64_t F = cut.groups / cut.B;
  if (cut.chunks == 1) return torch::stable::view(partial, {cut.B, F, cut.C});
  Tensor sums = new_float(partial, {cut.B, F, cut.C});
  const float* rows = data<float>(partial);
  float* out = mutable_data<float>(sums);
  over_items(cut.groups, cut.chunks * cut.C, [=](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      std::copy_n(rows + g * cut.chunks * cut.C, cut.C, out + g * cut.C);
      for (int64_t n = 1; n < cut.chunks; ++n) {
        for (int64_t c = 0; c < cut.C; ++c) out[g * cut.C + c] += rows[(g * cut.chunks + n) * cut.C + c];
      }
    }
  });
  return sums;
}

}  // namespace dit
