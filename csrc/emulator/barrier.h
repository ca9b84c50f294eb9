// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/barrier.h; included inside its namespace.

inline void init(Barrier& barrier, int arrivals) { emulator::barrier_init(&barrier, arrivals); }
inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void arrive(Barrier& barrier) { emulator::barrier_arrive(&barrier, 0, false); }
inline void arrive_expect(Barrier& barrier, uint32_t bytes) { emulator::barrier_arrive(&barrier, bytes, true); }
inline void arrive_cluster(Barrier& barrier, int block) { emulator::barrier_arrive_cluster(&barrier, block); }
inline bool try_wait(Barrier& barrier, uint32_t phase) { return emulator::barrier_test(&barrier, phase); }
inline void wait(Barrier& barrier, uint32_t phase) { emulator::barrier_wait(&barrier, phase); }
inline void named_sync(int id, int threads) { emulator::named_sync(id, threads); }
inline void named_arrive(int id, int threads) { emulator::named_arrive(id, threads); }
inline void fence_async_shared() { emulator::fence_async_shared(); }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::cluster_sync(); }
template <class T>
T load_cluster(const T* shared, int block) {
  T value;
  emulator::read_cluster(&value, shared, sizeof(value), block);
  return value;
}

template <int N>
void raise_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emulator::set_registers(N, true);
}
template <int N>
void lower_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emulator::set_registers(N, false);
}

// Kernels of a stream run one after the other here.
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
