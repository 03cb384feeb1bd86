// Who knows of whose accesses: vector clocks.
//
// An owner is what accesses memory: a thread, the products of a warpgroup (wgmma), or the copies onto one mbarrier.
// Each counts its own time; an access carries owner and time. A thread knows of an access (it happened before) if one
// of three vectors says so: its block's, which a block barrier writes; its warp's, which __syncwarp and named barriers
// write; its own, which waits on mbarriers write. So block barriers, the only ones of many kernels, stay cheap.
#pragma once
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
  }
  int warpgroup(int thread) const {
    const int block = thread / threads_;
    return blocks_ * threads_ + block * ((threads_ + kWarpgroup - 1) / kWarpgroup) + thread % threads_ / kWarpgroup;
  }
  int add_owner() { return owners_ == most_owners_ ? -1 : owners_++; }
  Vector nothing() const { return Vector(size_, 0); }
  Time now(int thread) const { return now_[thread]; }
  void tick(int thread) { ++now_[thread]; }

  bool knows(int thread, int owner, Time time) const {
    if (owner == thread || by_block_[thread / threads_][owner] >= time) return true;
    const Vector &warp = by_warp_[thread / kWarp], &own = by_thread_[thread];
    return (!warp.empty() && warp[owner] >= time) || (!own.empty() && own[owner] >= time);
  }

  // What the thread has done and knows goes into `to`; what it does from now on does not.
  void release(int thread, Vector& to) {
    join(to, by_block_[thread / threads_]);
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
    Vector all = nothing();
    for (int warp : warps) {
      sync_warp(warp);
      join(all, by_warp_[warp]);
    }
    for (int warp : warps) by_warp_[warp] = all;
  }
  void sync_block(int block) {
    Vector& known = by_block_[block];
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
  Vector now_;
  std::vector<Vector> by_block_, by_warp_, by_thread_;  // empty: nothing beyond what the block's says
};

}  // namespace ddst::emu
