#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

namespace {

/// out[i] = element start + i.
void make_elements(const Synthetic& source, uint64_t start, uint64_t count, Bf16* out) {
  while (count > 0) {
    // Within 2^32 elements the high half of the index is constant: the inner loop is 32-bit and vectorises.
    const auto low = static_cast<uint32_t>(start);
    const uint64_t left = (uint64_t{1} << 32) - low;
    const uint64_t n = count < left ? count : left;
    const uint32_t high = mix32(static_cast<uint32_t>(start >> 32) + source.key[1]);
    for (uint64_t i = 0; i < n; i++)
      out[i] = synthetic_element_low(source, high, low + static_cast<uint32_t>(i));
    start += n;
    out += n;
    count -= n;
  }
}

}  // namespace

void synthesize(const Synthetic& source, const Stretch& stretch, Bf16* out, Backend&) {
  for (uint64_t r = 0; r < stretch.rows; r++)
    make_elements(source, stretch.start + r * stretch.stride, stretch.count, out + r * stretch.count);
}

uint64_t stream(const void* memory, uint64_t bytes, Backend&) {
  // Four runs side by side, integer sums of whole cache lines, no prefetch hints: the fastest of the patterns
  // tried (1 to 8 runs, hints of 0 to 4 KB), so what a decode step is measured against is what the memory
  // really gives.
  typedef uint64_t Line __attribute__((vector_size(64), may_alias, aligned(64)));
  const uint64_t lines = bytes / sizeof(Line) / 4;
  const Line* run = static_cast<const Line*>(memory);
  Line a = {}, b = {}, c = {}, d = {};
  for (uint64_t i = 0; i < lines; i++) {
    a += run[i];
    b += run[lines + i];
    c += run[2 * lines + i];
    d += run[3 * lines + i];
  }
  a += b + c + d;
  return a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

const Ops& ops() {
  static const Ops table = {angles,  embed,  qkv,    attention, attn_out,  route,      gate_up, down,
                            ffn_out, logits, sample, advance,   note_time, synthesize, stream};
  return table;
}

}  // namespace tp::TP_ISA
