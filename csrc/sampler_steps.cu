// Launches of the sampler steps: picks the kernel by dtypes and alignment.
#include "common/dispatch.cuh"
#include "sampler_steps.cuh"

namespace dit {
namespace {

template <typename T, typename TX, int N>
void launch(const SamplerForward& a, cudaStream_t stream) {
  sampler_step_fwd_kernel<T, TX, N><<<a.R * sampler_blocks(a.n, N), kSamplerThreads, 0, stream>>>(a);
}

template <typename T, typename TX, int N>
void launch(const SamplerBackward& a, cudaStream_t stream) {
  sampler_step_bwd_kernel<T, TX, N><<<a.R * sampler_blocks(a.n, N), kSamplerThreads, 0, stream>>>(a);
}

template <typename Arguments>
cudaError_t launch_as(const Arguments& a, Dtype branch, bool x_as_branch, cudaStream_t stream) {
  return with_types(branch, x_as_branch, [&](auto* y, auto* x) {
    using T = std::remove_pointer_t<decltype(y)>;
    using TX = std::remove_pointer_t<decltype(x)>;
    a.aligned ? launch<T, TX, 8>(a, stream) : launch<T, TX, 1>(a, stream);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t sampler_step_fwd(const SamplerForward& a, Dtype branch, bool x_as_branch, cudaStream_t stream) {
  return launch_as(a, branch, x_as_branch, stream);
}

cudaError_t sampler_step_bwd(const SamplerBackward& a, Dtype branch, bool dout_as_branch, cudaStream_t stream) {
  return launch_as(a, branch, dout_as_branch, stream);
}

}  // namespace dit
