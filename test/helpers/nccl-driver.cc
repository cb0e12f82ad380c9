// Drives native/comm/nccl.cu over the stub beside it and prints what comes of it: no GPU takes part.
#include <dlfcn.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "base/check.h"
#include "comm/collective.h"

namespace {

template <class Call>
void say(const char* what, Call&& call) {
  try {
    call();
    std::printf("%s: ok\n", what);
  } catch (const tp::Error& error) {
    std::printf("%s: %s: %s\n", what, error.code().c_str(), error.what());
  }
}

}  // namespace

int main(int, char** argv) {
  const auto start = std::chrono::steady_clock::now();
  const auto nccl = tp::make_nccl(0, 2, 1024);
  const auto hello = nccl->hello();
  std::thread other;  // as the main thread of a rank does, while the engine's own is in a call
  if (std::string(argv[1]) == "aborted")
    other = std::thread([&] {
      usleep(50'000);
      nccl->abort();
    });
  say("connect", [&] { nccl->connect({hello, hello}, 0.3); });
  float value = 0;
  say("all-reduce", [&] { nccl->all_reduce(&value, 1, nullptr); });
  for (int i = 0; i < 10 && nccl->error().empty(); i++) usleep(1000);
  std::printf("error: %s\n", nccl->error().c_str());
  if (other.joinable()) other.join();
  nccl->abort();
  nccl->abort();
  std::printf("after abort: %s\n", nccl->error().c_str());
  say("all-gather", [&] { nccl->all_gather(&value, &value, 1, nullptr); });
  const auto aborts = reinterpret_cast<int (*)()>(dlsym(dlopen("libnccl.so.2", RTLD_NOW), "stub_aborts"));
  std::printf("aborts: %d\n", aborts());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("within 2 s: %s\n", took.count() < 2 ? "yes" : "no");
}
