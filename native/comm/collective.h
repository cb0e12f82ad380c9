// Sums and gathers between GPUs that stay inside the stream, so that a whole step can be one CUDA graph.
// Native code has no sockets: the bytes that ranks must exchange first (an id, a memory handle) are carried
// by TypeScript, see src/comm/bootstrap.ts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/peer_memory.h"

namespace tp {

/// A CUDA stream, opaque here: the engine that holds a collective compiles without CUDA too.
using Stream = void*;

class DeviceCollective {
 public:
  DeviceCollective() = default;
  DeviceCollective(const DeviceCollective&) = delete;
  DeviceCollective& operator=(const DeviceCollective&) = delete;
  virtual ~DeviceCollective() = default;

  /// What connect() needs of this rank, of one length on all: a memory handle (peer), rank 0's id (nccl;
  /// others' is unused).
  virtual std::vector<uint8_t> hello() const = 0;
  /// Takes the hellos of all ranks in rank order; returns when the ranks are joined. TP_COLLECTIVE on
  /// failure.
  virtual void connect(const std::vector<std::vector<uint8_t>>& hellos, double timeout_s) = 0;
  /// buffer (floats) becomes the fp32 sum over ranks in tree order: the same bits on every rank.
  virtual void all_reduce(float* buffer, int64_t floats, Stream stream) = 0;
  /// gathered (size, floats) becomes every rank's `send`, rank-major.
  virtual void all_gather(const float* send, float* gathered, int64_t floats, Stream stream) = 0;
  /// For kernels that do the sums themselves, once joined; null where memory of other ranks is out of reach.
  virtual const PeerMemory* peers() const { return nullptr; }
  /// Frees whoever waits, from any thread; the collective is of no use afterwards, and error() says so.
  virtual void abort() = 0;
  /// Empty, or what went wrong since connect().
  virtual std::string error() const = 0;
};

/// One host: CUDA IPC memory, one-shot push over NVLink or PCIe. `max_floats` of one message.
std::unique_ptr<DeviceCollective> make_peer(int rank, int size, int64_t max_floats);

/// libnccl.so.2, opened at run time; TP_COLLECTIVE when it is not there.
std::unique_ptr<DeviceCollective> make_nccl(int rank, int size, int64_t max_floats);

/// "2.28.9 (/usr/lib/...)", or why NCCL cannot be used.
std::string nccl_version(bool& usable);

}  // namespace tp
