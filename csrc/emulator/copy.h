// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/copy.h; included inside its namespace.

inline void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
  emulator::copy_async(shared, global, 16, valid_bytes);
}
inline void copy_async_8(void* shared, const void* global, int valid_bytes = 8) {
  emulator::copy_async(shared, global, 8, valid_bytes);
}
inline void copy_async_4(void* shared, const void* global, int valid_bytes = 4) {
  emulator::copy_async(shared, global, 4, valid_bytes);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int Pending>
void copy_async_wait() {
  emulator::copy_async_wait(Pending);
}

inline U128 load_16(const void* from) {
  emulator::check_alignment(from, 16, "load_16");
  return *static_cast<const U128*>(from);
}
inline void store_16(void* to, U128 value) {
  emulator::check_alignment(to, 16, "store_16");
  *static_cast<U128*>(to) = value;
}
inline U128 load_16_streaming(const void* global) {
  emulator::check_global(global, "load_16_streaming");
  return *static_cast<const U128*>(global);
}
