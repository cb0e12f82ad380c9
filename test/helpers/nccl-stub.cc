// A libnccl.so.2 without GPUs that misbehaves as STUB_NCCL says: its calls only count and answer.
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace {

enum { kSuccess = 0, kRemoteError = 6, kInProgress = 7 };
int asked = 0, aborts = 0;

bool is(const char* what) {
  const char* how = std::getenv("STUB_NCCL");
  return how && std::strcmp(how, what) == 0;
}

}  // namespace

extern "C" {

struct Id {
  char bytes[128];
};

int stub_aborts() { return aborts; }

int ncclGetVersion(int* version) {
  *version = 22902;
  return kSuccess;
}
int ncclGetUniqueId(Id* id) {
  std::memset(id->bytes, 7, sizeof id->bytes);
  return kSuccess;
}
int ncclCommInitRankConfig(void** comm, int, Id, int, void*) {
  *comm = &asked;
  asked = 0;
  return is("refuses") ? kRemoteError : kInProgress;
}
int ncclCommGetAsyncError(void*, int* state) {
  asked++;
  *state = kInProgress;
  if (is("never starts")) return kSuccess;
  if (asked > 5) *state = kSuccess;  // it starts in the background
  if (is("loses a peer") && asked > 10) *state = kRemoteError;
  return kSuccess;
}
int ncclCommAbort(void*) {
  aborts++;
  return kSuccess;
}
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*) {
  return is("never ends") ? kInProgress : kSuccess;
}
int ncclAllGather(const void*, void*, size_t, int, void*, void*) { return kSuccess; }
const char* ncclGetErrorString(int result) {
  return result == kRemoteError ? "remote process exited or there was a network error" : "?";
}
const char* ncclGetLastError(void*) { return "socket closed by 10.0.0.2"; }
}
