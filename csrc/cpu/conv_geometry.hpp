// A convolution's sizes, read from the operators' arguments and checked.
#pragma once

#include "../topology.hpp"
#include "activation.hpp"

namespace ddst::cpu {

struct Window {
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

inline void check_pair(const char* op, const char* name, const Ints& pair, int64_t least) {
  if (pair.size() != 2 || pair[0] < least || pair[1] < least || pair[0] > INT32_MAX || pair[1] > INT32_MAX) {
    fail(op, name, " is ", shape_text(pair), ", expected two ints from ", least, " to 2^31 - 1");
  }
}

inline Window read_window(const char* op, const Ints& stride, const Ints& padding, const Ints& dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  return {stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

inline void check_activation(const char* op, const char* name, const Tensor& t, const char* channels_name,
                             int64_t channels) {
  check_cpu(op, name, t);
  if (t.dim() != 4) fail(op, name, " has shape ", shape_text(t), ", expected 4 dimensions [N, C, H, W]");
  if (t.size(1) != channels) {
    fail(op, name, " has ", t.size(1), " channels (shape ", shape_text(t), "), expected ", channels, " (",
         channels_name, " of weight_shape)");
  }
  for (int i = 2; i < 4; ++i) {
    if (t.size(i) > INT32_MAX)
      fail(op, name, " has shape ", shape_text(t), ", expected at most 2^31 - 1 rows and columns");
  }
}

// The geometry of a forward convolution over images of h x w; fails where the kernel does not fit.
inline ConvGeometry make_geometry(const char* op, const WeightGrid& grid, const Window& w, int64_t images, int64_t h,
                                  int64_t wide) {
  const auto out_size = [&](int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? int64_t{0} : room / stride + 1;
  };
  ConvGeometry g{};
  g.images = images;
  g.in_h = h;
  g.in_w = wide;
  g.in_channels = grid.in_channels;
  g.out_channels = grid.out_channels;
  g.kernel_h = grid.kernel_h;
  g.kernel_w = grid.kernel_w;
  g.stride_h = w.stride_h;
  g.stride_w = w.stride_w;
  g.pad_h = w.pad_h;
  g.pad_w = w.pad_w;
  g.dilation_h = w.dilation_h;
  g.dilation_w = w.dilation_w;
  g.out_h = out_size(h, g.kernel_h, w.stride_h, w.pad_h, w.dilation_h);
  g.out_w = out_size(wide, g.kernel_w, w.stride_w, w.pad_w, w.dilation_w);
  if (h < 1 || wide < 1 || g.out_h < 1 || g.out_w < 1) {
    fail(op, "input of ", h, " x ", wide, " pixels with padding [", w.pad_h, ", ", w.pad_w,
         "] is smaller than the kernel of ", g.kernel_h, " x ", g.kernel_w, " with dilation [", w.dilation_h, ", ",
         w.dilation_w, "]");
  }
  if (g.out_h > INT32_MAX || g.out_w > INT32_MAX) {
    fail(op, "padding [", w.pad_h, ", ", w.pad_w, "] makes an output of ", g.out_h, " x ", g.out_w,
         " pixels, expected at most 2^31 - 1 rows and columns");
  }
  for (const Ints& sizes : {Ints{images, g.in_channels, h, wide}, Ints{images, g.out_channels, g.out_h, g.out_w}}) {
    if (!tensor_bytes(sizes, sizeof(double))) {
      fail(op, "stride [", w.stride_h, ", ", w.stride_w, "] and padding [", w.pad_h, ", ", w.pad_w,
           "] make a tensor of shape ", shape_text(sizes), ", expected less than 2^63 bytes");
    }
  }
  return g;
}

// A 1x1 convolution without stride and padding is a product per pixel: the image structure only costs time.
inline bool is_pointwise(const ConvGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

inline ConvGeometry flattened(ConvGeometry g) {
  if (!is_pointwise(g)) return g;
  g.images = g.images * g.out_h * g.out_w;
  g.in_h = g.in_w = g.out_h = g.out_w = 1;
  return g;
}

inline ImageShape input_shape(const ConvGeometry& g) { return {g.images, g.in_channels, g.in_h, g.in_w}; }
inline ImageShape output_shape(const ConvGeometry& g) { return {g.images, g.out_channels, g.out_h, g.out_w}; }

}  // namespace ddst::cpu
