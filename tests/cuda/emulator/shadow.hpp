// Watches shared memory: what was last written and read where, by whom, and whether who comes next knows of it.
#pragma once
#include <algorithm>
#include <source_location>
#include <string>
#include <vector>

#include "clocks.hpp"

namespace ddst::emu {

using Where = std::source_location;

// What checks report to. It does not return.
struct Reporter {
  [[noreturn]] virtual void fail_for(int thread, const std::string& message, Where where) = 0;
  virtual std::string owner_name(int owner) const = 0;

 protected:
  ~Reporter() = default;
};

class Shadow {
 public:
  Shadow(Reporter& reporter, const Clocks& clocks) : reporter_(reporter), clocks_(clocks) {}

  // All cells are unwritten again. `stride`: bytes from one block's shared memory to the next one's.
  void reset(std::size_t bytes, std::size_t stride, int threads) {
    if (cells_.size() < bytes / kGranule + 1) cells_.resize(bytes / kGranule + 1);
    if (++run_ == 0) cells_.assign(cells_.size(), Cell{}), run_ = 1;
    stride_ = stride;
    fences_.assign(std::size_t(threads), {});
  }

  // By a thread: `offset` counts from the first block's shared memory.
  void read(int by, std::size_t offset, std::uint32_t bytes, Where where) {
    const auto known = clocks_.knowledge(by);
    const Time now = clocks_.now(by);
    for (std::size_t i = offset / kGranule, end = last(offset, bytes); i < end; ++i) {
      Cell& cell = cells_[i];
      if (cell.run != run_ || cell.kind == kCpAsync || cell.kind == kBarrier) not_readable(by, cell, i, where);
      if (!known.of(cell.writer, cell.written)) race(by, "read after write", cell.writer, i, where);
      if (cell.reader == by || cell.read == 0)
        cell.reader = std::int16_t(by), cell.read = now;
      else
        note_reader(cell, known, by, by, now);
    }
  }
  void write(int by, std::size_t offset, std::uint32_t bytes, std::uint8_t kind, Where where) {
    const auto known = clocks_.knowledge(by);
    for (std::size_t i = offset / kGranule, end = last(offset, bytes); i < end; ++i) {
      Cell& cell = cells_[i];
      check_writable(by, known, cell, i, where);
      mark(cell, by, clocks_.now(by), kind);
    }
  }
  // A cp.async lands: no second check, but from now on its bytes are the thread's own write.
  void land(int by, std::size_t offset, std::uint32_t bytes) {
    for (std::size_t i = offset / kGranule, end = last(offset, bytes); i < end; ++i)
      mark(cells_[i], by, clocks_.now(by), kPlain);
  }

  // By the asynchronous proxy: a thread starts a copy, whose bytes are those of `owner` at `time`.
  void write_later(int by, std::size_t offset, std::uint32_t bytes, int owner, Time time, Where where) {
    const auto known = clocks_.knowledge(by);
    for (std::size_t i = offset / kGranule, end = last(offset, bytes); i < end; ++i) {
      Cell& cell = cells_[i];
      check_writable(by, known, cell, i, where);
      if (cell.run == run_) check_fence(by, cell, i, where);
      mark(cell, owner, time, kAsync);
    }
  }
  // The threads first .. first + count - 1 start a product that reads the bytes as `owner` at `time`.
  void read_later(int first, int count, std::size_t offset, std::uint32_t bytes, int owner, Time time, Where where) {
    const auto known = clocks_.knowledge(first);
    for (std::size_t i = offset / kGranule, end = last(offset, bytes); i < end; ++i) {
      Cell& cell = cells_[i];
      if (cell.run != run_ || cell.kind == kCpAsync || cell.kind == kBarrier) not_readable(first, cell, i, where);
      const Asked asked{run_, cell.writer, cell.written, time, owner};
      if (!(asked == asked_)) {
        for (int by = first; by < first + count; ++by) {
          if (!clocks_.knows(by, cell.writer, cell.written)) race(by, "read after write", cell.writer, i, where);
          check_fence(by, cell, i, where);
        }
        asked_ = asked;
      }
      note_reader(cell, known, first, owner, time);
    }
  }
  void fence(int by, Time time) { fences_[by].push_back(time), asked_ = {}; }

  enum Kind : std::uint8_t { kPlain, kCpAsync, kAsync, kBarrier };

 private:
  static constexpr std::int16_t kMany = -1;     // readers; their time is their block's generation
  static constexpr std::uint32_t kGranule = 4;  // bytes per cell: no instruction here accesses less
  struct Access {
    int owner;
    Time time;
  };
  struct Cell {
    std::uint32_t run = 0;
    Time written = 0, read = 0;
    std::int16_t writer = 0, reader = 0;
    std::uint32_t more = 0;  // other readers
    std::uint8_t kind = kPlain;
  };
  struct Asked {
    std::uint32_t run = 0;
    int writer = 0;
    Time written = 0, time = 0;
    int owner = 0;
    bool operator==(const Asked&) const = default;
  };

  static std::size_t last(std::size_t offset, std::uint32_t bytes) {
    return (offset + bytes + kGranule - 1) / kGranule;
  }
  std::string byte(std::size_t cell) const { return std::to_string(cell * kGranule % stride_); }

  [[gnu::cold]] void not_readable(int by, const Cell& cell, std::size_t i, Where where) {
    reporter_.fail_for(by,
                       (cell.run != run_        ? "read of uninitialised shared memory, byte "
                        : cell.kind == kCpAsync ? "read of a copy in flight (wait missing), byte "
                                                : "read of an mbarrier as data, byte ") +
                           byte(i),
                       where);
  }
  void check_writable(int by, const Clocks::Knowledge& known, const Cell& cell, std::size_t i, Where where) {
    if (cell.run != run_) return;
    if (cell.kind == kCpAsync || cell.kind == kBarrier)
      reporter_.fail_for(
          by,
          (cell.kind == kCpAsync ? "write over a copy in flight, byte " : "write over an mbarrier, byte ") + byte(i),
          where);
    if (!known.of(cell.writer, cell.written)) race(by, "write after write", cell.writer, i, where);
    if (cell.read == 0) return;
    if (cell.reader == kMany ? cell.read == clocks_.generation_of_block(int(i * kGranule / stride_))
                             : !known.of(cell.reader, cell.read))
      race(by, "write after read", cell.reader, i, where);
    if (cell.more)
      for (const Access& other : more_[cell.more])
        if (!known.of(other.owner, other.time)) race(by, "write after read", other.owner, i, where);
  }
  void mark(Cell& cell, int owner, Time time, std::uint8_t kind) {
    if (cell.more) more_[cell.more].clear();
    cell.run = run_, cell.read = 0;
    cell.writer = std::int16_t(owner), cell.written = time, cell.kind = kind;
  }
  // `known` is what `thread` knows, which the owner's access comes after: other readers that it knows of need not be
  // remembered. Where block barriers alone order warps, which threads of several warps have read is all the same.
  void note_reader(Cell& cell, const Clocks::Knowledge& known, int thread, int owner, Time time) {
    if (cell.reader == kMany && cell.read) {
      if (cell.read == clocks_.generation(thread)) return;
      cell.read = 0;
    }
    if (cell.read == 0 || cell.reader == owner) {
      cell.reader = std::int16_t(owner), cell.read = time;
      return;
    }
    if (cell.more)
      for (Access& other : more_[cell.more])
        if (other.owner == owner) {
          other.time = time;
          return;
        }
    if (known.of(cell.reader, cell.read)) {
      cell.reader = std::int16_t(owner), cell.read = time;
      if (cell.more) forget_known(more_[cell.more], known);
      return;
    }
    if (clocks_.only_block_barriers() && cell.reader / Clocks::kWarp != owner / Clocks::kWarp) {
      cell.reader = kMany, cell.read = clocks_.generation(thread);
      if (cell.more) more_[cell.more].clear();
      return;
    }
    if (!cell.more) {
      cell.more = std::uint32_t(more_.size());
      more_.emplace_back();
    }
    forget_known(more_[cell.more], known);
    more_[cell.more].push_back({owner, time});
  }
  void forget_known(std::vector<Access>& readers, const Clocks::Knowledge& known) {
    std::erase_if(readers, [&](const Access& a) { return known.of(a.owner, a.time); });
  }
  // Between a thread's write and an asynchronous access there must be that thread's fence, before it told anybody.
  void check_fence(int by, const Cell& cell, std::size_t i, Where where) {
    if (cell.kind != kPlain) return;
    const auto& fences = fences_[cell.writer];
    const auto found = std::lower_bound(fences.begin(), fences.end(), cell.written);
    if (found == fences.end() || !clocks_.knows(by, cell.writer, *found))
      reporter_.fail_for(by,
                         "asynchronous access to what " + reporter_.owner_name(cell.writer) +
                             " wrote without fence_async_shared, byte " + byte(i),
                         where);
  }
  [[gnu::cold]] void race(int by, const char* kind, int owner, std::size_t cell, Where where) {
    reporter_.fail_for(by,
                       std::string("race in shared memory (") + kind + ", no barrier since " +
                           (owner == kMany ? "several threads" : reporter_.owner_name(owner)) + "), byte " + byte(cell),
                       where);
  }

  Reporter& reporter_;
  const Clocks& clocks_;
  std::vector<Cell> cells_;
  std::vector<std::vector<Access>> more_{1};  // [0] stands for none
  std::vector<std::vector<Time>> fences_;     // of each thread, ascending
  Asked asked_;
  std::uint32_t run_ = 0;
  std::size_t stride_ = 1;
};

}  // namespace ddst::emu
