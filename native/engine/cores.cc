#include "engine/cores.h"

#ifdef __linux__
#include <dirent.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <vector>
#endif

namespace tp {

#ifdef __linux__

int keep_to_cores(int rank, int ranks, int threads) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 0;  // more cores than a cpu_set_t holds
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; core++)
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  const int count = static_cast<int>(cores.size());
  const int width = std::max({1, threads, count / std::max(1, ranks)});
  if (ranks < 2 || rank < 0 || rank >= ranks || ranks > count / width) return 0;
  cpu_set_t share;
  CPU_ZERO(&share);
  for (int i = 0; i < width; i++) CPU_SET(cores[static_cast<size_t>(rank * width + i)], &share);

  // Threads inherit from the one that makes them; those that run already are told one by one.
  DIR* const tasks = opendir("/proc/self/task");
  if (!tasks) return 0;
  int kept = 0;
  while (const dirent* task = readdir(tasks)) {
    const int id = std::atoi(task->d_name);
    if (id > 0 && sched_setaffinity(id, sizeof share, &share) == 0) kept = width;
  }
  closedir(tasks);
  return kept;
}

#else

int keep_to_cores(int, int, int) { return 0; }

#endif

}  // namespace tp
