// What csrc/cuda/tensor_map.hpp says of maps: bytes, positions, and every refusal.
#include <functional>

#include "check.hpp"
#include "tensor_map.hpp"

namespace {

using namespace ddst::cuda;

alignas(128) char memory[1024];

TensorMap patch() { return patch_map(memory, 2, 64, 32, 32, 256, {16, 34, 10, 1}, kSwizzle32); }
TensorMap column() { return column_map(memory, 2, 64, 32, 24, 256, {3, 4}, {2, 1}, {1, 1}, 32, 64, kSwizzle64); }

void expect_error(const TensorMap& map, const std::string& text) {
  const std::string why = tensor_map_error(map);
  expect(why.find(text) != std::string::npos, "a map is refused for \"" + text + "\", got \"" + why + "\"");
}

void expect_refused(const std::string& text, const std::function<void(TensorMap&)>& spoil, TensorMap map = patch()) {
  expect(tensor_map_error(map).empty(), "legal before it is spoilt for \"" + text + "\": " + tensor_map_error(map));
  spoil(map);
  expect_error(map, text);
}

}  // namespace

int main() {
  const TensorMap p = patch(), c = column(), w = matrix_map(memory, 2, 100, 64, 32, 16, kSwizzle32);
  expect(copied_bytes(p) == 16 * 34 * 10 * 2, "bytes of a patch");
  expect(copied_bytes(c) == 32 * 64 * 2, "bytes of a column");
  expect(copied_bytes(w) == 32 * 16 * 2, "bytes of a block's columns");
  expect(p.strides[1] == 512 && p.strides[2] == 512 * 32 && p.strides[3] == 512 * 32 * 32, "strides of a patch");
  expect(w.sizes[0] == 64 && w.sizes[1] == 100 && w.strides[1] == 128, "a matrix has its columns inside");
  expect(box_alignment(p) == 256 && box_alignment(c) == 512, "a swizzle repeats after 8 spans");
  expect(im2col_positions(c, 0) == 12 && im2col_positions(c, 1) == 31, "positions are the convolution's outputs");
  TensorMap strided = p;
  strided.steps[1] = 4;
  expect(copied_bytes(strided) == 16 * 9 * 10 * 2, "every fourth column of 34");

  expect_refused("element_bytes is 3", [](TensorMap& m) { m.element_bytes = 3; });
  expect_refused("rank is 0", [](TensorMap& m) { m.rank = 0; });
  expect_refused("rank is 6", [](TensorMap& m) { m.rank = 6; });
  expect_refused("rank is 3", [](TensorMap& m) { m.rank = 3; }, c);
  expect_refused("im2col is 2", [](TensorMap& m) { m.im2col = 2; });
  expect_refused("base is", [](TensorMap& m) { m.base = memory + 8; });
  expect_refused("base is 0", [](TensorMap& m) { m.base = nullptr; });
  expect_refused("swizzle is 16", [](TensorMap& m) { m.swizzle = 16; });
  expect_refused("sizes[3] is 0", [](TensorMap& m) { m.sizes[3] = 0; });
  expect_refused("sizes[0] is 4294967297", [](TensorMap& m) { m.sizes[0] = (std::int64_t{1} << 32) + 1; });
  expect_refused("strides[0] is 4", [](TensorMap& m) { m.strides[0] = 4; });
  expect_refused("strides[1] is 24", [](TensorMap& m) { m.strides[1] = 24; });
  expect_refused("strides[3] is -16", [](TensorMap& m) { m.strides[3] = -16; });
  expect_refused("strides[2] is 1099511627776", [](TensorMap& m) { m.strides[2] = std::int64_t{1} << 40; });
  expect_refused("steps[0] is 2", [](TensorMap& m) { m.steps[0] = 2; });
  expect_refused("steps[1] is 9", [](TensorMap& m) { m.steps[1] = 9; });
  expect_refused("box[1] is 257", [](TensorMap& m) { m.box[1] = 257; });
  expect_refused("box[3] is 0", [](TensorMap& m) { m.box[3] = 0; });
  expect_refused("the bytes of box[0] is 24, expected a multiple", [](TensorMap& m) { m.box[0] = 12; });
  expect_refused("the bytes of box[0] is 64, expected at most the swizzle's 32", [](TensorMap& m) { m.box[0] = 32; });
  expect_refused("channels is 0", [](TensorMap& m) { m.channels = 0; }, c);
  expect_refused("channels is 257", [](TensorMap& m) { m.channels = 257; }, c);
  expect_refused("pixels is 1025", [](TensorMap& m) { m.pixels = 1025; }, c);
  expect_refused("lower[0] is -129", [](TensorMap& m) { m.lower[0] = -129; }, c);
  expect_refused("upper[1] is 128", [](TensorMap& m) { m.upper[1] = 128; }, c);
  expect_refused("positions along width is 0", [](TensorMap& m) { m.upper[0] = -33; }, c);
  expect_refused("channels is 80, expected at most the swizzle's 64", [](TensorMap& m) { m.channels = 40; }, c);
  return finish("tensor map");
}
