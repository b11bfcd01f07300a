// What the pointwise ops over relevance beside activations share.
#pragma once
#include "common.h"

namespace fisnet {
// One map and one epsilon for all: the batch is one long sample, which needs no alignment of its samples.
inline Maps flat(const Maps& m, bool eps_n) { return m.maps == 1 && !eps_n ? Maps{1, 1, m.samples * m.size} : m; }

// `eps_n` holds one epsilon a sample, in the dtype of `a`.
inline void check_eps(const char* op, const OptTensor& eps_n, const Tensor& a) {
  if (!eps_n.has_value()) return;
  check_like(op, "eps", *eps_n, a);
  STD_TORCH_CHECK(eps_n->numel() == a.size(0) && eps_n->is_contiguous(), op, ": eps must have one value a sample");
}

// `t` covers its memory without gaps, in the order of its axes or with the channels innermost.
inline void check_dense(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1 && (t.is_contiguous() || channels_inside(t)), op, ": ", name, " must be dense, contiguous or channels_last");
}
}  // namespace fisnet
