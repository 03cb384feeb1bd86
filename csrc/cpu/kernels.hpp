// The interface between the glue (which knows torch) and the instruction-set specific kernels (which do not).
// Everything here is a plain struct of raw pointers: the files compiled with -mavx2 or -mavx512f must not emit any
// inline function that another file could pick up at link time, so neither torch nor the STL appears on this border.
#pragma once

#include <cstdint>

namespace ddst::cpu {

// ---- gather: forward and input gradient ---------------------------------------------------------------------------
// out[pixel, output block] = init + sum over the block's entries of source[pixel + shift(tap), input channels] *
// weight. "Source" and "out" are the two NHWC activations; for the input gradient they are grad_output and grad_input.

// One active block as one tile sees it: byte offsets from the pixel's base address and from the weights' base address.
struct Entry {
  int64_t source;
  int64_t weight;
};

// Output pixels for which exactly the same set of taps lies inside the source image. All pixels of a class share one
// entry list, so taps outside the image cost nothing and no padding is read (of planes, no row of it). A class covers
// one batch: some images, or a strip of rows of one; the classes of a batch follow each other, so that the border
// pixels find their neighbours in L2.
struct PixelClass {
  int64_t image_begin;
  int64_t first_tile;   // index of the class's first tile among all tiles
  int64_t tiles;        // number of tiles, each of at most `tile_pixels` pixels
  int64_t pixels;       // number of pixels
  const int32_t* rows;  // output rows of the class, ascending
  const int32_t* cols;  // output columns of the class, ascending
  int32_t n_rows;
  int32_t n_cols;
  const int64_t* list_begin;        // [out_blocks + 1]: entries[list_begin[r]] .. are those of output block r
  const int64_t* list_full;         // [out_blocks]: end of the entries with a whole reduction block; the rest are cut
  int64_t batch_tile, batch_tiles;  // the tiles of all classes of the batch
  double batch_begin, batch_end;    // the batch's stretch of the activations, in images
};

template <typename T>
struct GatherJob {
  const T* source;
  T* out;
  int64_t source_image, source_row,
      source_pixel;  // strides in elements; channels have stride 1 (in planes: see entries)
  int64_t out_image, out_row, out_pixel;
  const T* ahead;       // what is fetched in step with the tiles, from so many bytes behind them on: the source, or ...
  int64_t ahead_image;  // ... what will be read next; elements of an image
  int64_t ahead_bytes;
  const T* beside;          // what is fetched beside it: the output, or what is needed when it is finished ...
  int64_t beside_image;     // ... elements of an image
  const int64_t* row_base;  // [out rows]: source row of shift 0 (may lie outside the image; then no entry uses it)
  const int64_t* col_base;  // [out columns]
  const PixelClass* classes;
  int64_t n_classes;
  const Entry* entries;
  const T* weights;       // [block][slice][k][slice width]
  int64_t weights_slice;  // elements from one slice of a block to the next
  const T* init;          // [out_blocks][slices][slice width]: the bias, or zeros
  int64_t out_blocks;
  int64_t out_channels;
  int64_t source_channels;
  int block_out;    // channels of an output block
  int slice;        // channels a tile holds in registers (one of the kernel's slice widths)
  int slices;       // slices of an output block
  int block_k;      // channels of a reduction block
  int block_k_cut;  // channels of the last reduction block when the channel count is no multiple, else 0
  int dot_lanes;    // 0: the vector runs over output channels; else over so many channels of the reduction
  bool planes;      // the source lies in planes: tiles are stretches of rows, entries single channels
  bool stream;      // whole slices of out are whole cache lines, to be stored past the caches
};

// A width the gather kernel can hold in registers, with the pixels per tile and its cost per pixel and k step
// (in units of one 256-bit multiply-add), by which the glue chooses how to cut an output block.
struct SliceShape {
  int width;
  int tile_pixels;
  float cost;
  int row_pixels;  // per tile where the source lies in planes
};

// A narrow output block whose kernel runs the vector over the reduction: its channels, lanes and pixels per tile.
// Weights are then [block][channel][k].
struct DotShape {
  int channels;
  int lanes;
  int tile_pixels;
};

// One step over planes: some output channels that read the same source channels through the same tap.
constexpr int kPlaneChannels = 4;
struct PlaneStep {
  int64_t source;  // first plane, shifted by the tap, in elements
  int64_t weight;  // [channels][outputs], in elements
  int64_t output[kPlaneChannels];
  int outputs;
  int channels;  // of the reduction
  int kernel_row;
};

// Where a vector's first pixel lies in the planes of source (not yet shifted by a tap) and of out.
struct PlaneVector {
  int64_t source;
  int64_t out;
};

// Forward or input gradient at stride 1 with vectors over pixels. Position of pixel (image n of the chunk, row r of the
// chunk, column c) in a plane: n * image_pitch + r * pitch + c; in those of source top rows and left columns further.
template <typename T>
struct PlaneJob {
  const T* source;  // NHWC
  T* out;           // NHWC
  int64_t images, source_h, source_w, source_channels, out_h, out_w, out_channels;
  int64_t top, left;  // zeros before an image's first row and column
  int64_t halo_rows;  // source rows that a strip of output rows needs beside its own
  int64_t source_pitch, source_image_pitch, out_pitch, out_image_pitch;
  int64_t row_vectors;        // vectors of an output row; 0: they run on over the ends of rows
  const int64_t* row_offset;  // [kernel_h]: source row minus output row
  int64_t kernel_h;
  int64_t source_plane, out_plane;               // elements from one channel to the next
  int64_t chunk_images, chunk_rows, row_chunks;  // a chunk: some whole images, or some rows of one
  const PlaneStep* steps;
  int64_t n_steps;
  const T* weights;
  const T* init;  // [out_channels]
};

// The same with the sums of an output block in registers, over its whole list of entries. A few images lie side by
// side: pixel (image n of the group, row r of the strip, column c) stands in the planes of source at (top + r) *
// row_pitch + (left + c) * group + n, so that vectors need not end with an image's row.
template <typename T>
struct PlaneGatherJob {
  const T* source;  // NHWC
  T* out;           // NHWC
  int64_t images, source_h, source_w, source_channels, out_h, out_w, out_channels;
  int64_t group;               // images side by side
  int64_t top, left;           // rows and columns before an image's first, as far as taps reach
  int64_t halo_rows;           // source rows that a strip needs beside its own
  int64_t row_pitch;           // positions
  int64_t source_plane;        // elements from one channel to the next
  int64_t strip_rows, strips;  // output rows of a chunk, which covers one group of images; strips of a group
  const int32_t* row_class;    // [out_h]: rows that the same taps reach share their lists
  int64_t classes;
  const Entry* entries;       // source: bytes from a pixel's position with top = left = 0
  const int64_t* list_begin;  // [classes][out_blocks + 1], as in PixelClass
  const int64_t* list_full;   // [classes][out_blocks]
  const T* weights;           // [block][slice][k][slice width]
  int64_t weights_slice;      // elements from one slice of a block to the next
  const T* init;              // [out_blocks][slices][slice width]: the bias, or zeros
  int64_t out_blocks;
  int block_out, slice, slices, block_k, block_k_cut;  // as in GatherJob
  bool stream;                                         // whole panels of channels are stored past the caches
};

// Forward or input gradient of pixels that know no neighbours, as panels (panel.hpp).
template <typename T>
struct PanelJob {
  const T* source;  // [pixels][source_channels]
  T* out;           // [pixels][out_channels]
  int64_t pixels, source_channels, out_channels;
  const int32_t *ptr, *ids, *k_block;  // as in BlockLists: the blocks of output block r are ids[ptr[r]] ..
  const T* weights;                    // [slots][...], blocks of block_out x block_k ...
  int64_t out_step, k_step;            // ... elements from one output channel, one channel of the reduction to the next
  const T* init;                       // of each output channel, init_step apart: the bias, or one zero
  int64_t init_step;
  int64_t group_vectors;  // vectors of pixels whose panels are packed, and stay in the caches, together
  int block_out, block_k;
};

// The product of a packed matrix with one vector (block_vector.hpp).
template <typename T>
struct BlockVectorJob {
  const T* values;  // [slots][block_out][block_k] if row_major, else [slots][block_k][block_out]
  const T* source;
  T* out;
  int64_t source_size, out_size;
  const int32_t *ptr, *ids, *k_block;  // as in BlockLists
  int64_t block_out, block_k;
  bool row_major;
};

// ---- weight gradient and block scores -----------------------------------------------------------------------------
// dW[block][o][i] = sum over output pixels of grad_output[pixel, o] * input[pixel * stride + tap, i].

struct ConvGeometry {
  int64_t images, in_h, in_w, in_channels, out_h, out_w, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// A stretch of pixels that is contiguous in the packed input and in the packed output gradient.
struct Run {
  int64_t in;
  int64_t out;
  int64_t length;
};

template <typename T>
struct WeightGradJob {
  const T* input;        // NHWC
  const T* grad_output;  // NHWC
  ConvGeometry geometry;
  int block_out, block_in;
  int64_t n_blocks;
  int64_t first_row;  // added to every block_row (block scores work on one group of block rows at a time)
  const int32_t *block_row, *block_col, *block_tap;
  const int32_t* order;  // [n_blocks]: slots in processing order (rows ascending)
  bool direct;           // activations are read where they lie (but see input_plane), else packed chunk by chunk
  int64_t input_plane;   // with vectors over output channels the input becomes planes: from one channel to the next
  bool vector_over_in;   // registers hold input channels (partial is [id][b_out][b_in]) ...
  int slice;             // ... or output channels (partial is [id][b_in][padded b_out]); channels per vector group
  int slices;            // groups per block
  int64_t chunk_images;  // pixels are processed in chunks of some images ...
  int64_t chunk_rows;    // ... and some output rows
  int64_t row_chunks;    // chunks per image group
};

// ---- what stands before and behind a convolution ------------------------------------------------------------------

// act((x - mean) * scale + shift) per channel, act(z) = z or slope * z below zero; without a norm the pointers are
// null.
template <typename T>
struct RowForm {
  const T *mean, *scale, *shift;
  T slope;
};

// Over rows of pixels [pixel][channel]. next_row, residual, x: null where there is none.
template <typename T>
struct RowKernels {
  // out = act(norm(x)), every pixel `repeat` times (1 or 2).
  void (*activate)(const T* x, int64_t pixels, int64_t channels, const RowForm<T>& form, int64_t repeat, T* out);
  // out[p] = row[p], or with the next row the mean of 2x2 pixels, plus residual[p / repeat].
  void (*finish)(const T* row, const T* next_row, int64_t pixels, int64_t channels, const T* residual, int64_t repeat,
                 T* out);
  // sums += (x - shift), squares += (x - shift)^2.
  void (*sum)(const T* x, int64_t pixels, int64_t channels, const T* shift, T* sums, T* squares);
  // out = act'(norm(x)) * grad, grad[p] = row[p] or the sum of 2x2 pixels; sums += out, products += out * (x - mean).
  void (*activate_grad)(const T* row, const T* next_row, const T* x, int64_t pixels, int64_t channels,
                        const RowForm<T>& form, T* out, T* sums, T* products);
  // grad = grad * scale + (x - mean) * slope + constant, or grad * scale.
  void (*norm_grad)(T* grad, const T* x, int64_t pixels, int64_t channels, const T* mean, const T* scale,
                    const T* slope, const T* constant);
};

template <typename T>
struct Kernels {
  const SliceShape* gather_slices;  // ends with width 0
  const DotShape* gather_dots;      // in order of preference, ends with channels 0
  const SliceShape* plane_slices;   // of plane_gather (width and cost), ends with width 0
  int most_plane_channels;          // widest output block whose vectors run over pixels
  const int* weight_grad_slices;    // descending, ends with 0
  int vector_width;                 // lanes of the widest register
  // Computes tiles [tile_begin, tile_end) of output blocks [block_begin, block_end).
  void (*gather)(const GatherJob<T>& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
  // Computes chunks [chunk_begin, chunk_end).
  void (*planes)(const PlaneJob<T>& job, int64_t chunk_begin, int64_t chunk_end, T* source_planes, T* out_planes,
                 PlaneVector* vectors, int64_t* vectors_begin);
  // Computes chunks [chunk_begin, chunk_end). planes holds two chunks, spare a pixel of out; pixels and outs hold the
  // vectors and positions of a chunk.
  void (*plane_gather)(const PlaneGatherJob<T>& job, int64_t chunk_begin, int64_t chunk_end, T* planes, T* spare,
                       const char** pixels, T** outs);
  int panel_vectors;  // of a tile of panels, at most
  // Computes vectors [vector_begin, vector_end) of pixels of output blocks [block_begin, block_end). panels holds a
  // group of vectors.
  void (*panels)(const PanelJob<T>& job, int64_t vector_begin, int64_t vector_end, int64_t block_begin,
                 int64_t block_end, T* panels);
  // Computes output blocks [block_begin, block_end).
  void (*block_vector)(const BlockVectorJob<T>& job, int64_t block_begin, int64_t block_end);
  // One block as packed[slice][k][width]: transposed (vector over b_out) or straight (vector over b_in).
  void (*pack_weights)(const T* block, int block_out, int block_in, int width, bool transposed, T* packed);
  // dst[c * dst_stride + r] = src[r * src_stride + c].
  void (*transpose)(const T* src, int64_t rows, int64_t cols, int64_t src_stride, T* dst, int64_t dst_stride);
  // Adds the pixels of chunks [chunk_begin, chunk_end) to the partial gradients of order[block_begin .. block_end).
  void (*weight_grad)(const WeightGradJob<T>& job, int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
                      int64_t block_end, T* partial, T* input_scratch, T* grad_scratch, Run* runs, int64_t* run_begin);
  RowKernels<T> rows;
};

struct KernelSet {
  int code;  // 0 portable, 1 avx2, 2 avx512, 3 neon
  Kernels<float> f32;
  Kernels<double> f64;
};

const KernelSet& kernels_portable();
#if defined(__x86_64__)
const KernelSet& kernels_avx2();
const KernelSet& kernels_avx512();
#elif defined(__aarch64__)
const KernelSet& kernels_neon();
#endif

// The set chosen for this machine, or forced by the environment variable DDST_CPU_CAPABILITY.
// Throws std::invalid_argument where that names an unknown or unsupported one.
const KernelSet& active_kernels();

// Shares that a weight gradient's pixels are summed in, from the environment variable DDST_WEIGHT_GRAD_SHARES: the same
// bits for any number of threads. 0 where it is not set: then one share a thread, which is fastest.
// Throws std::invalid_argument where it is no number from 1 to 1024.
int64_t weight_grad_shares();

template <typename T>
const Kernels<T>& kernels_for(const KernelSet& set);
template <>
inline const Kernels<float>& kernels_for<float>(const KernelSet& set) {
  return set.f32;
}
template <>
inline const Kernels<double>& kernels_for<double>(const KernelSet& set) {
  return set.f64;
}

}  // namespace ddst::cpu
