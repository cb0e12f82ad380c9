#include "fault.h"

#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "fibers.h"

namespace simt {

namespace {

int faults_ = 0;
bool hushed_ = false;
std::string last_fault_;

/// The source behind a code address, by addr2line; functions: its function's name alone.
std::string source_of(const void* address, bool function) {
  if (!address) return "?";
  char command[256], line[512];
  std::snprintf(command, sizeof command, "addr2line -Cs%s -e /proc/%d/exe %p 2>/dev/null",
                function ? "f" : "i", static_cast<int>(getpid()),
                // A return address belongs to what comes after the call.
                static_cast<const void*>(static_cast<const char*>(address) - (function ? 0 : 1)));
  std::string out;
  if (std::FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, "\n")] = 0;
      if (function) {
        out = line;
        break;
      }
      if (std::strncmp(line, "cuda_runtime.h", 14) == 0 || std::strncmp(line, "ptx.cuh", 7) == 0) continue;
      out += (out.empty() ? "" : " < ") + std::string(line);
    }
    pclose(pipe);
  }
  return out.empty() ? "?" : out;
}

std::string format_list(const char* text, va_list values) {
  char out[1024];
  std::vsnprintf(out, sizeof out, text, values);
  return out;
}

std::string place_of(const Fiber& fiber) {
  const Block& block = *fiber.block;
  return format("block (%u, %u, %u), thread %u (warp %u, lane %d)", block.index.x, block.index.y,
                block.index.z, fiber.thread.x, fiber.thread.x / 32, fiber.lane);
}

void on_signal(int number, siginfo_t* info, void*) {
  // Not much may be done here, but the process is lost anyway.
  if (self)
    std::fprintf(stderr, "simt: FAULT: signal %d at address %p, in kernel %s\n  %s, seed %llu\n", number,
                 info->si_addr, source_of(self->block->grid->launch.kernel, true).c_str(),
                 place_of(*self).c_str(), static_cast<unsigned long long>(current_seed()));
  else
    std::fprintf(stderr, "simt: signal %d at address %p, on the host\n", number, info->si_addr);
  _exit(1);
}

}  // namespace

std::string format(const char* text, ...) {
  va_list values;
  va_start(values, text);
  std::string out = format_list(text, values);
  va_end(values);
  return out;
}

std::string name_of(const Grid& grid) { return "in kernel " + source_of(grid.launch.kernel, true) + "\n"; }

std::string waits_of(const Grid& grid) {
  std::map<std::pair<std::string, const void*>, std::pair<int, std::string>> kinds;
  for (const auto& block : grid.resident)
    for (Warp& warp : block->warps)
      for (int lane = 0; lane < 32; lane++)
        if ((warp.present & ~warp.ended) >> lane & 1) {
          const Fiber& fiber = warp.fibers[lane];
          auto& kind = kinds[{fiber.waits, fiber.where}];
          if (kind.first++ == 0) kind.second = place_of(fiber);
        }
  std::string out;
  for (const auto& [what, who] : kinds)
    out += format("  %d thread%s, the first %s: %s, at %s\n", who.first, who.first == 1 ? "" : "s",
                  who.second.c_str(), what.first.c_str(), source_of(what.second, false).c_str());
  return out;
}

void fail(Grid& grid, const std::string& text) {
  grid.failed = true;
  report(name_of(grid) + text);
}

void report(const std::string& text) {
  faults_++;
  last_fault_ = text;
  if (!hushed_)
    std::fprintf(stderr, "simt: FAULT %s  seed %llu, after %llu switches\n", text.c_str(),
                 static_cast<unsigned long long>(current_seed()),
                 static_cast<unsigned long long>(switches()));
}

void fault(const char* text, ...) {
  va_list values;
  va_start(values, text);
  const std::string what = format_list(text, values);
  va_end(values);
  if (self) {
    Grid& grid = *self->block->grid;
    std::string others;
    if (what.find("__trap") != std::string::npos) others = waits_of(grid);
    fail(grid,
         "  " + place_of(*self) + ": " + what + "\n  at " +
             source_of(what.find("__trap") != std::string::npos || !self->where ? __builtin_return_address(0)
                                                                                : self->where,
                       false) +
             "\n" + others);
    abandon_fiber();
  }
  throw Landed{what};  // a copy that landed while no thread ran
}

void catch_signals() {
  static bool done = false;
  if (done) return;
  done = true;
  static char stack[64 << 10];  // a thread's own may be what ran out
  stack_t other{};
  other.ss_sp = stack, other.ss_size = sizeof stack;
  sigaltstack(&other, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE}) sigaction(number, &action, nullptr);
}

int faults() { return faults_; }
const std::string& last_fault() { return last_fault_; }
void quiet(bool on) { hushed_ = on; }

}  // namespace simt
