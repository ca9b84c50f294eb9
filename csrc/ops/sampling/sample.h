// SPDX-License-Identifier: Apache-2.0
// The next token from logits: greedy, or drawn from softmax(logits / temperature) after top-k and then top-p.
//
// The random number is a function of seed and step alone (Philox, a counter-based generator), so a text depends neither
// on the other sequences of a batch nor on threads.
#pragma once

#include <cstdint>
#include <vector>

namespace tilewright::sampling {

struct Options {
  float temperature;  // 0: greedy, the lowest index among equals
  int64_t top_k;  // keep the k most probable tokens; 0: all
  float top_p;  // then keep the fewest tokens whose probabilities reach p of the rest, at least one; 1: all
  uint64_t seed;
  uint64_t step;  // of the sequence: another random number for every token
};

// Throws, naming the argument, for options out of range.
void check(const Options& options);

// Uniform in [0, 1), 53 bits: Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = step.
double uniform(uint64_t seed, uint64_t step);

// Memory that a thread keeps from one call to the next.
struct Workspace {
  struct Candidate {
    float value;  // logit, later weight
    int32_t token;
  };
  std::vector<Candidate> candidates;
  std::vector<float> weights;
};

// logits: [vocabulary]; -inf excludes a token. Throws when a logit is NaN or +inf, or when all are excluded.
int64_t sample(const float* logits, int64_t vocabulary, const Options& options, Workspace& workspace);

}  // namespace tilewright::sampling
