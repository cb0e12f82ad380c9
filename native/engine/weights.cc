#include "engine/weights.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace tp {

namespace {

// Tensors begin at whole lines: a GPU copies to shared memory more slowly from halves of two.
constexpr size_t kHostAlign = 64, kDeviceAlign = 256;
constexpr int64_t kBounceBytes = int64_t{4} << 20;   // short runs are picked out of blocks of this size
constexpr int64_t kDirectBytes = int64_t{64} << 10;  // runs at least this long are read where they belong
constexpr int64_t kSkipBytes = 4096;                 // gaps shorter than a page cannot be skipped anyway

using Run = Weights::Run;

std::vector<Run> runs_of(const Slice& slice) {
  std::vector<Run> runs;
  for_each_run(
      slice, [&](int64_t source, int64_t target, int64_t count) { runs.push_back({source, target, count}); });
  return runs;
}

/// Splits long runs, so that threads share even a tensor that is one run.
std::vector<Run> pieces_of(const Slice& slice, int64_t most) {
  std::vector<Run> pieces;
  for (const Run& run : runs_of(slice))
    for (int64_t done = 0; done < run.count; done += most)
      pieces.push_back({run.source + done, run.target + done, std::min(most, run.count - done)});
  return pieces;
}

void read_fully(int fd, void* into, int64_t bytes, int64_t offset) {
  auto* at = static_cast<char*>(into);
  while (bytes > 0) {
    const ssize_t got = pread(fd, at, static_cast<size_t>(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      fail("TP_WEIGHTS_READ", "reading %lld bytes at %lld: %s", static_cast<long long>(bytes),
           static_cast<long long>(offset), strerror(errno));
    if (got == 0) {
      struct stat file = {};
      fstat(fd, &file);
      fail("TP_WEIGHTS_READ",
           "the file ends at byte %lld, but %lld bytes are needed from byte %lld on; did it change?",
           static_cast<long long>(file.st_size), static_cast<long long>(bytes),
           static_cast<long long>(offset));
    }
    at += got;
    offset += got;
    bytes -= got;
  }
}

/// Runs [first, last), neighbours in the tensor.
struct Group {
  size_t first, last;
};

/// Elements of the file from a group's first to its last.
int64_t span_of(const std::vector<Run>& runs, const Group& group) {
  return runs[group.last - 1].source + runs[group.last - 1].count - runs[group.first].source;
}

/// Elements of a group.
int64_t sum_of(const std::vector<Run>& runs, const Group& group) {
  return runs[group.last - 1].target + runs[group.last - 1].count - runs[group.first].target;
}

/// As few groups as fit the bounce buffer by `size`; a run by itself always does.
std::vector<Group> groups_of(const std::vector<Run>& runs,
                             int64_t (*size)(const std::vector<Run>&, const Group&)) {
  std::vector<Group> groups;
  for (size_t first = 0; first < runs.size();) {
    size_t last = first + 1;
    while (last < runs.size() &&
           size(runs, {first, last + 1}) * static_cast<int64_t>(sizeof(Bf16)) <= kBounceBytes)
      last++;
    groups.push_back({first, last});
    first = last;
  }
  return groups;
}

/// Reads a group's whole span into `bounce` and copies its runs to where they belong.
void pick_out(const std::vector<Run>& runs, const Group& group, Bf16* into, Bf16* bounce, int fd,
              int64_t offset) {
  constexpr int64_t kSize = sizeof(Bf16);
  const int64_t from = runs[group.first].source;
  read_fully(fd, bounce, span_of(runs, group) * kSize, offset + from * kSize);
  for (size_t r = group.first; r < group.last; r++)
    std::memcpy(into + runs[r].target, bounce + (runs[r].source - from),
                static_cast<size_t>(runs[r].count * kSize));
}

}  // namespace

void for_each_run(const Slice& slice, const std::function<void(int64_t, int64_t, int64_t)>& run) {
  // The innermost axes that are whole, and the one before them, make one contiguous piece.
  const int axes = static_cast<int>(slice.shape.size());
  int inner = axes - 1;
  int64_t below = 1;
  while (inner > 0 && slice.start[inner] == 0 && slice.stop[inner] == slice.shape[inner])
    below *= slice.shape[inner--];
  const int64_t count = (slice.stop[inner] - slice.start[inner]) * below;
  if (count == 0) return;

  std::vector<int64_t> stride(axes, 1);
  for (int i = axes - 2; i >= 0; i--) stride[i] = stride[i + 1] * slice.shape[i + 1];
  std::vector<int64_t> at(slice.start.begin(), slice.start.begin() + inner);
  int64_t target = 0;
  for (;;) {
    int64_t source = slice.start[inner] * stride[inner];
    for (int i = 0; i < inner; i++) source += at[i] * stride[i];
    run(source, target, count);
    target += count;
    int axis = inner - 1;
    while (axis >= 0 && ++at[axis] == slice.stop[axis]) {
      at[axis] = slice.start[axis];
      axis--;
    }
    if (axis < 0) return;
  }
}

Weights::Weights(const std::vector<TensorSpec>& specs, Backend& backend, int threads)
    : backend_(backend), threads_(threads) {
  const size_t align = backend.on_host() ? kHostAlign : kDeviceAlign;
  std::vector<size_t> offsets;
  for (const TensorSpec& spec : specs) {
    Tensor tensor{spec.shape, nullptr, 1, false};
    size_t bytes = sizeof(Bf16);
    for (int64_t n : spec.shape) {
      if (n <= 0)
        fail("TP_PLAN", "tensor %s has an axis of %lld", spec.name.c_str(), static_cast<long long>(n));
      bytes = bytes_of({bytes, static_cast<size_t>(n)});
    }
    tensor.elements = static_cast<int64_t>(bytes / sizeof(Bf16));
    offsets.push_back(bytes_);
    bytes_ = bytes_of({bytes_ + (bytes + align - 1) / align * align});
    if (!tensors_.emplace(spec.name, tensor).second)
      fail("TP_PLAN", "tensor %s is planned twice", spec.name.c_str());
  }
  memory_ = backend.allocate(bytes_);
  for (size_t i = 0; i < specs.size(); i++)
    tensors_[specs[i].name].data = reinterpret_cast<Bf16*>(static_cast<char*>(memory_) + offsets[i]);
}

Tensor& Weights::expect(const std::string& name, const Slice& slice) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("TP_PLAN", "tensor %s is not in the plan", name.c_str());
  int64_t elements = 1;
  for (size_t i = 0; i < slice.shape.size(); i++) {
    if (slice.start[i] < 0 || slice.stop[i] > slice.shape[i] || slice.start[i] > slice.stop[i])
      fail("TP_PLAN", "slice of %s: axis %zu is [%lld, %lld) of %lld", name.c_str(), i,
           static_cast<long long>(slice.start[i]), static_cast<long long>(slice.stop[i]),
           static_cast<long long>(slice.shape[i]));
    elements *= slice.stop[i] - slice.start[i];
  }
  if (elements != found->second.elements)
    fail("TP_PLAN", "slice of %s holds %lld elements, the plan says %lld", name.c_str(),
         static_cast<long long>(elements), static_cast<long long>(found->second.elements));
  return found->second;
}

void Weights::synthesize(const std::string& name, const Slice& slice, const Synthetic& source) {
  Tensor& tensor = expect(name, slice);
  struct Piece {
    Stretch stretch;
    Bf16* out;
  };
  // Runs of one length and one distance are a stretch; host threads share it out, a device takes it whole.
  std::vector<Piece> pieces;
  const auto add = [&](const Stretch& stretch, Bf16* out) {
    constexpr uint64_t kMost = uint64_t{1} << 18;  // elements of a host thread's piece
    if (!backend_.on_host()) return pieces.push_back({stretch, out});
    if (stretch.count >= kMost) {
      for (uint64_t r = 0; r < stretch.rows; r++)
        for (uint64_t done = 0; done < stretch.count; done += kMost)
          pieces.push_back(
              {{stretch.start + r * stretch.stride + done, std::min(kMost, stretch.count - done), 0, 1},
               out + r * stretch.count + done});
      return;
    }
    const uint64_t rows = std::max<uint64_t>(1, kMost / stretch.count);
    for (uint64_t r = 0; r < stretch.rows; r += rows)
      pieces.push_back({{stretch.start + r * stretch.stride, stretch.count, stretch.stride,
                         std::min(rows, stretch.rows - r)},
                        out + r * stretch.count});
  };
  Stretch open{0, 0, 0, 0};
  int64_t into = 0;
  const auto end = [&] {
    if (open.rows > 0) add(open, tensor.data + into);
  };
  for_each_run(slice, [&](int64_t from, int64_t to, int64_t count) {
    const auto start = static_cast<uint64_t>(from), n = static_cast<uint64_t>(count);
    const bool fits =
        open.rows > 0 && open.count == n && (open.rows == 1 || start == open.start + open.rows * open.stride);
    if (!fits) {
      end();
      open = {start, n, 0, 0};
      into = to;
    } else if (open.rows == 1) {
      open.stride = start - open.start;
    }
    open.rows++;
  });
  end();
  backend_.parallel(static_cast<int>(pieces.size()), [&](int i, int) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    backend_.ops().synthesize(source, piece.stretch, piece.out, backend_);
  });
  backend_.finish();
  tensor.filled = true;
}

void Weights::read(const std::string& name, const Slice& slice, int fd, int64_t offset) {
  Tensor& tensor = expect(name, slice);
  const std::vector<Run> runs = runs_of(slice);
  constexpr int64_t kSize = sizeof(Bf16);
  const bool direct =
      runs.empty() || runs[0].count * kSize >= kDirectBytes ||
      (runs.size() > 1 && (runs[1].source - runs[0].source - runs[0].count) * kSize >= kSkipBytes);
  const std::vector<Run> pieces = direct ? pieces_of(slice, kBounceBytes / kSize) : std::vector<Run>();
  if (backend_.on_host())
    read_on_host(tensor.data, direct ? pieces : runs, direct, fd, offset);
  else
    read_to_device(tensor.data, direct ? pieces : runs, direct, fd, offset);
  tensor.filled = true;
}

void Weights::read_on_host(Bf16* into, const std::vector<Run>& runs, bool direct, int fd, int64_t offset) {
  constexpr int64_t kSize = sizeof(Bf16);
  // Short runs: tasks of neighbouring runs whose span fits the bounce buffer.
  const auto groups = direct ? std::vector<Group>() : groups_of(runs, span_of);

  // An exception may not cross the pool: the first one waits here.
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  const auto guarded = [&](auto&& work) {
    try {
      if (!failed.load(std::memory_order_relaxed)) work();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  if (direct) {
    backend_.parallel(static_cast<int>(runs.size()), [&](int i, int) {
      guarded([&] {
        const Run& piece = runs[static_cast<size_t>(i)];
        read_fully(fd, into + piece.target, piece.count * kSize, offset + piece.source * kSize);
      });
    });
  } else {
    backend_.parallel(static_cast<int>(groups.size()), [&](int i, int thread) {
      guarded([&] {
        const Group& group = groups[static_cast<size_t>(i)];
        void* const bounce = backend_.scratch(thread, static_cast<size_t>(span_of(runs, group) * kSize));
        pick_out(runs, group, into, static_cast<Bf16*>(bounce), fd, offset);
      });
    });
  }
  if (error) std::rethrow_exception(error);
}

void Weights::read_to_device(Bf16* into, const std::vector<Run>& runs, bool direct, int fd, int64_t offset) {
  constexpr int64_t kSize = sizeof(Bf16);
  static_assert(kBounceBytes <= static_cast<int64_t>(Uploads::kPieceBytes));
  if (!uploads_) uploads_ = std::make_unique<Uploads>(backend_, threads_);
  // Neighbours in the tensor travel together, however far apart they lie in the file.
  const auto groups = groups_of(runs, direct ? sum_of : span_of);
  uploads_->run(static_cast<int>(groups.size()), [&](int i, void* memory) {
    const Group& group = groups[static_cast<size_t>(i)];
    const int64_t first = runs[group.first].target, count = sum_of(runs, group);
    const auto room = static_cast<Bf16*>(memory);
    if (direct) {
      for (size_t r = group.first; r < group.last; r++)
        read_fully(fd, room + (runs[r].target - first), runs[r].count * kSize,
                   offset + runs[r].source * kSize);
    } else {
      thread_local std::vector<Bf16> bounce;
      bounce.resize(static_cast<size_t>(span_of(runs, group)));
      pick_out(runs, group, room - first, bounce.data(), fd, offset);
    }
    return Uploads::Sent{into + first, static_cast<size_t>(count * kSize)};
  });
}

const Bf16* Weights::get(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("TP_PLAN", "tensor %s is not in the plan", name.c_str());
  const auto text = [](const std::vector<int64_t>& s) {
    std::string out = "[";
    for (size_t i = 0; i < s.size(); i++) out += (i ? ", " : "") + std::to_string(s[i]);
    return out + "]";
  };
  if (found->second.shape != shape)
    fail("TP_PLAN", "tensor %s has shape %s, the op needs %s", name.c_str(),
         text(found->second.shape).c_str(), text(shape).c_str());
  return found->second.data;
}

void Weights::complete() {
  if (uploads_) uploads_->finish();
  uploads_.reset();
  for (const auto& [name, tensor] : tensors_)
    if (!tensor.filled) fail("TP_PLAN", "tensor %s was never loaded", name.c_str());
}

}  // namespace tp
