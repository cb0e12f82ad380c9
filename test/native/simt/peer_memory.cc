#include "peer_memory.h"

#include <cstring>
#include <unordered_set>
#include <vector>

#include "fibers.h"

namespace simt {

namespace {

/// A store on its way.
struct Late {
  char* to;
  int bytes;
  char value[16];
};
std::vector<Late> late_;
std::unordered_set<const void*> late_places_;

void land(size_t i) {
  std::memcpy(late_[i].to, late_[i].value, static_cast<size_t>(late_[i].bytes));
  late_places_.erase(late_[i].to);
  late_[i] = late_.back();
  late_.pop_back();
  changed();
}

}  // namespace

bool land_late_store() {
  if (late_.empty()) return false;
  land(draw(late_.size()));
  return true;
}
void maybe_land_late_stores() {
  if (late_.empty() || draw(4) != 0) return;
  for (size_t n = 1 + late_.size() / 8; n > 0; n--) land_late_store();
}
void forget_late_stores() { late_.clear(), late_places_.clear(); }

void fence_system() {
  while (!late_.empty()) land(late_.size() - 1);
}
void store_late(void* to, const void* value, int bytes) {
  if (!late_places_.insert(to).second) {  // stores to one place keep their order
    fence_system();
    late_places_.insert(to);
  }
  Late store{static_cast<char*>(to), bytes, {}};
  std::memcpy(store.value, value, static_cast<size_t>(bytes));
  late_.push_back(store);
  maybe_pause();
}
void load_shared_with_others(const void* from) {
  if (self->polled == from) {
    self->where = __builtin_return_address(0);
    self->waits = "memory that others write";
    self->polled = nullptr;
    pause();
  } else if (!self->polled || draw(64) == 0) {
    self->polled = from;
  }
}

}  // namespace simt
