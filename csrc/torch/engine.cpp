// SPDX-License-Identifier: Apache-2.0
// The decode engine and sampling as torch operators.
#include "engine/engine.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/memory.h"
#include "ops/sampling/sample.h"
#include "torch/tensors.h"

namespace tilewright::torch_adapter {
namespace {

using engine::Arena;
using engine::State;
using engine::Words;

Words words_of(const Tensor& program, const char* op) {
  require_cpu(program, op, "program");
  require_dtype(program, ScalarType::Long, op, "program");
  require_dim(program, 1, op, "program", "the one-dimensional program of a ModelImage");
  require(program.is_contiguous(), op, ": program must be contiguous");
  return {data<int64_t>(program), program.numel()};
}

Arena arena_of(const Tensor& weights, const char* op) {
  require_cpu(weights, op, "weights");
  require_dtype(weights, ScalarType::Byte, op, "weights");
  require_dim(weights, 1, op, "weights", "the one-dimensional arena of a ModelImage");
  require(weights.is_contiguous(), op, ": weights must be contiguous");
  return {data<uint8_t>(weights), weights.numel()};
}

State state_of(const Tensor& state, const char* op) {
  require_cpu(state, op, "state");
  require_dtype(state, ScalarType::Byte, op, "state");
  require_dim(state, 1, op, "state", "the one-dimensional arena of engine_state()");
  require(state.is_contiguous(), op, ": state must be contiguous");
  return engine::open_state(mutable_data<uint8_t>(state), state.numel());
}

Tensor longs(const Tensor& tensor, const char* op, const char* argument) {
  require_cpu(tensor, op, argument);
  require_dim(tensor, 1, op, argument, "one dimension");
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Long || type == ScalarType::Int, op, ": ", argument, " has dtype ", dtype_name(type),
          ", needed int64 or int32");
  return contiguous_of(tensor, ScalarType::Long);
}

// A uint8 arena that starts on a cache line. Weights are read from end to end for every token, so large pages are asked
// for: fewer address translations per byte.
Tensor engine_arena(int64_t bytes) {
  require(bytes >= 0, "engine_arena: bytes = ", bytes, ", needed >= 0");
  const Tensor arena = empty_cpu({bytes}, ScalarType::Byte);
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto first = (reinterpret_cast<uintptr_t>(arena.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const auto last =
      (reinterpret_cast<uintptr_t>(arena.mutable_data_ptr()) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return arena;
}

int64_t engine_checksum(const Tensor& program) { return engine::checksum(words_of(program, "engine_checksum")); }

Tensor engine_state(const Tensor& program, const Tensor& weights, int64_t sequences, int64_t max_length) {
  constexpr const char* kOp = "engine_state";
  const Words words = words_of(program, kOp);
  const Arena arena = arena_of(weights, kOp);
  const int64_t bytes = engine::state_bytes(words, arena, sequences, max_length);
  const Tensor state = empty_cpu({bytes}, ScalarType::Byte);
  engine::format_state(words, arena, sequences, max_length, mutable_data<uint8_t>(state), bytes);
  return state;
}

Tensor engine_lengths(const Tensor& state) {
  const State opened = state_of(state, "engine_lengths");
  const int64_t sequences = opened.header().sequences;
  Tensor lengths = empty_cpu({sequences}, ScalarType::Long);
  std::copy(opened.lengths(), opened.lengths() + sequences, mutable_data<int64_t>(lengths));
  return lengths;
}

void engine_truncate(const Tensor& state, const Tensor& lengths) {
  constexpr const char* kOp = "engine_truncate_";
  const State opened = state_of(state, kOp);
  const int64_t sequences = opened.header().sequences;
  const Tensor wanted = longs(lengths, kOp, "lengths");
  require_size(wanted, 0, sequences, kOp, "lengths", "S");
  engine::truncate(opened, data<int64_t>(wanted), kOp);
}

Tensor engine_forward(const Tensor& program, const Tensor& weights, const Tensor& state, const Tensor& tokens,
                      const Tensor& cu_seqlens, bool all_logits) {
  constexpr const char* kOp = "engine_forward";
  const Words words = words_of(program, kOp);
  const Arena arena = arena_of(weights, kOp);
  const State opened = state_of(state, kOp);
  const Tensor ids = longs(tokens, kOp, "tokens");
  const Tensor cu = longs(cu_seqlens, kOp, "cu_seqlens");
  require(cu.numel() >= 1, kOp, ": cu_seqlens is empty, needed [S+1] offsets from 0 to the number of tokens");
  const int64_t sequences = cu.numel() - 1;
  const int64_t width = engine::logits_width(words);
  Tensor logits = empty_cpu({all_logits ? ids.numel() : sequences, width}, ScalarType::Float);
  const engine::Batch batch{data<int64_t>(ids), ids.numel(), data<int64_t>(cu), sequences, all_logits};
  engine::forward(words, arena, opened, batch, static_cast<int>(torch::stable::get_num_threads()),
                  mutable_data<float>(logits));
  return logits;
}

Tensor sample(const Tensor& logits, double temperature, int64_t top_k, double top_p, int64_t seed, int64_t step) {
  constexpr const char* kOp = "sample";
  require_cpu(logits, kOp, "logits");
  require_dim(logits, 2, kOp, "logits", "[S, vocabulary]");
  const int64_t rows = logits.size(0), width = logits.size(1);
  require(width >= 1 && width < (int64_t{1} << 31), kOp, ": logits has shape ", shape_of(logits),
          ", needed a vocabulary of 1 .. 2^31 - 1");
  const sampling::Options options{static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                                  static_cast<uint64_t>(seed), static_cast<uint64_t>(step)};
  sampling::check(options);
  const Tensor values = as_float(logits, kOp, "logits");
  Tensor tokens = empty_cpu({rows}, ScalarType::Long);
  const auto* from = data<float>(values);
  auto* to = mutable_data<int64_t>(tokens);
  thread_local sampling::Workspace workspace;
  for (int64_t row = 0; row < rows; ++row) to[row] = sampling::sample(from + row * width, width, options, workspace);
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tilewright, m) {
  m.def("engine_arena(int bytes) -> Tensor");
  m.def("engine_checksum(Tensor program) -> int");
  m.def("engine_state(Tensor program, Tensor weights, int sequences, int max_length) -> Tensor");
  m.def("engine_lengths(Tensor state) -> Tensor");
  m.def("engine_truncate_(Tensor(a!) state, Tensor lengths) -> ()");
  m.def(
      "engine_forward(Tensor program, Tensor weights, Tensor(a!) state, Tensor tokens, Tensor cu_seqlens, "
      "bool all_logits) -> Tensor");
  m.def("sample(Tensor logits, float temperature, int top_k, float top_p, int seed, int step) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CompositeExplicitAutograd, m) {
  m.impl("engine_arena", TORCH_BOX(&engine_arena));
}

STABLE_TORCH_LIBRARY_IMPL(tilewright, CPU, m) {
  m.impl("engine_checksum", TORCH_BOX(&engine_checksum));
  m.impl("engine_state", TORCH_BOX(&engine_state));
  m.impl("engine_lengths", TORCH_BOX(&engine_lengths));
  m.impl("engine_truncate_", TORCH_BOX(&engine_truncate));
  m.impl("engine_forward", TORCH_BOX(&engine_forward));
  m.impl("sample", TORCH_BOX(&sample));
}

}  // namespace tilewright::torch_adapter
