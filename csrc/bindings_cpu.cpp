// The CPU launchers as torch ops in dit_ops_cpu: same names and signatures as in kernels/. Schemas of the public ops, fakes and
// autograd live in Python (dit_ops/ops). No `str` arguments: torch 2.13's stable conversion of std::string leaks.
#include <torch/csrc/stable/library.h>

#include "common/tensors_cpu.h"

namespace dit {

Tensors3 adaln_fwd(const Tensor& x, const Table& scale, const Table& shift, const Table& weight, const Table& bias, bool rms,
                   double eps);
Tensors3 adaln_bwd(const Tensor& dy, const Tensor& x, const Table& scale, const Table& weight, const Tensor& mean,
                   const Tensor& rstd, int64_t F, bool rms);
Tensor gated_residual_fwd(const Tensor& x, const Tensor& y, const Tensor& gate);
Tensors2 gated_residual_bwd(const Tensor& dout, const Tensor& y, const Tensor& gate);
Tensors4 gated_residual_adaln_fwd(const Tensor& x, const Tensor& y, const Table& gate, const Table& scale, const Table& shift,
                                  const Table& weight, const Table& bias, bool rms, double eps);
Tensors5 gated_residual_adaln_bwd(const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
                                  const Table& gate, const Table& scale, const Table& weight, const Tensor& mean,
                                  const Tensor& rstd, int64_t F, bool rms);
Tensors4 qk_norm_rope_fwd(const Tensor& q, const Tensor& k, const Table& q_weight, const Table& k_weight, const Tensor& rope_t,
                          const Tensor& rope_h, const Tensor& rope_w, int64_t F, int64_t H, int64_t W, double eps,
                          int64_t start_frame);
Tensor qk_norm_rope_into_fwd(const Table& q, const Tensor& k, const Table& v, const Table& q_weight, const Table& k_weight,
                             const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w, const Table& P,
                             const Table& P_inv, const Tensor& k_out, const Table& v_out, int64_t F, int64_t H, int64_t W,
                             double eps, int64_t start_frame, bool turn_keys);
Tensors4 qk_norm_rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k, const Table& q_weight,
                          const Table& k_weight, const Tensor& q_rstd, const Tensor& k_rstd, const Tensor& rope_t,
                          const Tensor& rope_h, const Tensor& rope_w, int64_t F, int64_t H, int64_t W, int64_t start_frame);
Tensors5 qk_norm_rope_prope_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Table& q_weight, const Table& k_weight,
                                const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w, const Tensor& P,
                                const Tensor& P_inv, int64_t F, int64_t H, int64_t W, double eps, int64_t start_frame);
Tensors5 qk_norm_rope_prope_bwd(const Tensor& dq2, const Tensor& dk2, const Tensor& dv2, const Tensor& q, const Tensor& k,
                                const Tensor& v, const Table& q_weight, const Table& k_weight, const Tensor& q_rstd,
                                const Tensor& k_rstd, const Tensor& rope_t, const Tensor& rope_h, const Tensor& rope_w,
                                const Tensor& P, const Tensor& P_inv, int64_t F, int64_t H, int64_t W, int64_t start_frame);
Tensor prope_output_fwd(const Tensor& o, const Tensor& P, int64_t halves);

}  // namespace dit

STABLE_TORCH_LIBRARY(dit_ops_cpu, m) {
  m.def("adaln_fwd(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, bool rms, float eps)"
        " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor mean, Tensor rstd, int F, bool rms)"
        " -> (Tensor dx, Tensor dy_xhat, Tensor dy_sum)");
  m.def("gated_residual_fwd(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gated_residual_bwd(Tensor dout, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)");
  m.def("gated_residual_adaln_fwd(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias,"
        " bool rms, float eps) -> (Tensor x_new, Tensor h, Tensor mean, Tensor rstd)");
  m.def("gated_residual_adaln_bwd(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor? gate, Tensor? scale,"
        " Tensor? weight, Tensor mean, Tensor rstd, int F, bool rms)"
        " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dh_xhat, Tensor dh_sum)");
  m.def("qk_norm_rope_fwd(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h, Tensor rope_w,"
        " int F, int H, int W, float eps, int start_frame) -> (Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)");
  m.def("qk_norm_rope_into_fwd(Tensor? q, Tensor k, Tensor? v, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h,"
        " Tensor rope_w, Tensor? P, Tensor? P_inv, Tensor(a!) k_out, Tensor(b!)? v_out, int F, int H, int W, float eps,"
        " int start_frame, bool turn_keys) -> Tensor q_out");
  m.def("qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor q_rstd,"
        " Tensor k_rstd, Tensor rope_t, Tensor rope_h, Tensor rope_w, int F, int H, int W, int start_frame)"
        " -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)");
  m.def("qk_norm_rope_prope_fwd(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h,"
        " Tensor rope_w, Tensor P, Tensor P_inv, int F, int H, int W, float eps, int start_frame)"
        " -> (Tensor q2, Tensor k2, Tensor v2, Tensor q_rstd, Tensor k_rstd)");
  m.def("qk_norm_rope_prope_bwd(Tensor dq2, Tensor dk2, Tensor dv2, Tensor q, Tensor k, Tensor v, Tensor? q_weight,"
        " Tensor? k_weight, Tensor q_rstd, Tensor k_rstd, Tensor rope_t, Tensor rope_h, Tensor rope_w, Tensor P, Tensor P_inv,"
        " int F, int H, int W, int start_frame) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, Tensor dk_weight)");
  m.def("prope_output_fwd(Tensor o, Tensor P, int halves) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dit_ops_cpu, CPU, m) {
  m.impl("adaln_fwd", TORCH_BOX(&dit::adaln_fwd));
  m.impl("adaln_bwd", TORCH_BOX(&dit::adaln_bwd));
  m.impl("gated_residual_fwd", TORCH_BOX(&dit::gated_residual_fwd));
  m.impl("gated_residual_bwd", TORCH_BOX(&dit::gated_residual_bwd));
  m.impl("gated_residual_adaln_fwd", TORCH_BOX(&dit::gated_residual_adaln_fwd));
  m.impl("gated_residual_adaln_bwd", TORCH_BOX(&dit::gated_residual_adaln_bwd));
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&dit::qk_norm_rope_fwd));
  m.impl("qk_norm_rope_into_fwd", TORCH_BOX(&dit::qk_norm_rope_into_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&dit::qk_norm_rope_bwd));
  m.impl("qk_norm_rope_prope_fwd", TORCH_BOX(&dit::qk_norm_rope_prope_fwd));
  m.impl("qk_norm_rope_prope_bwd", TORCH_BOX(&dit::qk_norm_rope_prope_bwd));
  m.impl("prope_output_fwd", TORCH_BOX(&dit::prope_output_fwd));
}
