// SPDX-License-Identifier: Apache-2.0
// The copy engine (TMA): boxes of tensors and runs of bytes between global and shared memory. One thread issues a copy.
#pragma once

#include <type_traits>

#include "core/require.h"
#include "hopper/barrier.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace tilewright::hopper {

#if defined(__CUDACC__)

// A tensor in global memory and the box that one copy moves. Kernels take it as part of a __grid_constant__ parameter.
struct TensorMap {
  CUtensorMap map;
};

namespace detail {

template <class T>
constexpr CUtensorMapDataType tensor_type() {
  if constexpr (std::is_same_v<T, bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if constexpr (std::is_same_v<T, f16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, tf32>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if constexpr (sizeof(T) == 4) return CU_TENSOR_MAP_DATA_TYPE_INT32;
  if constexpr (sizeof(T) == 2) return CU_TENSOR_MAP_DATA_TYPE_UINT16;
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

// The driver's encoder, asked for at run time: the library links against no driver.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    require(entry != nullptr && found == cudaDriverEntryPointSuccess,
            "the CUDA driver has no cuTensorMapEncodeTiled; a driver of CUDA 12 or newer is needed");
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

}  // namespace detail

// sizes and box count elements, innermost dimension first; strides_bytes are those of dimensions 1 to rank-1, multiples of
// 16. box[0] * sizeof(T) is at most the swizzle's width. Elements outside read as zero and are not written.
template <class T>
TensorMap make_tensor_map(const void* base, int rank, const uint64_t* sizes, const uint64_t* strides_bytes,
                          const uint32_t* box, Swizzle swizzle) {
  TensorMap result;
  const uint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapSwizzle pattern = swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                               : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult status = detail::tensor_map_encoder()(
      &result.map, detail::tensor_type<T>(), static_cast<uint32_t>(rank), const_cast<void*>(base), sizes, strides_bytes,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, pattern, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(status == CUDA_SUCCESS, "a tensor map was refused by the CUDA driver (error ", static_cast<int>(status),
          "): base ", base, ", rank ", rank, ", innermost size ", sizes[0], ", box ", box[0],
          "; bases and strides are multiples of 16 bytes");
  return result;
}

TILEWRIGHT_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

#define TILEWRIGHT_TMA_LOAD "cp.async.bulk.tensor."
#define TILEWRIGHT_TMA_LOAD_TO ".shared::cluster.global.mbarrier::complete_tx::bytes"

TILEWRIGHT_DEVICE void load_tile(void* to, const TensorMap& map, Barrier& barrier, int c0, int c1) {
  asm volatile(TILEWRIGHT_TMA_LOAD "2d" TILEWRIGHT_TMA_LOAD_TO " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
               : "memory");
}
TILEWRIGHT_DEVICE void load_tile(void* to, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2) {
  asm volatile(TILEWRIGHT_TMA_LOAD "3d" TILEWRIGHT_TMA_LOAD_TO
                                   " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
TILEWRIGHT_DEVICE void load_tile(void* to, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2, int c3) {
  asm volatile(TILEWRIGHT_TMA_LOAD "4d" TILEWRIGHT_TMA_LOAD_TO
                                   " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
TILEWRIGHT_DEVICE void load_tile(void* to, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2, int c3,
                                 int c4) {
  asm volatile(TILEWRIGHT_TMA_LOAD "5d" TILEWRIGHT_TMA_LOAD_TO
                                   " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Into the same place of every block of the cluster whose bit is set; each one's own barrier counts the bytes.
TILEWRIGHT_DEVICE void load_tile_multicast(void* to, const TensorMap& map, Barrier& barrier, uint16_t blocks, int c0,
                                           int c1) {
  asm volatile(TILEWRIGHT_TMA_LOAD "2d" TILEWRIGHT_TMA_LOAD_TO
                                   ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(c0), "r"(c1)
               : "memory");
}
TILEWRIGHT_DEVICE void load_tile_multicast(void* to, const TensorMap& map, Barrier& barrier, uint16_t blocks, int c0,
                                           int c1, int c2) {
  asm volatile(TILEWRIGHT_TMA_LOAD "3d" TILEWRIGHT_TMA_LOAD_TO
                                   ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(&barrier)), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

TILEWRIGHT_DEVICE void store_tile(const TensorMap& map, const void* from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1)
               : "memory");
}
TILEWRIGHT_DEVICE void store_tile(const TensorMap& map, const void* from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
TILEWRIGHT_DEVICE void store_tile(const TensorMap& map, const void* from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// Runs of bytes: both addresses and the length are multiples of 16.
TILEWRIGHT_DEVICE void load_bulk(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}
TILEWRIGHT_DEVICE void store_bulk(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}

// Stores of this thread up to here form a group.
TILEWRIGHT_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the sources of all but Pending groups may be overwritten.
template <int Pending>
TILEWRIGHT_DEVICE void store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Until every group is written.
TILEWRIGHT_DEVICE void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#else
#include "emulator/tma.h"
#endif

}  // namespace tilewright::hopper
