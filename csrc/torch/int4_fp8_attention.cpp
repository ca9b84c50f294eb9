// SPDX-License-Identifier: Apache-2.0
// int4_kv_append and int4_fp8_attention as torch operators.
#include <algorithm>

#include "ops/int4_fp8_attention/kernels.h"
#include "ops/int4_fp8_attention/reference.h"
#include "torch/kv_cache.h"

namespace tilewright::torch_adapter {
namespace {

using int4_fp8_attention::Problem;
using int4_fp8_attention::Query;

struct OnCpu {
  static void require(const Tensor& tensor, const char* op, const char* argument) { require_cpu(tensor, op, argument); }
};

constexpr const char* kAppend = "int4_kv_append";

// Enough tokens that waking a thread is worth it.
constexpr int64_t kTokensPerThread = 16;

void int4_kv_append(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const Tensor& k_cache,
                    const Tensor& v_cache, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                    const Tensor& lengths) {
  require_cpu(k, kAppend, "k");
  require_cpu(v, kAppend, "v");
  require_dim(k, 3, kAppend, "k", "[T, H_kv, D]");
  require_dim(v, 3, kAppend, "v", "[T, H_kv, D]");
  for (int64_t d = 0; d < 3; ++d) require_size(v, d, k.size(d), kAppend, "v", "that of k");
  const Cache cache = cache_of<OnCpu>({k_cache, v_cache, k_scales, v_scales}, k.size(2), kAppend);
  require_size(k, 1, cache.heads, kAppend, "k", "H_kv");
  const int64_t sequences = k_cache.size(0);
  const Tensor offsets = offsets_of(cu_seqlens, sequences, k.size(0), kAppend);
  const auto* at = data<int64_t>(offsets);
  require_lengths<OnCpu>(lengths, sequences, kAppend);
  auto* held = mutable_data<int64_t>(lengths);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t fresh = at[s + 1] - at[s];
    require(held[s] >= 0 && held[s] + fresh <= cache.capacity, kAppend, ": sequence ", s, " holds ", held[s],
            " tokens and gets ", fresh, " more, but the cache was allocated with max_length = ", cache.capacity,
            "; allocate it longer, or reset() it");
  }
  const Tensor keys = as_float(k, kAppend, "k"), values = as_float(v, kAppend, "v");
  for (int64_t s = 0; s < sequences; ++s) held[s] += at[s + 1] - at[s];
  const int4_fp8_attention::Append problem{
      .cache = cache,
      .packed = {sequences, at, held},
      .k = data<float>(keys),
      .v = data<float>(values),
      .token_stride = cache.heads * cache.head_dim,
      .head_stride = cache.head_dim,
  };
  const auto run = int4_fp8_attention::kernels().append;
  torch::stable::parallel_for(0, at[sequences], kTokensPerThread,
                              [&](int64_t first, int64_t last) { run(problem, first, last); });
}

struct Options {
  double scale;
  bool causal;
  std::optional<int64_t> window;
  bool fp8_query;
};

// A checked call. The tensors keep alive what the problem points to; out and workspace are yet to be set.
struct Call {
  Tensor queries, offsets;
  Problem problem;
  int64_t rows;   // of q that belong to a sequence
};

Call check(const Tensor& q, const CacheTensors& tensors, const Tensor& lengths, const Tensor& cu_seqlens,
           const Options& options, const char* op) {
  require_cpu(q, op, "q");
  require_dim(q, 3, op, "q", "[T, H, D]");
  const int64_t heads = q.size(1), head_dim = q.size(2), sequences = tensors.k.size(0);
  const Cache cache = cache_of<OnCpu>(tensors, head_dim, op);
  require(heads % cache.heads == 0, op, ": q has H = ", heads,
          " heads, needed a multiple of the cache's H_kv = ", cache.heads);
  require(!options.window.has_value() || *options.window >= 1, op, ": window = ", options.window.value_or(0),
          ", needed at least 1, or None for no window");
  Call call{as_float(q, op, "q"), offsets_of(cu_seqlens, sequences, q.size(0), op), {}, 0};
  const auto* at = data<int64_t>(call.offsets);
  require_lengths<OnCpu>(lengths, sequences, op);
  const auto* held = data<int64_t>(lengths);
  for (int64_t s = 0; s < sequences; ++s) {
    require(held[s] >= at[s + 1] - at[s] && held[s] <= cache.capacity, op, ": sequence ", s, " has ", at[s + 1] - at[s],
            " queries and a length of ", held[s], ", needed a length between that and max_length = ", cache.capacity,
            "; append the keys and values of the queries first");
  }
  call.rows = at[sequences];
  call.problem = {
      .cache = cache,
      .packed = {sequences, at, held},
      .q = data<float>(call.queries),
      .q_token_stride = heads * head_dim,
      .q_head_stride = head_dim,
      .heads = heads,
      .scale = static_cast<float>(options.scale),
      .causal = options.causal,
      .window = options.window.value_or(int4_fp8_attention::kNoWindow),
      .query = options.fp8_query ? Query::kFp8 : Query::kFloat32,
      .out = nullptr,
      .out_token_stride = heads * head_dim,
      .out_head_stride = head_dim,
      .workspace = nullptr,
  };
  return call;
}

// [T, H, D], zero from the given row on.
template <class T>
Tensor output(const Tensor& q, int64_t rows, ScalarType type) {
  Tensor out = empty_cpu({q.size(0), q.size(1), q.size(2)}, type);
  const int64_t row = q.size(1) * q.size(2);
  auto* values = mutable_data<T>(out);
  std::fill(values + rows * row, values + q.size(0) * row, T{0});
  return out;
}

Tensor attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& k_scales,
                 const std::optional<Tensor>& v_scales, const Tensor& lengths, const Tensor& cu_seqlens, double scale,
                 bool causal, std::optional<int64_t> window, bool fp8_query) {
  Call call = check(q, {k_cache, v_cache, k_scales, v_scales}, lengths, cu_seqlens, {scale, causal, window, fp8_query},
                    "int4_fp8_attention");
  const Tensor out = output<float>(q, call.rows, ScalarType::Float);
  Problem& problem = call.problem;
  if (problem.heads == 0) return to_type(out, q.scalar_type());
  problem.out = mutable_data<float>(out);
  const int4_fp8_attention::Plan plan = int4_fp8_attention::choose_plan(problem);
  const Tensor workspace = empty_cpu({plan.workspace_bytes}, ScalarType::Byte);
  problem.workspace = mutable_data<uint8_t>(workspace);
  std::fill(problem.workspace, problem.workspace + plan.counter_bytes, uint8_t{0});
  const auto run = int4_fp8_attention::kernels().items;
  torch::stable::parallel_for(0, plan.items, 1, [&](int64_t first, int64_t last) { run(problem, plan, first, last); });
  return to_type(out, q.scalar_type());
}

// The same function computed by the C++ oracle, in float64.
Tensor reference(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& k_scales,
                 const std::optional<Tensor>& v_scales, const Tensor& lengths, const Tensor& cu_seqlens, double scale,
                 bool causal, std::optional<int64_t> window, bool fp8_query) {
  const Call call = check(q, {k_cache, v_cache, k_scales, v_scales}, lengths, cu_seqlens,
                          {scale, causal, window, fp8_query}, "int4_fp8_attention_reference");
  const Tensor out = output<double>(q, call.rows, ScalarType::Double);
  int4_fp8_attention::reference(call.problem, mutable_data<double>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def(
      "int4_kv_append(Tensor k, Tensor v, Tensor cu_seqlens, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor(e!) lengths) -> ()");
  m.def(
      "int4_fp8_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scales, Tensor? v_scales, "
      "Tensor lengths, Tensor cu_seqlens, float scale, bool causal, SymInt? window, bool fp8_query) -> Tensor");
  m.def(
      "int4_fp8_attention_reference(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scales, Tensor? v_scales, "
      "Tensor lengths, Tensor cu_seqlens, float scale, bool causal, int? window, bool fp8_query) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("int4_kv_append", TORCH_BOX(&int4_kv_append));
  m.impl("int4_fp8_attention", TORCH_BOX(&attention));
  m.impl("int4_fp8_attention_reference", TORCH_BOX(&reference));
}

}  // namespace tilewright::torch_adapter
