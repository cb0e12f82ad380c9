#include <cmath>

#include "ops/cpu/cpu.h"

namespace tp::TP_ISA {

void angles(const AnglesArgs& a, const Dims&, const Input& in, Backend&) {
  for (int t = 0; t < in.tokens; t++) {
    for (int i = 0; i < a.pairs; i++) {
      const auto angle = static_cast<double>(a.frequency[i] * static_cast<float>(in.position[t]));
      a.cosine[static_cast<int64_t>(t) * a.pairs + i] = static_cast<float>(::cos(angle));
      a.sine[static_cast<int64_t>(t) * a.pairs + i] = static_cast<float>(::sin(angle));
    }
  }
}

}  // namespace tp::TP_ISA
