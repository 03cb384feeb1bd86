// Plans of forward and input gradient: which taps reach which pixels, in which order.
#pragma once

#include <algorithm>

#include "activation.hpp"

namespace ddst::cpu {

// Along one axis: for every output coordinate the source coordinate of shift 0, and groups of output coordinates for
// which the same kernel positions lie inside the source.
struct AxisPlan {
  struct Group {
    Array<int32_t> coords;
    Array<char> inside;    // [kernel size]
    Array<int64_t> shift;  // [kernel size]: source coordinate minus base
  };
  Array<int64_t> base;
  Array<Group> groups;
  Array<int64_t> offset;  // [kernel size] at stride 1: every source coordinate minus its output coordinate

  void add(int32_t coord, int64_t base_coord, const Array<char>& inside, const Array<int64_t>& shift) {
    base[coord] = base_coord;
    for (Group& group : groups) {
      if (group.inside == inside) {
        group.coords.push_back(coord);
        return;
      }
    }
    groups.push_back({{}, inside, shift});
    groups.back().coords.reserve(base.size());
    groups.back().coords.push_back(coord);
  }
};

// Forward: output coordinate o reads source o * stride - padding + k * dilation.
inline AxisPlan forward_axis(int64_t out, int64_t source, int64_t kernel, int64_t stride, int64_t padding,
                             int64_t dilation) {
  AxisPlan plan;
  plan.base.resize(out);
  Array<char> inside(kernel);
  Array<int64_t> shift(kernel);
  for (int64_t k = 0; k < kernel; ++k) {
    shift[k] = k * dilation;
    if (stride == 1) plan.offset.push_back(k * dilation - padding);
  }
  for (int64_t o = 0; o < out; ++o) {
    const int64_t base = o * stride - padding;
    for (int64_t k = 0; k < kernel; ++k) inside[k] = base + shift[k] >= 0 && base + shift[k] < source;
    plan.add(static_cast<int32_t>(o), base, inside, shift);
  }
  return plan;
}

// Input gradient: coordinate i of the input reads grad_output (i + padding - k * dilation) / stride where that is
// whole. Kernel positions that divide for one i differ by multiples of the stride, so within a group all shifts are
// equal.
inline AxisPlan input_grad_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                                int64_t dilation) {
  AxisPlan plan;
  plan.base.resize(in);
  Array<char> inside(kernel);
  Array<int64_t> shift(kernel);
  for (int64_t k = 0; k < kernel && stride == 1; ++k) plan.offset.push_back(padding - k * dilation);
  for (int64_t i = 0; i < in; ++i) {
    int64_t base = 0;
    bool found = false;
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t scaled = i + padding - k * dilation;
      inside[k] = scaled >= 0 && scaled % stride == 0 && scaled / stride < out;
      shift[k] = 0;
      if (!inside[k]) continue;
      if (!found) base = scaled / stride;
      found = true;
      shift[k] = scaled / stride - base;
    }
    plan.add(static_cast<int32_t>(i), base, inside, shift);
  }
  return plan;
}

// The same axis over a source with zeros before and behind it: all kernel positions lie inside. For stride 1.
struct PaddedAxis {
  AxisPlan plan;
  int64_t before;  // zeros before the source
  int64_t pitch;   // from one line of it to the next, which share the zeros between them

  PaddedAxis(const AxisPlan& axis, int64_t out, int64_t source) {
    const auto [least, most] = std::minmax_element(axis.offset.begin(), axis.offset.end());
    before = std::max<int64_t>(0, -*least);
    pitch = source + std::max(before, std::max<int64_t>(0, out + *most - source));
    plan.base.resize(out);
    plan.offset = axis.offset;
    const Array<char> inside(axis.offset.size(), 1);
    Array<int64_t> shift;
    for (int64_t offset : axis.offset) shift.push_back(offset + before);
    for (int64_t o = 0; o < out; ++o) plan.add(static_cast<int32_t>(o), o, inside, shift);
  }
};

// The active blocks from the output's side: those of output block r lie in the slots ids[ptr[r]] ..
struct BlockLists {
  int64_t out_blocks;
  int64_t nnz;
  const int32_t* ptr;
  const int32_t* ids;
  const int32_t* k_block;  // reduction block of each slot
  const int32_t* tap;

  int64_t id(int64_t position) const { return ids[position]; }

  // First output block of a share, where shares are about equal in work: a block costs its entries and its start.
  int64_t first_block(int64_t share, int64_t shares) const {
    if (share == shares) return out_blocks;
    const int64_t before = (nnz + out_blocks) * share / shares;
    int64_t r = 0;
    while (ptr[r + 1] + r + 1 <= before) ++r;
    return before - ptr[r] - r <= ptr[r + 1] + r + 1 - before ? r : r + 1;
  }
};

struct GatherShape {
  ImageShape source, out;
  int64_t kernel_w;
  int64_t block_out, block_k;
};

inline SliceShape choose_slice(const SliceShape* shapes, int64_t block) {
  SliceShape best = *shapes;
  float best_cost = 1e30f;
  for (const SliceShape* s = shapes; s->width != 0; ++s) {
    const float cost = static_cast<float>(ceil_div(block, s->width)) * s->cost;
    if (cost < best_cost) {
      best = *s;
      best_cost = cost;
    }
  }
  return best;
}

// The first dot kernel for blocks of so many channels whose lanes divide the reduction, or null.
inline const DotShape* choose_dot(const DotShape* shapes, int64_t block_out, int64_t block_k) {
  for (const DotShape* s = shapes; s->channels != 0; ++s) {
    if (s->channels == block_out && block_k % s->lanes == 0) return s;
  }
  return nullptr;
}

// How the tiles read the source: strides in elements, as NHWC (channel 1) or as planes, whose entries are single
// channels.
struct SourceLayout {
  int64_t row, pixel, channel;
  bool planes() const { return channel != 1; }
};

// Entry lists of every pixel class, one after the other.
struct GatherPlan {
  Array<PixelClass> classes;
  Array<Entry> entries;
  Array<int64_t> list_begin, list_full;
  int64_t out_blocks = 0;
  int64_t tiles = 0;
  int64_t work = 0;  // of all tiles
  int64_t multiply_adds = 0;

  // Of a class's tiles: for every pixel its entries, and the start of every output block.
  int64_t work_of(const PixelClass& c) const {
    return c.pixels * (c.list_begin[out_blocks] - c.list_begin[0] + out_blocks);
  }

  // First tile of a share, where shares are about equal in work.
  int64_t first_tile(int64_t share, int64_t shares) const {
    int64_t before = work * share / shares;
    for (const PixelClass& c : classes) {
      const int64_t here = work_of(c);
      if (before < here) return c.first_tile + c.tiles * before / here;
      before -= here;
    }
    return tiles;
  }
};

// Bytes of the source whose classes are computed together: so much stays in L2.
constexpr int64_t kBatchBytes = 256 * 1024;

// Cuts images into batches (small images: several to a batch; large ones: strips of rows), and the classes of each
// batch into tiles, the largest class (the inner pixels) first.
inline void order_tiles(const GatherShape& shape, const SourceLayout& layout, int64_t tile_pixels, int64_t element,
                        Array<PixelClass>& lists, GatherPlan& plan) {
  std::stable_sort(lists.begin(), lists.end(), [](const PixelClass& a, const PixelClass& b) {
    return static_cast<int64_t>(a.n_rows) * a.n_cols > static_cast<int64_t>(b.n_rows) * b.n_cols;
  });
  const int64_t images = shape.out.images, out_rows = shape.out.h;
  const int64_t image_bytes = shape.source.h * shape.source.w * shape.source.channels * element;
  int64_t batches = 1, strips = 1;  // pixels of one class only are taken in memory order anyway
  if (lists.size() > 1 || layout.planes()) {
    batches = ceil_div(images, std::max<int64_t>(1, kBatchBytes / image_bytes));
    strips = std::min(ceil_div(image_bytes, kBatchBytes), out_rows);
  }
  for (int64_t batch = 0; batch < batches * strips; ++batch) {
    const int64_t image_batch = batch / strips, strip = batch % strips;
    const int64_t image_begin = images * image_batch / batches, image_end = images * (image_batch + 1) / batches;
    const int64_t row_begin = out_rows * strip / strips, row_end = out_rows * (strip + 1) / strips;
    const int64_t batch_tile = plan.tiles;
    const size_t first = plan.classes.size();
    for (PixelClass c : lists) {
      const int32_t* const rows = std::lower_bound(c.rows, c.rows + c.n_rows, row_begin);
      c.n_rows = static_cast<int32_t>(std::lower_bound(rows, c.rows + c.n_rows, row_end) - rows);
      c.rows = rows;
      if (c.n_rows == 0) continue;
      c.image_begin = image_begin;
      c.pixels = (image_end - image_begin) * c.n_rows * c.n_cols;
      c.first_tile = plan.tiles;
      c.tiles = ceil_div(c.pixels, tile_pixels);
      if (layout.planes()) c.tiles = (image_end - image_begin) * c.n_rows * ceil_div(c.n_cols, tile_pixels);
      c.batch_tile = batch_tile;
      const double size = static_cast<double>(image_end - image_begin) / static_cast<double>(strips);
      c.batch_begin = static_cast<double>(image_begin) + size * static_cast<double>(strip);
      c.batch_end = c.batch_begin + size;
      plan.tiles += c.tiles;
      plan.work += plan.work_of(c);
      plan.classes.push_back(c);
    }
    for (size_t i = first; i < plan.classes.size(); ++i) plan.classes[i].batch_tiles = plan.tiles - batch_tile;
  }
}

// block_bytes, channel_bytes: weights of a block, and of one channel of its reduction. in_list_order: blocks lie in the
// order of the lists, else in their slots.
inline GatherPlan plan_gather(const GatherShape& shape, const SourceLayout& layout, const BlockLists& lists,
                              const AxisPlan& rows, const AxisPlan& cols, int64_t tile_pixels, int64_t element,
                              int64_t block_bytes, int64_t channel_bytes, bool in_list_order) {
  GatherPlan plan;
  plan.out_blocks = lists.out_blocks;
  const int64_t n_classes = static_cast<int64_t>(rows.groups.size() * cols.groups.size());
  Array<PixelClass> lists_of;
  plan.list_begin.resize(n_classes * (lists.out_blocks + 1));
  plan.list_full.resize(n_classes * lists.out_blocks);
  plan.entries.reserve(n_classes * lists.nnz);
  const bool cut = !layout.planes() && shape.source.channels % shape.block_k != 0;
  const int64_t last_k_block = ceil_div(shape.source.channels, shape.block_k) - 1;
  const int64_t taps = shape.kernel_w * static_cast<int64_t>(rows.groups[0].inside.size());
  Array<int64_t> tap_offset(taps);
  Array<char> tap_inside(taps);
  int64_t at = 0;
  for (const AxisPlan::Group& row : rows.groups) {
    for (const AxisPlan::Group& col : cols.groups) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t kh = tap / shape.kernel_w, kw = tap % shape.kernel_w;
        tap_inside[tap] = row.inside[kh] && col.inside[kw];
        tap_offset[tap] = (row.shift[kh] * layout.row + col.shift[kw] * layout.pixel) * element;
      }
      int64_t* const begin = plan.list_begin.data() + at * (lists.out_blocks + 1);
      int64_t* const full = plan.list_full.data() + at * lists.out_blocks;
      const int64_t class_first = static_cast<int64_t>(plan.entries.size());
      for (int64_t r = 0; r < lists.out_blocks; ++r) {
        begin[r] = static_cast<int64_t>(plan.entries.size());
        full[r] = -1;
        for (int64_t i = lists.ptr[r]; i < lists.ptr[r + 1]; ++i) {
          const int64_t id = lists.id(i);
          if (!tap_inside[lists.tap[id]]) continue;
          // Both list orders put the last reduction block last, so the cut entries are a tail.
          if (cut && full[r] < 0 && lists.k_block[id] == last_k_block) {
            full[r] = static_cast<int64_t>(plan.entries.size());
          }
          const int64_t channel = lists.k_block[id] * shape.block_k;
          const int64_t parts = layout.planes() ? std::min(shape.block_k, shape.source.channels - channel) : 1;
          for (int64_t k = 0; k < parts; ++k) {
            plan.entries.push_back({tap_offset[lists.tap[id]] + (channel + k) * layout.channel * element,
                                    (in_list_order ? i : id) * block_bytes + k * channel_bytes});
          }
        }
        if (full[r] < 0) full[r] = static_cast<int64_t>(plan.entries.size());
      }
      begin[lists.out_blocks] = static_cast<int64_t>(plan.entries.size());
      PixelClass c{};
      c.rows = row.coords.data();
      c.cols = col.coords.data();
      c.n_rows = static_cast<int32_t>(row.coords.size());
      c.n_cols = static_cast<int32_t>(col.coords.size());
      c.list_begin = begin;
      c.list_full = full;
      lists_of.push_back(c);
      plan.multiply_adds += shape.out.images * c.n_rows * c.n_cols * (begin[lists.out_blocks] - class_first) *
                            shape.block_out * (layout.planes() ? 1 : shape.block_k);
      ++at;
    }
  }
  order_tiles(shape, layout, tile_pixels, element, lists_of, plan);
  return plan;
}

}  // namespace ddst::cpu
