// RMS norm and 3D RoPE of queries and keys on the CPU; the rows serve qk_norm_rope_prope as well. Python has checked them.
#include "qk_norm_rope.h"

#include <algorithm>
#include <vector>

#include "common/norm_rows.h"
#include "common/project_rows.h"

namespace dit {
namespace {

struct Rows {
  const void* x;
  int64_t stride_b, stride_l;
  const float *weight, *rope[3], *M;  // weight null: no norm; M null: no projection
  bool rotate;  // an axis may have no channels, and then a null table
  bool transpose;
  const void* dout;      // backward only
  void* out;             // forward: [B, L, paths * N, D]    backward: dx [B, L, N, D]
  int64_t out_b, out_l;  // strides, forward only
  float* rstd;           // [B, L, C / span]
  float* dweight;        // backward only: one row [span] per chunk
  int64_t tokens, L, C, D, span, axis[3], F, H, W, start_frame;
  float eps;

  int64_t position(int64_t token) const { return token % L % (F * H * W); }
  int64_t frame(int64_t token) const { return position(token) / (H * W); }
  int64_t paths() const { return M ? 2 : 1; }
};

// (cos, sin) of every pair of the head at the token's frame, row and column.
DIT_INLINE void angles_of(const Rows& a, int64_t token, float* angles) {
  const int64_t at = a.position(token), w = at % a.W, h = at / a.W % a.H, f = at / (a.W * a.H) + a.start_frame;
  const int64_t places[3] = {f, h, w};
  for (int i = 0; i < 3; ++i) angles = std::copy_n(a.rope[i] + places[i] * 2 * a.axis[i], 2 * a.axis[i], angles);
}

// sign = 1 turns by the angles, sign = -1 turns back; adds to out.
DIT_INLINE void turn_heads(const float* __restrict n, const float* __restrict angles, float sign, float* __restrict out,
                           int64_t C, int64_t D) {
  for (int64_t head = 0; head < C; head += D) {
#pragma omp simd
    for (int64_t c = 0; c < D; c += 2) {
      const float a = n[head + c], b = n[head + c + 1], cosine = angles[c], sine = sign * angles[c + 1];
      out[head + c] += a * cosine - b * sine;
      out[head + c + 1] += a * sine + b * cosine;
    }
  }
}

template <typename T>
DIT_INLINE void forward_tokens(const Rows& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(3 * a.C + a.D);
  float *wide = buffer.data(), *normed = wide + a.C, *out = normed + a.C, *angles = out + a.C;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(a.x) + token / a.L * a.stride_b + token % a.L * a.stride_l;
    T* to = static_cast<T*>(a.out) + token / a.L * a.out_b + token % a.L * a.out_l;
    const float* n = load_row(x, wide, a.C);
    if (a.weight) {
      for (int64_t c = 0; c < a.C; c += a.span) {
        float mean, rstd;
        row_stats(n + c, a.span, a.eps, true, mean, rstd);
        a.rstd[(token * a.C + c) / a.span] = rstd;
#pragma omp simd
        for (int64_t i = 0; i < a.span; ++i) normed[c + i] = n[c + i] * rstd * a.weight[i];
      }
      n = normed;
    }
    if (a.rotate) {
      angles_of(a, token, angles);
      std::fill_n(out, a.C, 0.f);
      turn_heads(n, angles, 1.f, out, a.C, a.D);
      store_row(out, to, a.C);
    } else {
      store_row(n, to, a.C);
    }
    if (a.M) {
      std::fill_n(out, a.C, 0.f);
      project_heads(n, a.M + (token / a.L * a.F + a.frame(token)) * 16, a.transpose, out, a.C);
      store_row(out, to + a.C, a.C);
    }
  }
}

DIT_MULTIVERSION void forward_f32(const Rows& a, int64_t begin, int64_t end) { forward_tokens<float>(a, begin, end); }
DIT_MULTIVERSION void forward_bf16(const Rows& a, int64_t begin, int64_t end) { forward_tokens<bfloat16>(a, begin, end); }

// dn = (turned back) d_rope + M^T d_prope, g = dn * weight, dx = rstd * (g - xhat * mean(g * xhat)), dweight = sum of dn * xhat
template <typename T>
DIT_INLINE void backward_chunks(const Rows& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(4 * a.C + a.D);
  float *wide_x = buffer.data(), *wide_d = wide_x + a.C, *dn = wide_d + a.C, *dx = dn + a.C, *angles = dx + a.C;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* dweight = a.weight ? a.dweight + chunk * a.span : nullptr;
    if (dweight) std::fill_n(dweight, a.span, 0.f);
    for (int64_t token = chunk * kChunk; token < std::min((chunk + 1) * kChunk, a.tokens); ++token) {
      const T* dout = static_cast<const T*>(a.dout) + token * a.paths() * a.C;
      T* to = static_cast<T*>(a.out) + token * a.C;
      const float* d = load_row(dout, wide_d, a.C);
      if (a.rotate) {
        angles_of(a, token, angles);
        std::fill_n(dn, a.C, 0.f);
        turn_heads(d, angles, -1.f, dn, a.C, a.D);
      } else {
        std::copy_n(d, a.C, dn);
      }
      if (a.M) {
        d = load_row(dout + a.C, wide_d, a.C);
        project_heads(d, a.M + (token / a.L * a.F + a.frame(token)) * 16, !a.transpose, dn, a.C);
      }
      if (!a.weight) {
        store_row(dn, to, a.C);
        continue;
      }
      const float* x = load_row(static_cast<const T*>(a.x) + token / a.L * a.stride_b + token % a.L * a.stride_l, wide_x, a.C);
      for (int64_t c = 0; c < a.C; c += a.span) {
        const float rstd = a.rstd[(token * a.C + c) / a.span];
        float g_xhat = 0;
#pragma omp simd reduction(+ : g_xhat)
        for (int64_t i = 0; i < a.span; ++i) {
          const float product = dn[c + i] * x[c + i] * rstd;
          dweight[i] += product;
          g_xhat += product * a.weight[i];
        }
        const float share = g_xhat / static_cast<float>(a.span);
#pragma omp simd
        for (int64_t i = 0; i < a.span; ++i) dx[c + i] = rstd * (dn[c + i] * a.weight[i] - x[c + i] * rstd * share);
      }
      store_row(dx, to, a.C);
    }
  }
}

DIT_MULTIVERSION void backward_f32(const Rows& a, int64_t begin, int64_t end) { backward_chunks<float>(a, begin, end); }
DIT_MULTIVERSION void backward_bf16(const Rows& a, int64_t begin, int64_t end) { backward_chunks<bfloat16>(a, begin, end); }

Rows rows_of(const Tensor& x, const Table& weight, const Rope& grid, bool rotate, const Camera* camera) {
  Rows a{};
  a.x = x.const_data_ptr();
  a.stride_b = x.stride(0);
  a.stride_l = x.stride(1);
  a.weight = float_data(weight);
  const Tensor* tables[3] = {&grid.frame, &grid.height, &grid.width};
  for (int i = 0; i < 3; ++i) {
    a.rope[i] = rotate ? data<float>(*tables[i]) : nullptr;
    a.axis[i] = tables[i]->size(1);
  }
  a.rotate = rotate;
  a.M = camera ? data<float>(camera->M) : nullptr;
  a.transpose = camera && camera->transpose;
  a.L = x.size(1);
  a.tokens = x.size(0) * a.L;
  a.D = x.size(3);
  a.C = x.size(2) * a.D;
  a.span = weight ? weight->size(0) : a.C;
  a.F = grid.F;
  a.H = grid.H;
  a.W = grid.W;
  a.start_frame = grid.start_frame;
  return a;
}

}  // namespace

Tensors2 heads_fwd(const Tensor& x, const Table& weight, const Rope& grid, bool rotate, const Camera* camera, double eps,
                   const char* op, const Tensor* into) {
  Rows a = rows_of(x, weight, grid, rotate, camera);
  Tensor out = into ? *into : torch::stable::new_empty(x, {x.size(0), a.L, a.paths() * x.size(2), a.D});
  Tensor rstd = new_float(x, {x.size(0), a.L, weight ? a.C / a.span : 0});
  a.out = out.mutable_data_ptr();
  a.out_b = out.stride(0);
  a.out_l = out.stride(1);
  a.rstd = mutable_data<float>(rstd);
  a.eps = static_cast<float>(eps);
  const auto run = is_bfloat16(x, op) ? forward_bf16 : forward_f32;
  over_items(a.tokens, 2 * a.C, [=](int64_t begin, int64_t end) { run(a, begin, end); });
  return {out, rstd};
}

Tensors2 heads_bwd(const Tensor& dout, const Tensor& x, const Table& weight, const Tensor& rstd, const Rope& grid, bool rotate,
                   const Camera* camera, const char* op) {
  Rows a = rows_of(x, weight, grid, rotate, camera);
  const int64_t chunks = (a.tokens + kChunk - 1) / kChunk;
  Tensor dx = torch::stable::new_empty(x, {x.size(0), a.L, x.size(2), a.D});
  Tensor partial = new_float(x, {chunks, weight ? a.span : 0});
  a.dout = dout.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.rstd = mutable_data<float>(rstd);
  a.dweight = mutable_data<float>(partial);
  const auto run = is_bfloat16(x, op) ? backward_bf16 : backward_f32;
  over_items(chunks, std::min(a.tokens, kChunk) * a.C, [=](int64_t begin, int64_t end) { run(a, begin, end); });
  const int64_t axis[] = {0};
  return {dx, torch::stable::sum(partial, {{axis, 1}})};
}

Tensors4 qk_norm_rope_fwd(const Tensor& q, const Tensor& k, const Table& q_weight, const Table& k_weight, const Tensor& rope_t,
                          const Tensor& rope_h, const Tensor& rope_w, int64_t F, int64_t H, int64_t W, double eps,
                          int64_t start_frame) {
  const Rope grid{rope_t, rope_h, rope_w, F, H, W, start_frame};
  const auto [q_out, q_rstd] = heads_fwd(q, q_weight, grid, true, nullptr, eps, "qk_norm_rope");
  const auto [k_out, k_rstd] = heads_fwd(k, k_weight, grid, true, nullptr, eps, "qk_norm_rope");
  return {q_out, k_out, q_rstd, k_rstd};
}

Tensor qk_norm_rope_into_fwd(const Table& q, const Tensor& k, const Table& v, const Table& q_weight, const Table& k_weight,
                             const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w, const Table& P,
                             const Table& P_inv, const Tensor& k_out, const Table& v_out, int64_t F, int64_t H, int64_t W,
                             double eps, int64_t start_frame, bool turn_keys) {
  const char* op = "qk_norm_rope_into";
  const Rope grid{rope_t, rope_h, rope_w, F, H, W, start_frame};
  std::optional<Camera> to_query, to_key;
  if (P) to_query = Camera{*P, true};
  if (P_inv && turn_keys) to_key = Camera{*P_inv, false};
  const Camera* key = to_key ? &*to_key : nullptr;
  heads_fwd(k, k_weight, grid, turn_keys, key, eps, op, &k_out);
  if (v) heads_fwd(*v, std::nullopt, grid, false, key, eps, op, &*v_out);
  if (!q) return torch::stable::new_empty(k, {0});
  return std::get<0>(heads_fwd(*q, q_weight, grid, true, to_query ? &*to_query : nullptr, eps, op));
}

Tensors4 qk_norm_rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k, const Table& q_weight,
                          const Table& k_weight, const Tensor& q_rstd, const Tensor& k_rstd, const Tensor& rope_t,
                          const Tensor& rope_h, const Tensor& rope_w, int64_t F, int64_t H, int64_t W, int64_t start_frame) {
  const Rope grid{rope_t, rope_h, rope_w, F, H, W, start_frame};
  const auto [dq, dq_weight] = heads_bwd(dq_out, q, q_weight, q_rstd, grid, true, nullptr, "qk_norm_rope");
  const auto [dk, dk_weight] = heads_bwd(dk_out, k, k_weight, k_rstd, grid, true, nullptr, "qk_norm_rope");
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace dit
