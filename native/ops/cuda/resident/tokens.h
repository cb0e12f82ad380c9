// What depends on the tokens that a step may have. The kernel is compiled for up to TP_TOKENS of them, once
// for each of step_8.cu and step_16.cu, in a namespace TP_RESIDENT of its own: what few tokens need fits into
// fewer registers and leaves the ring more room.
#pragma once

#include "ops/cuda/resident/step.h"

namespace TP_RESIDENT {

constexpr int kMostTokens = TP_TOKENS;
constexpr int kTokenGroups = kMostTokens / kColumns;  // products with the same weights
static_assert(kMostTokens % kColumns == 0 &&
              kWarps == kColumns);  // of eight, a warp a token where rows are whole
constexpr int kMostChosen = kMostTokens * kMostTopK < kMostExperts ? kMostTokens * kMostTopK : kMostExperts;
constexpr int kSumFloats = kUnitRows * kMostTokens;  // of one warp's products
constexpr int kGroup = 4 / kTokenGroups;             // portions of 8 rows whose sums meet at once
// Sums of an expert's rows and leaves for one token, and some floats more, so that tokens lie on other banks.
constexpr int kExpertSums = 32 + 4;
constexpr int kRoomFloats = kWarps * kColumns * kExpertSums;
static_assert(kRoomFloats >= kGroup * kWarps * kSumFloats);
// Of more tokens the experts' inputs are read from memory where they are used, and what is made of them lies
// where inputs would.
constexpr bool kFewTokens = kTokenGroups == 1;
// Turns in which a block goes through its units of o_proj, at most.
constexpr int kMostTurns = 2 * kTokenGroups;

}  // namespace TP_RESIDENT
