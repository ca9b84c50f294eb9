// SPDX-License-Identifier: Apache-2.0
// Runs a program over blocks of tokens: prompts and decoding steps alike.
//
// A token's logits are the same bits whatever block, batch or number of threads it comes in, as far as the kernels that
// the records call keep that promise.
#pragma once

#include <cstdint>

#include "engine/program.h"
#include "engine/state.h"

namespace tilewright::engine {

// Bytes of a state for S sequences of up to L tokens.
int64_t state_bytes(Words program, Arena weights, int64_t sequences, int64_t capacity);
// Writes header and zero lengths; the rest may hold anything.
void format_state(Words program, Arena weights, int64_t sequences, int64_t capacity, uint8_t* data, int64_t bytes);

struct Batch {
  const int64_t* tokens;  // [T]
  int64_t token_count;
  const int64_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences;
  bool all_logits;
};

// Width of a row of logits; throws for a program that is damaged at its header.
int64_t logits_width(Words program);

// Appends the batch's tokens to the state and writes logits: [S, width] of each sequence's last token (zeros for a
// sequence without tokens), or [T, width] of all. When it throws, the state's sequences are as before.
void forward(Words program, Arena weights, State state, const Batch& batch, int threads, float* logits);

}  // namespace tilewright::engine
