// SPDX-License-Identifier: Apache-2.0
// A bench for the tops without Python: one linear layer end to end against plain integers, and both attentions against
// each other. Prints "all equal" and returns 0, or says what differs.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../kernels/tops.h"

using namespace tilewright_hls;

namespace {

unsigned state = 12345;
int draw(int below) {
  state = state * 1664525u + 1013904223u;
  return static_cast<int>((state >> 8) % static_cast<unsigned>(below));
}

int fail(const char* what, int at) {
  std::printf("%s differs at %d\n", what, at);
  return 1;
}

int check_product() {
  constexpr int kInputs = 100, kOutputs = 33, kRows = 2;
  StatusWord status = 0;
  const int blocks = beats_for(kInputs, 84), padded = beats_for(kOutputs, 16) * 16;
  std::vector<int> weight(static_cast<size_t>(padded * blocks * 84), 0);
  for (int o = 0; o < kOutputs; ++o) {
    for (int i = 0; i < kInputs; ++i) weight[static_cast<size_t>(o * blocks * 84 + i)] = draw(3) - 1;
  }
  hls::stream<WeightBeat<768>> beats("weights");
  hls::stream<Half> norm("norm");
  const int vectors = blocks * padded;
  for (int first = 0; first < vectors; first += 5) {
    int bits[768] = {};
    for (int v = first; v < first + 5 && v < vectors; ++v) {
      for (int t = 0; t < 28; ++t) {
        int index = 0, power = 1;
        for (int g = 0; g < 3; ++g, power *= 3) {
          index += (weight[static_cast<size_t>(v % padded * blocks * 84 + v / padded * 84 + t * 3 + g)] + 1) * power;
        }
        for (int b = 0; b < 5; ++b) bits[(v - first) * 140 + t * 5 + b] = index >> b & 1;
      }
    }
    WeightBeat<768> beat;
    for (int i = 0; i < 96; ++i) {
      int byte = 0;
      for (int b = 0; b < 8; ++b) byte |= bits[i * 8 + b] << b;
      beat.byte[i] = byte;
    }
    beats.write(beat);
  }
  tw_wbmu_load(beats, norm, vectors, 0, status);
  beats.expect_empty();
  std::vector<int> x(kRows * kInputs);
  for (int& value : x) value = draw(255) - 127;
  hls::stream<Beat<ap_int<8>, 84>> in("x");
  for (int row = 0; row < kRows; ++row) {
    for (int block = 0; block < blocks; ++block) {
      Beat<ap_int<8>, 84> beat;
      for (int i = 0; i < 84 && block * 84 + i < kInputs; ++i)
        beat.at[i] = x[static_cast<size_t>(row * kInputs + block * 84 + i)];
      beat.last = block == blocks - 1;
      in.write(beat);
    }
  }
  hls::stream<Beat<ap_int<32>, 16>> out("accumulators");
  tw_tlmm(in, out, kInputs, kOutputs, kRows, status);
  for (int row = 0; row < kRows; ++row) {
    for (int first = 0; first < kOutputs; first += 16) {
      const auto got = out.read();
      for (int o = first; o < first + 16 && o < kOutputs; ++o) {
        int sum = 0;
        for (int i = 0; i < kInputs; ++i) {
          sum += x[static_cast<size_t>(row * kInputs + i)] * weight[static_cast<size_t>(o * blocks * 84 + i)];
        }
        if (got.at[o - first] != sum) return fail("product", o);
      }
    }
  }
  out.expect_empty();
  return static_cast<long long>(status) == 0 ? 0 : fail("status of the product", 0);
}

int check_attention() {
  constexpr int kTokens = 7, kWidth = 32, kKvWidth = 16;
  StatusWord status = 0;
  std::vector<Half> q(kTokens * kWidth), k(kTokens * kKvWidth), v(kTokens * kKvWidth);
  for (auto* part : {&q, &k, &v}) {
    for (Half& value : *part) value = (draw(2) << 15) | ((12 + draw(5)) << 10) | draw(1024);
  }
  const AttentionShape shape{4, 2, 8, Factor{66853, -17}};
  const auto send = [&](hls::stream<HalfBeat<16>>& stream, int token) {
    for (int beat = 0; beat < kWidth / 16; ++beat) {
      HalfBeat<16> made;
      for (int i = 0; i < 16; ++i) made.at[i] = q[static_cast<size_t>(token * kWidth + beat * 16 + i)];
      made.last = beat == kWidth / 16 - 1;
      stream.write(made);
    }
  };
  hls::stream<HalfBeat<16>> in("q"), together("prefill"), alone("decode");
  for (int token = kTokens - 1; token >= 0; --token) send(in, token);
  tw_rpa(in, k.data(), v.data(), kTokens, together, shape, kTokens, status);
  for (int token = kTokens - 1; token >= 0; --token) {
    send(in, token);
    tw_da(in, k.data(), v.data(), kTokens, alone, shape, token + 1, status);
  }
  in.expect_empty();
  for (int at = 0; at < kTokens * kWidth / 16; ++at) {
    const auto a = together.read(), b = alone.read();
    for (int i = 0; i < 16; ++i) {
      if (a.at[i] != b.at[i]) return fail("attention", at * 16 + i);
    }
  }
  together.expect_empty();
  alone.expect_empty();
  return 0;
}

}  // namespace

int main() {
  try {
    if (check_product() != 0 || check_attention() != 0) return EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return EXIT_FAILURE;
  }
  std::printf("all equal\n");
  return EXIT_SUCCESS;
}
