// SPDX-License-Identifier: Apache-2.0
// wgmma: a product is computed when the first warp waits for it, the last moment the program allows; until a thread itself
// has waited, its accumulators hold poison.
#include <algorithm>
#include <cstring>

#include "emulator/products.h"
#include "emulator/state.h"

namespace tilewright::emulator {

constexpr uint32_t kPoison = 0x7fffffffu;  // a NaN, and as an integer far from anything sensible

namespace {

uint32_t pattern_bytes(uint64_t descriptor) {
  constexpr uint32_t kBytes[4] = {0, 128, 64, 32};
  return kBytes[descriptor >> 62];
}

// The 16-byte pieces of an operand of `rows` rows of M or N, 32 bytes of K each. K-major: piece 2 r + j is half j of row r.
// MN-major: piece k * (rows / 8) + c holds the elements 8 c to 8 c + 7 of column k.
std::vector<uint32_t> operand_chunks(const Block& block, uint64_t descriptor, int rows, bool mn_major,
                                     const char* which) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>((descriptor >> 16) & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>((descriptor >> 32) & 0x3fff) << 4;
  const uint32_t width = pattern_bytes(descriptor);
  if (((descriptor >> 49) & 7) != 0)
    kernel_error("wgmma: the descriptor of %s has a base offset; align its tile", which);
  if (width != 0 && start % (8 * width) >= width) {
    kernel_error("wgmma: the descriptor of %s starts at shared address %u, within a swizzle pattern of %u bytes", which,
                 start, 8 * width);
  }
  const uint32_t mask = width == 128 ? 0x70 : width == 64 ? 0x30 : width == 32 ? 0x10 : 0;
  std::vector<uint32_t> chunks;
  const auto add = [&](uint32_t address) {
    address ^= (address >> 3) & mask;
    if (address < kSharedBase || address + 16 > kSharedBase + block.shared.bytes) {
      kernel_error("wgmma reads %s at shared byte %lld, outside the block's %u bytes", which,
                   static_cast<long long>(address) - kSharedBase, block.shared.bytes);
    }
    chunks.push_back(address - kSharedBase);
  };
  const uint32_t row = width == 0 ? 16 : width;
  if (!mn_major) {
    for (uint32_t r = 0; r < static_cast<uint32_t>(rows); ++r) {
      for (uint32_t j = 0; j < 2; ++j) add(start + r % 8 * row + r / 8 * stride + j * (width == 0 ? leading : 16));
    }
    return chunks;
  }
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t c = 0; c < static_cast<uint32_t>(rows) / 8; ++c) {
      if (width == 0) {
        add(start + c * stride + k % 8 * 16 + k / 8 * leading);
      } else {
        add(start + c % (width / 16) * 16 + c / (width / 16) * leading + k % 8 * width + k / 8 * stride);
      }
    }
  }
  return chunks;
}

// The operand as [rows][32 bytes].
std::vector<uint8_t> gather(const Block& block, const std::vector<uint32_t>& chunks, int rows, bool mn_major) {
  std::vector<uint8_t> bytes(static_cast<size_t>(rows) * kRowBytes);
  for (size_t i = 0; i < chunks.size(); ++i) {
    const char* from = block.shared.base + chunks[i];
    if (!mn_major) {
      std::memcpy(bytes.data() + i * 16, from, 16);
      continue;
    }
    const size_t k = i / (rows / 8), c = i % (rows / 8);
    for (size_t e = 0; e < 8; ++e) std::memcpy(bytes.data() + (8 * c + e) * kRowBytes + 2 * k, from + 2 * e, 2);
  }
  return bytes;
}

std::vector<uint8_t> gather_registers(const Product& product) {
  std::vector<uint8_t> bytes(64 * kRowBytes);
  for (int t = 0; t < 128; ++t) {
    for (int j = 0; j < 4; ++j) {
      const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (j % 2);
      std::memcpy(bytes.data() + row * kRowBytes + 16 * (j / 2) + 4 * (t % 4), &product.a_registers[t][j], 4);
    }
  }
  return bytes;
}

int accumulator_row_of(int t, int i) { return t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2); }
int accumulator_col_of(int t, int i) { return 8 * (i / 4) + 2 * (t % 4) + i % 2; }

template <class T>
void run_product(Product& product, const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
  const int n = product.shape.n, depth = kRowBytes / element_bytes(product.shape.a);
  std::vector<T> left(static_cast<size_t>(64) * depth), right(static_cast<size_t>(n) * depth),
      d(static_cast<size_t>(64) * n);
  if constexpr (std::is_same_v<T, float>) {
    decode_floats(product.shape.a, a.data(), 64, left.data());
    decode_floats(product.shape.b, b.data(), n, right.data());
  } else {
    decode_integers(product.shape.a, a.data(), 64, left.data());
    decode_integers(product.shape.b, b.data(), n, right.data());
  }
  const auto each = [&](auto&& visit) {
    for (int t = 0; t < 128; ++t) {
      for (int i = 0; i < n / 2; ++i) {
        visit(d[accumulator_row_of(t, i) * n + accumulator_col_of(t, i)], product.d[t * (n / 2) + i]);
      }
    }
  };
  if (product.accumulate) each([](T& value, uint32_t bits) { std::memcpy(&value, &bits, 4); });
  multiply(64, n, depth, left.data(), right.data(), d.data());
  each([](T value, uint32_t& bits) { std::memcpy(&bits, &value, 4); });
}

void execute(Block& block, Product& product) {
  if (product.executed) return;
  product.executed = true;
  if (product.earlier != nullptr) product.d = product.earlier->d;
  const std::vector<uint8_t> a = product.a_in_registers ? gather_registers(product)
                                                        : gather(block, product.a_chunks, 64, product.shape.a_mn_major);
  const std::vector<uint8_t> b = gather(block, product.b_chunks, product.shape.n, product.shape.b_mn_major);
  if (is_integer(product.shape.a)) {
    run_product<int32_t>(product, a, b);
  } else {
    run_product<float>(product, a, b);
  }
}

// Operands are read from the moment the first warp has issued the product until the last one has waited for it.
// Each warp must have been told of what it reads.
void start_reading(Block& block, Product& product) {
  const auto check = product.reading ? &check_async_read : &mark_reading;
  product.reading = true;
  for (const uint32_t chunk : product.a_chunks) check(block, chunk, 16, "wgmma (operand A)");
  for (const uint32_t chunk : product.b_chunks) check(block, chunk, 16, "wgmma (operand B)");
}

void retire(Block& block, WarpGroup& group) {
  while (!group.products.empty() && group.products.front()->returned == 128) {
    Product& done = *group.products.front();
    for (const uint32_t chunk : done.a_chunks) unmark_reading(block, chunk, 16);
    for (const uint32_t chunk : done.b_chunks) unmark_reading(block, chunk, 16);
    for (auto& later : group.products) {
      if (later->earlier != &done) continue;
      if (!later->executed) later->d = done.d;
      later->earlier = nullptr;
    }
    group.products.pop_front();
    ++group.first;
  }
}

Product& enter_product(Block& block, WarpGroup& group, const Product& wanted) {
  const uint64_t at = current->issued++ - group.first;
  if (at == group.products.size()) {
    group.products.push_back(std::make_unique<Product>(wanted));
    Product& product = *group.products.back();
    const ProductShape& shape = product.shape;
    if (!product.a_in_registers) product.a_chunks = operand_chunks(block, product.a, 64, shape.a_mn_major, "A");
    product.b_chunks = operand_chunks(block, product.b, shape.n, shape.b_mn_major, "B");
    product.d.assign(static_cast<size_t>(128) * (shape.n / 2), 0);
    return product;
  }
  Product& product = *group.products[at];
  const ProductShape &one = product.shape, &two = wanted.shape;
  if (one.a != two.a || one.b != two.b || one.n != two.n || one.a_mn_major != two.a_mn_major ||
      one.b_mn_major != two.b_mn_major || product.a_in_registers != wanted.a_in_registers) {
    kernel_error("wgmma number %llu of the warpgroup is another instruction here than in other threads",
                 static_cast<unsigned long long>(current->issued - 1));
  }
  if (product.a != wanted.a || product.b != wanted.b || product.accumulate != wanted.accumulate) {
    kernel_error(
        "wgmma number %llu of the warpgroup has another descriptor or accumulate flag here than in other threads",
        static_cast<unsigned long long>(current->issued - 1));
  }
  if (product.earlier != wanted.earlier) {
    kernel_error("wgmma number %llu of the warpgroup goes on with other accumulators here than in other threads",
                 static_cast<unsigned long long>(current->issued - 1));
  }
  return product;
}

void check_fence(const void* registers, size_t bytes, const char* which) {
  const Fiber& fiber = *current;
  if (fiber.register_fence == 0) kernel_error("wgmma without a wgmma_fence() before it");
  const size_t at = static_cast<size_t>(static_cast<const char*>(registers) - fiber.stack->base());
  if (at >= kStackBytes) kernel_error("wgmma: %s is not an array of the thread's own", which);
  for (size_t word = at / 8; word <= (at + bytes - 1) / 8; ++word) {
    if (fiber.stack->stamps()[word] < fiber.register_fence) continue;
    kernel_error("wgmma: registers of %s were written after the last wgmma_fence()", which);
  }
}

// The product under way that already has these registers, if any.
Product* holder_of(const Fiber& fiber, const char* registers, size_t bytes) {
  for (auto pending = fiber.products.rbegin(); pending != fiber.products.rend(); ++pending) {
    if (registers + bytes <= pending->registers || registers >= pending->registers + pending->bytes) continue;
    if (pending->registers == registers && pending->bytes == bytes) return pending->product;
    kernel_error("wgmma: its accumulators overlap those of a product under way without being the same");
  }
  return nullptr;
}

}  // namespace

void wgmma_fence() { current->register_fence = ++current->clock; }

void wgmma_issue(const ProductShape& shape, void* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                 bool accumulate) {
  const Unwatched inside;
  Fiber& fiber = *current;
  Block& block = this_block();
  if (fiber.thread / 128 * 128 + 128 > machine->shape.threads) {
    kernel_error("wgmma in an incomplete warpgroup: the block has %d threads", machine->shape.threads);
  }
  WarpGroup& group = block.groups[fiber.thread / 128];
  auto* registers = static_cast<char*>(d);
  const size_t bytes = static_cast<size_t>(shape.n / 2) * 4;
  Product wanted{};
  wanted.shape = shape;
  wanted.a = a;
  wanted.b = b;
  wanted.a_in_registers = a_registers != nullptr;
  wanted.accumulate = accumulate;
  wanted.earlier = holder_of(fiber, registers, bytes);
  if (wanted.earlier == nullptr) check_fence(d, bytes, "D");
  if (a_registers != nullptr) check_fence(a_registers, 16, "A");
  Product& product = enter_product(block, group, wanted);
  const int t = fiber.thread % 128;
  if (a_registers != nullptr) std::copy_n(a_registers, 4, product.a_registers[t].begin());
  if (wanted.earlier == nullptr) std::memcpy(product.d.data() + t * (shape.n / 2), d, bytes);
  std::fill_n(reinterpret_cast<uint32_t*>(registers), shape.n / 2, kPoison);
  fiber.products.push_back({&product, registers, bytes, -1});
  ++product.issued;
  if (++product.issued_by_warp[t / 32] == 32) start_reading(block, product);
  if (product.issued == 128) {
    for (Fiber* waiter : std::exchange(group.waiting, {})) wake(waiter);
  }
}

void wgmma_commit() {
  const Unwatched inside;
  for (PendingProduct& pending : current->products) {
    if (pending.group < 0) pending.group = current->product_groups;
  }
  ++current->product_groups;
}

namespace {

void give_back(const PendingProduct& pending) {
  const uint32_t* from = pending.product->d.data() + current->thread % 128 * (pending.bytes / 4);
  auto* registers = reinterpret_cast<uint32_t*>(pending.registers);
  for (size_t i = 0; i < pending.bytes / 4; ++i) {
    if (registers[i] != kPoison) kernel_error("accumulator register %zu was written while its wgmma was under way", i);
  }
  std::memcpy(registers, from, pending.bytes);
}

}  // namespace

void wgmma_wait(int pending_groups) {
  const Unwatched inside;
  Fiber& fiber = *current;
  Block& block = this_block();
  WarpGroup& group = block.groups[fiber.thread / 128];
  const auto due = [&](const PendingProduct& p) {
    return p.group >= 0 && p.group < fiber.product_groups - pending_groups;
  };
  for (const PendingProduct& pending : fiber.products) {
    if (!due(pending)) continue;
    while (pending.product->issued < 128) {
      group.waiting.push_back(&fiber);
      park("wgmma_wait, for warps of the group that have not issued the product", &group);
    }
  }
  for (const PendingProduct& pending : fiber.products) {
    if (!due(pending)) continue;
    for (const auto& product : group.products) {  // in the order of issue
      execute(block, *product);
      if (product.get() == pending.product) break;
    }
  }
  for (size_t i = 0; i < fiber.products.size(); ++i) {
    const PendingProduct& pending = fiber.products[i];
    if (!due(pending)) continue;
    ++pending.product->returned;
    const bool last = std::none_of(fiber.products.begin() + static_cast<std::ptrdiff_t>(i) + 1, fiber.products.end(),
                                   [&](const PendingProduct& p) { return p.registers == pending.registers; });
    if (last) give_back(pending);
  }
  std::erase_if(fiber.products, due);
  retire(block, group);
}

void products_end(Fiber& fiber) {
  if (fiber.products.empty()) return;
  kernel_error("returns while a wgmma is under way: no %s covers it",
               fiber.products.front().group < 0 ? "wgmma_commit()" : "wgmma_wait");
}

}  // namespace tilewright::emulator
