// SPDX-License-Identifier: Apache-2.0
#include "ops/local_linear_attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tilewright::local_linear_attention {
namespace {

// The solution of a x = b, n unknowns, with row exchanges; a and b are overwritten.
std::vector<double> solve(std::vector<double>& a, std::vector<double>& b) {
  const size_t n = b.size();
  for (size_t c = 0; c < n; ++c) {
    size_t pivot = c;
    for (size_t r = c + 1; r < n; ++r) {
      if (std::abs(a[r * n + c]) > std::abs(a[pivot * n + c])) pivot = r;
    }
    for (size_t j = 0; j < n; ++j) std::swap(a[c * n + j], a[pivot * n + j]);
    std::swap(b[c], b[pivot]);
    for (size_t r = c + 1; r < n; ++r) {
      const double factor = a[r * n + c] / a[c * n + c];
      for (size_t j = c; j < n; ++j) a[r * n + j] -= factor * a[c * n + j];
      b[r] -= factor * b[c];
    }
  }
  std::vector<double> x(n);
  for (size_t c = n; c-- > 0;) {
    double sum = b[c];
    for (size_t j = c + 1; j < n; ++j) sum -= a[c * n + j] * x[j];
    x[c] = sum / a[c * n + c];
  }
  return x;
}

struct Row {
  const double* q;
  double ridge;
  int64_t begin, end;   // visible keys, rows of k and v
  int64_t kv_head;
  double* o;
};

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

void fit(const Forward<double>& p, const Row& row) {
  const int64_t size = p.shape.key_size, count = row.end - row.begin;
  std::fill(row.o, row.o + p.shape.value_size, 0.0);
  if (count <= 0) return;
  const auto key = [&](int64_t j) { return p.k + ((row.begin + j) * p.shape.kv_heads + row.kv_head) * size; };
  std::vector<double> w(static_cast<size_t>(count));
  double peak = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < count; ++j) {
    w[static_cast<size_t>(j)] = p.options.scale * dot(row.q, key(j), size);
    peak = std::max(peak, w[static_cast<size_t>(j)]);
  }
  const auto n = static_cast<size_t>(size);
  std::vector<double> mu(n), sigma(n * n), z(n);
  double omega = 0.0;
  for (int64_t j = 0; j < count; ++j) {
    double& weight = w[static_cast<size_t>(j)];
    weight = std::exp(weight - peak);
    omega += weight;
    for (size_t a = 0; a < n; ++a) z[a] = key(j)[a] - row.q[a];
    for (size_t a = 0; a < n; ++a) {
      mu[a] += weight * z[a];
      for (size_t b = 0; b < n; ++b) sigma[a * n + b] += weight * z[a] * z[b];
    }
  }
  const double r = row.ridge * (p.options.absolute ? std::exp(-peak) : omega);
  for (size_t a = 0; a < n; ++a) sigma[a * n + a] += r;
  std::vector<double> right = mu;
  const std::vector<double> rho = solve(sigma, right);
  const double delta = omega - dot(mu.data(), rho.data(), size);
  const double at_query = dot(rho.data(), row.q, size);
  for (int64_t j = 0; j < count; ++j) {
    const double s = w[static_cast<size_t>(j)] * (1.0 - dot(rho.data(), key(j), size) + at_query) / delta;
    const double* value = p.v + ((row.begin + j) * p.shape.kv_heads + row.kv_head) * p.shape.value_size;
    for (int64_t d = 0; d < p.shape.value_size; ++d) row.o[d] += s * value[d];
  }
}

}  // namespace

void reference(const Forward<double>& p, const std::vector<Segment>& segments) {
  for (const Segment& s : segments) {
    for (int64_t i = 0; i < s.queries; ++i) {
      const int64_t position = s.keys - s.queries + i;
      const int64_t begin = p.options.window > position ? 0 : position - p.options.window + 1;
      const int64_t end = p.options.causal ? std::min(position + 1, s.keys) : s.keys;
      for (int64_t h = 0; h < p.shape.heads; ++h) {
        const int64_t at = (s.first_query + i) * p.shape.heads + h;
        fit(p, {p.q + at * p.shape.key_size, p.ridge[at], s.first_key + begin, s.first_key + end, h / p.shape.group(),
                p.o + at * p.shape.value_size});
      }
    }
  }
}

}  // namespace tilewright::local_linear_attention
