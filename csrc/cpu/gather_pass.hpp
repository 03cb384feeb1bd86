// Forward and input gradient as one pass: chooses the form of the gather kernel, and runs it.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>

#include "plane_gather_pass.hpp"
#include "plane_pass.hpp"

namespace ddst::cpu {

// Whether vectors run over pixels. With fewer pixels the transposition and its lists cost more than they gain.
template <typename T>
bool runs_over_pixels(const Kernels<T>& kernels, const GatherShape& shape, const AxisPlan& rows, const AxisPlan& cols) {
  constexpr int64_t kLeastPixels = 512;
  return shape.block_out <= kernels.most_plane_channels && !rows.offset.empty() && !cols.offset.empty() &&
         shape.out.pixels() >= kLeastPixels;
}

// Source bytes fetched ahead of the tile that is computed: a group, the row below it, and what the border tiles (which
// come last in a batch of images) will make up for.
constexpr int64_t kSourceLead = 128 * 1024;

// Whether the tiles read planes: of a block with few source channels they would use little of every cache line.
inline bool reads_planes(const GatherShape& shape, const AxisPlan& rows, const AxisPlan& cols) {
  constexpr int64_t kMostChannels = 2;
  return shape.block_k <= kMostChannels && rows.offset.size() * cols.offset.size() > 1;
}

// Some consecutive classes and their tiles, whose source is made planes together.
template <typename T>
struct PlaneBatch {
  int64_t first_class, classes, tile_begin, tile_end;
  int64_t image_begin, images, row_begin, rows;  // of the source

  const T* first(const T* source, const ImageShape& shape) const {
    return source + (image_begin * shape.h + row_begin) * shape.w * shape.channels;
  }
};

template <typename T>
Array<PlaneBatch<T>> plane_batches(const GatherPlan& plan, const ImageShape& source, const AxisPlan& rows) {
  const auto [least, most] = std::minmax_element(rows.offset.begin(), rows.offset.end());
  Array<PlaneBatch<T>> batches;
  for (size_t i = 0; i < plan.classes.size(); ++i) {
    const PixelClass& c = plan.classes[i];
    const int64_t row_begin = std::clamp<int64_t>(c.rows[0] + *least, 0, source.h);
    const int64_t row_end = std::clamp<int64_t>(c.rows[c.n_rows - 1] + *most + 1, row_begin, source.h);
    if (i == 0 || c.batch_tile != plan.classes[i - 1].batch_tile) {
      batches.push_back({static_cast<int64_t>(i), 0, c.first_tile, 0, c.image_begin,
                         c.pixels / (static_cast<int64_t>(c.n_rows) * c.n_cols), row_begin, row_end - row_begin});
    }
    PlaneBatch<T>& batch = batches.back();
    const int64_t end = std::max(batch.row_begin + batch.rows, row_end);
    batch.row_begin = std::min(batch.row_begin, row_begin);
    batch.rows = end - batch.row_begin;
    batch.classes += 1;
    batch.tile_end = c.first_tile + c.tiles;
  }
  return batches;
}

// The most source rows of a batch.
inline int64_t batch_rows(const GatherShape& shape, const AxisPlan& rows, int64_t element) {
  const auto [least, most] = std::minmax_element(rows.offset.begin(), rows.offset.end());
  const int64_t image_bytes = shape.source.h * shape.source.w * shape.source.channels * element;
  if (image_bytes <= kBatchBytes) return std::min(kBatchBytes / image_bytes, shape.source.images) * shape.source.h;
  const int64_t strips = std::min(ceil_div(image_bytes, kBatchBytes), shape.out.h);
  return std::min(ceil_div(shape.out.h, strips) + *most - *least, shape.source.h);
}

// Runs a job whose entries address planes of so many elements, batch by batch.
template <typename T>
void run_on_planes(const Kernels<T>& kernels, const GatherJob<T>& job, const GatherPlan& plan, const ImageShape& source,
                   const AxisPlan& rows, const PaddedAxis& cols, int64_t plane) {
  const Array<PlaneBatch<T>> batches = plane_batches<T>(plan, source, rows);
  const int64_t count = static_cast<int64_t>(batches.size());
  const int64_t tasks = std::min(task_count(plan.multiply_adds), count);
  Array<Buffer<T>> memory;
  for (int64_t i = 0; i < tasks; ++i) memory.emplace_back(plane * source.channels);
  run_tasks(tasks, [&](int64_t task) {
    T* const planes = memory[task].get();
    std::fill(planes, planes + plane * source.channels, T(0));
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      const PlaneBatch<T>& batch = batches[i];
      const int64_t image_pitch = batch.rows * cols.pitch, line = source.w * source.channels;
      for (int64_t n = 0; n < batch.images; ++n) {
        const T* const image = batch.first(job.source, source) + n * source.h * line;
        for (int64_t r = 0; r < batch.rows; ++r) {
          kernels.transpose(image + r * line, source.w, source.channels, source.channels,
                            planes + n * image_pitch + r * cols.pitch + cols.before, plane);
        }
      }
      GatherJob<T> part = job;
      part.source = planes - batch.image_begin * image_pitch - batch.row_begin * cols.pitch;
      part.source_image = image_pitch;
      part.source_row = cols.pitch;
      part.source_pixel = 1;
      part.col_base = cols.plan.base.data();
      part.ahead += i + 1 < count ? batches[i + 1].first(job.source, source) - batch.first(job.source, source) : 0;
      part.ahead_bytes = 0;
      part.classes += batch.first_class;
      part.n_classes = batch.classes;
      kernels.gather(part, batch.tile_begin, batch.tile_end, 0, job.out_blocks);
    }
  });
}

// A pass as tasks: tile_shares x block_shares.
struct Split {
  int64_t tile_shares, block_shares;
  int64_t tasks() const { return tile_shares * block_shares; }
};

// Cuts a pass where the slowest task has least to do, in units of one entry's multiply-adds for one pixel. A task packs
// the weights of its blocks for itself where they are packed at all, and fetches the source of its tiles.
inline Split choose_split(const GatherPlan& plan, const GatherShape& shape, const BlockLists& lists, bool packs,
                          int64_t tasks) {
  constexpr double kPackEntry = 10, kReadEntry = 2, kReadLine = 0.3;
  const double pixels = static_cast<double>(shape.out.pixels());
  const double read_pixel = kReadLine * static_cast<double>(shape.source.channels) / 16;
  Split best{1, 1};
  double best_cost = 1e300;
  for (int64_t block_shares = 1; block_shares <= std::min(tasks, lists.out_blocks); ++block_shares) {
    if (tasks % block_shares != 0 && block_shares != lists.out_blocks) continue;
    const int64_t tile_shares = std::min(tasks / block_shares, plan.tiles);
    int64_t entries = 0;  // of the largest share of blocks
    for (int64_t share = 0, begin = 0; share < block_shares; ++share) {
      const int64_t end = lists.first_block(share + 1, block_shares);
      entries = std::max<int64_t>(entries, lists.ptr[end] - lists.ptr[begin] + end - begin);
      begin = end;
    }
    const double share_pixels =
        pixels * static_cast<double>(ceil_div(plan.tiles, tile_shares)) / static_cast<double>(plan.tiles);
    const double cost =
        static_cast<double>(entries) * (share_pixels + (packs ? kPackEntry : kReadEntry)) + share_pixels * read_pixel;
    if (cost < best_cost) {
      best_cost = cost;
      best = {tile_shares, block_shares};
    }
  }
  return best;
}

// Pixels a power of two apart compete for the same lines of an L1 cache of 8 ways, which then holds no tile of more.
inline int64_t tile_pixels_of(const SliceShape& slice, int64_t pixel_bytes) {
  constexpr int64_t kWayBytes = 4096, kWays = 8;
  return pixel_bytes % kWayBytes == 0 ? std::min<int64_t>(slice.tile_pixels, kWays) : slice.tile_pixels;
}

// Forward or input gradient: out = bias + gathered products. Its lists and weights are made once and serve any number
// of sources of its shape. transposed: the vector runs over b_out (forward), else over b_in (input gradient).
template <typename T>
class GatherPass {
 public:
  // most_tasks: threads to use, 0 for all of torch's. reused: it runs more than once.
  GatherPass(const Kernels<T>& kernels, const GatherShape& shape, const BlockLists& lists, AxisPlan rows, AxisPlan cols,
             bool transposed, const T* values, const T* bias, int64_t most_tasks, bool reused)
      : kernels_(kernels),
        shape_(shape),
        lists_(lists),
        rows_(std::move(rows)),
        cols_(std::move(cols)),
        transposed_(transposed),
        values_(values),
        bias_(bias),
        over_pixels_(runs_over_pixels(kernels, shape, rows_, cols_)) {
    if (!over_pixels_) plan(most_tasks, reused);
  }
  GatherPass(const GatherPass&) = delete;  // parts of it point to others

  void run(const T* source, T* out) const {
    if (over_pixels_) {
      const auto pass = shape_.block_out < kernels_.plane_slices[0].width ? &plane_pass<T> : &plane_gather_pass<T>;
      return pass(kernels_, shape_, lists_, rows_, cols_, transposed_, values_, bias_, source, out);
    }
    GatherJob<T> job = job_;
    job.source = job.ahead = source;
    job.out = out;
    job.stream = shape_.block_out % job.slice == 0 && streams(out, job.slice, shape_.out);
    if (padded_) return run_on_planes(kernels_, job, plan_, shape_.source, rows_, *padded_, plane_);
    const int64_t packed_size = lists_.nnz * weights_->block_size;
    const Buffer<T> copies = own_ ? Buffer<T>(split_.tile_shares * packed_size) : Buffer<T>();
    run_tasks(split_.tasks(), [&](int64_t task) {
      const int64_t t = task / split_.block_shares, b = task % split_.block_shares;
      const int64_t tile_begin = plan_.first_tile(t, split_.tile_shares);
      const int64_t tile_end = plan_.first_tile(t + 1, split_.tile_shares);
      const int64_t block_begin = lists_.first_block(b, split_.block_shares);
      const int64_t block_end = lists_.first_block(b + 1, split_.block_shares);
      if (tile_begin == tile_end || block_begin == block_end) return;
      GatherJob<T> mine = job;
      if (own_) {
        T* const copy = copies.get() + t * packed_size;
        weights_->pack(lists_.ptr[block_begin], lists_.ptr[block_end], copy);
        mine.weights = copy;
      }
      kernels_.gather(mine, tile_begin, tile_end, block_begin, block_end);
    });
  }

 private:
  void plan(int64_t most_tasks, bool reused) {
    if (most_tasks == 0) most_tasks = torch::stable::get_num_threads();
    const GatherShape& shape = shape_;
    const DotShape* dot = choose_dot(kernels_.gather_dots, shape.block_out, shape.block_k);
    SliceShape slice = choose_slice(kernels_.gather_slices, shape.block_out);
    if (dot != nullptr) slice = {static_cast<int>(shape.block_out), dot->tile_pixels, 0, 0};
    weights_.emplace(kernels_, shape, lists_, slice.width, dot != nullptr, transposed_, values_);
    init_ = sliced_bias(shape, lists_.out_blocks, slice.width, bias_);
    const bool planes = dot == nullptr && reads_planes(shape, rows_, cols_);
    SourceLayout layout{shape.source.w * shape.source.channels, shape.source.channels, 1};
    if (planes) {
      padded_.emplace(cols_, shape.out.w, shape.source.w);
      const int64_t pixels = batch_rows(shape, rows_, sizeof(T)) * padded_->pitch + padded_->before;
      plane_ = plane_size<T>(pixels);
      layout = {padded_->pitch, 1, plane_};
    }
    const int64_t tile_pixels =
        planes ? slice.row_pixels : tile_pixels_of(slice, shape.source.channels * static_cast<int64_t>(sizeof(T)));
    plan_ = plan_gather(shape, layout, lists_, rows_, planes ? padded_->plan : cols_, tile_pixels, sizeof(T),
                        weights_->block_size * sizeof(T), slice.width * sizeof(T), !weights_->direct);
    split_ = choose_split(plan_, shape, lists_, !weights_->direct, tasks_worth(plan_.multiply_adds, most_tasks));
    // Small weights are packed by each task for itself: what another core has packed comes slower than it is packed.
    constexpr int64_t kMostOwnBytes = 512 * 1024;
    const int64_t packed_bytes = lists_.nnz * weights_->block_size * static_cast<int64_t>(sizeof(T));
    own_ = !weights_->direct && !planes && !reused && (split_.tile_shares == 1 || packed_bytes <= kMostOwnBytes);
    if (!own_) packed_ = weights_->pack_all();

    GatherJob<T>& job = job_;
    job.source_pixel = shape.source.channels;
    job.source_row = shape.source.w * job.source_pixel;
    job.source_image = shape.source.h * job.source_row;
    job.ahead_image = job.source_image;
    job.ahead_bytes = kSourceLead;
    job.out_pixel = shape.out.channels;
    job.out_row = shape.out.w * job.out_pixel;
    job.out_image = shape.out.h * job.out_row;
    job.row_base = rows_.base.data();
    job.col_base = cols_.base.data();
    job.classes = plan_.classes.data();
    job.n_classes = static_cast<int64_t>(plan_.classes.size());
    job.entries = plan_.entries.data();
    job.weights = weights_->direct ? values_ : packed_.get();
    job.weights_slice = weights_->slice_size;
    job.init = init_.data();
    job.out_blocks = lists_.out_blocks;
    job.out_channels = shape.out.channels;
    job.source_channels = shape.source.channels;
    job.block_out = static_cast<int>(shape.block_out);
    job.slice = slice.width;
    job.slices = static_cast<int>(weights_->slices);
    job.planes = planes;
    job.block_k = planes ? 1 : static_cast<int>(shape.block_k);
    job.block_k_cut = static_cast<int>(shape.source.channels % shape.block_k);
    job.dot_lanes = dot == nullptr ? 0 : dot->lanes;
  }

  const Kernels<T>& kernels_;
  const GatherShape shape_;
  const BlockLists lists_;
  const AxisPlan rows_, cols_;
  const bool transposed_;
  const T *const values_, *const bias_;
  const bool over_pixels_;  // a form that plans for itself
  std::optional<BlockWeights<T>> weights_;
  std::optional<PaddedAxis> padded_;  // of planes
  int64_t plane_ = 0;
  Array<T> init_;
  GatherPlan plan_;
  Split split_{1, 1};
  bool own_ = false;  // each task packs its weights
  Buffer<T> packed_;
  GatherJob<T> job_{};
};

}  // namespace ddst::cpu
