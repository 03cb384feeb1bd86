// An emulated thread, what a launch is asked for and what it counts.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "product_registers.hpp"
#include "shadow.hpp"

namespace ddst::emu {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  // cp.async moves its bytes at the wait, bulk copies when nothing else can go on or, with a seed, some time before
  // that and in any order; false: all at once (both are allowed by the hardware)
  bool delay_copies = true;
  bool check_races = true;  // shared memory: races, uninitialised reads, reads of copies in flight
  std::uint64_t seed = 0;   // order of warps and lanes; 0 is the natural order
  int drop_barrier = -1;    // fault injection: the n-th block barrier orders nothing
  int drop_wait = -1;       // fault injection: the n-th cp.async wait of every thread does nothing
  // Fault injection: waits and fences at this place ("file:line") do nothing, those that wait for all threads of a
  // block or cluster order nothing; drop_turn: only the n-th time that a thread comes there.
  std::string drop_at;
  int drop_turn = -1;
  bool list_waits = false;  // Stats::wait_places
};

struct Stats {
  long mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0, copies = 0, shuffles = 0, barriers = 0, blocks = 0, waits = 0;
  // Bulk copies: what they are (to all CTAs of a cluster: one), bytes that they read from the second-level cache (none
  // out of bounds, those for all CTAs once) and that they write to shared memory.
  long bulk_copies = 0, bulk_bytes = 0, bulk_bytes_written = 0;
  long wgmma[33] = {};                                                // of warpgroups, by columns / 8
  long barrier_waits = 0, barrier_arrivals = 0, remote_arrivals = 0;  // of threads
  std::map<std::string, int> wait_places;  // of waits and fences: how often a thread came there, at most
};

struct Index3 {
  int x = 0, y = 0, z = 0;
};

class Block;
using WarpOp = void (*)(Block&, int warp, void* const* args);  // args: one pointer per lane; of a warpgroup likewise

struct Copy {
  std::uint32_t dst, bytes;
  int group;
  std::function<void(std::byte*)> fetch;
};

struct Thread {
  enum class State { ready, at_warp_op, at_warpgroup_op, at_barrier, at_some, at_cluster, at_mbarrier, done };
  Fiber fiber;
  int id = 0;                // in the cluster
  int block = 0, local = 0;  // of the cluster, and the thread's number there
  State state = State::ready;
  const char* what = "start";
  Where where;
  WarpOp op = nullptr;
  void* args = nullptr;
  int barrier = 0, count = 0;   // at_some: number and threads; at_mbarrier: place and parity
  bool orders_nothing = false;  // at a barrier that fault injection took away
  std::vector<Copy> copies;
  int groups = 0, waits = 0;
  ProductRegisters products;
  std::map<std::string, int> turns;  // of places of waits, for fault injection
};

}  // namespace ddst::emu
