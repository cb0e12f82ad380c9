// Which cores a rank's threads run on, where several ranks of a host compute on its cores.
#pragma once

namespace tp {

/// Keeps this process, all its threads and those still to come, to its share of the cores that it may use
/// now: as many as `threads`, more where `ranks` leave more. Left alone, a scheduler lets two ranks wait for
/// one core while another halts. Returns the number of cores; does nothing (0) where the shares do not
/// suffice for all ranks: those are better moved about.
int keep_to_cores(int rank, int ranks, int threads);

}  // namespace tp
