// SPDX-License-Identifier: Apache-2.0
// int4_kv_append and int4_fp8_attention on a CUDA device. Shapes are checked here; what only the device knows (offsets,
// lengths) is checked there, and marks a sequence instead of raising: see ops/int4_fp8_attention/cuda/problem.h.
#include "ops/int4_fp8_attention/cuda/launch.h"
#include "torch/cuda/device.h"
#include "torch/kv_cache.h"

namespace tilewright::torch_adapter {
namespace {

namespace kernels = int4_fp8_attention::cuda;

constexpr const char* kAppend = "int4_kv_append";
constexpr const char* kAttention = "int4_fp8_attention";

struct Device {
  static void require(const Tensor& tensor, const char* op, const char* argument) {
    require_device(tensor, op, argument);
  }
};

// As the kernels take them: float32, bfloat16 or float16 with adjacent elements in a head; float64 becomes float32.
Tensor readable(const Tensor& tensor, const char* op, const char* argument) {
  const ScalarType type = tensor.scalar_type();
  return with_adjacent_rows(tensor, type == ScalarType::Double ? ScalarType::Float : type, op, argument);
}

kernels::Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return kernels::Element::kBFloat16;
    case ScalarType::Half: return kernels::Element::kFloat16;
    default: return kernels::Element::kFloat32;
  }
}

kernels::Tokens tokens_of(const Tensor& tensor) {
  return {data<void>(tensor), element_of(tensor), tensor.stride(0), tensor.stride(1)};
}

// The kernels count rows, keys and blocks in 32 bits.
void require_countable(int64_t tokens, int64_t heads, int64_t capacity, const char* op) {
  constexpr int64_t kMost = int64_t{1} << 28;
  require(tokens * heads <= kMost, op, ": ", tokens, " tokens of ", heads, " heads, needed at most ", kMost,
          " rows in one call; split the tokens over several");
  require(capacity <= kMost, op, ": k_cache holds ", capacity, " tokens a sequence, needed at most ", kMost);
}

Tensor offsets_on(const Tensor& cu_seqlens, const Tensor& like, int64_t sequences, const char* op) {
  require_same_device(cu_seqlens, like, op, "cu_seqlens");
  const ScalarType type = cu_seqlens.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": cu_seqlens has dtype ", dtype_name(type),
          ", needed int64 or int32");
  require_dim(cu_seqlens, 1, op, "cu_seqlens", "[S+1]");
  require_size(cu_seqlens, 0, sequences + 1, op, "cu_seqlens", "S+1");
  return torch::stable::contiguous(torch::stable::to(cu_seqlens, ScalarType::Long));
}

void require_one_device(const Tensor& like, const CacheTensors& cache, const Tensor& lengths, const char* op) {
  require_same_device(cache.k, like, op, "k_cache");
  require_same_device(cache.v, like, op, "v_cache");
  if (cache.k_scales.has_value()) require_same_device(*cache.k_scales, like, op, "k_scales");
  if (cache.v_scales.has_value()) require_same_device(*cache.v_scales, like, op, "v_scales");
  require_same_device(lengths, like, op, "lengths");
}

void int4_kv_append(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const Tensor& k_cache,
                    const Tensor& v_cache, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                    const Tensor& lengths) {
  require_device(k, kAppend, "k");
  require_same_device(v, k, kAppend, "v");
  require_dim(k, 3, kAppend, "k", "[T, H_kv, D]");
  require_dim(v, 3, kAppend, "v", "[T, H_kv, D]");
  for (int64_t d = 0; d < 3; ++d) require_size(v, d, k.size(d), kAppend, "v", "that of k");
  const CacheTensors tensors{k_cache, v_cache, k_scales, v_scales};
  require_one_device(k, tensors, lengths, kAppend);
  const Cache cache = cache_of<Device>(tensors, k.size(2), kAppend);
  require_size(k, 1, cache.heads, kAppend, "k", "H_kv");
  const int64_t sequences = k_cache.size(0);
  require_countable(k.size(0), cache.heads, cache.capacity, kAppend);
  require_lengths<Device>(lengths, sequences, kAppend);
  const OnDevice guard(k);
  const Tensor offsets = offsets_on(cu_seqlens, k, sequences, kAppend);
  const Tensor keys = readable(k, kAppend, "k"), values = readable(v, kAppend, "v");
  kernels::append({.cache = cache,
                   .sequences = sequences,
                   .tokens = k.size(0),
                   .cu_seqlens = data<int64_t>(offsets),
                   .lengths = mutable_data<int64_t>(lengths),
                   .k = tokens_of(keys),
                   .v = tokens_of(values)},
                  stream_of(k));
}

Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& k_scales,
                 const std::optional<Tensor>& v_scales, const Tensor& lengths, const Tensor& cu_seqlens, double scale,
                 bool causal, std::optional<int64_t> window, bool fp8_query) {
  require_device(q, kAttention, "q");
  require_dim(q, 3, kAttention, "q", "[T, H, D]");
  const CacheTensors tensors{k_cache, v_cache, k_scales, v_scales};
  require_one_device(q, tensors, lengths, kAttention);
  const Cache cache = cache_of<Device>(tensors, q.size(2), kAttention);
  const int64_t heads = q.size(1), sequences = k_cache.size(0);
  require(heads % cache.heads == 0, kAttention, ": q has H = ", heads,
          " heads, needed a multiple of the cache's H_kv = ", cache.heads);
  require(!window.has_value() || *window >= 1, kAttention, ": window = ", window.value_or(0),
          ", needed at least 1, or None for no window");
  require_countable(q.size(0), heads, cache.capacity, kAttention);
  require_lengths<Device>(lengths, sequences, kAttention);
  const OnDevice guard(q);
  const Tensor offsets = offsets_on(cu_seqlens, q, sequences, kAttention);
  const Tensor queries = readable(q, kAttention, "q");
  const Tensor out = empty_on(queries, {q.size(0), heads, q.size(2)}, queries.scalar_type());
  if (q.size(0) == 0 || heads == 0) return torch::stable::to(out, q.scalar_type());
  kernels::Attention problem{.cache = cache,
                             .sequences = sequences,
                             .tokens = q.size(0),
                             .cu_seqlens = data<int64_t>(offsets),
                             .lengths = data<int64_t>(lengths),
                             .q = tokens_of(queries),
                             .heads = heads,
                             .scale = static_cast<float>(scale),
                             .causal = causal,
                             .window = window.value_or(int4_fp8_attention::kNoWindow),
                             .query = fp8_query ? int4_fp8_attention::Query::kFp8 : int4_fp8_attention::Query::kFloat32,
                             .out = mutable_data<void>(out),
                             .partials = nullptr};
  const int64_t needed = kernels::partials_needed(problem);
  const Tensor partials = empty_on(queries, {needed}, ScalarType::Float);
  problem.partials = needed > 0 ? mutable_data<float>(partials) : nullptr;
  kernels::attend(problem, stream_of(q));
  return torch::stable::to(out, q.scalar_type());
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) {
  m.impl("int4_kv_append", TORCH_BOX(&int4_kv_append));
  m.impl("int4_fp8_attention", TORCH_BOX(&attention));
}

}  // namespace tilewright::torch_adapter
