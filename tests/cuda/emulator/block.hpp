// Runs thread blocks, those of a cluster together, as fibers: warp and warpgroup collectives and barriers are
// rendezvous, shared memory is watched.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <utility>

#include "device/registers.hpp"
#include "mbarrier.hpp"
#include "thread.hpp"

namespace ddst::emu {

// Bytes on their way to shared memory of one block.
struct BulkCopy {
  int thread, block;
  std::uint32_t offset;
  std::shared_ptr<const std::vector<std::byte>> bytes;  // in the order of addresses
  std::uint32_t barrier;
  Time time;
  Where where;
};

class Block final : public Mbarriers::Host {
 public:
  static constexpr int kWarp = Clocks::kWarp, kWarpgroup = Clocks::kWarpgroup;
  inline static thread_local Block* current = nullptr;

  Options options;
  Stats stats;
  Index3 grid_size;

  // `cluster` blocks in a row along x run together.
  void launch(Index3 grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
              int cluster = 1) {
    if (threads % kWarp) throw Failure("block size is no multiple of 32");
    if (cluster < 1 || grid.x % cluster) throw Failure("grid is no multiple of the cluster");
    Block* const outer = current;
    current = this;
    kernel_ = &kernel;
    grid_size = grid;
    for (int z = 0; z < grid.z; ++z)
      for (int y = 0; y < grid.y; ++y)
        for (int x = 0; x < grid.x; x += cluster) {
          first_block_ = {x, y, z};
          try {
            run(cluster, threads, shared_bytes);
          } catch (...) {
            running_ = nullptr;
            current = outer;
            throw;
          }
        }
    current = outer;
  }

  // ---- called from fibers ----
  int thread_id() const { return running_->local; }
  int thread_count() const { return thread_count_; }
  int cluster_rank() const { return running_->block; }
  int cluster_size() const { return blocks_; }
  Index3 block_index() const { return index_of(running_->block); }
  Thread& self() { return *running_; }

  void warp_op(WarpOp op, void* args, const char* what, Where where) {
    running_->op = op;
    running_->args = args;
    block_self(Thread::State::at_warp_op, what, where);
  }
  void warpgroup_op(WarpOp op, void* args, const char* what, Where where) {
    running_->op = op;
    running_->args = args;
    block_self(Thread::State::at_warpgroup_op, what, where);
  }
  void barrier(Where where) {
    running_->orders_nothing = dropped(where);
    block_self(Thread::State::at_barrier, "__syncthreads", where);
  }
  void some_barrier(int id, int threads, Where where) {
    if (threads % kWarp || threads < kWarp || threads > thread_count_)
      fail("barrier of " + std::to_string(threads) + " threads", where);
    running_->orders_nothing = dropped(where);
    running_->barrier = id, running_->count = threads;
    block_self(Thread::State::at_some, "sync_some", where);
  }
  void cluster_barrier(Where where) {
    running_->orders_nothing = dropped(where);
    block_self(Thread::State::at_cluster, "cluster_sync", where);
  }
  void wait(std::uint32_t offset, int parity, Where where) {
    Mbarrier& b = barriers.used(running_->id, running_->block, offset, false, "wait", where);
    ++stats.barrier_waits;
    if (dropped(where)) return;
    if (barriers.passes(b, parity)) return clocks.acquire(running_->id, b.released);
    b.waiting.push_back(running_->id);
    running_->barrier = int(offset), running_->count = parity;
    block_self(Thread::State::at_mbarrier, "barrier_wait", where);
    --b.woken;
  }
  void start(BulkCopy copy) {
    if (options.delay_copies)
      in_flight_.push_back(std::move(copy));
    else
      land(copy);
  }
  // True if fault injection takes this wait or fence away.
  bool dropped(Where where) {
    if (options.drop_at.empty() && !options.list_waits) return false;
    const std::string here = place(where);
    const int turn = running_->turns[here]++;
    int& most = stats.wait_places[here];
    most = std::max(most, turn + 1);
    return here == options.drop_at && (options.drop_turn < 0 || options.drop_turn == turn);
  }

  [[noreturn]] void fail(const std::string& message, Where where) { report(running_, message, where); }
  [[noreturn]] void fail_for(const Thread* thread, const std::string& message, Where where) {
    report(thread, message, where);
  }
  [[noreturn]] void fail_for(int thread, const std::string& message, Where where) override {
    report(threads_[thread].get(), message, where);
  }

  // ---- shared memory of the running thread's block ----
  std::byte* shared_data(std::uint32_t offset, std::uint32_t bytes, std::uint32_t align, Where where) {
    return shared_data_of(running_ ? *running_ : *threads_[0], offset, bytes, align, where);
  }
  std::byte* shared_data_of(const Thread& by, std::uint32_t offset, std::uint32_t bytes, std::uint32_t align,
                            Where where) {
    if (std::uint64_t(offset) + bytes > shared_bytes_)
      report(&by,
             "shared access out of bounds: offset " + std::to_string(offset) + " + " + std::to_string(bytes) + " of " +
                 std::to_string(shared_bytes_),
             where);
    if (offset % align) report(&by, "misaligned shared access: offset " + std::to_string(offset), where);
    return shared_ + by.block * shared_stride_ + offset;
  }
  std::byte* shared_data_in(int block, std::uint32_t offset, std::uint32_t bytes, std::uint32_t align, Where where) {
    return shared_data(offset, bytes, align, where) + (block - running_->block) * std::ptrdiff_t(shared_stride_);
  }
  void note_read(const Thread& by, std::uint32_t offset, std::uint32_t bytes, Where where) {
    if (options.check_races) shadow.read(by.id, shadow_offset(by.block, offset), bytes, where);
  }
  void note_write(const Thread& by, std::uint32_t offset, std::uint32_t bytes, Shadow::Kind kind, Where where) {
    if (options.check_races) shadow.write(by.id, shadow_offset(by.block, offset), bytes, kind, where);
  }
  // A cp.async lands: no second check, but from now on its bytes are the thread's own write.
  void land(const Thread& by, const Copy& copy) {
    if (options.delay_copies) copy.fetch(shared_ + by.block * shared_stride_ + copy.dst);
    if (options.check_races) shadow.land(by.id, shadow_offset(by.block, copy.dst), copy.bytes);
  }
  std::size_t shadow_offset(int block, std::uint32_t offset) const { return block * shared_stride_ + offset; }

  // An increase may come before the decrease that it waits for: whether all fits is seen when the block ends.
  void set_registers(int warp, int count, bool more) {
    const int now = registers_[warp];
    if (more ? count < now : count > now)
      report(threads_[warp * kWarp].get(),
             std::string("setmaxnreg: ") + (more ? "an increase" : "a decrease") + " from " + std::to_string(now) +
                 " registers to " + std::to_string(count),
             threads_[warp * kWarp]->where);
    registers_[warp] = count;
  }

  std::string place(Where where) const {
    const char* name = std::strrchr(where.file_name(), '/');
    return std::string(name ? name + 1 : where.file_name()) + ':' + std::to_string(where.line());
  }
  std::string owner_name(int owner) const override {
    if (owner < int(blocks_ * thread_count_)) {
      const Thread& thread = *threads_[owner];
      return "thread " + std::to_string(thread.local) +
             (blocks_ > 1 ? " of CTA " + std::to_string(thread.block) : std::string());
    }
    if (const Mbarrier* b = barriers.of_owner(owner))
      return "a bulk copy in flight, for which the barrier at byte " + std::to_string(b->offset) + " was not waited";
    return "a wgmma in flight, for which wgmma_wait did not wait";
  }
  Thread& thread(int id) { return *threads_[id]; }
  void wake(int thread) override { threads_[thread]->state = Thread::State::ready; }
  // An arrival or a copy reaches block `rank` from another one: access of `owner` at `time`.
  void reach(int rank, const char* what, int owner, Time time, Where where) {
    if (rank < 0 || rank >= blocks_)
      fail(std::string(what) + " to CTA " + std::to_string(rank) + " of " + std::to_string(blocks_), where);
    if (rank == running_->block) return;
    if (ended(rank)) fail(std::string(what) + " to CTA " + std::to_string(rank) + ", which has ended", where);
    reached_[rank].insert_or_assign(owner, Reach{running_->id, time, what, where});
  }

  Clocks clocks;
  Shadow shadow{*this, clocks};
  Mbarriers barriers{*this, clocks};

 private:
  struct Reach {  // from another block
    int thread;
    Time time;
    const char* what;
    Where where;
  };

  static void entry();
  void block_self(Thread::State state, const char* what, Where where) {
    running_->state = state;
    running_->what = what;
    running_->where = where;
    running_->fiber.suspend();
  }
  [[noreturn]] void report(const Thread* thread, const std::string& message, Where where);
  Index3 index_of(int block) const { return {first_block_.x + block, first_block_.y, first_block_.z}; }
  std::string lane_name(const Thread& thread) const;

  // schedule.hpp
  void run(int blocks, int threads, std::size_t shared_bytes);
  void prepare(int blocks, int threads, std::size_t shared_bytes);
  void run_warp(int warp, unsigned first_lane);
  void resolve_warp(int warp, int at_op);
  void resolve_warpgroups();
  void release_barriers();
  void release_some(int block);
  void land(const BulkCopy& copy);
  void land_some();
  bool land_one();
  bool ended(int block) const;
  void block_ends(int block);
  [[noreturn]] void stuck();
  int count(int first, int last, Thread::State state) const {
    return int(std::count_if(threads_.begin() + first, threads_.begin() + last,
                             [&](const auto& thread) { return thread->state == state; }));
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> storage_;
  std::byte* shared_ = nullptr;
  std::size_t shared_bytes_ = 0, shared_stride_ = 0, capacity_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::deque<BulkCopy> in_flight_;
  std::vector<std::map<int, Reach>> reached_;  // of each block, the last one of each owner
  std::vector<bool> ended_;
  std::vector<int> registers_;  // of a thread of each warp, by setmaxnreg
  Index3 first_block_;
  int blocks_ = 1, thread_count_ = 0, barriers_ = 0;
  bool progress_ = false;
  std::mt19937_64 random_;
  Thread* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::string failure_;
};

}  // namespace ddst::emu

#include "schedule.hpp"
