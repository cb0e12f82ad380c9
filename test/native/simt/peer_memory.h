// Memory that devices share: stores to it land late, and who polls it gives others a turn.
#pragma once

namespace simt {

/// Lands any store. False: none is on its way.
bool land_late_store();
/// Sometimes lands a few.
void maybe_land_late_stores();
/// Drops those on their way.
void forget_late_stores();

}  // namespace simt
