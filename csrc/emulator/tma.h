// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/tma.h; included inside its namespace.

struct alignas(64) TensorMap {
  emulator::Box box;
};

template <class T>
TensorMap make_tensor_map(const void* base, int rank, const uint64_t* sizes, const uint64_t* strides_bytes,
                          const uint32_t* box, Swizzle swizzle) {
  TensorMap map{};
  map.box.base = static_cast<const char*>(base);
  map.box.rank = rank;
  map.box.element_bytes = sizeof(T);
  map.box.swizzle = static_cast<uint32_t>(swizzle);
  for (int d = 0; d < rank && d < 5; ++d) {
    map.box.sizes[d] = sizes[d];
    map.box.strides[d] = d == 0 ? sizeof(T) : strides_bytes[d - 1];
    map.box.extent[d] = box[d];
  }
  emulator::check_box(map.box);
  return map;
}

inline void prefetch(const TensorMap&) {}

template <class... Coordinates>
void load_tile(void* to, const TensorMap& map, Barrier& barrier, Coordinates... c) {
  const int coordinates[] = {static_cast<int>(c)...};
  emulator::load_box(to, map.box, &barrier, coordinates, sizeof...(c), 0);
}
template <class... Coordinates>
void load_tile_multicast(void* to, const TensorMap& map, Barrier& barrier, uint16_t blocks, Coordinates... c) {
  const int coordinates[] = {static_cast<int>(c)...};
  emulator::load_box(to, map.box, &barrier, coordinates, sizeof...(c), blocks | emulator::kMulticast);
}
template <class... Coordinates>
void store_tile(const TensorMap& map, const void* from, Coordinates... c) {
  const int coordinates[] = {static_cast<int>(c)...};
  emulator::store_box(map.box, from, coordinates, sizeof...(c));
}
inline void load_bulk(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  emulator::load_bulk(to, from, bytes, &barrier);
}
inline void store_bulk(void* to, const void* from, uint32_t bytes) { emulator::store_bulk(to, from, bytes); }
inline void store_commit() { emulator::store_commit(); }
template <int Pending>
void store_wait() {
  emulator::store_wait(Pending, true);
}
inline void store_wait_all() { emulator::store_wait(0, false); }
