// The arguments of norm_rotary: which of them its loops take, and where the rows of a part lie.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <array>
#include <cstdint>
#include <optional>

#include "arguments.h"

namespace harmonica {

enum class Norm { none, rms, layer };

struct RotarySettings {
  int64_t dim;
  Norm norm;
  bool across;
  double eps;
  bool interleaved;
};

inline std::optional<RotarySettings> settings_of(int64_t dim, c10::string_view norm, bool across, double eps,
                                                 bool interleaved) {
  if (norm == "none") return RotarySettings{dim, Norm::none, across, eps, interleaved};
  if (norm == "rms") return RotarySettings{dim, Norm::rms, across, eps, interleaved};
  if (norm == "layer") return RotarySettings{dim, Norm::layer, across, eps, interleaved};
  return std::nullopt;
}

struct Part {
  const at::Tensor& x;
  std::optional<at::Tensor> weight, bias, cos, sin;
};

constexpr int64_t most_dims = 6;

struct Rows;

// A tensor, broadcast to the shape of a part, as rows: its strides in bytes, 0 where it broadcasts.
struct Place {
  const char* data = nullptr;
  std::array<int64_t, most_dims> strides{};
  int64_t step = 0;  // along a row

  inline const char* at(const Rows& rows, int64_t row) const;
};

// The rows of a part: `count` of them, of `width` numbers; `normed` successive ones share a norm.
struct Rows {
  Rows(const Part& part, const at::Tensor& result, bool across)
      : dims(part.x.dim() - 1), width(part.x.size(-1)), count(part.x.numel() / width),
        normed(across ? part.x.size(-2) : 1) {
    for (int64_t i = 0; i < dims; ++i) sizes[i] = part.x.size(i);
    x = place(part.x);
    out = place(result);
    if (part.cos.has_value()) {
      cos = place(*part.cos);
      sin = place(*part.sin);
    }
  }

  Place place(const at::Tensor& t) const {
    Place found{static_cast<const char*>(t.const_data_ptr()), {}, t.stride(-1) * int64_t(t.element_size())};
    for (int64_t i = 0, own = t.dim() - 2; own >= 0; ++i, --own)
      found.strides[dims - 1 - i] = t.size(own) == 1 ? 0 : t.stride(own) * int64_t(t.element_size());
    return found;
  }

  int64_t dims, width, count, normed;
  std::array<int64_t, most_dims> sizes{};
  Place x, out, cos, sin;
};

inline const char* Place::at(const Rows& rows, int64_t row) const {
  int64_t offset = 0;
  for (int64_t i = rows.dims - 1; i > 0; --i) {
    offset += row % rows.sizes[i] * strides[i];
    row /= rows.sizes[i];
  }
  return data + offset + row * strides[0];
}

// A weight or bias has the dtype of the parts or fp32; a table of half types may have fp64 too.
inline bool is_beside(const at::Tensor& x, const at::Tensor& t, bool is_table) {
  const auto own = x.scalar_type(), type = t.scalar_type();
  const bool is_half = own == at::kBFloat16 || own == at::kHalf;
  const bool fits = type == own || (is_half && (type == at::kFloat || (is_table && type == at::kDouble)));
  return fits && t.device() == x.device() && t.layout() == at::kStrided;
}

inline bool is_vector(const at::Tensor& x, const std::optional<at::Tensor>& t, bool across) {
  const int64_t width = across ? x.size(-1) * x.size(-2) : x.size(-1);
  return !t.has_value() || (is_beside(x, *t, false) && t->dim() == 1 && t->size(0) == width);
}

inline bool is_table(const at::Tensor& x, const std::optional<at::Tensor>& t) {
  const int64_t width = x.size(-1);
  if (!is_beside(x, *t, true) || width % 2 == 1 || t->dim() == 0 || t->dim() > x.dim()) return false;
  if (t->size(-1) != width && t->size(-1) != width / 2) return false;
  for (int64_t i = 2; i <= t->dim(); ++i)
    if (t->size(-i) != 1 && t->size(-i) != x.size(-i)) return false;
  return true;
}

inline bool is_rotary_call(at::TensorList parts, at::IntArrayRef counts, const std::array<Gates, 4>& vectors,
                           const RotarySettings& settings) {
  int64_t all = 0;
  for (const int64_t count : counts) {
    if (count < 1) return false;
    all += count;
  }
  if (all == 0 || all != int64_t(parts.size())) return false;
  for (const Gates& given : vectors)
    if (given.size() != parts.size()) return false;
  int64_t index = 0;
  for (const int64_t count : counts) {
    const at::Tensor& first = parts[index];
    const int64_t kept = settings.across ? 2 : 1;
    if (first.dim() > most_dims || settings.dim < 0 || settings.dim >= first.dim() - kept) return false;
    for (const int64_t end = index + count; index < end; ++index) {
      const at::Tensor& x = parts[index];
      if (!is_known(x) || !is_like(parts[0], x) || x.dim() != first.dim()) return false;
      for (int64_t i = 0; i < x.dim(); ++i)
        if (i != settings.dim && x.size(i) != first.size(i)) return false;
      const auto cos = vectors[2].get(index), sin = vectors[3].get(index);
      if (!is_vector(x, vectors[0].get(index), settings.across) || !is_vector(x, vectors[1].get(index), settings.across))
        return false;
      if (cos.has_value() != sin.has_value()) return false;
      if (cos.has_value() && (!is_table(x, cos) || !is_table(x, sin))) return false;
    }
  }
  return true;
}

}  // namespace harmonica
