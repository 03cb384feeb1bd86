// Random block-sparse convolutions for the gather kernel: packed values, records, a float64 reference.
#pragma once
#include <random>
#include <vector>

#include "check.hpp"
#include "conv2d_gather.cuh"

namespace ddst::test {

using namespace cuda;

using Rng = std::mt19937;
inline int pick(Rng& rng, int low, int high) { return low + int(rng() % unsigned(high - low + 1)); }

template <class T>
constexpr int kDtype = std::is_same_v<T, dev::bf16>   ? DDST_CUDA_BFLOAT16
                       : std::is_same_v<T, dev::fp16> ? DDST_CUDA_FLOAT16
                                                      : DDST_CUDA_TFLOAT32;
// Largest relative error of a rounding.
template <class T>
constexpr double kRounding = std::is_same_v<T, dev::bf16>   ? 0x1p-8
                             : std::is_same_v<T, dev::fp16> ? 0x1p-11
                                                            : 0x1p-24;

inline double widen(dev::bf16 v) { return emu::bf16_to_float(v.bits); }
inline double widen(dev::fp16 v) { return emu::fp16_to_float(v.bits); }
inline double widen(float v) { return v; }
template <class T>
T narrow(float v) {
  if constexpr (std::is_same_v<T, dev::bf16>)
    return {emu::float_to_bf16(v)};
  else if constexpr (std::is_same_v<T, dev::fp16>)
    return {emu::float_to_fp16(v)};
  else
    return v;
}
// What the multiplication sees of a value.
template <class T>
double operand(T v) {
  if constexpr (std::is_same_v<T, float>)
    return emu::float_to_tf32(v);
  else
    return widen(v);
}

template <class T>
struct GatherProblem {
  ddst_cuda_conv2d_problem p;
  bool input_gradient, relu = false;
  std::vector<bool> mask;  // [rows, cols, taps]
  std::vector<int> ids;    // like mask: the block's id, -1
  std::vector<T> values;   // [nnz, block_out, block_in]
  std::vector<T> input;    // NHWC
  std::vector<T> bias, residual;
  int rows, cols, taps, read_channels, written_channels;
  std::int64_t read_pixels, written_pixels;

  GatherProblem(const ddst_cuda_conv2d_problem& problem, bool input_gradient, double density, bool epilogue, Rng& rng)
      : p(problem), input_gradient(input_gradient) {
    p.dtype = kDtype<T>;
    p.out_height = (p.height + 2 * p.padding_y - p.kernel_height) / p.stride_y + 1;
    p.out_width = (p.width + 2 * p.padding_x - p.kernel_width) / p.stride_x + 1;
    rows = ceil(p.out_channels, p.block_out), cols = ceil(p.in_channels, p.block_in);
    taps = p.kernel_height * p.kernel_width;
    read_channels = input_gradient ? p.out_channels : p.in_channels;
    written_channels = input_gradient ? p.in_channels : p.out_channels;
    read_pixels = std::int64_t(p.images) * (input_gradient ? p.out_height * p.out_width : p.height * p.width);
    written_pixels = std::int64_t(p.images) * (input_gradient ? p.height * p.width : p.out_height * p.out_width);
    std::uniform_real_distribution<float> value(-1, 1), coin(0, 1);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)
        for (int tap = 0; tap < taps; ++tap) {
          const bool active = coin(rng) < density;
          mask.push_back(active);
          ids.push_back(active ? int(values.size() / std::size_t(p.block_out * p.block_in)) : -1);
          if (!active) continue;
          for (int o = 0; o < p.block_out; ++o)
            for (int i = 0; i < p.block_in; ++i) {
              const bool inside = r * p.block_out + o < p.out_channels && c * p.block_in + i < p.in_channels;
              values.push_back(narrow<T>(inside ? value(rng) : 0));
            }
        }
    for (std::int64_t i = 0; i < read_pixels * read_channels; ++i) input.push_back(narrow<T>(value(rng)));
    if (!epilogue) return;
    relu = true;
    for (int i = 0; i < written_channels; ++i) bias.push_back(narrow<T>(value(rng)));
    for (std::int64_t i = 0; i < written_pixels * written_channels; ++i) residual.push_back(narrow<T>(value(rng)));
  }

  static int ceil(int a, int b) { return (a + b - 1) / b; }

  // The definition of a record, one after another; ddst/ops/cuda.py builds the same on the device.
  std::vector<int> records(const GatherGeometry& g, int tile_channels) const {
    const int granules = (1 << g.log_channels_per_block) / kSlice, per_group = tile_channels / kSlice / granules;
    std::vector<int> all;
    for (int phase = 0; phase < g.phases_y * g.phases_x; ++phase)
      for (int group = 0; group < g.groups; ++group)
        for (int in_block = 0; in_block < g.in_blocks; ++in_block) {
          std::vector<int> record(std::size_t(g.record_ints), 0);
          for (int tap = 0; tap < taps; ++tap) {
            const int kh = tap / p.kernel_width, kw = tap % p.kernel_width;
            if (kh % g.phases_y * g.phases_x + kw % g.phases_x != phase) continue;
            for (int n = 0; n < per_group; ++n) {
              const int out = group * per_group + n, row = input_gradient ? in_block : out;
              const int col = input_gradient ? out : in_block;
              if (row >= rows || col >= cols) continue;
              const int id = ids[std::size_t((row * cols + col) * taps + tap)];
              if (id < 0) continue;
              record[std::size_t(kRecordHeader + tap)] |= ((1 << granules) - 1) << (n * granules);
              record[std::size_t(kRecordHeader + g.padded_taps + record[0]++)] = id;
            }
          }
          all.insert(all.end(), record.begin(), record.end());
        }
    return all;
  }

  // max over the output of |error| / (its rounding + float32 accumulation): at most 1 if right, huge for NaN.
  double error(const T* got) const {
    std::vector<double> dense(std::size_t(taps) * p.in_channels * p.out_channels);  // [tap][read][written]
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)
        for (int tap = 0; tap < taps; ++tap) {
          const int id = ids[std::size_t((r * cols + c) * taps + tap)];
          for (int o = r * p.block_out; id >= 0 && o < std::min((r + 1) * p.block_out, p.out_channels); ++o)
            for (int i = c * p.block_in; i < std::min((c + 1) * p.block_in, p.in_channels); ++i) {
              const std::size_t at = (std::size_t(id) * p.block_out + o % p.block_out) * p.block_in + i % p.block_in;
              const int read = input_gradient ? o : i, written = input_gradient ? i : o;
              dense[(std::size_t(tap) * read_channels + read) * written_channels + written] = operand(values[at]);
            }
        }
    std::vector<double> x(input.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = operand(input[i]);
    std::vector<double> sum(std::size_t(written_pixels) * written_channels), magnitude(sum.size());
    const auto add = [&](std::int64_t to, std::int64_t from, int tap) {
      double *s = &sum[std::size_t(to * written_channels)], *m = &magnitude[std::size_t(to * written_channels)];
      for (int c = 0; c < read_channels; ++c) {
        const double v = x[std::size_t(from * read_channels + c)];
        const double* w = &dense[(std::size_t(tap) * read_channels + c) * written_channels];
        for (int n = 0; n < written_channels; ++n) s[n] += v * w[n], m[n] += std::abs(v * w[n]);
      }
    };
    for (int n = 0; n < p.images; ++n)
      for (int oy = 0; oy < p.out_height; ++oy)
        for (int ox = 0; ox < p.out_width; ++ox)
          for (int tap = 0; tap < taps; ++tap) {
            const int y = oy * p.stride_y - p.padding_y + tap / p.kernel_width;
            const int x = ox * p.stride_x - p.padding_x + tap % p.kernel_width;
            if (y < 0 || y >= p.height || x < 0 || x >= p.width) continue;
            const std::int64_t image = (std::int64_t(n) * p.height + y) * p.width + x;
            const std::int64_t out = (std::int64_t(n) * p.out_height + oy) * p.out_width + ox;
            input_gradient ? add(image, out, tap) : add(out, image, tap);
          }
    double worst = 0;
    for (std::size_t i = 0; i < sum.size(); ++i) {
      if (!bias.empty())
        sum[i] += widen(bias[i % std::size_t(written_channels)]) + widen(residual[i]), magnitude[i] += 2;
      const double expected = relu ? std::max(sum[i], 0.0) : sum[i];
      const double allowed = std::abs(sum[i]) * kRounding<T> * 1.01 + magnitude[i] * 0x1p-20 + 1e-30;
      const double off = std::abs(widen(got[i]) - expected) / allowed;
      worst = std::max(worst, off == off ? off : 1e30);
    }
    return worst;
  }
};

template <class T>
emu::Buffer input_buffer(const char* name, const std::vector<T>& from) {
  emu::Buffer buffer(name, from.size() * sizeof(T), emu::Buffer::Role::input);
  if (!from.empty()) std::memcpy(buffer.host<T>(), from.data(), from.size() * sizeof(T));
  return buffer;
}

constexpr int kSharedLimit = 227 * 1024;  // sm_90

// Runs the kernel; with `compare`, every output must be written once and be right.
template <class Traits>
emu::Stats run(const GatherProblem<typename Traits::T>& problem, emu::Options options, const std::string& name,
               bool compare = true) {
  using T = typename Traits::T;
  GatherParams<T> p{};
  const std::string why = gather_geometry(problem.p, problem.input_gradient, Traits::kTile, kSharedLimit, p.g);
  if (!why.empty()) throw emu::Failure(name + ": refused, " + why);
  p.layout = gather_layout(p.g, Traits::kTile, sizeof(T));
  auto input = input_buffer("input", problem.input), values = input_buffer("values", problem.values);
  auto records = input_buffer("records", problem.records(p.g, Traits::kTile.channels));
  auto bias = input_buffer("bias", problem.bias), residual = input_buffer("residual", problem.residual);
  emu::Buffer output("output", std::size_t(problem.written_pixels) * problem.written_channels * sizeof(T),
                     emu::Buffer::Role::output_once);
  p.input = dev::global_ptr<const T>(input), p.values = dev::global_ptr<const T>(values);
  p.records = dev::global_ptr<const int>(records), p.output = dev::global_ptr<T>(output);
  if (!problem.bias.empty()) p.bias = dev::global_ptr<const T>(bias);
  if (!problem.residual.empty()) p.residual = dev::global_ptr<const T>(residual);
  p.relu = problem.relu;
  static emu::Block block;  // keeps the stacks of its fibers
  block.options = options;
  block.stats = {};
  block.launch({gather_blocks(p.g), 1, 1}, Traits::kThreads, std::size_t(p.layout.bytes),
               [&] { conv2d_gather<Traits>(p); });
  if (compare) {
    expect(output.fully_written(), name + ": output not fully written");
    const double error = problem.error(output.host<T>());
    expect(error <= 1, name + ": error " + std::to_string(error));
  }
  return block.stats;
}

template <class T, bool kTransposed, bool kLarge>
using Traits = cuda::GatherTraits<T, kTransposed, kLarge, cuda::PlainSource>;

}  // namespace ddst::test
