#include "copies.h"

#include <algorithm>
#include <cstring>

#include "fibers.h"
#include "mbarrier.h"
#include "shared_memory.h"

namespace simt {

namespace {

/// Copy `i` of a thread's lands; an arrival takes those before it along.
void land(Fiber& fiber, size_t i) {
  auto& copies = fiber.warp->copies[fiber.lane];
  const auto put = [&](const Copy& copy) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memset(copy.to + copy.bytes, 0, static_cast<size_t>(copy.room - copy.bytes));
  };
  const Copy copy = copies[i];
  if (!copy.to) {
    for (size_t j = 0; j < i; j++)
      if (copies[j].to) put(copies[j]);
    std::vector<uint32_t> barriers;
    for (size_t j = 0; j <= i; j++)
      if (!copies[j].to) barriers.push_back(copies[j].barrier);
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(i) + 1);
    for (const uint32_t barrier : barriers) arrive(*fiber.block, barrier, 0);
    return;
  }
  put(copy);
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(i));
  changed();
}

void land_box(const Bulk& bulk) {
  const CUtensorMap& map = bulk.map;
  const int row_bytes = static_cast<int>(map.box[0]) * 2;
  uint32_t to = bulk.to;
  for (uint32_t z = 0; z < (map.dimensions > 2 ? map.box[2] : 1); z++)
    for (uint32_t y = 0; y < map.box[1]; y++, to += static_cast<uint32_t>(row_bytes))
      for (int at = 0; at < row_bytes; at += 16) {
        const int64_t x = bulk.at[0] + at / 2, row = bulk.at[1] + int64_t{y}, plane = bulk.at[2] + int64_t{z};
        const bool inside = row >= 0 && row < static_cast<int64_t>(map.sizes[1]) && plane >= 0 &&
                            (map.dimensions < 3 || plane < static_cast<int64_t>(map.sizes[2]));
        uint32_t place = to + static_cast<uint32_t>(at);
        if (map.swizzled) place ^= (place >> 7 & 7) << 4;
        char* const piece = room_at(place, 16);
        for (int i = 0; i < 8; i++) {
          uint16_t element = 0;
          if (inside && x + i >= 0 && x + i < static_cast<int64_t>(map.sizes[0]))
            std::memcpy(&element,
                        map.memory + (x + i) * 2 + row * static_cast<int64_t>(map.strides[0]) +
                            (map.dimensions > 2 ? plane * static_cast<int64_t>(map.strides[1]) : 0),
                        2);
          std::memcpy(piece + i * 2, &element, 2);
        }
      }
}

void land(Block& block, size_t i) {
  const Bulk bulk = block.bulk[i];
  block.bulk[i] = block.bulk.back();
  block.bulk.pop_back();
  if (bulk.box)
    land_box(bulk);
  else
    std::memcpy(room_at(bulk.to, bulk.bytes), bulk.from, static_cast<size_t>(bulk.bytes));
  bring(block, bulk.barrier, bulk.bytes);
}

void begin_copy(Copy copy) {
  auto& copies = self->warp->copies[self->lane];
  if (copies.empty()) {
    auto& copying = self->block->copying;
    if (std::find(copying.begin(), copying.end(), self) == copying.end()) copying.push_back(self);
  }
  copies.push_back(copy);
}

}  // namespace

bool land_one(Block& block) {
  if (!block.bulk.empty() && (block.copying.empty() || draw(2))) {
    land(block, draw(block.bulk.size()));
    return true;
  }
  while (!block.copying.empty()) {
    Fiber*& fiber = block.copying[draw(block.copying.size())];
    const size_t count = fiber->warp->copies[fiber->lane].size();
    if (count > 0) {
      land(*fiber, draw(count));
      return true;
    }
    fiber = block.copying.back();
    block.copying.pop_back();
  }
  return false;
}

void copy_async(uint32_t to, const void* from, int bytes, int room) {
  self->where = __builtin_return_address(0);
  if (to % static_cast<uint32_t>(room) || reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(room))
    fault("cp.async of %d bytes from %p to %08x: not at a multiple of that", room, from, to);
  if (bytes < 0 || bytes > room) fault("cp.async of %d of %d bytes", bytes, room);
  char* const place = room_at(to, room);
  std::memset(place, kPoison, static_cast<size_t>(room));
  begin_copy({self->group, place, static_cast<const char*>(from), bytes, room, 0});
}
void copy_async_commit() { self->group++; }
void copy_async_wait(int pending) {
  self->where = __builtin_return_address(0);
  auto& copies = self->warp->copies[self->lane];
  for (size_t i = copies.size(); i-- > 0;)
    if (i < copies.size() && copies[i].group < self->group - pending) land(*self, i);
  maybe_pause();
}
void copy_async_wait_all() {
  self->group++;
  copy_async_wait(0);
}
void copy_async_arrive(uint32_t barrier) { begin_copy({self->group, nullptr, nullptr, 0, 0, barrier}); }

void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  self->where = __builtin_return_address(0);
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
    fault("cp.async.bulk of %d bytes from %p to %08x: not multiples of 16", bytes, from, to);
  std::memset(room_at(to, bytes), kPoison, static_cast<size_t>(bytes));
  look_for_mbarrier(barrier);
  self->block->bulk.push_back({to, barrier, static_cast<const char*>(from), bytes, false, {}, {}});
  maybe_pause();
}
void copy_box(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier) {
  self->where = __builtin_return_address(0);
  const CUtensorMap& m = *static_cast<const CUtensorMap*>(map);
  const int bytes = static_cast<int>(m.box[0] * m.box[1] * (m.dimensions > 2 ? m.box[2] : 1)) * 2;
  if (to % 128) fault("a box to %08x: not at a multiple of 128", to);
  std::memset(room_at(to, bytes), kPoison, static_cast<size_t>(bytes));
  look_for_mbarrier(barrier);
  self->block->bulk.push_back({to, barrier, nullptr, bytes, true, m, {x, y, z}});
  maybe_pause();
}

}  // namespace simt
