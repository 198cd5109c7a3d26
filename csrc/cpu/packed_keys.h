// K and V in the compute type, in the layouts that products read: rows [keys, D] for P V and dS K, and columns
// (transposed, [D, keys]) for Q K^T and dO V^T, so that vectors always run along memory. Packing is one pass over K and
// V, where the products read a key for every query that selected it, n l' Tq / Tk times. Panels that no list names are
// not packed: a decoding step touches n l' keys of a long cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/block_lists.h"
#include "cpu/kernels.h"

namespace nsa::cpu {

// Keys of a transposed panel. Panels cut the k rows of all sequences at multiples of this; 64 floats are four AVX-512
// vectors.
inline constexpr std::int64_t kPanelKeys = 64;

// [Hkv, num_panels, D, kPanelKeys]
template <typename Real>
struct KeyColumns {
  std::int64_t dim = 0, num_panels = 0;
  Real* data = nullptr;
  Real* panel(std::int64_t head, std::int64_t panel) const {
    return data + (head * num_panels + panel) * dim * kPanelKeys;
  }
  // [D, keys to the panel's end], rows kPanelKeys apart. Reading a vector past them is allowed.
  const Real* at(std::int64_t head, std::int64_t k_row) const {
    return panel(head, k_row / kPanelKeys) + k_row % kPanelKeys;
  }
};

// [Hkv, total_k, row_stride]: D elements and zeros
template <typename Real>
struct KeyRows {
  std::int64_t dim = 0, row_stride = 0, total_k = 0;
  Real* data = nullptr;
  Real* at(std::int64_t head, std::int64_t k_row) const { return data + (head * total_k + k_row) * row_stride; }
};

// Which panels of which kv head some list names: [Hkv, num_panels]
struct UsedPanels {
  std::int64_t num_panels = 0;
  std::uint8_t* flags = nullptr;
};

template <typename AnySequences>
std::int64_t count_panels(const AnySequences& sequences) {
  return (sequences.total_k + kPanelKeys - 1) / kPanelKeys;
}

template <typename Real, typename AnySequences>
KeyColumns<Real> carve_key_columns(std::int64_t heads, std::int64_t dim, const AnySequences& sequences,
                                   Carver& carver) {
  const std::int64_t panels = count_panels(sequences);
  const std::int64_t size = heads * panels * dim * kPanelKeys;
  return {dim, panels, carver.take<Real>(size + kAlignment)};
}

template <typename Real, typename AnySequences>
KeyRows<Real> carve_key_rows(std::int64_t heads, std::int64_t dim, const AnySequences& sequences, Carver& carver) {
  const std::int64_t stride = padded<Real>(dim);
  return {dim, stride, sequences.total_k, carver.take<Real>(heads * sequences.total_k * stride)};
}

UsedPanels carve_used_panels(const SelectedAttentionProblem& problem, const Sequences& sequences, Carver& carver);
void fill_used_panels(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                      const UsedPanels& used, int num_threads);

// Fills what isn't null with `count` rows of k or v from `source` on, row_bytes apart: k rows first .. of one panel.
template <typename Real>
void pack_run(Dtype dtype, const void* source, std::int64_t row_bytes, std::int64_t head, std::int64_t first,
              std::int64_t count, const KeyColumns<Real>& columns, const KeyRows<Real>& rows);

// Fills what isn't null from k or v [.., Hkv, D].
template <typename Real>
void pack_keys(const SelectedAttentionProblem& problem, const Sequences& sequences, const UsedPanels& used,
               const Tensor& tensor, const KeyColumns<Real>& columns, const KeyRows<Real>& rows, int num_threads);

// A run of keys that stands in one panel, and where its scores go.
struct KeyPiece {
  std::int64_t first = 0;   // k row
  std::int64_t count = 0;   // keys
  std::int64_t column = 0;  // of the tile of scores
};

// Walks the visible keys of one list in chunks. Blocks that touch make one run, so l' doesn't matter beyond its memory
// order.
class KeyWalk {
 public:
  KeyWalk(const std::int32_t* begin, const std::int32_t* end, KeyRange keys, std::int64_t block_size)
      : next_id_(begin), end_id_(end), keys_(keys), block_size_(block_size) {}

  // At most `capacity` keys, which is also the most pieces; returns how many keys, 0 at the end.
  std::int64_t next(std::int64_t capacity, KeyPiece* pieces, std::int64_t* num_pieces) {
    std::int64_t columns = 0, count = 0;
    while (columns < capacity && (key_ < block_end_ || open_block())) {
      const std::int64_t room = std::min(capacity - columns, kPanelKeys - key_ % kPanelKeys);
      const std::int64_t taken = std::min(block_end_ - key_, room);
      KeyPiece* const last = count > 0 ? &pieces[count - 1] : nullptr;
      if (last != nullptr && last->first + last->count == key_ && key_ % kPanelKeys != 0) {
        last->count += taken;
      } else {
        pieces[count++] = {key_, taken, columns};
      }
      key_ += taken;
      columns += taken;
    }
    *num_pieces = count;
    return columns;
  }

 private:
  bool open_block() {
    if (next_id_ == end_id_) return false;
    key_ = keys_.begin + *next_id_++ * block_size_;
    block_end_ = key_ + std::min(block_size_, keys_.end - key_);
    return true;
  }

  const std::int32_t* next_id_;
  const std::int32_t* end_id_;
  KeyRange keys_;
  std::int64_t block_size_;
  std::int64_t key_ = 0, block_end_ = 0;
};

}  // namespace nsa::cpu
