// Who knows of whose accesses: vector clocks.
//
// An owner is what accesses memory: a thread, the products of a warpgroup (wgmma), or the copies onto one mbarrier.
// Each counts its own time; an access carries owner and time. A thread knows of an access (it happened before) if one
// of three vectors says so: its block's, which a block barrier writes; its warp's, which __syncwarp and named barriers
// write; its own, which waits on mbarriers write. So block barriers, the only ones of many kernels, stay cheap.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace ddst::emu {

using Time = std::int32_t;  // signed: two of four are compared in one instruction

class Clocks {
 public:
  using Vector = std::vector<Time>;
  static constexpr int kWarp = 32, kWarpgroup = 128;

  void reset(int blocks, int threads) {
    blocks_ = blocks, threads_ = threads;
    owners_ = blocks * threads + blocks * ((threads + kWarpgroup - 1) / kWarpgroup);
    now_.assign(std::size_t(blocks * threads), 1);
    size_ = std::size_t(owners_ + kMostBarriers * blocks + 3) / 4 * 4;
    by_block_.resize(blocks);
    for (auto& known : by_block_) known.assign(size_, 0);
    by_warp_.resize(std::size_t(blocks * threads / kWarp));
    by_thread_.resize(std::size_t(blocks * threads));
    for (auto& known : by_warp_) known.clear();
    for (auto& known : by_thread_) known.clear();
    most_owners_ = owners_ + kMostBarriers * blocks;
    generations_.assign(std::size_t(blocks), 1);
    block_of_.resize(std::size_t(blocks * threads));
    for (int thread = 0; thread < blocks * threads; ++thread) block_of_[thread] = thread / threads;
    only_block_barriers_ = true;
  }
  int warpgroup(int thread) const {
    const int block = thread / threads_;
    return blocks_ * threads_ + block * ((threads_ + kWarpgroup - 1) / kWarpgroup) + thread % threads_ / kWarpgroup;
  }
  int add_owner() {
    only_block_barriers_ = false;
    return owners_ == most_owners_ ? -1 : owners_++;
  }
  Vector nothing() const { return Vector(size_, 0); }
  Time now(int thread) const { return now_[thread]; }
  void tick(int thread) { ++now_[thread]; }

  // What a thread knows: of the access of `owner` at `time`?
  class Knowledge {
   public:
    bool of(int owner, Time time) const {
      return block_[owner] >= time || owner == thread_ || (warp_ && warp_[owner] >= time) ||
             (own_ && own_[owner] >= time);
    }

   private:
    friend Clocks;
    int thread_;
    const Time *block_, *warp_, *own_;
  };
  Knowledge knowledge(int thread) const {
    const auto data = [](const Vector& known) { return known.empty() ? nullptr : known.data(); };
    Knowledge result;
    result.thread_ = thread;
    result.block_ = by_block_[block_of_[thread]].data();
    result.warp_ = data(by_warp_[thread / kWarp]), result.own_ = data(by_thread_[thread]);
    return result;
  }
  bool knows(int thread, int owner, Time time) const { return knowledge(thread).of(owner, time); }
  // Block barriers so far, + 1, of the thread's block; and whether they are all that orders different warps.
  Time generation(int thread) const { return generations_[block_of_[thread]]; }
  Time generation_of_block(int block) const { return generations_[block]; }
  bool only_block_barriers() const { return only_block_barriers_; }

  // What the thread has done and knows goes into `to`; what it does from now on does not.
  void release(int thread, Vector& to) {
    join(to, by_block_[block_of_[thread]]);
    join(to, by_warp_[thread / kWarp]);
    join(to, by_thread_[thread]);
    to[thread] = now_[thread]++;
  }
  void acquire(int thread, const Vector& from) {
    Vector& own = by_thread_[thread];
    if (own.empty()) own = nothing();
    join(own, from);
  }
  void learn(int thread, int owner, Time time) {
    Vector& own = by_thread_[thread];
    if (own.empty()) own = nothing();
    own[owner] = std::max(own[owner], time);
  }

  void sync_warp(int warp) {
    Vector& known = by_warp_[warp];
    if (known.empty()) known = nothing();
    for (int thread = warp * kWarp; thread < (warp + 1) * kWarp; ++thread) {
      join(known, by_thread_[thread]);
      by_thread_[thread].clear();
      known[thread] = now_[thread]++;
    }
  }
  void sync_warps(const std::vector<int>& warps) {
    only_block_barriers_ = false;
    Vector all = nothing();
    for (int warp : warps) {
      sync_warp(warp);
      join(all, by_warp_[warp]);
    }
    for (int warp : warps) by_warp_[warp] = all;
  }
  void sync_block(int block) {
    Vector& known = by_block_[block];
    ++generations_[block];
    for (int warp = block * threads_ / kWarp; warp < (block + 1) * threads_ / kWarp; ++warp) {
      join(known, by_warp_[warp]);
      by_warp_[warp].clear();
    }
    for (int thread = block * threads_; thread < (block + 1) * threads_; ++thread) {
      join(known, by_thread_[thread]);
      by_thread_[thread].clear();
      known[thread] = now_[thread]++;
    }
  }

 private:
  static constexpr int kMostBarriers = 128;  // of a block

  static void join(Vector& to, const Vector& from) {  // the later time of each owner
    typedef Time Four __attribute__((vector_size(16), aligned(4), may_alias));
    for (std::size_t i = 0; i < from.size(); i += 4) {
      Four& a = *reinterpret_cast<Four*>(&to[i]);
      const Four b = *reinterpret_cast<const Four*>(&from[i]);
      a = a > b ? a : b;
    }
  }

  int blocks_ = 0, threads_ = 0, owners_ = 0, most_owners_ = 0;
  std::size_t size_ = 0;
  bool only_block_barriers_ = true;
  Vector now_, generations_;
  std::vector<int> block_of_;
  std::vector<Vector> by_block_, by_warp_, by_thread_;  // empty: nothing beyond what the block's says
};

}  // namespace ddst::emu
