// Bulk copies from global to shared memory: what a tensor map's boxes and columns hold, and where it comes to lie.
#pragma once
#include "memory.hpp"
#include "tensor_map.hpp"

namespace ddst::emu {

// Bits of the address from 7 on are xored into those from 4 on: as many as the swizzle has of 32, 64 and 128 bytes.
inline std::uint32_t swizzled_address(std::uint32_t address, int swizzle, std::uint32_t phase) {
  return address ^ ((phase & (std::uint32_t(swizzle) / 16 - 1)) << 4);
}
inline std::uint32_t swizzled_address(std::uint32_t address, int swizzle) {
  return swizzle ? swizzled_address(address, swizzle, address >> 7) : address;
}

// Reads what a map points at.
class MapReader {
 public:
  MapReader(const cuda::TensorMap& map, Where where) : map_(map), where_(where) {
    const std::string error = cuda::tensor_map_error(map);
    if (!error.empty()) Block::current->fail(error, where);
    inner_bytes_ = (map.im2col ? map.channels : map.box[0]) * map.element_bytes;
    if (map.swizzle && inner_bytes_ != map.swizzle)
      Block::current->fail("tensor map: rows of " + std::to_string(inner_bytes_) + " bytes with a swizzle of " +
                               std::to_string(map.swizzle) + ", which pads them in shared memory",
                           where);
    buffer_ = Buffer::at(map.base);
    if (!buffer_) Block::current->fail("tensor map of memory that is not there", where);
    bytes_.reserve(std::size_t(cuda::copied_bytes(map)));
  }

  // All elements of the box at `at`, the innermost dimension first.
  void box(const int* at) {
    if (map_.im2col) Block::current->fail("copy_box of an im2col map", where_);
    rows(map_.rank - 1, at, 0, true);
  }
  // Pixels in a row, from the one at `at` on, along width, height, images; each is read `offset` further on.
  void pixels(const int (&at)[4], const int (&offset)[2]) {
    if (!map_.im2col) Block::current->fail("copy_im2col of a map in tile mode", where_);
    std::int64_t position[2] = {at[1], at[2]}, image = at[3];
    for (int i = 0; i < 2; ++i) {
      if (offset[i] < 0 || offset[i] > 255)
        Block::current->fail("im2col offset " + std::to_string(offset[i]) + " is not in 0 to 255", where_);
      if (position[i] < map_.lower[i] || position[i] >= map_.sizes[1 + i] + map_.upper[i])
        Block::current->fail("im2col starts at " + std::to_string(position[i]) + ", outside of its bounding box",
                             where_);
    }
    for (int pixel = 0; pixel < map_.pixels; ++pixel) {
      const std::int64_t w = position[0] + offset[0], h = position[1] + offset[1];
      row(at[0], w * map_.strides[1] + h * map_.strides[2] + image * map_.strides[3],
          inside(1, w) && inside(2, h) && inside(3, image));
      for (int i = 0; i < 2; ++i) {
        position[i] += map_.steps[1 + i];
        if (position[i] < map_.sizes[1 + i] + map_.upper[i]) break;
        position[i] = map_.lower[i];
        if (i == 1) image += map_.steps[3];
      }
    }
  }

  // As they lie in shared memory from `to` on.
  std::shared_ptr<const std::vector<std::byte>> swizzled(std::uint32_t to) const {
    auto result = std::make_shared<std::vector<std::byte>>(bytes_.size());
    for (std::uint32_t i = 0; i < bytes_.size(); i += 16)
      std::memcpy(result->data() + (swizzled_address(to + i, map_.swizzle) - to), bytes_.data() + i, 16);
    return result;
  }
  long bytes_inside() const { return inside_; }

 private:
  bool inside(int dimension, std::int64_t index) const { return index >= 0 && index < map_.sizes[dimension]; }
  void rows(int dimension, const int* at, std::int64_t offset, bool all_inside) {
    if (dimension == 0) return row(at[0], offset, all_inside);
    for (int i = 0; i < map_.box[dimension]; i += map_.steps[dimension]) {
      const std::int64_t index = std::int64_t(at[dimension]) + i;
      rows(dimension - 1, at, offset + index * map_.strides[dimension], all_inside && inside(dimension, index));
    }
  }
  // A row of the innermost dimension, `first` is its first element.
  void row(std::int64_t first, std::int64_t offset, bool all_inside) {
    const std::int64_t count = inner_bytes_ / map_.element_bytes;
    const std::int64_t begin = std::clamp<std::int64_t>(-first, 0, count),
                       end = all_inside ? std::clamp<std::int64_t>(map_.sizes[0] - first, begin, count) : begin;
    const std::size_t start = bytes_.size();
    bytes_.resize(start + std::size_t(inner_bytes_), std::byte{0});
    if (end == begin) return;
    const std::int64_t bytes = (end - begin) * map_.element_bytes;
    const std::byte* from = buffer_->read(buffer_->offset_of(map_.base) + offset + (first + begin) * map_.element_bytes,
                                          bytes, map_.element_bytes, where_);
    std::memcpy(bytes_.data() + start + begin * map_.element_bytes, from, std::size_t(bytes));
    inside_ += bytes;
  }

  const cuda::TensorMap& map_;
  const Where where_;
  Buffer* buffer_ = nullptr;
  int inner_bytes_ = 0;
  long inside_ = 0;
  std::vector<std::byte> bytes_;
};

// The running thread starts a copy to `to` of block `rank`, onto the barrier at `barrier` there.
inline void start_copy(int rank, std::uint32_t to, std::shared_ptr<const std::vector<std::byte>> bytes,
                       std::uint32_t barrier, Where where) {
  Block& block = *Block::current;
  Thread& self = block.self();
  if (rank >= block.cluster_size())
    block.fail("copy to CTA " + std::to_string(rank) + " of " + std::to_string(block.cluster_size()), where);
  const Mbarrier& b = block.barriers.used(self.id, rank, barrier, true, "copy", where);
  block.reach(rank, "copy", b.owner, b.phase + 1, where);
  const auto count = std::uint32_t(bytes->size());
  std::byte* const there = block.shared_data_in(rank, to, count, 16, where);
  const Time time = b.phase + 1;
  if (block.options.check_races)
    block.shadow.write_later(self.id, block.shadow_offset(rank, to), count, b.owner, time, where);
  std::memset(there, 0xff, count);
  block.stats.bulk_bytes_written += count;
  block.start({self.id, rank, to, std::move(bytes), barrier, time, where});
}

inline void start_map_copy(const cuda::TensorMap& map, const MapReader& reader, std::uint32_t to, std::uint32_t barrier,
                           unsigned mask, Where where) {
  Block& block = *Block::current;
  if (to % std::uint32_t(cuda::box_alignment(map)))
    block.fail("bulk copy to byte " + std::to_string(to) + ", which is no multiple of " +
                   std::to_string(cuda::box_alignment(map)),
               where);
  const auto bytes = reader.swizzled(to);
  for (int rank = 0; mask >> rank; ++rank)
    if (mask >> rank & 1) start_copy(rank, to, bytes, barrier, where);
  ++block.stats.bulk_copies;
  block.stats.bulk_bytes += reader.bytes_inside();
}

}  // namespace ddst::emu
