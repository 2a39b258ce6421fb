// Queries, keys and values of the RoPE and the ProPE path on the CPU: heads [0, N) turned, heads [N, 2N) by the camera:
// P^T q, P^-1 k, P^-1 v. Python has checked them.
#include "qk_norm_rope.h"

namespace dit {

Tensors5 qk_norm_rope_prope_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Table& q_weight, const Table& k_weight,
                                const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w, const Tensor& P,
                                const Tensor& P_inv, int64_t F, int64_t H, int64_t W, double eps, int64_t start_frame) {
  const Rope grid{rope_t, rope_h, rope_w, F, H, W, start_frame};
  const Camera to_query{P, true}, to_key{P_inv, false};
  const auto [q2, q_rstd] = heads_fwd(q, q_weight, grid, true, &to_query, eps, "qk_norm_rope_prope");
  const auto [k2, k_rstd] = heads_fwd(k, k_weight, grid, true, &to_key, eps, "qk_norm_rope_prope");
  const auto [v2, no_rstd] = heads_fwd(v, std::nullopt, grid, false, &to_key, eps, "qk_norm_rope_prope");
  return {q2, k2, v2, q_rstd, k_rstd};
}

Tensors5 qk_norm_rope_prope_bwd(const Tensor& dq2, const Tensor& dk2, const Tensor& dv2, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Table& q_weight, const Table& k_weight, const Tensor& q_rstd,
                                const Tensor& k_rstd, const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w,
                                const Tensor& P, const Tensor& P_inv, int64_t F, int64_t H, int64_t W, int64_t start_frame) {
  const Rope grid{rope_t, rope_h, rope_w, F, H, W, start_frame};
  const Camera to_query{P, true}, to_key{P_inv, false};
  const auto [dq, dq_weight] = heads_bwd(dq2, q, q_weight, q_rstd, grid, true, &to_query, "qk_norm_rope_prope");
  const auto [dk, dk_weight] = heads_bwd(dk2, k, k_weight, k_rstd, grid, true, &to_key, "qk_norm_rope_prope");
  const auto [dv, none] = heads_bwd(dv2, v, std::nullopt, q_rstd, grid, false, &to_key, "qk_norm_rope_prope");
  return {dq, dk, dv, dq_weight, dk_weight};
}

}  // namespace dit
