// The gather kernel: forward and input gradient of conv and linear. Included only by kernels_*.cpp.
#pragma once

#include "kernels.hpp"
#include "microkernel.hpp"

namespace ddst::cpu {
namespace {

// What one tile needs beside its pixels: one output block's slice.
template <typename T>
struct TileWork {
  const Entry* begin;
  const Entry* full_end;  // entries up to here reduce over block_k channels, the others over block_k_cut
  const Entry* end;
  const char* weights;
  const T* init;
  int k_groups;  // steps of the kernel (its unrolling, or its lanes) in block_k
  int k_cut;
  int block_k;
  int64_t out_channel;
  int channels;  // channels to store, at most the slice's width
  bool stream;   // store past the caches
};

template <typename T>
using TileFunction = void (*)(const char* const*, T* const*, const TileWork<T>&);

template <typename T, int N, int NV, int P>
DDST_INLINE void store_tile(const typename Simd<T, N>::V (&acc)[P][NV], T* const* outs, const TileWork<T>& work) {
  using S = Simd<T, N>;
  if (work.stream) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      T* out = outs[p] + work.out_channel;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) S::stream(out + v * N, acc[p][v]);
    }
  } else if (work.channels == NV * N) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      T* out = outs[p] + work.out_channel;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) S::store(out + v * N, acc[p][v]);
    }
  } else {  // channels past the end belong to the next pixel: only the real ones are written
    T lanes[P][NV * N];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) S::store(&lanes[p][v * N], acc[p][v]);
    }
    for (int p = 0; p < P; ++p)
      for (int c = 0; c < work.channels; ++c) outs[p][work.out_channel + c] = lanes[p][c];
  }
}

// Whether multiply-adds read pixels at addresses without an index, which the pixels' pointers then move to with each
// entry: where that is paid back by a whole entry's instructions that take one slot and not two.
template <int NV, int kUnroll>
#if defined(__AVX512F__)
constexpr bool kMovesPixels = NV == 1 && kUnroll >= 8;
#else
constexpr bool kMovesPixels = false;
#endif

template <int P>
DDST_INLINE void move_pixels(const char* (&pixel)[P], int64_t bytes) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) pixel[p] += bytes;
}

// P pixels x (NV * N) channels stay in registers while the whole entry list streams past.
template <typename T, int N, int NV, int P, int kUnroll>
__attribute__((noinline)) void gather_tile(const char* const* pixels, T* const* outs, const TileWork<T>& work) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[P][NV];
  const char* pixel[P];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    pixel[p] = pixels[p];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[p][v] = S::load(work.init + v * N);
  }
  const Entry* entry = work.begin;
  const Entry* const full_end = work.full_end;
  const char* const weights = work.weights;
  constexpr int64_t kGroup = kUnroll * static_cast<int64_t>(sizeof(T));
  int64_t moved = 0;  // bytes that the pixels' pointers have moved
#pragma GCC unroll 1
  for (; entry != full_end; ++entry) {
    int64_t offset = entry->source;
    const char* w = weights + entry->weight;
    int groups = work.k_groups;
    if constexpr (kMovesPixels<NV, kUnroll>) {
      move_pixels<P>(pixel, offset - moved);
      moved = offset + (groups - 1) * kGroup;
      for (;;) {
        multiply_near_steps<T, N, P, 0, kUnroll>(acc, pixel, w);
        if (--groups == 0) break;
        move_pixels<P>(pixel, kGroup);
        w += kUnroll * S::kBytes;
      }
    } else {
      do {
        multiply_steps<T, N, NV, P, 0, kUnroll>(acc, pixel, offset, w);
        offset += kGroup;
        w += kUnroll * NV * S::kBytes;
      } while (--groups > 0);
    }
  }
  const Entry* const end = work.end;
#pragma GCC unroll 1
  for (; entry != end; ++entry) {
    int64_t offset = entry->source - moved;
    const char* w = weights + entry->weight;
#pragma GCC unroll 1
    for (int k = work.k_cut; k > 0; --k) {
      multiply_step<T, N, NV, P, 0>(acc, pixel, offset, w);
      offset += sizeof(T);
      w += NV * S::kBytes;
    }
  }
  store_tile<T, N, NV, P>(acc, outs, work);
}

// The same for neighbouring pixels of planes, whose entries are single channels.
template <typename T, int N, int NV, int P>
__attribute__((noinline)) void row_tile(const char* const* pixels, T* const* outs, const TileWork<T>& work) {
  using S = Simd<T, N>;
  compiler_barrier();
  typename S::V acc[P][NV], init[NV];
  load_row<T, N, NV>(init, reinterpret_cast<const char*>(work.init));
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[p][v] = init[v];
  }
  const char* const row = pixels[0];
  const char* const weights = work.weights;
  const Entry* const end = work.end;
#pragma GCC unroll 1
  for (const Entry* entry = work.begin; entry != end; ++entry) {
    typename S::V w[NV];
    load_row<T, N, NV>(w, weights + entry->weight);
    outer_step<T, N, NV, P>(acc, w, row + entry->source);
  }
  store_tile<T, N, NV, P>(acc, outs, work);
}

template <typename T, int N, int NV, int kMax, int P = 1>
DDST_INLINE void fill_row_tiles(TileFunction<T>* table) {
  table[P] = &row_tile<T, N, NV, P>;
  if constexpr (P < kMax) fill_row_tiles<T, N, NV, kMax, P + 1>(table);
}

// The functions for 1 .. kMax pixels, as a table.
template <typename T, int N, int NV, int kMax, int kUnroll, int P = 1>
DDST_INLINE void fill_tiles(TileFunction<T>* table) {
  table[P] = &gather_tile<T, N, NV, P, kUnroll>;
  if constexpr (P < kMax) fill_tiles<T, N, NV, kMax, kUnroll, P + 1>(table);
}

// Returns the unrolling chosen for block_k.
template <typename T, int N, int NV, int kMax>
DDST_INLINE int choose_tiles(TileFunction<T>* table, int block_k) {
  if (block_k % 16 == 0) return fill_tiles<T, N, NV, kMax, 16>(table), 16;
  if (block_k % 8 == 0) return fill_tiles<T, N, NV, kMax, 8>(table), 8;
  if (block_k % 4 == 0) return fill_tiles<T, N, NV, kMax, 4>(table), 4;
  return fill_tiles<T, N, NV, kMax, 1>(table), 1;
}

constexpr int kMaxTilePixels = 16;
constexpr int kMaxGroupTiles = 48;
// Bytes of source that one group of tiles may touch: it is read again for every output block, from L2.
constexpr int64_t kGroupBytes = 80 * 1024;

constexpr int64_t kOutLead = 64 * 1024;

// Fetches an activation ahead of its use. Tiles follow memory order batch by batch, so that a cursor moving over the
// activation at the pace of the tiles finds everything that they will touch, in the order of the touch.
template <int kWrite>
struct Prefetcher {
  const char* base;
  int64_t image_bytes;
  int64_t lead;
  int64_t last = 0;    // no byte from here on is fetched
  int64_t cursor = 0;  // byte offset of the next line
  int64_t lines = 0;   // to fetch at each step

  // Where the tiles before `tile` (of this class's batch) end, in bytes, on the average over the batch.
  int64_t position(const PixelClass& c, int64_t tile) const {
    const double share = static_cast<double>(tile - c.batch_tile) / static_cast<double>(c.batch_tiles);
    const double images = c.batch_begin + (c.batch_end - c.batch_begin) * share;
    return static_cast<int64_t>(images * static_cast<double>(image_bytes));
  }
  void start(const PixelClass& first, int64_t tile_begin, const PixelClass& end, int64_t tile_end) {
    cursor = position(first, tile_begin) / 64 * 64;
    last = position(end, tile_end);
  }
  // Plans the fetches of a group of tiles that ends before `tile`, over so many steps.
  void plan(const PixelClass& c, int64_t tile, int64_t steps) {
    int64_t target = position(c, tile) + lead;
    if (target > last) target = last;
    lines = target > cursor ? ((target - cursor) / 64 + steps - 1) / steps : 0;
  }
  DDST_INLINE void step() {
    for (int64_t i = lines; i > 0; --i, cursor += 64) __builtin_prefetch(base + cursor, kWrite, 2);
  }
};

// Addresses of the pixels of some consecutive tiles of one class.
template <typename T>
struct TileGroup {
  const PixelClass* cls;
  int64_t tiles = 0;
  int first[kMaxGroupTiles + 1];
  const char* pixel[kMaxGroupTiles * kMaxTilePixels];
  T* out[kMaxGroupTiles * kMaxTilePixels];

  void fill(const GatherJob<T>& job, const PixelClass& c, int64_t begin, int64_t end) {
    cls = &c;
    tiles = end - begin;
    const int64_t first_pixel = c.pixels * begin / c.tiles;
    const int64_t per_image = static_cast<int64_t>(c.n_rows) * c.n_cols;
    int64_t image = c.image_begin + first_pixel / per_image;
    int64_t row = first_pixel % per_image / c.n_cols;
    int64_t col = first_pixel % c.n_cols;
    for (int64_t t = 0; t < tiles; ++t) first[t] = static_cast<int>(c.pixels * (begin + t) / c.tiles - first_pixel);
    first[tiles] = static_cast<int>(c.pixels * end / c.tiles - first_pixel);
    const int n = first[tiles];
    for (int i = 0; i < n;) {
      const int64_t source_line = image * job.source_image + job.row_base[c.rows[row]] * job.source_row;
      T* const out_line = job.out + image * job.out_image + c.rows[row] * job.out_row;
      for (; col < c.n_cols && i < n; ++col, ++i) {
        const int64_t source = source_line + job.col_base[c.cols[col]] * job.source_pixel;
        // An integer sum: the base of a border pixel may lie outside the tensor (no entry then reads there).
        pixel[i] = reinterpret_cast<const char*>(reinterpret_cast<intptr_t>(job.source) +
                                                 source * static_cast<int64_t>(sizeof(T)));
        out[i] = out_line + c.cols[col] * job.out_pixel;
      }
      if (col == c.n_cols) {
        col = 0;
        if (++row == c.n_rows) {
          row = 0;
          ++image;
        }
      }
    }
  }
};

// Walks over the tiles of a range in groups that stay inside one class.
template <typename T>
struct GroupWalk {
  const GatherJob<T>& job;
  int64_t tile;
  int64_t tile_end;
  int64_t group_tiles;
  int64_t cls = 0;

  bool next(TileGroup<T>& group) {
    if (tile >= tile_end) return false;
    while (tile >= job.classes[cls].first_tile + job.classes[cls].tiles) ++cls;
    const PixelClass& c = job.classes[cls];
    const int64_t class_end = c.first_tile + c.tiles;
    int64_t end = tile + group_tiles;
    if (end > tile_end) end = tile_end;
    if (end > class_end) end = class_end;
    group.fill(job, c, tile - c.first_tile, end - c.first_tile);
    tile = end;
    return true;
  }
};

inline const PixelClass& class_of(const PixelClass* c, const PixelClass* end, int64_t tile) {
  while (c + 1 < end && tile >= c->first_tile + c->tiles) ++c;
  return *c;
}

// A kernel form for one job: functions for 1 .. tile_pixels pixels, and the channels that one step of it reduces.
template <typename T>
struct TileTable {
  TileFunction<T> tile[kMaxTilePixels + 1];
  int tile_pixels;
  int step;
};

// Runs over tiles in groups; within a group all output blocks one after the other, so that the group's source pixels
// stay in L2 and one block's weights in L1.
template <typename T>
void run_tiles(const GatherJob<T>& job, const TileTable<T>& table, int64_t tile_begin, int64_t tile_end,
               int64_t block_begin, int64_t block_end) {
  const int64_t source_bytes = job.source_channels * static_cast<int64_t>(sizeof(T));
  int64_t group_tiles = kGroupBytes / (source_bytes * table.tile_pixels);
  if (group_tiles < 1) group_tiles = 1;
  if (job.planes || group_tiles > kMaxGroupTiles) group_tiles = kMaxGroupTiles;

  TileGroup<T> group;
  GroupWalk<T> walk{job, tile_begin, tile_end, group_tiles};
  constexpr int64_t kElement = sizeof(T);
  Prefetcher<0> read{reinterpret_cast<const char*>(job.ahead), job.ahead_image * kElement, job.ahead_bytes};
  Prefetcher<1> write{reinterpret_cast<const char*>(job.beside), job.beside_image * kElement, kOutLead};
  const bool whole = block_end - block_begin == job.out_blocks;  // else other threads are at the same pixels
  const PixelClass* const classes_end = job.classes + job.n_classes;
  read.start(class_of(job.classes, classes_end, tile_begin), tile_begin,
             class_of(job.classes, classes_end, tile_end - 1), tile_end);
  write.start(class_of(job.classes, classes_end, tile_begin), tile_begin,
              class_of(job.classes, classes_end, tile_end - 1), tile_end);
  while (walk.next(group)) {
    const PixelClass& c = *group.cls;
    const int64_t calls = (block_end - block_begin) * job.slices * group.tiles;
    if (whole) read.plan(c, walk.tile, calls);
    if (whole && !job.stream) write.plan(c, walk.tile, calls);
    for (int64_t block = block_begin; block < block_end; ++block) {
      TileWork<T> work;
      work.begin = job.entries + c.list_begin[block];
      work.full_end = job.entries + c.list_full[block];
      work.end = job.entries + c.list_begin[block + 1];
      work.k_groups = job.block_k / table.step;
      work.block_k = job.block_k;
      work.k_cut = job.block_k_cut;
      for (int slice = 0; slice < job.slices; ++slice) {
        const int64_t in_block = static_cast<int64_t>(slice) * job.slice;
        work.out_channel = block * job.block_out + in_block;
        int64_t channels = job.slice;
        if (channels > job.block_out - in_block) channels = job.block_out - in_block;
        if (channels > job.out_channels - work.out_channel) channels = job.out_channels - work.out_channel;
        if (channels <= 0) break;
        work.channels = static_cast<int>(channels);
        work.stream = job.stream && channels == job.slice;
        work.weights = reinterpret_cast<const char*>(job.weights + slice * job.weights_slice);
        work.init = job.init + (block * job.slices + slice) * job.slice;
        for (int64_t t = 0; t < group.tiles; ++t) {
          read.step();
          write.step();
          const int i = group.first[t];
          table.tile[group.first[t + 1] - i](group.pixel + i, group.out + i, work);
        }
      }
    }
  }
  if (job.stream) stream_fence();
}

// kRow: pixels of a tile that reads planes.
template <typename T, int N, int NV, int kTile, int kRow>
void gather_slices(const GatherJob<T>& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin,
                   int64_t block_end) {
  TileTable<T> table;
  table.tile_pixels = job.planes ? kRow : kTile;
  table.step = 1;
  if (job.planes) {
    fill_row_tiles<T, N, NV, kRow>(table.tile);
  } else {
    table.step = choose_tiles<T, N, NV, kTile>(table.tile, job.block_k);
  }
  run_tiles(job, table, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace
}  // namespace ddst::cpu
