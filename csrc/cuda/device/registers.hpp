// How many registers threads have, and what setmaxnreg may move between warpgroups.
#pragma once

namespace ddst::dev {

// Registers of each thread at a kernel's start, with DDST_KERNEL(threads, 1), before any are given or taken.
constexpr int registers_at_entry(int threads) {
  const int share = 65536 / threads / 8 * 8;
  return share < 256 ? share : 256;
}
// Whether `takers` of the threads may take_registers<taken> and all others give_registers<given>: an increase to less
// than there were, or a decrease to more, is undefined, and an increase beyond what was given waits forever.
constexpr bool registers_fit(int threads, int takers, int taken, int given) {
  const int entry = registers_at_entry(threads);
  return given <= entry && entry <= taken && takers * taken + (threads - takers) * given <= entry * threads;
}

}  // namespace ddst::dev
