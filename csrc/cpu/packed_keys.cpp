#include "cpu/packed_keys.h"

#include <atomic>

#include "cpu/parallel.h"

namespace nsa::cpu {
namespace {

// source [keys, dim] -> target [dim, keys], rows kPanelKeys apart.
template <typename Real>
void transpose(const Kernels<Real>& kernel, Dtype dtype, const char* source, std::int64_t row_bytes, std::int64_t keys,
               std::int64_t dim, Real* target) {
  constexpr std::int64_t kDims = kAlignment / sizeof(Real);  // one cache line of every row at a time
  Real tile[kPanelKeys][kDims];
  for (std::int64_t first = 0; first < dim; first += kDims) {
    const std::int64_t dims = std::min(kDims, dim - first);
    for (std::int64_t key = 0; key < keys; ++key) {
      kernel.load(dtype, source + key * row_bytes + first * bytes_of(dtype), dims, tile[key]);
    }
    for (std::int64_t d = 0; d < dims; ++d) {
      Real* const line = target + (first + d) * kPanelKeys;
      for (std::int64_t key = 0; key < keys; ++key) line[key] = tile[key][d];
    }
  }
}

template <typename Real>
void pack_panel(const SelectedAttentionProblem& problem, const Sequences& sequences, const Tensor& tensor,
                std::int64_t head, std::int64_t panel, const KeyColumns<Real>& columns, const KeyRows<Real>& rows) {
  const Dtype dtype = problem.dtype;
  const std::int64_t row_bytes = tensor.row_stride * bytes_of(dtype);
  const std::int64_t begin = panel * kPanelKeys;
  const std::int64_t end = std::min(begin + kPanelKeys, sequences.total_k);
  Real* const target = columns.data != nullptr ? columns.panel(head, panel) : nullptr;
  if (target != nullptr && end - begin < kPanelKeys) std::fill(target, target + columns.dim * kPanelKeys, Real{0});
  // A panel of a batched call may hold the rows of several batches, which stand any stride apart.
  std::int64_t run;
  for (std::int64_t first = begin; first < end; first += run) {
    const RowIndex index = index_of_k(problem, first);
    run = std::min(end - first, problem.seqlen_k - index.row);
    pack_run(dtype, address_of(tensor, dtype, index, head), row_bytes, head, first, run, columns, rows);
  }
}

}  // namespace

template <typename Real>
void pack_run(Dtype dtype, const void* source, std::int64_t row_bytes, std::int64_t head, std::int64_t first,
              std::int64_t count, const KeyColumns<Real>& columns, const KeyRows<Real>& rows) {
  const Kernels<Real>& kernel = kernels<Real>();
  const auto* const bytes = static_cast<const char*>(source);
  if (columns.data != nullptr) {
    Real* const target = columns.panel(head, first / kPanelKeys) + first % kPanelKeys;
    transpose(kernel, dtype, bytes, row_bytes, count, columns.dim, target);
  }
  for (std::int64_t i = 0; rows.data != nullptr && i < count; ++i) {
    Real* const row = rows.at(head, first + i);
    kernel.load(dtype, bytes + i * row_bytes, rows.dim, row);
    std::fill(row + rows.dim, row + rows.row_stride, Real{0});
  }
}

UsedPanels carve_used_panels(const SelectedAttentionProblem& problem, const Sequences& sequences, Carver& carver) {
  const std::int64_t panels = count_panels(sequences);
  return {panels, carver.take<std::uint8_t>(problem.num_heads_k * panels)};
}

void fill_used_panels(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                      const UsedPanels& used, int num_threads) {
  constexpr std::int64_t kRowsPerPiece = 256;
  std::fill(used.flags, used.flags + problem.num_heads_k * used.num_panels, std::uint8_t{0});
  parallel_for(num_threads, sequences.total_q, kRowsPerPiece, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t first_block = place_query(problem, sequences, row).first_block;
      for (std::int64_t head = 0; head < lists.num_heads; ++head) {
        for (const std::int32_t* id = lists.begin(row, head); id != lists.end(row, head); ++id) {
          const KeyRange keys = keys_of_block(problem, sequences, first_block + *id);
          for (std::int64_t panel = keys.begin / kPanelKeys; panel <= (keys.end - 1) / kPanelKeys; ++panel) {
            std::atomic_ref<std::uint8_t> flag(used.flags[head * used.num_panels + panel]);
            if (!flag.load(std::memory_order_relaxed)) flag.store(1, std::memory_order_relaxed);
          }
        }
      }
    }
  });
}

template <typename Real>
void pack_keys(const SelectedAttentionProblem& problem, const Sequences& sequences, const UsedPanels& used,
               const Tensor& tensor, const KeyColumns<Real>& columns, const KeyRows<Real>& rows, int num_threads) {
  constexpr std::int64_t kPanelsPerPiece = 8;
  const std::int64_t count = problem.num_heads_k * used.num_panels;
  parallel_for(num_threads, count, kPanelsPerPiece, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      if (!used.flags[i]) continue;
      pack_panel(problem, sequences, tensor, i / used.num_panels, i % used.num_panels, columns, rows);
    }
  });
}

template void pack_run(Dtype, const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       const KeyColumns<float>&, const KeyRows<float>&);
template void pack_run(Dtype, const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       const KeyColumns<double>&, const KeyRows<double>&);

template void pack_keys(const SelectedAttentionProblem&, const Sequences&, const UsedPanels&, const Tensor&,
                        const KeyColumns<float>&, const KeyRows<float>&, int);
template void pack_keys(const SelectedAttentionProblem&, const Sequences&, const UsedPanels&, const Tensor&,
                        const KeyColumns<double>&, const KeyRows<double>&, int);

}  // namespace nsa::cpu
