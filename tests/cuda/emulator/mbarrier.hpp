// mbarriers: phases that complete by arrivals and by bytes of copies, and order what came before them.
#pragma once
#include <map>

#include "shadow.hpp"

namespace ddst::emu {

struct Mbarrier {
  int block, owner;  // `owner`: of the copies onto it, in the clocks; their time is the number of the phase + 1
  std::uint32_t offset;
  int expected, pending;
  long bytes = 0;  // that are still to come in this phase
  int phase = 0;   // phases completed
  int initialiser;
  Time initialised;
  Time fenced = 0;          // 0: its initialisation is not visible to copies and other CTAs
  bool everywhere = false;  // it is to all threads of the cluster, by a cluster barrier
  Clocks::Vector arriving, released;
  std::vector<int> waiting;
  int woken = 0, woken_thread = 0;  // threads that have not gone on yet
};

class Mbarriers {
 public:
  struct Host : Reporter {
    virtual void wake(int thread) = 0;

   protected:
    ~Host() = default;
  };
  Mbarriers(Host& host, Clocks& clocks) : host_(host), clocks_(clocks) {}

  void reset() { barriers_.clear(), names_.clear(); }
  const Mbarrier* of_owner(int owner) const {
    const auto found = names_.find(owner);
    return found == names_.end() ? nullptr : found->second;
  }

  void init(int by, int block, std::uint32_t offset, int arrivals, Where where) {
    if (arrivals < 1 || arrivals >= 1 << 20)
      host_.fail_for(by, "barrier_init with " + std::to_string(arrivals) + " arrivals", where);
    if (barriers_.count({block, offset})) host_.fail_for(by, "barrier initialised twice, byte " + at(offset), where);
    const int owner = clocks_.add_owner();
    if (owner < 0) host_.fail_for(by, "more mbarriers than the emulator has room for", where);
    Mbarrier b{};
    b.block = block, b.owner = owner, b.offset = offset, b.expected = b.pending = arrivals;
    b.initialiser = by, b.initialised = clocks_.now(by);
    b.arriving = clocks_.nothing(), b.released = clocks_.nothing();
    names_[owner] = &(barriers_[{block, offset}] = std::move(b));
  }
  void fence_inits(int by) {
    for (auto& [place, b] : barriers_)
      if (b.initialiser == by && !b.fenced) b.fenced = clocks_.now(by);
    clocks_.tick(by);
  }
  void cluster_synchronised() {
    for (auto& [place, b] : barriers_) b.everywhere = b.everywhere || b.fenced;
  }

  // `remote`: by a copy, or from another CTA.
  Mbarrier& used(int by, int block, std::uint32_t offset, bool remote, const char* what, Where where) {
    const auto found = barriers_.find({block, offset});
    if (found == barriers_.end())
      host_.fail_for(by, std::string(what) + " on an uninitialised barrier, byte " + at(offset), where);
    Mbarrier& b = found->second;
    if (b.everywhere) return b;
    if (remote && !b.fenced)
      host_.fail_for(by, std::string(what) + " on a barrier without fence_barrier_init, byte " + at(offset), where);
    if (!clocks_.knows(by, b.initialiser, remote ? b.fenced : b.initialised))
      host_.fail_for(by,
                     std::string(what) + " on a barrier whose initialisation by " + host_.owner_name(b.initialiser) +
                         " nothing orders before, byte " + at(offset),
                     where);
    return b;
  }

  void arrive(Mbarrier& b, int by, long bytes, Where where) {
    if (b.pending == 0)
      host_.fail_for(by, "more arrivals than the barrier's " + std::to_string(b.expected) + ", byte " + at(b.offset),
                     where);
    b.bytes += bytes;
    --b.pending;
    clocks_.release(by, b.arriving);
    complete(b, by, where);
  }
  // Bytes of a copy that was started in the phase before `time`.
  void arrive_bytes(Mbarrier& b, int by, Time time, long bytes, Where where) {
    if (b.phase + 1 != time)
      host_.fail_for(by,
                     "copy completes on a barrier whose phase did not wait for its bytes (arrive_expect missing or "
                     "too small), byte " +
                         at(b.offset),
                     where);
    b.bytes -= bytes;
    complete(b, by, where);
  }
  bool passes(const Mbarrier& b, int parity) const { return (b.phase & 1) != parity; }

  static std::string state(const Mbarrier& b) {
    return "barrier at byte " + at(b.offset) + " (phase " + std::to_string(b.phase) + ", " + std::to_string(b.pending) +
           " arrivals and " + std::to_string(b.bytes) + " bytes missing)";
  }
  std::map<std::pair<int, std::uint32_t>, Mbarrier>& all() { return barriers_; }

 private:
  static std::string at(std::uint32_t offset) { return std::to_string(offset); }

  void complete(Mbarrier& b, int by, Where where) {
    if (b.pending) return;
    if (b.bytes < 0)
      host_.fail_for(
          by, "copies bring " + std::to_string(-b.bytes) + " bytes more than the barrier expects, byte " + at(b.offset),
          where);
    if (b.bytes) return;
    if (b.woken)
      host_.fail_for(by,
                     "a phase of the barrier at byte " + at(b.offset) + " completes while " +
                         host_.owner_name(b.woken_thread) + " may still wait for the one before",
                     where);
    ++b.phase;
    b.pending = b.expected;
    for (std::size_t i = 0; i < b.released.size(); ++i) b.released[i] = std::max(b.released[i], b.arriving[i]);
    b.released[b.owner] = b.phase;
    std::fill(b.arriving.begin(), b.arriving.end(), 0);
    for (int thread : b.waiting) {
      clocks_.acquire(thread, b.released);
      host_.wake(thread);
      b.woken_thread = thread;
    }
    b.woken = int(b.waiting.size());
    b.waiting.clear();
  }

  Host& host_;
  Clocks& clocks_;
  std::map<std::pair<int, std::uint32_t>, Mbarrier> barriers_;  // by block and place
  std::map<int, const Mbarrier*> names_;
};

}  // namespace ddst::emu
