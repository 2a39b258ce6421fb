// The device code of csrc/ as host code, for machines without a GPU: what is of CUDA in it has a stand-in here.
// A block has one thread, which holds a whole row: sums over a block are its own sum, and barriers do nothing. So formulas,
// tables, strides, chunks and roundings are executed, and only how threads share a row is not.
#include <algorithm>
#include <cmath>
#include <cstdint>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads)

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x, y;
};
using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
};
using cudaError_t = int;
using cudaStream_t = void*;
using std::min;

static Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() {}
inline float __shfl_xor_sync(unsigned, float, int) { return 0.f; }
inline void __stwb(uint4* p, uint4 value) { *p = value; }
inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __bfloat162float(__nv_bfloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#include "adaln.cuh"
#include "gated_residual_adaln.cuh"
#include "sampler_steps.cuh"

using namespace dit;

namespace {

constexpr int kItems = 4;  // a row has kItems vectors

template <typename F>
void for_blocks(int64_t x, int64_t y, unsigned threads, const F& kernel) {
  gridDim = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  blockDim = {threads, 1};
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
    }
  }
}

AdalnRows rows(const void* data, const int64_t* strides) { return {data, strides[0], strides[1]}; }

template <typename T>
void forward(const GatedResidualAdalnForward& a, bool sum) {
  for_blocks(a.norm.L, a.norm.B, 1, [&] {
    sum ? gated_residual_adaln_fwd_kernel<T, float, kItems, 1>(a) : adaln_fwd_kernel<T, float, kItems, 1>(a.norm);
  });
}

template <typename T>
void backward(const GatedResidualAdalnBackward& a, bool sum) {
  for_blocks(a.norm.L / a.norm.group * a.norm.chunks, a.norm.B, 1, [&] {
    sum ? gated_residual_adaln_bwd_kernel<T, float, kItems, 1>(a) : adaln_bwd_kernel<T, float, kItems, 1>(a.norm);
  });
}

template <typename T>
void sampler_fwd(const SamplerForward& a) {
  a.aligned ? sampler_step_fwd_kernel<T, float, 8>(a) : sampler_step_fwd_kernel<T, float, 1>(a);
}

template <typename T>
void sampler_bwd(const SamplerBackward& a) {
  a.aligned ? sampler_step_bwd_kernel<T, float, 8>(a) : sampler_step_bwd_kernel<T, float, 1>(a);
}

}  // namespace

// sizes: B, L, tokens of a modulation row, C; strides: of gate, scale, shift over B and F. sum = false: adaln alone.
extern "C" void adaln_forward_on_host(bool sum, bool bf16, const int64_t* sizes, const int64_t* strides, const void* x,
                                      const void* y, const float* gate, const float* scale, const float* shift,
                                      const float* weight, const float* bias, void* x_new, void* h, float* mean, float* rstd,
                                      bool rms) {
  const AdalnRows scale_rows = rows(scale, strides + 2), shift_rows = rows(shift, strides + 4);
  const AdalnForward norm{x,        scale_rows, shift_rows, weight, bias, h, mean, rstd, sizes[0], sizes[1],
                          sizes[2], static_cast<int>(sizes[3]), 1e-6f, rms};
  const GatedResidualAdalnForward a{norm, y, rows(gate, strides), x_new};
  bf16 ? forward<__nv_bfloat16>(a, sum) : forward<float>(a, sum);
}

extern "C" void adaln_backward_on_host(bool sum, bool bf16, const int64_t* sizes, const int64_t* strides, int chunks,
                                       int tokens, const void* dx_new, const void* dh, const void* x_new, const void* y,
                                       const float* gate, const float* scale, const float* weight, const float* mean,
                                       const float* rstd, void* dx, void* dy, float* dgate, float* dh_xhat, float* dh_sum,
                                       bool rms) {
  const AdalnBackward norm{dh,       x_new,    rows(scale, strides + 2), weight, mean, rstd, dx, dh_xhat, dh_sum,
                           sizes[0], sizes[1], sizes[2], chunks, tokens, static_cast<int>(sizes[3]), rms};
  const GatedResidualAdalnBackward a{norm, dx_new, y, rows(gate, strides), dy, dgate};
  bf16 ? backward<__nv_bfloat16>(a, sum) : backward<float>(a, sum);
}

// s, t: a table or null and then the number; R rows of n values, s_rows and t_rows of them to an element of each table.
extern "C" void sampler_forward_on_host(int64_t step, bool bf16, const float* x, const void* y, const void* z, float* out,
                                        const float* s, const float* t, float s_number, float t_number, unsigned s_rows,
                                        unsigned t_rows, float guidance, unsigned R, int64_t n, bool aligned) {
  const SamplerForward a{static_cast<SamplerStep>(step), x, y, z, out, {s, s_number, s_rows}, {t, t_number, t_rows}, guidance,
                         R, n, aligned};
  for_blocks(R * sampler_blocks(n, aligned ? 8 : 1), 1, kSamplerThreads, [&] {
    bf16 ? sampler_fwd<__nv_bfloat16>(a) : sampler_fwd<float>(a);
  });
}

extern "C" void sampler_backward_on_host(int64_t step, char of, bool bf16, const float* dout, void* grad, const float* s,
                                         const float* t, float s_number, float t_number, unsigned s_rows, unsigned t_rows,
                                         float guidance, unsigned R, int64_t n, bool aligned) {
  const SamplerBackward a{static_cast<SamplerStep>(step), of, dout, grad, {s, s_number, s_rows}, {t, t_number, t_rows},
                          guidance, R, n, aligned};
  for_blocks(R * sampler_blocks(n, aligned ? 8 : 1), 1, kSamplerThreads, [&] {
    bf16 ? sampler_bwd<__nv_bfloat16>(a) : sampler_bwd<float>(a);
  });
}
