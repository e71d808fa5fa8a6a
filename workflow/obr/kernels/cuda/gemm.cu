// Matrix products on tensor cores, by CUTLASS: d (m, n) = a (m, k) b (n, k)^T, rows of d and a the weight's, rows of
// b tokens. operands.py lays out what they read; every pointer is to memory of the device.

#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm.h"
#include "cutlass/gemm/device/gemm_sparse.h"

using cutlass::gemm::GemmShape;
using Int4 = cutlass::int4b_t;
using Half = cutlass::half_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using TensorCores = cutlass::arch::OpClassTensorOp;
using Sm80 = cutlass::arch::Sm80;  // whose instructions sm_86 and sm_89 share
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;

// Whole numbers throughout: scaled by floats, as is CUTLASS's default, sums beyond 2^24 would be rounded.
using Whole = cutlass::epilogue::thread::LinearCombination<int32_t, 4, int32_t, int32_t>;
using Real = cutlass::epilogue::thread::LinearCombination<Half, 8, float, float>;

// Threadblock, warp, instruction; stages of copies under way.
using DenseInt4 = cutlass::gemm::device::Gemm<
    Int4, Row, Int4, Column, int32_t, Row, int32_t, TensorCores, Sm80, GemmShape<128, 128, 256>, GemmShape<64, 64, 256>,
    GemmShape<16, 8, 64>, Whole, Swizzle, 3, 32, 32, false, cutlass::arch::OpMultiplyAddSaturate>;
using SparseInt4 = cutlass::gemm::device::SparseGemm<
    Int4, Row, Int4, Column, int32_t, Row, int32_t, TensorCores, Sm80, GemmShape<128, 128, 256>, GemmShape<64, 64, 256>,
    GemmShape<16, 8, 128>, Whole, Swizzle, 3, 32, 32, false, cutlass::arch::OpMultiplyAddSaturate>;
using DenseHalf = cutlass::gemm::device::Gemm<
    Half, Row, Half, Column, Half, Row, float, TensorCores, Sm80, GemmShape<128, 128, 64>, GemmShape<64, 64, 64>,
    GemmShape<16, 8, 16>, Real, Swizzle, 3>;

// What operands.py counts on.
static_assert(SparseInt4::kSparse == 2 && SparseInt4::kElementsPerElementE == 32, "a word of metadata: 64 columns");
static_assert(sizeof(SparseInt4::ElementE) == 4, "metadata are words of 32 bits");
static_assert(std::is_same<SparseInt4::LayoutE, cutlass::layout::ColumnMajorInterleaved<2>>::value, "pairs of words");

namespace {

template <typename Gemm>
int run(Gemm& gemm, typename Gemm::Arguments const& arguments, void* stream) {
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr);
  if (status == cutlass::Status::kSuccess) status = gemm.run(static_cast<cudaStream_t>(stream));
  return static_cast<int>(status);
}

template <typename Gemm, typename In, typename Out, typename Scale>
int dense(int m, int n, int k, void const* a, void const* b, void* d, void* stream) {
  Gemm gemm;
  auto out = static_cast<Out*>(d);
  return run(gemm,
             {{m, n, k}, {static_cast<In const*>(a), k}, {static_cast<In const*>(b), k}, {out, n}, {out, n},
              {Scale(1), Scale(0)}},
             stream);
}

}  // namespace

extern "C" {

// 0, or the status that obr_reason tells the words of. m, n and k: multiples of 32, 32 and 256.
int obr_int4_dense(int m, int n, int k, void const* a, void const* b, void* d, void* stream) {
  return dense<DenseInt4, Int4, int32_t, int32_t>(m, n, k, a, b, d, stream);
}

// a: the kept half of its columns, (m, k / 2). metadata: which those are.
int obr_int4_sparse(int m, int n, int k, void const* a, void const* b, void const* metadata, void* d, void* stream) {
  SparseInt4 gemm;
  auto out = static_cast<int32_t*>(d);
  using E = SparseInt4::ElementE;
  auto e = static_cast<E*>(const_cast<void*>(metadata));
  auto a4 = static_cast<Int4*>(const_cast<void*>(a));
  auto b4 = static_cast<Int4*>(const_cast<void*>(b));
  return run(gemm,
             {{m, n, k}, {a4, k / 2}, {b4, k}, {out, n}, {out, n},
              {e, SparseInt4::LayoutE::packed({m, k / 2 / SparseInt4::kElementsPerElementE})}, {1, 0}},
             stream);
}

int obr_fp16_dense(int m, int n, int k, void const* a, void const* b, void* d, void* stream) {
  return dense<DenseHalf, Half, Half, float>(m, n, k, a, b, d, stream);
}

char const* obr_reason(int status) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
}
