// Runs one thread block as fibers: warp collectives and block barriers are rendezvous, shared memory is watched.
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace ddst::emu {

using Where = std::source_location;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  bool delay_copies = true;  // cp.async moves its bytes at the wait; false: at once (both are allowed by the hardware)
  bool check_races = true;   // shared memory: races, uninitialised reads, reads of copies in flight
  std::uint64_t seed = 0;    // order of warps and lanes; 0 is the natural order
  int drop_barrier = -1;     // fault injection: the n-th block barrier orders nothing
  int drop_wait = -1;        // fault injection: the n-th cp.async wait of every thread does nothing
};

struct Stats {
  long mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0, copies = 0, shuffles = 0, barriers = 0, blocks = 0, waits = 0;
};

struct Index3 {
  int x = 0, y = 0, z = 0;
};

class Block;
using WarpOp = void (*)(Block&, int warp, void* const* args);  // args: one pointer per lane

struct Copy {
  std::uint32_t dst, bytes;
  int group;
  std::function<void(std::byte*)> fetch;
};

struct Thread {
  enum class State { ready, at_warp_op, at_barrier, done };
  Fiber fiber;
  int id = 0;
  State state = State::ready;
  const char* what = "start";
  Where where;
  WarpOp op = nullptr;
  void* args = nullptr;
  std::vector<Copy> copies;
  int groups = 0, waits = 0;
};

class Block {
 public:
  static constexpr int kWarp = 32;
  inline static thread_local Block* current = nullptr;

  Options options;
  Stats stats;
  Index3 block_index, grid_size;

  void launch(Index3 grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads % kWarp) throw Failure("block size is no multiple of 32");
    Block* const outer = current;
    current = this;
    kernel_ = &kernel;
    grid_size = grid;
    for (int z = 0; z < grid.z; ++z)
      for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; ++x) {
          block_index = {x, y, z};
          try {
            run(threads, shared_bytes);
          } catch (...) {
            current = outer;
            throw;
          }
        }
    current = outer;
  }

  // ---- called from fibers ----
  int thread_id() const { return running_->id; }
  int thread_count() const { return thread_count_; }
  Thread& self() { return *running_; }

  void warp_op(WarpOp op, void* args, const char* what, Where where) {
    running_->op = op;
    running_->args = args;
    block_self(Thread::State::at_warp_op, what, where);
  }
  void barrier(Where where) { block_self(Thread::State::at_barrier, "__syncthreads", where); }

  [[noreturn]] void fail(const std::string& message, Where where) { fail_for(running_, message, where); }
  [[noreturn]] void fail_for(const Thread* thread, const std::string& message, Where where) {
    std::ostringstream text;
    text << message << " at " << place(where);
    if (thread)
      text << ", thread " << thread->id << " (warp " << thread->id / kWarp << " lane " << thread->id % kWarp << ')';
    text << ", block (" << block_index.x << ',' << block_index.y << ',' << block_index.z << ')';
    if (!running_) throw Failure(text.str());
    failure_ = text.str();
    running_->fiber.suspend();  // the scheduler throws; this stack is abandoned
    std::abort();
  }

  // ---- shared memory ----
  std::byte* shared_data(std::uint32_t offset, std::uint32_t bytes, std::uint32_t align, Where where) {
    if (std::uint64_t(offset) + bytes > shared_bytes_)
      fail("shared access out of bounds: offset " + std::to_string(offset) + " + " + std::to_string(bytes) + " of " +
               std::to_string(shared_bytes_),
           where);
    if (offset % align) fail("misaligned shared access: offset " + std::to_string(offset), where);
    return shared_ + offset;
  }
  void note_read(const Thread& by, std::uint32_t offset, std::uint32_t bytes, Where where) {
    if (!options.check_races) return;
    for (std::uint32_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
      Cell& cell = shadow_[i];
      if (cell.write_epoch < first_epoch_)
        fail_for(&by, "read of uninitialised shared memory, byte " + std::to_string(i * kGranule), where);
      if (cell.writer & kInFlight)
        fail_for(&by, "read of a copy in flight (wait missing), byte " + std::to_string(i * kGranule), where);
      if (conflicts(by, cell.writer, cell.write_epoch, cell.write_warp_epoch))
        race(by, "read after write", cell.writer, i, where);
      const std::uint32_t warp_epoch = warp_epochs_[by.id / kWarp];
      const bool fresh =
          cell.read_epoch != epoch_ || (cell.reader_warp == by.id / kWarp && cell.read_warp_epoch < warp_epoch);
      cell.reader = fresh || cell.reader == by.id ? by.id : kMany;
      cell.reader_warp = fresh || cell.reader_warp == by.id / kWarp ? by.id / kWarp : kMany;
      cell.read_epoch = epoch_;
      cell.read_warp_epoch = warp_epoch;
    }
  }
  void note_write(const Thread& by, std::uint32_t offset, std::uint32_t bytes, bool in_flight, Where where) {
    if (!options.check_races) return;
    for (std::uint32_t i = offset / kGranule; i < (offset + bytes + kGranule - 1) / kGranule; ++i) {
      Cell& cell = shadow_[i];
      if (cell.write_epoch >= first_epoch_ && (cell.writer & kInFlight))
        fail_for(&by, "write over a copy in flight, byte " + std::to_string(i * kGranule), where);
      if (conflicts(by, cell.writer, cell.write_epoch, cell.write_warp_epoch))
        race(by, "write after write", cell.writer, i, where);
      if (cell.read_epoch == epoch_ && cell.reader != by.id &&
          !(cell.reader_warp == by.id / kWarp && cell.read_warp_epoch < warp_epochs_[by.id / kWarp]))
        race(by, "write after read", cell.reader, i, where);
      mark_written(cell, by, in_flight);
    }
  }
  // A copy lands: no second check, but from now on its bytes are the thread's own write.
  void land(const Thread& by, const Copy& copy) {
    if (options.delay_copies) copy.fetch(shared_ + copy.dst);
    if (!options.check_races) return;
    for (std::uint32_t i = copy.dst / kGranule; i < (copy.dst + copy.bytes) / kGranule; ++i)
      mark_written(shadow_[i], by, false);
  }
  void sync_warp_memory(int warp) { ++warp_epochs_[warp]; }

  std::string place(Where where) const {
    const char* name = std::strrchr(where.file_name(), '/');
    return std::string(name ? name + 1 : where.file_name()) + ':' + std::to_string(where.line());
  }
  Thread& thread(int id) { return *threads_[id]; }

 private:
  static constexpr std::uint32_t kGranule = 2;  // bytes per shadow cell; the smallest element type
  static constexpr std::uint16_t kInFlight = 0x8000, kMany = 0x7fff;
  struct Cell {
    std::uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
    std::uint16_t writer = 0, reader = 0, reader_warp = 0;
  };

  bool conflicts(const Thread& by, int other, std::uint32_t epoch, std::uint32_t warp_epoch) const {
    if (epoch != epoch_ || other == by.id) return false;
    return other / kWarp != by.id / kWarp || warp_epoch >= warp_epochs_[by.id / kWarp];
  }
  void mark_written(Cell& cell, const Thread& by, bool in_flight) {
    cell.writer = std::uint16_t(by.id | (in_flight ? kInFlight : 0));
    cell.write_epoch = epoch_;
    cell.write_warp_epoch = warp_epochs_[by.id / kWarp];
  }
  [[noreturn]] void race(const Thread& by, const char* kind, int other, std::uint32_t cell, Where where) {
    fail_for(&by,
             std::string("race in shared memory (") + kind + ", no barrier since thread " +
                 (other == kMany ? "several" : std::to_string(other)) + "), byte " + std::to_string(cell * kGranule),
             where);
  }

  static void entry() {
    Block& block = *current;
    (*block.kernel_)();
    if (!block.running_->copies.empty()) block.fail("thread ends with copies in flight", block.running_->where);
    block.running_->state = Thread::State::done;
    block.running_->what = "end";
    block.running_->fiber.suspend();
    std::abort();
  }

  void block_self(Thread::State state, const char* what, Where where) {
    running_->state = state;
    running_->what = what;
    running_->where = where;
    running_->fiber.suspend();
  }

  void run(int threads, std::size_t shared_bytes) {
    thread_count_ = threads;
    while (int(threads_.size()) < threads) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->id = int(threads_.size()) - 1;
    }
    prepare_shared(shared_bytes);
    ++stats.blocks;
    barriers_ = 0;
    first_epoch_ = ++epoch_;
    warp_epochs_.assign(threads / kWarp, 0);
    for (int t = 0; t < threads; ++t) {
      Thread& thread = *threads_[t];
      thread.state = Thread::State::ready;
      thread.copies.clear();
      thread.groups = thread.waits = 0;
      thread.fiber.start(&Block::entry);
    }
    std::vector<int> warps(threads / kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    std::mt19937_64 random(options.seed);
    for (;;) {
      if (options.seed) std::shuffle(warps.begin(), warps.end(), random);
      for (int warp : warps) run_warp(warp, options.seed ? unsigned(random()) % kWarp : 0);
      const auto count = [&](Thread::State s) {
        return std::count_if(threads_.begin(), threads_.begin() + threads, [&](auto& t) { return t->state == s; });
      };
      const auto done = count(Thread::State::done), waiting = count(Thread::State::at_barrier);
      if (done == threads) return;
      if (waiting == threads) {
        release_barrier();
      } else if (waiting + done == threads) {
        for (int t = 0; t < threads; ++t)
          if (threads_[t]->state == Thread::State::at_barrier)
            fail("barrier that " + std::to_string(done) + " ended threads never reach", threads_[t]->where);
      }
    }
  }

  // Runs a warp until every lane has ended or waits at a block barrier.
  void run_warp(int warp, unsigned first_lane) {
    for (;;) {
      for (int i = 0; i < kWarp; ++i) {
        Thread& thread = *threads_[warp * kWarp + (i + first_lane) % kWarp];
        if (thread.state != Thread::State::ready) continue;
        running_ = &thread;
        thread.fiber.resume();
        running_ = nullptr;
        if (!failure_.empty()) throw Failure(std::exchange(failure_, {}));
      }
      int at_op = 0;
      for (int lane = 0; lane < kWarp; ++lane)
        at_op += threads_[warp * kWarp + lane]->state == Thread::State::at_warp_op;
      if (at_op == 0) return;
      resolve(warp, at_op);
    }
  }

  void resolve(int warp, int at_op) {
    void* args[kWarp];
    const Thread* first = nullptr;
    for (int lane = 0; lane < kWarp; ++lane)
      if (threads_[warp * kWarp + lane]->state == Thread::State::at_warp_op) {
        first = threads_[warp * kWarp + lane].get();
        break;
      }
    for (int lane = 0; lane < kWarp; ++lane) {
      Thread& thread = *threads_[warp * kWarp + lane];
      const bool same = thread.state == Thread::State::at_warp_op && thread.op == first->op &&
                        thread.where.line() == first->where.line() && thread.where.column() == first->where.column();
      if (!same)
        fail_for(&thread,
                 std::string("warp diverged: ") + std::to_string(at_op) + " lanes wait, lane " +
                     std::to_string(first->id % kWarp) + " at " + first->what + ' ' + place(first->where) +
                     ", but lane " + std::to_string(lane) + " is at " + thread.what,
                 thread.where);
      args[lane] = thread.args;
    }
    first->op(*this, warp, args);
    for (int lane = 0; lane < kWarp; ++lane) threads_[warp * kWarp + lane]->state = Thread::State::ready;
  }

  void release_barrier() {
    for (int t = 1; t < thread_count_; ++t)
      if (threads_[t]->where.line() != threads_[0]->where.line())
        fail_for(threads_[t].get(), "threads meet at different barriers; thread 0 is at " + place(threads_[0]->where),
                 threads_[t]->where);
    if (barriers_++ != options.drop_barrier) ++epoch_;
    ++stats.barriers;
    for (int t = 0; t < thread_count_; ++t) threads_[t]->state = Thread::State::ready;
  }

  void prepare_shared(std::size_t bytes) {
    if (bytes > capacity_) {
      storage_.reset(static_cast<std::byte*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024)));
      shadow_.assign(bytes / kGranule + 1, Cell{});
      capacity_ = bytes;
    }
    shared_ = storage_.get();
    shared_bytes_ = bytes;
    if (bytes) std::memset(shared_, 0xff, bytes);  // NaN in fp32, bf16 and fp16; -1 as an index
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> storage_;
  std::byte* shared_ = nullptr;
  std::size_t shared_bytes_ = 0, capacity_ = 0;
  std::vector<Cell> shadow_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::uint32_t> warp_epochs_;
  std::uint32_t epoch_ = 0, first_epoch_ = 0;
  int thread_count_ = 0, barriers_ = 0;
  Thread* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::string failure_;
};

}  // namespace ddst::emu
