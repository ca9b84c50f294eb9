// SPDX-License-Identifier: Apache-2.0
// Where Verilator's runtime prints: into the message of the exception that an assertion becomes. Included by force.
#pragma once

namespace tilewright::rtl {
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
int print(const char* format, ...);
}  // namespace tilewright::rtl

#define VL_PRINTF tilewright::rtl::print
