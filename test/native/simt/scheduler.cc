// Fibers, warps, blocks and grids: who runs next, what threads wait for, and when copies land.
#include "scheduler.h"

#include <link.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_set>
#include <utility>

#include "cuda.h"

namespace simt {

namespace {

constexpr size_t kStack = 64 << 10, kPage = 4096;
constexpr size_t kMostDynamic = 232448, kDynamicRoom = (kMostDynamic / kPage + 2) * kPage;
constexpr uint32_t kDynamicBase = 1 << 20;  // 32-bit address of dynamic shared memory; static begins at 0
constexpr unsigned char kPoison = 0xff;     // NaN in fp32 and bfloat16, -1 in integers
constexpr unsigned char kCanary = 0xa5;     // behind dynamic shared memory
constexpr int kMostWarps = 32, kBarriers = 16;
/// When nobody gets on, this much time passes at once, so that kernels that have patience lose it.
constexpr uint64_t kLeapNs = 10'000'000;
constexpr int kMostLeaps = 100'000;
constexpr double kMostSeconds = 300;  // of one wait of the host for the device

}  // namespace

/// A cp.async on its way; with `barrier`, the arrival that follows all copies before it.
struct Copy {
  int group;
  char* to;
  const char* from;
  int bytes, room;
  uint32_t barrier;
};

/// A bulk copy on its way: neighbouring bytes, or a box of a matrix.
struct Bulk {
  uint32_t to, barrier;
  const char* from;
  int bytes;
  bool box;
  CUtensorMap map;
  int at[3];
};

struct Warp {
  Block* block;
  uint32_t present = 0, ended = 0;  // lanes
  uint32_t ready = 0, offered = 0;  // that may run, that wait in a collective
  Op op[32];
  uint32_t mask[32];
  uint64_t value[32], result[32];
  int argument[32];
  Fiber fibers[32];
  std::vector<Copy> copies[32];
};

struct Barrier {
  int threads = 0, came = 0;
  bool all = false;  // __syncthreads
  std::vector<Fiber*> waiting;
  uint32_t lanes[kMostWarps] = {};  // that came
};

struct Sleeper {
  Fiber* fiber;
  uint32_t barrier, parity;
};

struct Block {
  Grid* grid;
  Uint3 index;
  unsigned number, cluster;
  int live = 0;  // threads
  bool lets_next_start = false;
  std::vector<Warp> warps;
  uint32_t ready = 0;  // warps with a lane that may run
  Barrier barriers[kBarriers];
  std::vector<Bulk> bulk;
  std::vector<Fiber*> copying;  // threads that may have copies on their way
  std::vector<Sleeper> sleepers;
  std::vector<char> statics;  // shared memory, while another block runs
  char* dynamic = nullptr;
};

Fiber* self = nullptr;
Uint3 block_index, block_dim, grid_dim;

namespace {

uint64_t seed_ = 1, state_ = 0x9e3779b97f4a7c15u, switches_ = 0, clock_ = 1'000'000'000;
int processors_ = 6, faults_ = 0, leaps_ = 0;
bool hushed_ = false;
std::string last_fault_;
std::function<void()> when_stuck_;
std::vector<std::shared_ptr<Grid>> grids_;
Block* current_ = nullptr;  // whose static shared memory is in place; null: the host's own
std::vector<char> host_statics_;
void* main_stack_ = nullptr;
int budget_ = 0;           // switches until other blocks get a turn
uint64_t idle_turns_ = 0;  // pauses since something last changed
bool told_ = false;        // when_stuck_ was called in this stillness
std::vector<char*> free_stacks_, free_dynamics_;
char* statics_ = nullptr;  // thread-local memory of this program
size_t static_bytes_ = 0;

/// A store to memory that ranks share, on its way.
struct Late {
  char* to;
  int bytes;
  char value[16];
};
std::vector<Late> late_;
std::unordered_set<const void*> late_places_;

char* room_at(uint32_t address, int bytes);

// ---- fibers

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

char* map_with_guard(size_t bytes) {
  void* memory = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: mmap");
    std::abort();
  }
  return static_cast<char*>(memory);
}

char* take_stack() {
  if (free_stacks_.empty()) {
    char* const memory = map_with_guard(kStack);
    mprotect(memory, kPage, PROT_NONE);  // stacks grow down
    return memory;
  }
  char* const memory = free_stacks_.back();
  free_stacks_.pop_back();
  return memory;
}

char* take_dynamic() {
  if (free_dynamics_.empty()) {
    char* const memory = map_with_guard(kDynamicRoom);
    mprotect(memory + kDynamicRoom, kPage, PROT_NONE);
    return memory;
  }
  char* const memory = free_dynamics_.back();
  free_dynamics_.pop_back();
  return memory;
}

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

/// Puts a block's static shared memory in place of whatever is there.
void enter(Block* block) {
  if (current_ == block) return;
  std::vector<char>& from = current_ ? current_->statics : host_statics_;
  from.resize(static_bytes_);
  std::memcpy(from.data(), statics_, static_bytes_);
  const std::vector<char>& to = block ? block->statics : host_statics_;
  std::memcpy(statics_, to.data(), static_bytes_);
  current_ = block;
}

// ---- words for people

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

std::string format(const char* text, va_list values) {
  char out[1024];
  std::vsnprintf(out, sizeof out, text, values);
  return out;
}
std::string format(const char* text, ...) {
  va_list values;
  va_start(values, text);
  std::string out = format(text, values);
  va_end(values);
  return out;
}

std::string place_of(const Fiber& fiber) {
  const Block& block = *fiber.block;
  return format("block (%u, %u, %u), thread %u (warp %u, lane %d)", block.index.x, block.index.y,
                block.index.z, fiber.thread.x, fiber.thread.x / 32, fiber.lane);
}

/// What the threads of the grid wait for, those of the same kind together.
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
  report("in kernel " + source_of(grid.launch.kernel, true) + "\n" + text);
}

// ---- threads that may run

void wake(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  warp.ready |= 1u << fiber->lane;
  fiber->block->ready |= 1u << (&warp - fiber->block->warps.data());
}

int pick_bit(uint32_t bits) {
  const int turn = static_cast<int>(draw() >> 40) & 31;
  const uint32_t turned = bits >> turn | (turn ? bits << (32 - turn) : 0);
  return (__builtin_ctz(turned) + turn) & 31;
}

bool land_one(Block& block);

/// The next thread of a block: mostly another lane of the same warp. Null: other blocks' turn.
Fiber* pick(Block& block, Warp* warp) {
  if (--budget_ <= 0) return nullptr;
  const uint64_t chance = draw() >> 32;
  if (chance % 64 == 0) land_one(block);
  if (!block.ready) return nullptr;
  if (!warp || !warp->ready || (chance & 0x7c0) == 0)
    warp = &block.warps[static_cast<size_t>(pick_bit(block.ready))];
  const int lane = pick_bit(warp->ready);
  warp->ready &= ~(1u << lane);
  if (!warp->ready) block.ready &= ~(1u << (warp - block.warps.data()));
  return &warp->fibers[lane];
}

/// Leaves the running thread, which has said what it waits for or is ready to go on.
void leave() {
  Fiber* const me = self;
  Fiber* const to = pick(*me->block, me->warp);
  if (to == me) return;
  switches_++;
  self = to;
  simt_switch(&me->stack_pointer, to ? to->stack_pointer : main_stack_);
}

void wait_in(const char* what) {
  self->waits = what;
  leave();
}

void end_thread();

void thread_main() {
  self->block->grid->launch.body();
  end_thread();
}

void begin(Grid& grid, unsigned number) {
  auto block = std::make_unique<Block>();
  const Uint3 g = grid.launch.grid, b = grid.launch.block;
  const unsigned threads = b.x * b.y * b.z;
  block->grid = &grid;
  block->number = number;
  block->cluster = number / grid.launch.cluster;
  block->index = {number % g.x, number / g.x % g.y, number / g.x / g.y};
  block->live = static_cast<int>(threads);
  block->statics.assign(static_bytes_, static_cast<char>(kPoison));
  block->dynamic = take_dynamic();
  std::memset(block->dynamic, kPoison, grid.launch.shared);
  std::memset(block->dynamic + grid.launch.shared, kCanary, kPage);
  block->warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; t++) {
    Warp& warp = block->warps[t / 32];
    const int lane = static_cast<int>(t % 32);
    warp.block = block.get();
    warp.present |= 1u << lane;
    Fiber& fiber = warp.fibers[lane];
    fiber.thread = {t % b.x, t / b.x % b.y, t / b.x / b.y};
    fiber.block = block.get(), fiber.warp = &warp, fiber.lane = lane;
    fiber.waits = "not begun";
    fiber.stack = take_stack();
    // Not all stacks begin in the same sets of the cache.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack + kPage - t * 37 % 64 * 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(thread_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;  // registers
    fiber.stack_pointer = top;
    wake(&fiber);
  }
  grid.clusters[block->cluster].live += static_cast<int>(threads);
  grid.resident.push_back(std::move(block));
  changed();
}

void put_away(Block& block) {
  for (Warp& warp : block.warps)
    for (Fiber& fiber : warp.fibers)
      if (fiber.stack) free_stacks_.push_back(fiber.stack), fiber.stack = nullptr;
  free_dynamics_.push_back(block.dynamic);
  if (current_ == &block) enter(nullptr);
}

// ---- barriers of a block

void release(Block& block, int id) {
  Barrier& barrier = block.barriers[id];
  for (size_t w = 0; w < block.warps.size(); w++) {
    const uint32_t came = barrier.lanes[w], all = block.warps[w].present & ~block.warps[w].ended;
    if (came && (came & all) != all)
      fault("barrier %d of %d threads: of warp %zu only lanes %08x came, and lanes %08x have not ended", id,
            barrier.threads, w, came, all);
    barrier.lanes[w] = 0;
  }
  for (Fiber* fiber : barrier.waiting)
    if (fiber != self) wake(fiber);
  barrier.waiting.clear();
  barrier.came = barrier.threads = 0;
  changed();
}

/// True when the running thread was the last.
bool come(int id, int threads, bool waits) {
  Block& block = *self->block;
  if (id < 0 || id >= kBarriers) fault("there is no barrier %d", id);
  Barrier& barrier = block.barriers[id];
  const bool all = threads == 0;
  if (all) threads = block.live;
  if (!all && threads % 32) fault("barrier %d of %d threads: not whole warps", id, threads);
  if (barrier.came > 0 && (barrier.all != all || (!all && barrier.threads != threads)))
    fault("barrier %d: threads that came before wait for %d, this one for %d", id, barrier.threads, threads);
  uint32_t& lanes = barrier.lanes[self->warp - block.warps.data()];
  if (lanes >> self->lane & 1) fault("barrier %d: this thread came already", id);
  barrier.threads = threads, barrier.all = all;
  barrier.came++;
  lanes |= 1u << self->lane;
  if (waits) barrier.waiting.push_back(self);
  if (barrier.came < threads) return false;
  release(block, id);
  return true;
}

void end_thread() {
  Fiber* const me = self;
  Block& block = *me->block;
  Warp& warp = *me->warp;
  const uint32_t bit = 1u << me->lane;
  for (uint32_t others = warp.offered; others; others &= others - 1)
    if (const int lane = __builtin_ctz(others); warp.mask[lane] & bit)
      fault("lane %d waits in a warp's collective of mask %08x for lanes that have ended, this one", lane,
            warp.mask[lane]);
  warp.ended |= bit;
  block.live--;
  Grid::Cluster& cluster = block.grid->clusters[block.cluster];
  cluster.live--;
  changed();
  if (Barrier& barrier = block.barriers[0]; barrier.all && barrier.came > 0 && barrier.came == block.live)
    release(block, 0);
  if (!cluster.came.empty() && static_cast<int>(cluster.came.size()) == cluster.live) {
    for (Fiber* fiber : cluster.came) wake(fiber);
    cluster.came.clear();
  }
  if (block.live == 0) {
    if (!block.bulk.empty())
      fault("the block ends with %zu bulk copies on their way to its shared memory", block.bulk.size());
    const char* const behind = block.dynamic + block.grid->launch.shared;
    for (size_t i = 0; i < kPage; i++)
      if (static_cast<unsigned char>(behind[i]) != kCanary)
        fault("the block wrote behind its %zu bytes of dynamic shared memory, at %zu",
              block.grid->launch.shared, block.grid->launch.shared + i);
  }
  Fiber* const to = block.live == 0 ? nullptr : pick(block, &warp);
  self = to;
  simt_switch(&me->stack_pointer, to ? to->stack_pointer : main_stack_);
}

// ---- collectives of a warp

float bf16(uint32_t bits) {
  float value;
  bits <<= 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// acc += a times b, `halves` times 8 elements. Sums in fp32, element after element; the hardware's order and
/// its rounding inside are its own.
void multiply(Warp& warp, int halves) {
  float a[16][16], b[16][8];
  bool low_only = true;
  const MmaOperands* all[32];
  for (int lane = 0; lane < 32; lane++) {
    const auto& x = *(all[lane] = reinterpret_cast<const MmaOperands*>(warp.value[lane]));
    const int row = lane / 4, k = lane % 4 * 2;
    for (int half = 0; half < halves; half++) {
      for (int i = 0; i < 2; i++) {
        const uint32_t pair = x.a[2 * half + i];
        a[row + 8 * i][8 * half + k] = bf16(pair), a[row + 8 * i][8 * half + k + 1] = bf16(pair >> 16);
        if (i == 1 && pair) low_only = false;
      }
      b[8 * half + k][row] = bf16(x.b[half]), b[8 * half + k + 1][row] = bf16(x.b[half] >> 16);
    }
  }
  for (int row = 0; row < (low_only ? 8 : 16); row++) {
    float sums[8] = {};
    for (int k = 0; k < 8 * halves; k++)
      for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
    for (int q = 0; q < 4; q++) {
      float* const acc = all[row % 8 * 4 + q]->acc + (row < 8 ? 0 : 2);
      acc[0] += sums[2 * q], acc[1] += sums[2 * q + 1];
    }
  }
}

struct LdmatrixOperands {
  const char* row;
  uint32_t* out;
};

void load_matrices(const Warp& warp, bool transposed) {
  for (int lane = 0; lane < 32; lane++) {
    uint32_t* const out = reinterpret_cast<const LdmatrixOperands*>(warp.value[lane])->out;
    for (int matrix = 0; matrix < 4; matrix++) {
      const auto row = [&](int r) {
        return reinterpret_cast<const LdmatrixOperands*>(warp.value[matrix * 8 + r])->row;
      };
      if (!transposed) {
        std::memcpy(&out[matrix], row(lane / 4) + lane % 4 * 4, 4);
        continue;
      }
      uint16_t pair[2];
      for (int i = 0; i < 2; i++) std::memcpy(&pair[i], row(lane % 4 * 2 + i) + lane / 4 * 2, 2);
      std::memcpy(&out[matrix], pair, 4);
    }
  }
}

/// What every lane of the mask gets.
void complete(Warp& warp, Op op, uint32_t mask) {
  switch (op) {
    case Op::syncwarp:
      return;
    case Op::mma16:
    case Op::mma8:
      return multiply(warp, op == Op::mma16 ? 2 : 1);
    case Op::ldmatrix:
    case Op::ldmatrix_trans:
      return load_matrices(warp, op == Op::ldmatrix_trans);
    default:
      break;
  }
  uint64_t joined = op == Op::all ? 1 : 0;
  bool first = true;
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const uint64_t x = warp.value[lane];
    int from = lane;
    switch (op) {
      case Op::shfl:
        from = warp.argument[lane] & 31;
        break;
      case Op::shfl_up:
        from = lane >= warp.argument[lane] ? lane - warp.argument[lane] : lane;
        break;
      case Op::shfl_down:
        from = lane + warp.argument[lane] < 32 ? lane + warp.argument[lane] : lane;
        break;
      case Op::shfl_xor:
        from = (lane ^ warp.argument[lane]) & 31;
        break;
      case Op::ballot:
        joined |= uint64_t{x != 0} << lane;
        break;
      case Op::all:
        joined &= x != 0;
        break;
      case Op::any:
        joined |= x != 0;
        break;
      case Op::add:
        joined += x;
        break;
      case Op::min:
        joined = first || static_cast<int64_t>(x) < static_cast<int64_t>(joined) ? x : joined;
        break;
      case Op::max:
        joined = first || static_cast<int64_t>(x) > static_cast<int64_t>(joined) ? x : joined;
        break;
      case Op::match:
        warp.result[lane] = 0;
        for (uint32_t others = mask; others; others &= others - 1)
          if (const int other = __builtin_ctz(others); warp.value[other] == x)
            warp.result[lane] |= uint64_t{1} << other;
        continue;
      default:
        break;
    }
    first = false;
    if (op >= Op::shfl && op <= Op::shfl_xor) {
      if (!(mask >> from & 1))
        fault("lane %d shuffles from lane %d, which mask %08x leaves out", lane, from, mask);
      warp.result[lane] = warp.value[from];
    }
  }
  if (op >= Op::ballot && op <= Op::max)
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) warp.result[__builtin_ctz(lanes)] = joined;
}

const char* const kOpNames[] = {
    "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
    "__shfl_xor_sync",   "__ballot_sync",     "__all_sync",        "__any_sync",
    "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync", "__match_any_sync",
    "mma.m16n8k16",      "mma.m16n8k8",       "ldmatrix",          "ldmatrix.trans"};

// ---- copies

struct Mbarrier {
  uint16_t arrivals, pending;
  int32_t bytes_and_phase;  // bytes to come * 2 + parity of the phase under way
};

/// Of the block whose shared memory is in place.
Mbarrier& mbarrier_at(uint32_t address) {
  if (address % 8) fault("mbarrier at %08x: not at a multiple of 8", address);
  auto& barrier = *reinterpret_cast<Mbarrier*>(room_at(address, 8));
  if (barrier.arrivals == 0 || barrier.arrivals == 0xffff)
    fault("mbarrier at %08x: not initialised", address);
  return barrier;
}

void look_whether_over(Block& block, uint32_t address, Mbarrier& barrier) {
  changed();
  if (barrier.pending != 0 || barrier.bytes_and_phase >> 1 != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.bytes_and_phase ^= 1;
  auto& sleepers = block.sleepers;
  for (size_t i = 0; i < sleepers.size();)
    if (sleepers[i].barrier == address) {
      wake(sleepers[i].fiber);
      sleepers[i] = sleepers.back();
      sleepers.pop_back();
    } else {
      i++;
    }
}

void arrive(Block& block, uint32_t address, int bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  if (barrier.pending == 0) fault("mbarrier at %08x: more than its %d arrivals", address, barrier.arrivals);
  barrier.pending--;
  barrier.bytes_and_phase += 2 * bytes;
  look_whether_over(block, address, barrier);
}

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

void land(Block& block, size_t i) {
  const Bulk bulk = block.bulk[i];
  block.bulk[i] = block.bulk.back();
  block.bulk.pop_back();
  if (!bulk.box) {
    std::memcpy(room_at(bulk.to, bulk.bytes), bulk.from, static_cast<size_t>(bulk.bytes));
  } else {
    const CUtensorMap& map = bulk.map;
    const int row_bytes = static_cast<int>(map.box[0]) * 2;
    uint32_t to = bulk.to;
    for (uint32_t z = 0; z < (map.dimensions > 2 ? map.box[2] : 1); z++)
      for (uint32_t y = 0; y < map.box[1]; y++, to += static_cast<uint32_t>(row_bytes))
        for (int at = 0; at < row_bytes; at += 16) {
          const int64_t x = bulk.at[0] + at / 2, row = bulk.at[1] + int64_t{y},
                        plane = bulk.at[2] + int64_t{z};
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
  Mbarrier& barrier = mbarrier_at(bulk.barrier);
  barrier.bytes_and_phase -= 2 * bulk.bytes;
  look_whether_over(block, bulk.barrier, barrier);
}

/// Any copy of the block's; its shared memory must be in place.
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

void begin_copy(Copy copy) {
  auto& copies = self->warp->copies[self->lane];
  if (copies.empty()) {
    auto& copying = self->block->copying;
    if (std::find(copying.begin(), copying.end(), self) == copying.end()) copying.push_back(self);
  }
  copies.push_back(copy);
}

void land_late(size_t i) {
  std::memcpy(late_[i].to, late_[i].value, static_cast<size_t>(late_[i].bytes));
  late_places_.erase(late_[i].to);
  late_[i] = late_.back();
  late_.pop_back();
  changed();
}

// ---- blocks and grids

void run(Block& block) {
  enter(&block);
  block_index = block.index, block_dim = block.grid->launch.block, grid_dim = block.grid->launch.grid;
  budget_ = 1 + static_cast<int>(draw(draw(4) ? 64 : 4096));
  Fiber* const to = pick(block, nullptr);
  if (!to) return;
  self = to;
  switches_++;
  simt_switch(&main_stack_, to->stack_pointer);
}

/// Takes away what has ended, and lets in what there is room for.
void tidy() {
  for (auto& grid : grids_) {
    if (grid->failed)
      for (auto& block : grid->resident) put_away(*block);
    if (grid->failed) grid->resident.clear(), grid->done = true;
    for (size_t i = 0; i < grid->resident.size();)
      if (grid->resident[i]->live == 0) {
        put_away(*grid->resident[i]);
        std::swap(grid->resident[i], grid->resident.back());
        grid->resident.pop_back();
        grid->ended++;
      } else {
        i++;
      }
    while (!grid->failed && grid->started < grid->order.size() &&
           (grid->launch.cluster > 1
                ? grid->started % grid->launch.cluster != 0 || grid->resident.size() < grid->most
                : grid->resident.size() < grid->most))
      begin(*grid, grid->order[grid->started++]);
  }
  for (auto& grid : grids_) {
    if (grid->ended == grid->order.size() && (!grid->before || grid->before->done)) grid->done = true;
    if (grid->before && grid->before->done) {
      for (Fiber* fiber : grid->waiting)
        if (!grid->failed) wake(fiber);
      grid->waiting.clear();
    }
    if (grid->done) {
      while (!late_.empty()) land_late(late_.size() - 1);
      grid->before.reset();
      changed();
    }
  }
  std::erase_if(grids_, [](const auto& grid) { return grid->done; });
}

void fail_all(const std::string& text) {
  std::string all = text + "\n";
  for (auto& grid : grids_) {
    grid->failed = true;
    all += "in kernel " + source_of(grid->launch.kernel, true) + "\n" + waits_of(*grid);
  }
  report(all);
}

/// A fault of a copy that landed between threads.
struct Landed {
  std::string what;
};

std::chrono::steady_clock::time_point turns_since_;

void on_signal(int number, siginfo_t* info, void*) {
  // Not much may be done here, but the process is lost anyway.
  if (self)
    std::fprintf(stderr, "simt: FAULT: signal %d at address %p, in kernel %s\n  %s, seed %llu\n", number,
                 info->si_addr, source_of(self->block->grid->launch.kernel, true).c_str(),
                 place_of(*self).c_str(), static_cast<unsigned long long>(seed_));
  else
    std::fprintf(stderr, "simt: signal %d at address %p, on the host\n", number, info->si_addr);
  _exit(1);
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

}  // namespace

Grid::Grid() = default;
Grid::~Grid() = default;
bool Grid::lets_next_start() const {
  if (done) return true;
  return started == order.size() && std::all_of(resident.begin(), resident.end(), [](const auto& block) {
           return block->lets_next_start || block->live == 0;
         });
}

uint64_t draw() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

size_t static_shared_bytes() {
  find_statics();
  return static_bytes_;
}
int processor_count() { return processors_; }

void start(std::shared_ptr<Grid> grid) {
  find_statics();
  catch_signals();
  const Launch& launch = grid->launch;
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z,
               clusters = blocks / launch.cluster;
  std::vector<unsigned> order(clusters);
  for (size_t i = 0; i < clusters; i++) order[i] = static_cast<unsigned>(i);
  for (size_t i = clusters; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
  for (const unsigned cluster : order)
    for (unsigned i = 0; i < launch.cluster; i++) grid->order.push_back(cluster * launch.cluster + i);
  grid->clusters.resize(clusters);
  // A kernel has at least a block on every processor at once, as long as it has that many.
  grid->most =
      launch.together ? blocks : static_cast<size_t>(processors_) + draw(static_cast<uint64_t>(processors_));
  grids_.push_back(std::move(grid));
  changed();
}

bool turn() {
  tidy();
  if (grids_.empty()) {
    enter(nullptr);
    return false;
  }
  clock_ += 100;
  std::vector<Block*> runnable, all;
  int threads = 0;
  for (auto& grid : grids_)
    for (auto& block : grid->resident) {
      all.push_back(block.get());
      threads += block->live;
      if (block->ready) runnable.push_back(block.get());
    }
  const bool still = idle_turns_ > 1000 + 4 * static_cast<uint64_t>(threads);
  if (!runnable.empty() && !still) {
    run(*runnable[draw(runnable.size())]);
    if (!late_.empty() && draw(4) == 0)
      for (size_t n = 1 + late_.size() / 8; n > 0; n--) land_late(draw(late_.size()));
    if (draw(1024) == 0 &&
        std::chrono::duration<double>(std::chrono::steady_clock::now() - turns_since_).count() > kMostSeconds)
      fail_all(format("the device has not come to an end in %.0f s", kMostSeconds));
    return true;
  }
  // Nobody gets on by itself: what is on its way lands, or time passes.
  idle_turns_ = 0;
  if (!all.empty()) {
    const size_t first = draw(all.size());
    for (size_t i = 0; i < all.size(); i++) {
      Block& block = *all[(first + i) % all.size()];
      if (block.bulk.empty() && block.copying.empty()) continue;
      enter(&block);
      try {
        if (land_one(block)) return true;
      } catch (const Landed& landed) {
        fail(*block.grid, "  a copy that landed: " + landed.what + "\n");
        return true;
      }
    }
  }
  if (!late_.empty()) {
    land_late(draw(late_.size()));
    return true;
  }
  bool sleeping = !runnable.empty();
  for (Block* block : all) sleeping |= !block->sleepers.empty();
  if (!sleeping || leaps_ > kMostLeaps) {
    fail_all(sleeping ? "threads go round and round, and nothing changes" : "deadlock: all threads wait");
    leaps_ = 0;
    return true;
  }
  leaps_++;
  clock_ += kLeapNs;
  if (leaps_ > 2 && when_stuck_ && !told_) {
    told_ = true;
    const auto action = std::exchange(when_stuck_, nullptr);
    action();
  }
  for (Block* block : all) {
    for (const Sleeper& sleeper : block->sleepers) wake(sleeper.fiber);
    block->sleepers.clear();
  }
  return true;
}

void stop_all() {
  for (auto& grid : grids_) grid->failed = true;
  late_.clear(), late_places_.clear();
  tidy();
  enter(nullptr);
}

void report(const std::string& text) {
  faults_++;
  last_fault_ = text;
  if (!hushed_)
    std::fprintf(stderr, "simt: FAULT %s  seed %llu, after %llu switches\n", text.c_str(),
                 static_cast<unsigned long long>(seed_), static_cast<unsigned long long>(switches_));
}

void fault(const char* text, ...) {
  va_list values;
  va_start(values, text);
  const std::string what = format(text, values);
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
    void* nowhere;
    self = nullptr;
    simt_switch(&nowhere, main_stack_);
  }
  throw Landed{what};  // a copy that landed while no thread ran
}

uint64_t collective(Op op, uint32_t mask, uint64_t value, int argument) {
  Warp& warp = *self->warp;
  const int lane = self->lane;
  const uint32_t bit = 1u << lane;
  self->where = __builtin_return_address(0);
  mask &= warp.present;
  if (!(mask & bit)) fault("%s of mask %08x by lane %d, which it leaves out", kOpNames[int(op)], mask, lane);
  if (mask & warp.ended)
    fault("%s of mask %08x: lanes %08x have ended", kOpNames[int(op)], mask, mask & warp.ended);
  for (uint32_t others = warp.offered; others; others &= others - 1) {
    const int other = __builtin_ctz(others);
    if ((mask >> other & 1) == 0 && (warp.mask[other] & bit) == 0) continue;
    if (warp.mask[other] != mask || warp.op[other] != op)
      fault("lanes of a warp part: lane %d is in %s of mask %08x, lane %d in %s of mask %08x", lane,
            kOpNames[int(op)], mask, other, kOpNames[int(warp.op[other])], warp.mask[other]);
    break;
  }
  warp.op[lane] = op, warp.mask[lane] = mask, warp.value[lane] = value, warp.argument[lane] = argument;
  warp.offered |= bit;
  if ((warp.offered & mask) != mask) {
    wait_in(kOpNames[int(op)]);
    return warp.result[lane];
  }
  warp.offered &= ~mask;
  complete(warp, op, mask);
  warp.ready |= mask & ~bit;
  if (warp.ready) self->block->ready |= 1u << (&warp - self->block->warps.data());
  return warp.result[lane];
}

void barrier_wait(int id, int threads) {
  static const char* const kNames[] = {"__syncthreads", "barrier 1",  "barrier 2",  "barrier 3",
                                       "barrier 4",     "barrier 5",  "barrier 6",  "barrier 7",
                                       "barrier 8",     "barrier 9",  "barrier 10", "barrier 11",
                                       "barrier 12",    "barrier 13", "barrier 14", "barrier 15"};
  self->where = __builtin_return_address(0);
  if (!come(id, threads, true)) wait_in(kNames[id]);
}
void barrier_arrive(int id, int threads) {
  self->where = __builtin_return_address(0);
  come(id, threads, false);
}

void cluster_wait() {
  self->where = __builtin_return_address(0);
  Grid::Cluster& cluster = self->block->grid->clusters[self->block->cluster];
  cluster.came.push_back(self);
  if (static_cast<int>(cluster.came.size()) < cluster.live) {
    wait_in("the cluster's barrier");
    return;
  }
  for (Fiber* fiber : cluster.came)
    if (fiber != self) wake(fiber);
  cluster.came.clear();
  changed();
}
int cluster_rank() { return static_cast<int>(self->block->number % self->block->grid->launch.cluster); }

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

namespace {

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

}  // namespace

char* shared_memory(uint32_t address, int bytes) {
  self->where = __builtin_return_address(0);
  return room_at(address, bytes);
}

void mbarrier_init(uint32_t barrier, int arrivals) {
  self->where = __builtin_return_address(0);
  if (barrier % 8) fault("mbarrier at %08x: not at a multiple of 8", barrier);
  if (arrivals <= 0 || arrivals >= 0xffff) fault("mbarrier of %d arrivals", arrivals);
  *reinterpret_cast<Mbarrier*>(room_at(barrier, 8)) = {static_cast<uint16_t>(arrivals),
                                                       static_cast<uint16_t>(arrivals), 0};
}
void mbarrier_arrive(uint32_t barrier, int bytes) {
  self->where = __builtin_return_address(0);
  maybe_pause();
  arrive(*self->block, barrier, bytes);
}
bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  self->where = __builtin_return_address(0);
  const Mbarrier& barrier = mbarrier_at(address);
  const auto over = [&] { return static_cast<uint32_t>(barrier.bytes_and_phase & 1) != (parity & 1); };
  if (over()) return true;
  if (draw(16) == 0) {
    pause();
  } else {
    self->block->sleepers.push_back({self, address, parity});
    wait_in("an mbarrier");
  }
  return over();
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
  mbarrier_at(barrier);
  self->block->bulk.push_back({to, barrier, static_cast<const char*>(from), bytes, false, {}, {}});
  maybe_pause();
}
void copy_box(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier) {
  self->where = __builtin_return_address(0);
  const CUtensorMap& m = *static_cast<const CUtensorMap*>(map);
  const int bytes = static_cast<int>(m.box[0] * m.box[1] * (m.dimensions > 2 ? m.box[2] : 1)) * 2;
  if (to % 128) fault("a box to %08x: not at a multiple of 128", to);
  std::memset(room_at(to, bytes), kPoison, static_cast<size_t>(bytes));
  mbarrier_at(barrier);
  self->block->bulk.push_back({to, barrier, nullptr, bytes, true, m, {x, y, z}});
  maybe_pause();
}

void store_late(void* to, const void* value, int bytes) {
  if (!late_places_.insert(to).second) {  // stores to one place keep their order
    while (!late_.empty()) land_late(late_.size() - 1);
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
void changed() {
  idle_turns_ = 0;
  leaps_ = 0;
  told_ = false;
}
void fence_system() {
  while (!late_.empty()) land_late(late_.size() - 1);
}
void pause() {
  idle_turns_++;
  wake(self);
  leave();
}
void maybe_pause() {
  if (draw() >> 60) return;
  wake(self);
  leave();
}

void grid_wait() {
  Grid& grid = *self->block->grid;
  while (grid.before && !grid.before->done) {
    grid.waiting.push_back(self);
    self->where = __builtin_return_address(0);
    wait_in("the kernel before");
  }
}
void grid_launch_dependents() {
  if (self->block->lets_next_start) return;
  self->block->lets_next_start = true;
  changed();
}

uint64_t clock_ns() { return clock_ += 1; }

void seed(uint64_t value) {
  seed_ = value;
  state_ = value * 0x9e3779b97f4a7c15u + 0x1234567u;
  for (int i = 0; i < 8; i++) draw();
}
void processors(int count) { processors_ = count; }
void when_stuck(std::function<void()> action) { when_stuck_ = std::move(action); }
int faults() { return faults_; }
const std::string& last_fault() { return last_fault_; }
void quiet(bool on) { hushed_ = on; }
uint64_t switches() { return switches_; }

/// The host begins to wait for the device.
void begin_waiting() { turns_since_ = std::chrono::steady_clock::now(); }

}  // namespace simt
