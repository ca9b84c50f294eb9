// SPDX-License-Identifier: Apache-2.0
// The gradient of linear_attention on a CUDA device. Nothing here reads device memory: sequences are found by the kernels.
#include <tuple>

#include "ops/linear_attention/cuda/backward.h"
#include "ops/linear_attention/cuda/backward_plain.h"
#include "torch/cuda/device.h"

namespace tilewright::torch_adapter {
namespace {

using linear_attention::Decay;
using linear_attention::Rows;
using linear_attention::Rule;
using linear_attention::Sequences;
using linear_attention::cuda::chunk_places;
using linear_attention::cuda::ChunkBackward;
using linear_attention::cuda::PlainBackward;
using linear_attention::cuda::Storage;

constexpr const char* kOp = "linear_attention_backward";

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Inputs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const std::optional<Tensor>& beta;
  const std::optional<Tensor>& g;
  const std::optional<Tensor>& cu_seqlens;
  const Tensor& checkpoints;
  const Tensor& d_out;
  const Tensor& d_state;
};

struct Shape {
  int64_t batch, tokens, heads, value_heads, key_size, value_size;
  Decay decay;
  int64_t sequences, places;
  bool initial, initial_by_chunk;

  std::vector<int64_t> by_query() const { return {batch, tokens, heads, key_size}; }
  std::vector<int64_t> by_token() const { return {batch, tokens, value_heads}; }
  std::vector<int64_t> by_key() const { return {batch, tokens, value_heads, key_size}; }
  std::vector<int64_t> by_value() const { return {batch, tokens, value_heads, value_size}; }
  std::vector<int64_t> states(int64_t count) const { return {count, value_heads, key_size, value_size}; }
};

void require_sizes(const Tensor& tensor, const Tensor& other, const std::vector<int64_t>& sizes, const char* argument,
                   const char* letters) {
  require_same_device(tensor, other, kOp, argument);
  require(is_floating(tensor.scalar_type()), kOp, ": ", argument, " has dtype ", dtype_name(tensor.scalar_type()),
          ", needed float32, bfloat16, float16 or float64");
  const auto rank = static_cast<int64_t>(sizes.size());
  require_dim(tensor, rank, kOp, argument, letters);
  for (int64_t d = 0; d < rank; ++d) require_size(tensor, d, sizes[static_cast<size_t>(d)], kOp, argument, letters);
}

Decay decay_of(const Inputs& in, const Shape& s) {
  if (!in.g.has_value()) return Decay::kNone;
  if (in.g->dim() == 1) {
    require_sizes(*in.g, in.q, {s.value_heads}, "g", "[HV]");
    return Decay::kToken;
  }
  if (in.g->dim() == 3) {
    require_sizes(*in.g, in.q, s.by_token(), "g", "[B, T, HV]");
    return Decay::kToken;
  }
  require_sizes(*in.g, in.q, s.by_key(), "g", "[HV], [B, T, HV] or [B, T, HV, K]");
  return Decay::kChannel;
}

void check_states(const Inputs& in, Shape& s) {
  require_sizes(in.d_state, in.q, s.states(s.sequences), "d_state", "[N, HV, K, V]");
  require_dim(in.checkpoints, 4, kOp, "checkpoints", "[N, HV, K, V]");
  const int64_t kept = in.checkpoints.size(0);
  require(kept == 0 || kept == s.sequences || kept == s.places, kOp, ": checkpoints has ", kept,
          " states, needed what linear_attention kept with save: none, the ", s.sequences, " initial ones or the ",
          s.places, " before each chunk");
  if (kept > 0) require_sizes(in.checkpoints, in.q, s.states(kept), "checkpoints", "[N, HV, K, V]");
  s.initial = kept > 0;
  s.initial_by_chunk = kept != s.sequences;
}

Shape check(const Inputs& in, bool delta) {
  require_device(in.q, kOp, "q");
  require_dim(in.q, 4, kOp, "q", "[B, T, H, K]");
  require_dim(in.v, 4, kOp, "v", "[B, T, HV, V]");
  Shape s{in.q.size(0), in.q.size(1), in.q.size(2), in.v.size(2), in.q.size(3), in.v.size(3), Decay::kNone, 0, 0,
          false,        false};
  const std::vector<int64_t> keys{s.batch, s.tokens, s.heads, s.key_size};
  require_sizes(in.q, in.q, keys, "q", "[B, T, H, K]");
  require_sizes(in.k, in.q, keys, "k", "[B, T, H, K]");
  require_sizes(in.v, in.q, s.by_value(), "v", "[B, T, HV, V]");
  require(s.heads >= 1 && s.value_heads >= 1 && s.value_heads % s.heads == 0, kOp, ": v has HV = ", s.value_heads,
          " heads, needed a multiple of q's H = ", s.heads);
  constexpr int kMaxKeySize = PlainBackward<float>::kMaxKeySize;
  require(s.key_size >= 1 && s.key_size <= kMaxKeySize && s.value_size >= 1, kOp, ": q has K = ", s.key_size,
          " and v has V = ", s.value_size, ", needed 1 to ", kMaxKeySize,
          " channels of keys and at least 1 of values; wider keys run on the CPU");
  require_sizes(in.d_out, in.q, s.by_value(), "d_out", "[B, T, HV, V]");
  require(in.beta.has_value() == delta, kOp, ": beta is needed for the delta rule, and for it alone");
  if (delta) require_sizes(*in.beta, in.q, s.by_token(), "beta", "[B, T, HV]");
  s.decay = decay_of(in, s);
  s.sequences = s.batch;
  if (in.cu_seqlens.has_value()) {
    require_same_device(*in.cu_seqlens, in.q, kOp, "cu_seqlens");
    require_dim(*in.cu_seqlens, 1, kOp, "cu_seqlens", "[N+1]");
    require(s.batch == 1 && in.cu_seqlens->size(0) >= 1, kOp, ": q has B = ", s.batch, " and cu_seqlens has ",
            in.cu_seqlens->size(0), " offsets, needed B = 1 and N+1 offsets");
    s.sequences = in.cu_seqlens->size(0) - 1;
  }
  s.places = chunk_places(s.sequences, s.tokens, in.cu_seqlens.has_value());
  check_states(in, s);
  return s;
}

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [B, T, HV] or, with token stride 0, [HV].
template <class T>
Rows<const T> gates_of(const Tensor& tensor) {
  return tensor.dim() == 1 ? Rows<const T>{data<T>(tensor), 0, 0, tensor.stride(0)} : rows_of<T>(tensor);
}

// Tensors that a call's pointers lead into, alive until its kernels are launched.
class Memory {
 public:
  explicit Memory(const Tensor& where) : where_(where) {}

  template <class T>
  T* take(const std::vector<int64_t>& sizes) {
    return take<T>(sizes, scalar_type_of<T>());
  }

  template <class T>
  T* take(const std::vector<int64_t>& sizes, ScalarType type) {
    tensors_.push_back(empty_on(where_, sizes, type));
    return mutable_data<T>(tensors_.back());
  }

  // The tensor as the copy engine can read it.
  const Tensor& boxes(const Tensor& tensor, ScalarType type) {
    const Tensor converted = torch::stable::to(tensor, type);
    bool fits = converted.stride(3) == 1 && reinterpret_cast<uintptr_t>(converted.const_data_ptr()) % 16 == 0;
    for (int64_t d = 0; d < 3; ++d) {
      const int64_t step = converted.stride(d);
      fits = fits && (converted.size(d) == 1 || (step > 0 && step % 8 == 0));
    }
    tensors_.push_back(fits ? converted : torch::stable::contiguous(converted));
    return tensors_.back();
  }

  // The tensor in T with adjacent elements in its last dimension.
  template <class T>
  const Tensor& rows(const Tensor& tensor, const char* argument) {
    tensors_.push_back(with_adjacent_rows(tensor, scalar_type_of<T>(), kOp, argument));
    return tensors_.back();
  }

  template <class T>
  const T* whole(const Tensor& tensor) {
    tensors_.push_back(torch::stable::contiguous(torch::stable::to(tensor, scalar_type_of<T>())));
    return data<T>(tensors_.back());
  }

  const int64_t* offsets(const std::optional<Tensor>& cu_seqlens) {
    if (!cu_seqlens.has_value()) return nullptr;
    const ScalarType type = cu_seqlens->scalar_type();
    require(type == ScalarType::Long || type == ScalarType::Int, kOp, ": cu_seqlens has dtype ", dtype_name(type),
            ", needed int64 or int32");
    tensors_.push_back(torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long)));
    return data<int64_t>(tensors_.back());
  }

 private:
  const Tensor& where_;
  std::vector<Tensor> tensors_;
};

// Rows behind the last packed sequence are zero, and only the device knows whether there are any.
Tensor output(const Inputs& in, const std::vector<int64_t>& sizes, ScalarType type) {
  return in.cu_seqlens.has_value() ? zeros_on(in.q, sizes, type) : empty_on(in.q, sizes, type);
}

template <class T>
void place_scratch(PlainBackward<T>& p, const Shape& s, Memory& memory) {
  const bool delta = p.rule == Rule::kDelta;
  const std::vector<int64_t> parts{s.batch, s.tokens, s.value_heads, p.tiles, s.key_size};
  if (delta) {
    p.errors = memory.take<T>(s.by_value());
    p.dk_read_parts = memory.take<T>(parts);
    p.d_beta_parts = memory.take<T>({s.batch, s.tokens, s.value_heads, p.tiles});
  }
  p.dq_parts = memory.take<T>(parts);
  p.dk_write_parts = memory.take<T>(parts);
  if (s.decay == Decay::kNone) return;
  p.d_states = memory.take<T>(s.states(s.places));
  p.anchors = memory.take<T>({s.places, s.value_heads, p.tiles, s.key_size});
}

void place_scratch(ChunkBackward& p, const Shape& s, ScalarType type, Memory& memory) {
  constexpr int64_t kRows = linear_attention::cuda::kChunk;
  const std::vector<int64_t> pairs{s.places, s.value_heads, kRows, kRows};
  const std::vector<int64_t> values{s.places, s.value_heads, p.slices(), kRows, ChunkBackward::kSlice};
  const std::vector<int64_t> states{s.places, s.value_heads, p.slices(), ChunkBackward::kSlice,
                                    ChunkBackward::kMaxKeySize};
  if (s.decay == Decay::kChannel) {
    const std::vector<int64_t> keys{s.places, s.value_heads, kRows, ChunkBackward::kMaxKeySize};
    p.keys_into = memory.take<uint16_t>(keys, type);
    p.keys_onto = memory.take<uint16_t>(keys, type);
    p.queries_into = memory.take<uint16_t>(keys, type);
  }
  p.factors = memory.take<float>({s.places, s.value_heads, ChunkBackward::kFactors, kRows});
  p.attention = memory.take<uint16_t>(pairs, type);
  p.states = memory.take<uint16_t>(states, type);
  p.d_states = memory.take<uint16_t>(states, type);
  p.d_errors = memory.take<uint16_t>(values, type);
  if (p.rule != Rule::kDelta) return;
  p.inverse = memory.take<uint16_t>(pairs, type);
  p.errors = memory.take<uint16_t>(values, type);
}

template <class T>
SixTensors plain(const Inputs& in, const Shape& s, double scale, bool delta) {
  constexpr ScalarType kType = scalar_type_of<T>();
  Memory memory(in.q);
  PlainBackward<T> p{};
  p.rule = delta ? Rule::kDelta : Rule::kAdditive;
  p.decay = s.decay;
  p.sequences = {s.sequences, s.tokens, memory.offsets(in.cu_seqlens)};
  p.heads = static_cast<int>(s.heads);
  p.value_heads = static_cast<int>(s.value_heads);
  p.key_size = static_cast<int>(s.key_size);
  p.value_size = static_cast<int>(s.value_size);
  p.tiles = (p.value_size + PlainBackward<T>::kColumns - 1) / PlainBackward<T>::kColumns;
  p.scale = static_cast<T>(scale);
  p.q = rows_of<T>(memory.rows<T>(in.q, "q"));
  p.k = rows_of<T>(memory.rows<T>(in.k, "k"));
  p.v = rows_of<T>(memory.rows<T>(in.v, "v"));
  p.d_out = rows_of<T>(memory.rows<T>(in.d_out, "d_out"));
  if (delta) p.beta = rows_of<T>(memory.rows<T>(*in.beta, "beta"));
  if (in.g.has_value()) p.g = gates_of<T>(memory.rows<T>(*in.g, "g"));
  if (s.initial) p.initial_state = memory.whole<T>(in.checkpoints);
  p.initial_by_chunk = s.initial_by_chunk;
  p.d_final_state = memory.whole<T>(in.d_state);
  place_scratch(p, s, memory);

  const Tensor dq = output(in, s.by_key(), kType), dk = output(in, s.by_key(), kType);
  const Tensor dv = output(in, s.by_value(), kType);
  const Tensor d_beta = delta ? output(in, s.by_token(), kType) : empty_on(in.q, {0}, kType);
  const Tensor dg = s.decay == Decay::kNone ? empty_on(in.q, {0}, kType)
                                            : output(in, s.decay == Decay::kChannel ? s.by_key() : s.by_token(), kType);
  const Tensor d_initial = empty_on(in.q, s.states(s.sequences), kType);
  p.dq = mutable_data<T>(dq);
  p.dk = mutable_data<T>(dk);
  p.dv = mutable_data<T>(dv);
  p.d_beta = mutable_data<T>(d_beta);
  p.dg = mutable_data<T>(dg);
  p.d_initial_state = mutable_data<T>(d_initial);
  linear_attention::cuda::launch_plain_backward(p, stream_of(in.q));
  return {dq, dk, dv, d_beta, dg, d_initial};
}

// The decay, beta and the states are float32 beside 16-bit rows.
SixTensors by_chunk(const Inputs& in, const Shape& s, double scale, bool delta) {
  constexpr ScalarType kWide = ScalarType::Float;
  const ScalarType type = in.q.scalar_type();
  Memory memory(in.q);
  ChunkBackward p{};
  p.storage = type == ScalarType::BFloat16 ? Storage::kBf16 : Storage::kF16;
  p.rule = delta ? Rule::kDelta : Rule::kAdditive;
  p.decay = s.decay;
  p.sequences = {s.sequences, s.tokens, memory.offsets(in.cu_seqlens)};
  p.batches = static_cast<int>(s.batch);
  p.heads = static_cast<int>(s.heads);
  p.value_heads = static_cast<int>(s.value_heads);
  p.key_size = static_cast<int>(s.key_size);
  p.value_size = static_cast<int>(s.value_size);
  p.scale = static_cast<float>(scale);
  p.q = rows_of<uint16_t>(memory.boxes(in.q, type));
  p.k = rows_of<uint16_t>(memory.boxes(in.k, type));
  p.v = rows_of<uint16_t>(memory.boxes(in.v, type));
  p.d_out = rows_of<uint16_t>(memory.boxes(in.d_out, type));
  if (delta) p.beta = rows_of<float>(memory.rows<float>(*in.beta, "beta"));
  if (in.g.has_value()) p.g = gates_of<float>(memory.rows<float>(*in.g, "g"));
  if (s.initial) p.initial_state = memory.whole<float>(in.checkpoints);
  p.initial_by_chunk = s.initial_by_chunk;
  p.d_final_state = memory.whole<float>(in.d_state);
  place_scratch(p, s, type, memory);

  const bool channel = s.decay == Decay::kChannel;
  // Decays a channel come by value head: so do the parts of dq and dk, which the caller sums in float32.
  const Tensor dq = channel ? output(in, s.by_key(), kWide) : output(in, s.by_query(), type);
  const Tensor dk = channel ? output(in, s.by_key(), kWide) : output(in, s.by_query(), type);
  const Tensor dv = output(in, s.by_value(), type);
  const Tensor d_beta = delta ? output(in, s.by_token(), kWide) : empty_on(in.q, {0}, kWide);
  const Tensor dg =
      s.decay == Decay::kNone ? empty_on(in.q, {0}, kWide) : output(in, channel ? s.by_key() : s.by_token(), kWide);
  const Tensor d_initial = empty_on(in.q, s.states(s.sequences), kWide);
  p.dv = mutable_data<uint16_t>(dv);
  p.d_beta = mutable_data<float>(d_beta);
  p.dg = mutable_data<float>(dg);
  p.d_initial_state = mutable_data<float>(d_initial);
  if (channel) {
    p.dq_wide = mutable_data<float>(dq);
    p.dk_wide = mutable_data<float>(dk);
    linear_attention::cuda::launch_channel_backward(p, stream_of(in.q));
  } else {
    p.dq = mutable_data<uint16_t>(dq);
    p.dk = mutable_data<uint16_t>(dk);
    linear_attention::cuda::launch_chunk_backward(p, stream_of(in.q));
  }
  return {dq, dk, dv, d_beta, dg, d_initial};
}

// What the tensor cores take. The fake kernel in ops/linear_attention.py asks the same.
bool fits_tensor_cores(const Inputs& in, const Shape& s) {
  const ScalarType type = in.q.scalar_type();
  return (type == ScalarType::BFloat16 || type == ScalarType::Half) && in.k.scalar_type() == type &&
         in.v.scalar_type() == type && s.batch > 0 && s.tokens > 0 && s.key_size % 8 == 0 &&
         s.key_size <= ChunkBackward::kMaxKeySize && s.value_size % 8 == 0 &&
         s.value_size <= ChunkBackward::kMaxValueSize;
}

bool wants_double(const Inputs& in) {
  return in.q.scalar_type() == ScalarType::Double || in.k.scalar_type() == ScalarType::Double ||
         in.v.scalar_type() == ScalarType::Double;
}

// errors: this gradient computes again what the forward pass corrected, and reads none that it kept.
SixTensors backward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& beta,
                    const std::optional<Tensor>& g, const std::optional<Tensor>& cu_seqlens, const Tensor& checkpoints,
                    const Tensor& /*errors*/, const Tensor& d_out, const Tensor& d_state, double scale, bool delta) {
  const OnDevice guard(q);
  const Inputs in{q, k, v, beta, g, cu_seqlens, checkpoints, d_out, d_state};
  const Shape s = check(in, delta);
  if (fits_tensor_cores(in, s)) return by_chunk(in, s, scale, delta);
  return wants_double(in) ? plain<double>(in, s, scale, delta) : plain<float>(in, s, scale, delta);
}

}  // namespace

TILEWRIGHT_DEVICE_OPERATORS(m) { m.impl("linear_attention_backward", TORCH_BOX(&backward)); }

}  // namespace tilewright::torch_adapter
