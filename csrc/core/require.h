// SPDX-License-Identifier: Apache-2.0
// Errors that name the argument, what came, what is needed and the way out.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tilewright {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace tilewright
