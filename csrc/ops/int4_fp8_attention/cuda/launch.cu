// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_fp8_attention/cuda/append.cuh"
#include "ops/int4_fp8_attention/cuda/launch.h"
#include "ops/int4_fp8_attention/cuda/plain.cuh"

namespace tilewright::int4_fp8_attention::cuda {

void append(const Append& problem, hopper::Stream stream) {
  const int64_t rows = problem.tokens * problem.cache.heads;
  constexpr int kThreads = kAppendWarps * kWarp;
  hopper::launch(append_rows,
                 hopper::Grid{.blocks = {ceil_div(rows, kAppendWarps)}, .threads = kThreads, .stream = stream},
                 problem);
  hopper::launch(
      advance_lengths,
      hopper::Grid{
          .blocks = {ceil_div(problem.sequences, kThreads)}, .threads = kThreads, .stream = stream, .overlap = true},
      problem);
}

int64_t partials_needed(const Attention& problem) {
  const int multiprocessors = hopper::multiprocessors();
  return path_of(problem, multiprocessors) == Path::kDecode ? workspace_floats(problem, multiprocessors) : 0;
}

void attend_plain(const Attention& problem, hopper::Stream stream) {
  hopper::launch(plain_attention,
                 hopper::Grid{.blocks = {ceil_div(problem.tokens * problem.heads, kPlainWarps)},
                              .threads = kPlainWarps * kWarp,
                              .shared_bytes = kPlainSharedBytes,
                              .stream = stream},
                 problem);
}

void attend(const Attention& problem, hopper::Stream stream) {
  switch (path_of(problem, hopper::multiprocessors())) {
    case Path::kPlain: return attend_plain(problem, stream);
    case Path::kDecode: return attend_decode(problem, stream);
    case Path::kPrefill: return attend_prefill(problem, stream);
  }
}

}  // namespace tilewright::int4_fp8_attention::cuda
