// SPDX-License-Identifier: Apache-2.0
// A KV cache as torch tensors: the checks of its shapes, for the adapters of every device. Place::require(tensor, op,
// argument) says on which device tensors must be.
#pragma once

#include "ops/int4_fp8_attention/problem.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {

using format::ScaleType;
using int4_fp8_attention::Cache;
using int4_fp8_attention::CacheFormat;
using int4_fp8_attention::Strides;

// The cache is written in place and never copied, hence strides of any kind but adjacent elements within a row.
inline Strides strides_of(const Tensor& tensor, const char* op, const char* argument) {
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  require(tensor.size(3) <= 1 || tensor.stride(3) == 1, op, ": ", argument, " has a last dimension of stride ",
          tensor.stride(3), ", needed 1; allocate it with KVCache.allocate()");
  return {tensor.stride(0) * size, tensor.stride(1) * size, tensor.stride(2) * size};
}

template <class Place>
void require_same_layout(const Tensor& tensor, const Tensor& like, const char* op, const char* argument,
                         const char* like_argument) {
  Place::require(tensor, op, argument);
  require_dtype(tensor, like.scalar_type(), op, argument);
  bool same = tensor.dim() == like.dim();
  for (int64_t d = 0; same && d < like.dim(); ++d) {
    same = tensor.size(d) == like.size(d) && (like.size(d) <= 1 || tensor.stride(d) == like.stride(d));
  }
  require(same, op, ": ", argument, " has shape ", shape_of(tensor), ", needed shape ", shape_of(like),
          " and strides of ", like_argument, "; allocate both with KVCache.allocate()");
}

struct [[gnu::visibility("hidden")]] CacheTensors {
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& k_scales;
  const std::optional<Tensor>& v_scales;
};

template <class Place>
void view_scales(Cache& cache, const CacheTensors& tensors, const char* op) {
  const Tensor& k = tensors.k;
  require(tensors.k_scales.has_value() && tensors.v_scales.has_value(), op,
          ": an INT4 cache (dtype uint8) needs k_scales and v_scales");
  const Tensor& scales = *tensors.k_scales;
  Place::require(scales, op, "k_scales");
  const ScalarType type = scales.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": k_scales has dtype ", dtype_name(type),
          ", needed float32 or bfloat16");
  require_dim(scales, 4, op, "k_scales", "[S, H_kv, L, ceil(D/128)]");
  require_size(scales, 0, k.size(0), op, "k_scales", "S");
  require_size(scales, 1, k.size(1), op, "k_scales", "H_kv");
  require_size(scales, 2, k.size(2), op, "k_scales", "L");
  require_size(scales, 3, format::Int4Kv::groups(cache.head_dim), op, "k_scales", "ceil(D/128)");
  require_same_layout<Place>(*tensors.v_scales, scales, op, "v_scales", "k_scales");
  cache.scale_type = type == ScalarType::Float ? ScaleType::kFloat32 : ScaleType::kBFloat16;
  cache.k_scales = mutable_data<uint8_t>(scales);
  cache.v_scales = mutable_data<uint8_t>(*tensors.v_scales);
  cache.scales = strides_of(scales, op, "k_scales");
}

template <class Place>
Cache cache_of(const CacheTensors& tensors, int64_t head_dim, const char* op) {
  const Tensor& k = tensors.k;
  Place::require(k, op, "k_cache");
  const ScalarType type = k.scalar_type();
  require(type == ScalarType::Byte || type == ScalarType::BFloat16, op, ": k_cache has dtype ", dtype_name(type),
          ", needed uint8 (INT4 codes) or bfloat16");
  Cache cache{};
  cache.format = type == ScalarType::Byte ? CacheFormat::kInt4 : CacheFormat::kBFloat16;
  const bool int4 = cache.format == CacheFormat::kInt4;
  require_dim(k, 4, op, "k_cache", int4 ? "[S, H_kv, L, ceil(D/2)]" : "[S, H_kv, L, D]");
  require(head_dim >= 1 && head_dim <= int4_fp8_attention::kMaxHeadDim, op, ": head size D = ", head_dim,
          ", needed 1 to ", int4_fp8_attention::kMaxHeadDim);
  require(k.size(1) >= 1, op, ": k_cache has shape ", shape_of(k), ", needed at least one KV head");
  require_size(k, 3, int4 ? format::Int4Kv::row_bytes(head_dim) : head_dim, op, "k_cache", int4 ? "ceil(D/2)" : "D");
  require_same_layout<Place>(tensors.v, k, op, "v_cache", "k_cache");
  cache.heads = k.size(1);
  cache.head_dim = head_dim;
  cache.capacity = k.size(2);
  cache.k = mutable_data<uint8_t>(k);
  cache.v = mutable_data<uint8_t>(tensors.v);
  cache.data = strides_of(k, op, "k_cache");
  if (int4) {
    view_scales<Place>(cache, tensors, op);
  } else {
    require(!tensors.k_scales.has_value() && !tensors.v_scales.has_value(), op,
            ": a bfloat16 cache has no scales; pass None for k_scales and v_scales");
  }
  return cache;
}

template <class Place>
void require_lengths(const Tensor& lengths, int64_t sequences, const char* op) {
  Place::require(lengths, op, "lengths");
  require_dtype(lengths, ScalarType::Long, op, "lengths");
  require_dim(lengths, 1, op, "lengths", "[S]");
  require_size(lengths, 0, sequences, op, "lengths", "S");
  require(lengths.is_contiguous(), op, ": lengths must be contiguous");
}

}  // namespace tilewright::torch_adapter
