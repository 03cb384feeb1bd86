// Who runs next, and what happens once everybody waits. Part of block.hpp.
#pragma once
#include "block.hpp"

namespace ddst::emu {

inline void Block::report(const Thread* thread, const std::string& message, Where where) {
  std::ostringstream text;
  text << message << " at " << place(where);
  if (thread) text << ", " << lane_name(*thread);
  const Index3 at = index_of(thread ? thread->block : running_ ? running_->block : 0);
  text << ", block (" << at.x << ',' << at.y << ',' << at.z << ')';
  if (!running_) throw Failure(text.str());
  failure_ = text.str();
  running_->fiber.suspend();  // the scheduler throws; this stack is abandoned
  std::abort();
}
inline std::string Block::lane_name(const Thread& thread) const {
  return "thread " + std::to_string(thread.local) + " (warp " + std::to_string(thread.local / kWarp) + " lane " +
         std::to_string(thread.local % kWarp) + ')';
}

inline void Block::entry() {
  Block& block = *current;
  (*block.kernel_)();
  if (!block.running_->copies.empty()) block.fail("thread ends with copies in flight", block.running_->where);
  if (!block.running_->products.idle()) block.fail("thread ends with a wgmma in flight", block.running_->where);
  block.running_->state = Thread::State::done;
  block.running_->what = "end";
  block.running_->fiber.suspend();
  std::abort();
}

inline void Block::prepare(int blocks, int threads, std::size_t shared_bytes) {
  blocks_ = blocks, thread_count_ = threads;
  while (int(threads_.size()) < blocks * threads) threads_.push_back(std::make_unique<Thread>());
  shared_stride_ = (shared_bytes + 1023) / 1024 * 1024, shared_bytes_ = shared_bytes;
  const std::size_t bytes = shared_stride_ * blocks;
  if (bytes > capacity_) {
    storage_.reset(static_cast<std::byte*>(std::aligned_alloc(1024, bytes)));
    capacity_ = bytes;
  }
  shared_ = storage_.get();
  if (bytes) std::memset(shared_, 0xff, bytes);  // NaN in fp32, bf16 and fp16; -1 as an index
  clocks.reset(blocks, threads);
  shadow.reset(bytes, shared_stride_, blocks * threads);
  barriers.reset();
  in_flight_.clear();
  reached_.assign(blocks, {});
  ended_.assign(blocks, false);
  registers_.assign(blocks * threads / kWarp, dev::registers_at_entry(threads));
  barriers_ = 0;
  random_.seed(options.seed);
  stats.blocks += blocks;
  for (int t = 0; t < blocks * threads; ++t) {
    Thread& thread = *threads_[t];
    thread.id = t, thread.block = t / threads, thread.local = t % threads;
    thread.state = Thread::State::ready;
    thread.copies.clear();
    thread.groups = thread.waits = 0;
    thread.orders_nothing = false;
    thread.products.reset();
    thread.turns.clear();
    thread.fiber.start(&Block::entry);
  }
}

inline void Block::run(int blocks, int threads, std::size_t shared_bytes) {
  prepare(blocks, threads, shared_bytes);
  std::vector<int> warps(blocks * threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  for (;;) {
    if (options.seed) std::shuffle(warps.begin(), warps.end(), random_);
    progress_ = false;
    for (int warp : warps) run_warp(warp, options.seed ? unsigned(random_()) % kWarp : 0);
    bool all_ended = true;
    for (int block = 0; block < blocks; ++block) {
      if (!ended_[block] && ended(block)) block_ends(block);
      all_ended = all_ended && ended_[block];
    }
    if (all_ended) return;
    if (!in_flight_.empty()) land_some();
    resolve_warpgroups();
    release_barriers();
    if (!progress_ && !land_one()) stuck();
  }
}

// Runs a warp until every lane has ended or waits for others.
inline void Block::run_warp(int warp, unsigned first_lane) {
  for (;;) {
    int at_op = 0, elsewhere = 0;
    for (int i = 0; i < kWarp; ++i) {
      Thread& thread = *threads_[warp * kWarp + (i + first_lane) % kWarp];
      if (thread.state != Thread::State::ready) continue;
      progress_ = true;
      running_ = &thread;
      thread.fiber.resume();
      running_ = nullptr;
      if (!failure_.empty()) throw Failure(std::exchange(failure_, {}));
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread::State state = threads_[warp * kWarp + lane]->state;
      at_op += state == Thread::State::at_warp_op;
      elsewhere +=
          state != Thread::State::at_warp_op && state != Thread::State::done && state != Thread::State::at_barrier;
    }
    if (at_op == 0 || elsewhere) return;  // those elsewhere may still come
    resolve_warp(warp, at_op);
  }
}

inline void Block::resolve_warp(int warp, int at_op) {
  void* args[kWarp];
  const Thread* first = nullptr;
  for (int lane = 0; lane < kWarp && !first; ++lane)
    if (threads_[warp * kWarp + lane]->state == Thread::State::at_warp_op) first = threads_[warp * kWarp + lane].get();
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& thread = *threads_[warp * kWarp + lane];
    const bool same = thread.state == Thread::State::at_warp_op && thread.op == first->op &&
                      thread.where.line() == first->where.line() && thread.where.column() == first->where.column();
    if (!same)
      report(&thread,
             std::string("warp diverged: ") + std::to_string(at_op) + " lanes wait, lane " +
                 std::to_string(first->local % kWarp) + " at " + first->what + ' ' + place(first->where) +
                 ", but lane " + std::to_string(lane) + " is at " + thread.what,
             thread.where);
    args[lane] = thread.args;
  }
  first->op(*this, warp, args);
  for (int lane = 0; lane < kWarp; ++lane) threads_[warp * kWarp + lane]->state = Thread::State::ready;
}

// Warpgroups all of whose threads are at the same product go on.
inline void Block::resolve_warpgroups() {
  for (int block = 0; block < blocks_; ++block)
    for (int first = block * thread_count_; first + kWarpgroup <= (block + 1) * thread_count_; first += kWarpgroup) {
      if (threads_[first]->state != Thread::State::at_warpgroup_op) continue;
      if (count(first, first + kWarpgroup, Thread::State::at_warpgroup_op) < kWarpgroup) continue;
      void* args[kWarpgroup];
      for (int i = 0; i < kWarpgroup; ++i) {
        Thread& thread = *threads_[first + i];
        if (thread.op != threads_[first]->op || thread.where.line() != threads_[first]->where.line() ||
            thread.where.column() != threads_[first]->where.column())
          report(&thread,
                 std::string("warpgroup diverged: thread ") + std::to_string(threads_[first]->local) + " is at " +
                     threads_[first]->what + ' ' + place(threads_[first]->where) + ", but this one at " + thread.what,
                 thread.where);
        args[i] = thread.args;
      }
      threads_[first]->op(*this, first / kWarp, args);
      for (int i = 0; i < kWarpgroup; ++i) threads_[first + i]->state = Thread::State::ready;
      progress_ = true;
    }
}

inline void Block::release_barriers() {
  for (int block = 0; block < blocks_; ++block) {
    const int first = block * thread_count_, last = first + thread_count_;
    const int waiting = count(first, last, Thread::State::at_barrier);
    if (waiting == 0) {
    } else if (waiting == thread_count_) {
      for (int t = first; t < last; ++t)
        if (threads_[t]->where.line() != threads_[first]->where.line())
          report(threads_[t].get(),
                 "threads meet at different barriers; thread 0 is at " + place(threads_[first]->where),
                 threads_[t]->where);
      if (barriers_++ != options.drop_barrier && !threads_[first]->orders_nothing) clocks.sync_block(block);
      ++stats.barriers;
      for (int t = first; t < last; ++t) wake(t);
      progress_ = true;
    } else if (const int done = count(first, last, Thread::State::done); waiting + done == thread_count_) {
      for (int t = first; t < last; ++t)
        if (threads_[t]->state == Thread::State::at_barrier)
          report(threads_[t].get(), "barrier that " + std::to_string(done) + " ended threads never reach",
                 threads_[t]->where);
    }
    release_some(block);
  }
  const int all = blocks_ * thread_count_, waiting = count(0, all, Thread::State::at_cluster);
  if (waiting && waiting + count(0, all, Thread::State::done) == all) {
    bool orders = true;
    for (int t = 0; t < all; ++t) {
      if (threads_[t]->state != Thread::State::at_cluster) continue;
      orders = orders && !threads_[t]->orders_nothing;
      wake(t);
    }
    if (orders) barriers.cluster_synchronised();  // relaxed: no data, and no arrivals before a CTA's end
    progress_ = true;
  }
}

// Barriers of some of a block's warps.
inline void Block::release_some(int block) {
  const int first = block * thread_count_, last = first + thread_count_;
  for (int t = first; t < last; ++t) {
    const Thread& one = *threads_[t];
    if (one.state != Thread::State::at_some) continue;
    std::vector<int> warps;
    int there = 0;
    bool orders = true;
    for (int other = first; other < last; ++other) {
      const Thread& thread = *threads_[other];
      if (thread.state != Thread::State::at_some || thread.barrier != one.barrier) continue;
      if (thread.count != one.count)
        report(&thread,
               "barrier " + std::to_string(one.barrier) + " of " + std::to_string(thread.count) +
                   " threads, at which " + lane_name(one) + " waits for " + std::to_string(one.count),
               thread.where);
      ++there;
      orders = orders && !thread.orders_nothing;
      if (warps.empty() || warps.back() != other / kWarp) warps.push_back(other / kWarp);
    }
    if (there < one.count) continue;
    if (int(warps.size()) * kWarp != one.count || there != one.count)
      report(&one,
             "barrier " + std::to_string(one.barrier) + " of " + std::to_string(one.count) + " threads, at which " +
                 std::to_string(there) + " of " + std::to_string(warps.size()) + " warps are",
             one.where);
    const int id = one.barrier;
    if (orders) clocks.sync_warps(warps);
    for (int other = first; other < last; ++other)
      if (threads_[other]->state == Thread::State::at_some && threads_[other]->barrier == id) wake(other);
    progress_ = true;
  }
}

inline void Block::land(const BulkCopy& copy) {
  Mbarrier& b = barriers.used(copy.thread, copy.block, copy.barrier, false, "copy", copy.where);
  std::memcpy(shared_ + copy.block * shared_stride_ + copy.offset, copy.bytes->data(), copy.bytes->size());
  barriers.arrive_bytes(b, copy.thread, copy.time, long(copy.bytes->size()), copy.where);
}
// With a seed, copies land at any time.
inline void Block::land_some() {
  if (!options.seed) return;
  for (std::size_t i = 0; i < in_flight_.size();)
    if (random_() % 4 == 0) {
      std::swap(in_flight_[i], in_flight_.front());
      progress_ = land_one() || progress_;
    } else {
      ++i;
    }
}
inline bool Block::land_one() {
  if (in_flight_.empty()) return false;
  const BulkCopy copy = std::move(in_flight_.front());
  in_flight_.pop_front();
  land(copy);
  return true;
}

inline bool Block::ended(int block) const {
  const int first = block * thread_count_;
  return count(first, first + thread_count_, Thread::State::done) == thread_count_;
}
// What others do to a block must be over when it ends: somebody there waited for it.
inline void Block::block_ends(int block) {
  ended_[block] = true;
  const int first = block * thread_count_;
  for (const auto& [owner, reach] : reached_[block]) {
    bool known = false;
    for (int t = first; t < first + thread_count_ && !known; ++t) known = clocks.knows(t, owner, reach.time);
    if (!known)
      report(threads_[reach.thread].get(),
             "CTA " + std::to_string(block) + " may end before the " + reach.what + " to it", reach.where);
  }
  for (int warp = first / kWarp; warp < (first + thread_count_) / kWarp; ++warp) {
    const int of_warpgroup = registers_[warp - (warp - first / kWarp) % 4];
    if (registers_[warp] != of_warpgroup)
      report(threads_[warp * kWarp].get(),
             "setmaxnreg: the warpgroup's warps ask for " + std::to_string(of_warpgroup) + " and " +
                 std::to_string(registers_[warp]) + " registers",
             threads_[warp * kWarp]->where);
  }
  const int warps = thread_count_ / kWarp, first_warp = first / kWarp;
  const int sum = std::accumulate(registers_.begin() + first_warp, registers_.begin() + first_warp + warps, 0);
  if (sum > dev::registers_at_entry(thread_count_) * warps)
    report(threads_[first].get(),
           "setmaxnreg: " + std::to_string(sum * kWarp) + " registers are asked for, more than there were",
           threads_[first]->where);
  for (const BulkCopy& copy : in_flight_)
    if (copy.block == block)
      report(threads_[copy.thread].get(), "CTA " + std::to_string(block) + " ends while a copy to it is in flight",
             copy.where);
  for (auto& [place, b] : barriers.all())
    if (b.block == block && b.bytes > 0)
      report(threads_[b.initialiser].get(),
             "CTA " + std::to_string(block) + " ends while bytes are missing: " + Mbarriers::state(b),
             threads_[b.initialiser]->where);
}

// Nobody can go on.
inline void Block::stuck() {
  for (int warp = 0; warp < blocks_ * thread_count_ / kWarp; ++warp)
    if (const int at_op = count(warp * kWarp, (warp + 1) * kWarp, Thread::State::at_warp_op)) resolve_warp(warp, at_op);
  std::map<std::string, std::string> places;  // the threads there
  const Thread* waiting = nullptr;
  const Thread* product = nullptr;
  std::string before;
  for (int t = 0; t < blocks_ * thread_count_; ++t) {
    const Thread& thread = *threads_[t];
    std::string at = thread.what;
    if (thread.state != Thread::State::done) at += ' ' + place(thread.where);
    if (thread.state == Thread::State::at_mbarrier)
      at += " for parity " + std::to_string(thread.count) + " of the " +
            Mbarriers::state(barriers.all().at({thread.block, std::uint32_t(thread.barrier)}));
    if (blocks_ > 1) at += " in CTA " + std::to_string(thread.block);
    if (t == 0 || at != before) {
      std::string& threads = places[at];
      threads += (threads.empty() ? "" : ", ") + std::to_string(thread.local) + "...";
      if (t) places[before] += std::to_string(threads_[t - 1]->local);
    }
    before = at;
    if (!waiting && thread.state != Thread::State::done) waiting = &thread;
    if (!product && thread.state == Thread::State::at_warpgroup_op) product = &thread;
  }
  places[before] += std::to_string(thread_count_ - 1);
  std::string text = product ? "warpgroup diverged, some of its threads never come to its wgmma:" : "deadlock:";
  for (const auto& [at, threads] : places)
    text += (text.back() == ':' ? " threads " : "; threads ") + threads + " at " + at;
  report(product ? product : waiting, text + "; the first waits", (product ? product : waiting)->where);
}

}  // namespace ddst::emu
