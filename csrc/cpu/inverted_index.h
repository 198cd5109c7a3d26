// The lists turned round: for every (kv head, block) the q rows that chose it, ascending.
#pragma once

#include <cstdint>

#include "cpu/block_lists.h"

namespace nsa::cpu {

// A list longer than `segment` is cut into segments, whose sums are added up afterwards, so that one block that every
// query reads (the first, by the paper's rule) keeps all threads busy. A function of sizes alone: results don't depend
// on threads.
struct InvertedIndex {
  std::int64_t num_blocks = 0;            // of all sequences
  std::int64_t num_lists = 0;             // Hkv * num_blocks; list = kv head * num_blocks + block
  std::int64_t segment = 0;               // q rows
  std::int64_t max_split_segments = 0;    // of lists with more than one segment, together
  std::int64_t* list_begin = nullptr;     // [num_lists + 1] where a list starts in rows
  std::int64_t* rows = nullptr;           // [total_q * Hkv * S]
  std::int64_t* segment_begin = nullptr;  // [num_lists + 1] segments before a list; every list has at least one
  std::int64_t* split_begin = nullptr;    // [num_lists + 1] segments of split lists before a list

  std::int64_t length(std::int64_t list) const { return list_begin[list + 1] - list_begin[list]; }
  bool is_split(std::int64_t list) const { return split_begin[list + 1] > split_begin[list]; }
};

InvertedIndex carve_inverted_index(const SelectedAttentionProblem& problem, const Sequences& sequences, Carver& carver);
void fill_inverted_index(const SelectedAttentionProblem& problem, const Sequences& sequences, const BlockLists& lists,
                         const InvertedIndex& index, int num_threads);

}  // namespace nsa::cpu
