// SPDX-License-Identifier: Apache-2.0
// hls::stream for a plain C++ compiler. Called one after the other, a read of an empty stream is an error (the vendor's only
// warns and hands out a default, so that a simulation passes which would hang). In a Network, streams have their depth:
// reads of an empty and writes to a full one wait.
#pragma once

#ifdef TILEWRIGHT_VENDOR_HLS
#include <hls_stream.h>
#else

#include <algorithm>
#include <cstddef>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>

#include "tilewright_hls/network.h"

namespace hls {

template <class T>
class stream {
 public:
  explicit stream(std::string name = "stream", std::size_t depth = 2) : name_(std::move(name)), depth_(depth) {}
  stream(const stream&) = delete;
  stream& operator=(const stream&) = delete;

  T read() {
    if (items_.empty()) {
      auto* network = tilewright_hls::Network::current();
      if (network == nullptr) throw std::runtime_error("read of the empty stream '" + name_ + "'");
      network->wait([this] { return !items_.empty(); }, "reads from empty '" + name_ + "'");
    }
    T item = items_.front();
    items_.pop_front();
    return item;
  }
  void write(const T& item) {
    if (auto* network = tilewright_hls::Network::current(); network != nullptr) {
      network->wait([this] { return items_.size() < depth_; },
                    "writes to full '" + name_ + "' of depth " + std::to_string(depth_));
    }
    items_.push_back(item);
    most_ = std::max(most_, items_.size());
  }
  bool empty() const { return items_.empty(); }
  bool full() const { return items_.size() >= depth_; }
  std::size_t size() const { return items_.size(); }

  // For test benches only.
  std::size_t most() const { return most_; }
  void set_depth(std::size_t depth) { depth_ = depth; }
  void expect_empty() const {
    if (!items_.empty()) {
      throw std::runtime_error("stream '" + name_ + "' holds " + std::to_string(items_.size()) + " items at the end");
    }
  }

 private:
  std::string name_;
  std::size_t depth_, most_ = 0;
  std::deque<T> items_;
};

}  // namespace hls

#endif
