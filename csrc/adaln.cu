// Launches of adaln: picks the kernel by dtypes and by how many vectors a row has.
#include "adaln.cuh"
#include "common/dispatch.cuh"

namespace dit {
namespace {

template <typename T, typename TT>
cudaError_t forward(const AdalnForward& a, cudaStream_t stream) {
  const int vectors = a.C / kVector<T>;
  const dim3 grid(a.L, a.B);
  if (vectors <= 256) {
    adaln_fwd_kernel<T, TT, 1, 256><<<grid, threads(vectors, 1), 0, stream>>>(a);
  } else if (vectors <= 1024) {
    adaln_fwd_kernel<T, TT, 2, 512><<<grid, threads(vectors, 2), 0, stream>>>(a);
  } else if constexpr (sizeof(T) == 4) {
    adaln_fwd_kernel<T, TT, 4, 512><<<grid, threads(vectors, 4), 0, stream>>>(a);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <typename T, typename TT>
cudaError_t backward(const AdalnBackward& a, cudaStream_t stream) {
  const int vectors = a.C / kVector<T>;
  const dim3 grid(a.L / a.group * a.chunks, a.B);
  if (vectors <= 256) {
    adaln_bwd_kernel<T, TT, 1, 256><<<grid, threads(vectors, 1), 0, stream>>>(a);
  } else if (vectors <= 1024) {
    adaln_bwd_kernel<T, TT, 2, 512><<<grid, threads(vectors, 2), 0, stream>>>(a);
  } else if constexpr (sizeof(T) == 4) {
    adaln_bwd_kernel<T, TT, 4, 512><<<grid, threads(vectors, 4), 0, stream>>>(a);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t adaln_fwd(const AdalnForward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream) {
  return with_types(dtype, tables_as_x, [&](auto* x, auto* table) {
    return forward<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(table)>>(a, stream);
  });
}

cudaError_t adaln_bwd(const AdalnBackward& a, Dtype dtype, bool tables_as_x, cudaStream_t stream) {
  return with_types(dtype, tables_as_x, [&](auto* x, auto* table) {
    return backward<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(table)>>(a, stream);
  });
}

}  // namespace dit
