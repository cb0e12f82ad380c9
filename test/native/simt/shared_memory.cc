#include "shared_memory.h"

#include <link.h>

#include <cstring>

#include "guarded_pool.h"

namespace simt {

namespace {

constexpr size_t kMostDynamic = 232448, kDynamicRoom = (kMostDynamic / kPage + 2) * kPage;
constexpr uint32_t kDynamicBase = 1 << 20;  // 32-bit address of dynamic shared memory; static begins at 0
constexpr unsigned char kCanary = 0xa5;     // behind dynamic shared memory

char* statics_ = nullptr;  // thread-local memory of this program
size_t static_bytes_ = 0;
Block* current_ = nullptr;  // whose static shared memory is in place; null: the host's own
std::vector<char> host_statics_;
GuardedPool dynamics_(kDynamicRoom, GuardedPool::Guard::behind);

/// This program's thread-local memory: what __shared__ variables lie in, and nothing else does.
void find_statics() {
  if (statics_) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; i++)
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            statics_ = static_cast<char*>(info->dlpi_tls_data);
            static_bytes_ = info->dlpi_phdr[i].p_memsz;
          }
        return 1;  // the program comes first
      },
      nullptr);
  static char none[1];
  if (!statics_) statics_ = none;
}

}  // namespace

size_t static_shared_bytes() {
  find_statics();
  return static_bytes_;
}

void take_shared(Block& block) {
  const size_t bytes = block.grid->launch.shared;
  block.statics.assign(static_shared_bytes(), static_cast<char>(kPoison));
  block.dynamic = dynamics_.take();
  std::memset(block.dynamic, kPoison, bytes);
  std::memset(block.dynamic + bytes, kCanary, kPage);
}
void give_back_shared(Block& block) {
  dynamics_.give_back(block.dynamic);
  if (current_ == &block) enter(nullptr);
}
void look_behind_shared(const Block& block) {
  const size_t bytes = block.grid->launch.shared;
  const char* const behind = block.dynamic + bytes;
  for (size_t i = 0; i < kPage; i++)
    if (static_cast<unsigned char>(behind[i]) != kCanary)
      fault("the block wrote behind its %zu bytes of dynamic shared memory, at %zu", bytes, bytes + i);
}

void enter(Block* block) {
  if (current_ == block) return;
  std::vector<char>& from = current_ ? current_->statics : host_statics_;
  from.resize(static_bytes_);
  std::memcpy(from.data(), statics_, static_bytes_);
  const std::vector<char>& to = block ? block->statics : host_statics_;
  std::memcpy(statics_, to.data(), static_bytes_);
  current_ = block;
}

void* static_of(unsigned rank, void* here) {
  const auto at = static_cast<size_t>(static_cast<char*>(here) - statics_);
  if (at >= static_bytes_) fault("%p is not in static shared memory", here);
  const unsigned size = current_->grid->launch.cluster, number = current_->cluster * size + rank;
  if (number == current_->number) return here;
  for (const auto& block : current_->grid->resident)
    if (rank < size && block->number == number) return block->statics.data() + at;
  fault("the cluster of %u blocks has none of rank %u, or it has ended", size, rank);
}

char* room_at(uint32_t address, int bytes) {
  const auto end = int64_t{address} + bytes;
  if (address >= kDynamicBase) {
    if (end > kDynamicBase + static_cast<int64_t>(current_->grid->launch.shared))
      fault("shared memory at %lld of %zu bytes", static_cast<long long>(end - kDynamicBase),
            current_->grid->launch.shared);
    return current_->dynamic + (address - kDynamicBase);
  }
  if (end > static_cast<int64_t>(static_bytes_)) fault("there is no shared memory at %08x", address);
  return statics_ + address;
}

char* dynamic_shared(int) { return self->block->dynamic; }

uint32_t shared_address(const void* p) {
  self->where = __builtin_return_address(0);
  const auto* const at = static_cast<const char*>(p);
  const Block& block = *self->block;
  if (at >= block.dynamic && at <= block.dynamic + block.grid->launch.shared)
    return kDynamicBase + static_cast<uint32_t>(at - block.dynamic);
  if (at >= statics_ && at < statics_ + static_bytes_) return static_cast<uint32_t>(at - statics_);
  fault("%p is not in the block's shared memory", p);
}

char* shared_memory(uint32_t address, int bytes) {
  self->where = __builtin_return_address(0);
  return room_at(address, bytes);
}

}  // namespace simt
