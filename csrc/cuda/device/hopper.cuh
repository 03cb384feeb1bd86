// What sm_90a adds to primitives.cuh: mbarriers, bulk (tensor) copies, clusters, wgmma. PTX under nvcc, the emulator of
// tests/cuda otherwise.
//
// A kernel takes its tensor maps by value in a parameter marked DDST_GRID_CONSTANT and passes their addresses.
#pragma once
#include "primitives.cuh"
#include "registers.hpp"

namespace ddst::dev {

using Barrier = std::uint64_t;  // an mbarrier in shared memory

}  // namespace ddst::dev

#ifdef __CUDACC__
#define DDST_GRID_CONSTANT const __grid_constant__
#define DDST_ROLLED _Pragma("unroll 1")  // a loop that stays one
#include "hopper_ptx.cuh"
#else
#define DDST_GRID_CONSTANT const
#define DDST_ROLLED
#include "emulator/hopper_host.hpp"
namespace ddst::dev {
inline int warp_index() { return thread_index() / 32; }
template <class T>
shared_ptr<T> kept(shared_ptr<T> p) {
  return p;
}
}  // namespace ddst::dev
#endif
