// SPDX-License-Identifier: Apache-2.0
// The host half of hopper/types.h; included inside its namespace.

inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) { return emulator::f16_to_float(value.bits); }
inline float to_float(e4m3 value) { return emulator::e4m3_to_float(value.bits); }

inline uint32_t pack_bf16x2(float low, float high) {
  return emulator::float_to_bf16(low) | static_cast<uint32_t>(emulator::float_to_bf16(high)) << 16;
}
inline uint32_t pack_f16x2(float low, float high) {
  return emulator::float_to_f16(low) | static_cast<uint32_t>(emulator::float_to_f16(high)) << 16;
}
inline uint16_t pack_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(emulator::float_to_e4m3(low) | emulator::float_to_e4m3(high) << 8);
}
inline uint32_t pack_e4m3x4(float a0, float a1, float a2, float a3) {
  return pack_e4m3x2(a0, a1) | static_cast<uint32_t>(pack_e4m3x2(a2, a3)) << 16;
}
inline void unpack_f16x2(uint32_t word, float& low, float& high) {
  low = emulator::f16_to_float(static_cast<uint16_t>(word));
  high = emulator::f16_to_float(static_cast<uint16_t>(word >> 16));
}
inline uint32_t e4m3x2_to_f16x2(uint16_t codes) {
  return pack_f16x2(emulator::e4m3_to_float(static_cast<uint8_t>(codes)),
                    emulator::e4m3_to_float(static_cast<uint8_t>(codes >> 8)));
}
inline void unpack_e4m3x4(uint32_t word, float (&values)[4]) {
  for (int i = 0; i < 4; ++i) values[i] = emulator::e4m3_to_float(static_cast<uint8_t>(word >> (8 * i)));
}

// To nearest, ties away from zero, as cvt.rna does.
inline float round_tf32(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return bits_float((bits + 0x1000u) & 0xffffe000u);
}
