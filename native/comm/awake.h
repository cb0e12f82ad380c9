// Keeps a core of this process from going to sleep while ranks wait for each other in host memory: waking a
// halted virtual core costs more than the exchange that it sleeps through.
#pragma once

namespace tp {

/// For the next `ms` milliseconds a thread of idle priority (SCHED_IDLE) spins: it gives its core up to
/// anything that wants to run. Later calls set the time anew. Does nothing where there is no such priority.
void stay_awake(double ms);

}  // namespace tp
