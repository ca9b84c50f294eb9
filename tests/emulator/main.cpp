// SPDX-License-Identifier: Apache-2.0
// emulator_tests layouts FILE: compares with CuTe's tables in the file (cute_tables.cpp). emulator_tests SEED: runs every case, prints name, outcome, message, separated by tabs. The outcome is "right", "wrong"
// (no error, wrong results), "caught" (the expected error) or "missed" (no error, or another one).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "cases.h"

using namespace tilewright::emulator_tests;

namespace {

// One of the alternatives, which `|` separates.
bool says(const std::string& message, const std::string& expected) {
  for (size_t from = 0; from < expected.size();) {
    const size_t end = std::min(expected.find('|', from), expected.size());
    if (message.find(expected.substr(from, end - from)) != std::string::npos) return true;
    from = end + 1;
  }
  return false;
}

void run_case(const Case& test) {
  const char* outcome = "right";
  std::string message;
  try {
    if (!test.run()) outcome = "wrong";
    if (!test.expected.empty()) outcome = "missed";
  } catch (const std::exception& error) {
    message = error.what();
    outcome = says(message, test.expected) ? "caught" : test.expected.empty() ? "wrong" : "missed";
  }
  std::printf("%s\t%s\t%s\n", test.name.c_str(), outcome, message.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "layouts") {
    run_layouts(arguments[2]);
    return 0;
  }
  auto& settings = tilewright::emulator::current_settings();
  settings.seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 0;
  settings.strict = true;
  for (const auto& cases :
       {unit_cases(), simple_cases(), pipeline_cases(), product_cases(), store_cases(), cluster_cases()}) {
    for (const Case& test : cases) {
      if (count < 3 || test.name == arguments[2]) run_case(test);
    }
  }
  return 0;
}
