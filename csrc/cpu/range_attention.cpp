#include <stdexcept>

#include "cpu/cpu.h"

namespace nsa::cpu {

std::size_t workspace_bytes(const RangeAttentionForward&) { return 0; }
std::size_t workspace_bytes(const RangeAttentionBackward&) { return 0; }
void range_attention(const RangeAttentionForward&) { throw std::runtime_error("the CPU has no range attention yet"); }
void range_attention(const RangeAttentionBackward&) { throw std::runtime_error("the CPU has no range attention yet"); }
std::size_t workspace_bytes(const BlockSelection&) { return 0; }
void select_blocks(const BlockSelection&) { throw std::runtime_error("the CPU has no block selection yet"); }

}  // namespace nsa::cpu
