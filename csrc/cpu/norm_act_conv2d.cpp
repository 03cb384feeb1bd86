// The fused half of a residual block: norm, activation and upsampling in front of a convolution, pooling, residual sum
// and the next norm's moments behind it. A pass runs over a few images at a time: what it reads is made of the input
// just before and lies in L2, what it writes is finished there. ddst/ops/norm_act_conv2d.py holds the formulas.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "chunk_view.hpp"
#include "half_block_parts.hpp"
#include "weight_grad_pass.hpp"

namespace ddst::cpu {
namespace {

template <typename T>
std::tuple<Tensor, Tensor> forward(const Half& half, const Tensor& input, const Tensor& values, const T* bias,
                                   const MaybeTensor& residual, int64_t residual_upsample, const NormTerms<T>& norm,
                                   bool with_moments, bool channels_last) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  const ConvGeometry& g = half.geometry;
  const int64_t channels = g.out_channels, out_h = half.out_h(), out_w = half.out_w();
  NhwcOutput<T> out(input, {half.images, channels, out_h, out_w}, channels_last);
  Tensor moments = empty_tensor("its moments", with_moments ? Ints{2, channels} : Ints{0}, input);
  if (half.images == 0) {
    if (with_moments) std::fill_n(moments.mutable_data_ptr<T>(), 2 * channels, std::numeric_limits<T>::quiet_NaN());
    return {out.finish(kernels), moments};
  }
  const NhwcInput<T> x(input, {half.images, g.in_channels, half.h, half.w}, kernels);
  const int64_t side = residual_upsample;
  std::optional<NhwcInput<T>> added;
  if (residual) added.emplace(*residual, ImageShape{half.images, channels, out_h / side, out_w / side}, kernels);
  const T* const plus = added ? added->data() : nullptr;
  const Tensor packed = as_contiguous(values);
  const RowSource<T> map = activated_map(kernels, half, norm, x.data());
  const int64_t in_image = map.image_size(), out_image = g.out_h * g.out_w * channels;
  const bool finishes = half.pool == 2 || residual;
  const Parts parts = forward_parts(half, std::max(in_image, out_image) * static_cast<int64_t>(sizeof(T)));
  Array<Moments> moments_of;
  for (size_t i = 0; with_moments && i < parts.parts.size(); ++i) moments_of.emplace_back(channels);
  const PartedPass<T> pass{parts,
                           {half.images, g.in_channels, g.in_h, g.in_w},
                           {half.images, channels, g.out_h, g.out_w},
                           !map.identity(),
                           finishes,
                           x.data(),
                           out.data(),
                           x.data(),
                           plus,
                           half.h * half.w * g.in_channels,
                           out_h / side * (out_w / side) * channels};
  pass.run(
      input,
      [&](const Part& part) {
        return forward_pass<T>(kernels, half.topology, half.grid, part_geometry(half, part, true),
                               packed.const_data_ptr<T>(), bias, parts.threads, true);
      },
      [&](const Part& part, T* to) {
        for (int64_t n = 0; n < part.images; ++n)
          map.write(part.image + n, part.source_row, part.source_rows, to + n * part.source_rows * map.row_size());
      },
      [&](int64_t index, const Part& part, const T* from) {
        const int64_t first = part.row / half.pool, end = std::min((part.row + part.rows) / half.pool, out_h);
        const int64_t line = g.out_w * channels;
        for (int64_t n = part.image; n < part.image + part.images; ++n) {
          T* const rows = out.data() + n * out_h * out_w * channels;
          for (int64_t r = first; finishes && r < end; ++r) {
            const T* const row = from + ((n - part.image) * part.rows + half.pool * r - part.row) * line;
            const int64_t residual_row = (n * (out_h / side) + r / side) * (out_w / side);
            kernels.rows.finish(row, half.pool == 2 ? row + line : nullptr, out_w, channels,
                                plus == nullptr ? nullptr : plus + residual_row * channels, side,
                                rows + r * out_w * channels);
          }
          if (with_moments) moments_of[index].add(kernels, rows + first * out_w * channels, (end - first) * out_w);
        }
      });
  if (with_moments) {
    Moments all(channels);
    for (const Moments& part : moments_of) all.add(part);
    all.write(moments.mutable_data_ptr<T>());
  }
  return {out.finish(kernels), moments};
}

// Sums over the pixels of each image of grad_z and of grad_z * (x - mean): [image][channel].
struct GradSums {
  int64_t channels;
  Array<double> sums, products;
  GradSums(int64_t images, int64_t c) : channels(c), sums(images * c, 0.0), products(images * c, 0.0) {}
};

// grad_z of some rows of one image, made of the gradients of the enlarged map's rows; totals of the rows are added.
template <typename T>
void activation_grad(const Kernels<T>& kernels, const Half& half, const NormTerms<T>& norm, int64_t image, int64_t rows,
                     const T* from, const T* x, T* grad, double* sums_of_rows, double* products_of_rows) {
  constexpr int64_t kPiece = 512;  // pixels that are summed in T
  const int64_t channels = half.geometry.in_channels, line = half.w * channels;
  const int64_t from_line = half.geometry.in_w * channels;
  Array<T> sums(channels, T(0)), products(channels, T(0));
  int64_t pixels = 0;
  const RowForm<T> form = norm.form(image, half.slope);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = 0; begin < half.w; begin += kPiece) {
      const int64_t count = std::min(kPiece, half.w - begin), at = r * line + begin * channels;
      const T* const row = from + half.upsample * (r * from_line + begin * channels);
      kernels.rows.activate_grad(row, half.upsample == 2 ? row + from_line : nullptr, x + at, count, channels, form,
                                 grad + at, sums.data(), products.data());
      pixels += count;
      const bool last = r + 1 == rows && begin + count == half.w;
      if (!norm.present || (pixels < kPiece && !last)) continue;
      for (int64_t c = 0; c < channels; ++c) {
        sums_of_rows[c] += static_cast<double>(sums[c]);
        products_of_rows[c] += static_cast<double>(products[c]);
      }
      std::fill(sums.begin(), sums.end(), T(0));
      std::fill(products.begin(), products.end(), T(0));
      pixels = 0;
    }
  }
}

// The gradients of gamma and beta, of their shape.
template <typename T>
void affine_grads(const NormTerms<T>& norm, int64_t images, const GradSums& totals, T* grad_gamma, T* grad_beta) {
  for (int64_t row = 0; row < norm.samples; ++row) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t n = row; n < (norm.samples == 1 ? images : row + 1); ++n) {
        sum += totals.sums[n * norm.channels + c];
        product += totals.products[n * norm.channels + c];
      }
      grad_gamma[row * norm.channels + c] = static_cast<T>(product * norm.rstd[c]);
      grad_beta[row * norm.channels + c] = static_cast<T>(sum);
    }
  }
}

// grad_z becomes the input's gradient through mean and variance of the batch.
template <typename T>
void batch_norm_grad(const Kernels<T>& kernels, const Half& half, const NormTerms<T>& norm, const GradSums& totals,
                     const T* x, T* grad) {
  const int64_t channels = norm.channels, image_size = half.h * half.w * channels;
  const double count = static_cast<double>(half.images * half.h * half.w);
  Array<T> slope(channels), constant(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t n = 0; n < half.images; ++n) {
      const double gamma = norm.gamma[norm.samples == 1 ? c : n * channels + c];
      sum += gamma * totals.sums[n * channels + c];
      product += gamma * totals.products[n * channels + c];
    }
    const double rstd = norm.rstd[c];
    slope[c] = static_cast<T>(-rstd * rstd * rstd * product / count);
    constant[c] = static_cast<T>(-rstd * sum / count);
  }
  const int64_t tasks = std::min(half.images, task_count(half.images * image_size * 4));
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t n = half.images * task / tasks; n < half.images * (task + 1) / tasks; ++n) {
      kernels.rows.norm_grad(grad + n * image_size, x + n * image_size, half.h * half.w, channels, norm.mean.data(),
                             norm.form(n, 1).scale, slope.data(), constant.data());
    }
  });
}

template <typename T>
Tensor input_grad(const Half& half, const Tensor& grad_output, const Tensor& input, const Tensor& values,
                  const NormTerms<T>& norm, bool batch_stats, bool channels_last, T* grad_gamma, T* grad_beta) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  const ConvGeometry& g = half.geometry;
  const ImageShape shape{half.images, g.in_channels, half.h, half.w};
  NhwcOutput<T> out(input, shape, channels_last);
  GradSums totals(norm.present ? half.images : 0, g.in_channels);
  if (half.images > 0) {
    const NhwcInput<T> x(input, shape, kernels);
    const NhwcInput<T> grad(grad_output, {half.images, g.out_channels, half.out_h(), half.out_w()}, kernels);
    const Tensor packed = as_contiguous(values);
    const Unpooled<T> unpooled(kernels, half, grad.data());
    const bool finishes = norm.present || half.slope != 1 || half.upsample == 2;
    const int64_t in_image = unpooled.source.image_size(), out_image = g.in_h * g.in_w * g.in_channels;
    const int64_t line = half.w * g.in_channels, image_size = half.h * line;
    const Parts parts = input_grad_parts(half, std::max(in_image, out_image) * static_cast<int64_t>(sizeof(T)));
    // Strips of one image add to the same sums: each has its own, which are added in their order.
    const int64_t sums_size = norm.present ? g.in_channels : 0;
    Array<double> sums(parts.parts.size() * sums_size, 0.0), products(parts.parts.size() * sums_size, 0.0);
    const PartedPass<T> pass{parts,
                             {half.images, g.out_channels, g.out_h, g.out_w},
                             {half.images, g.in_channels, g.in_h, g.in_w},
                             !unpooled.source.identity(),
                             finishes,
                             grad.data(),
                             out.data(),
                             grad.data(),
                             x.data(),
                             half.out_h() * half.out_w() * g.out_channels,
                             image_size};
    pass.run(
        input,
        [&](const Part& part) {
          return input_grad_pass<T>(kernels, half.topology, half.grid, part_geometry(half, part, false),
                                    packed.const_data_ptr<T>(), parts.threads, true);
        },
        [&](const Part& part, T* to) {
          for (int64_t n = 0; n < part.images; ++n) {
            unpooled.source.write(part.image + n, part.source_row, part.source_rows,
                                  to + n * part.source_rows * unpooled.source.row_size());
          }
        },
        [&](int64_t index, const Part& part, const T* from) {
          const int64_t first = part.row / half.upsample, rows = part.rows / half.upsample;
          for (int64_t n = 0; finishes && n < part.images; ++n) {
            const int64_t image = part.image + n, begin = image * image_size + first * line;
            T* const to = out.data() + begin;
            // Of several images, each has its sums; of strips, their part.
            double* const image_sums =
                part.images > 1 ? totals.sums.data() + image * sums_size : sums.data() + index * sums_size;
            double* const image_products =
                part.images > 1 ? totals.products.data() + image * sums_size : products.data() + index * sums_size;
            activation_grad(kernels, half, norm, image, rows, from + n * part.rows * g.in_w * g.in_channels,
                            x.data() + begin, to, image_sums, image_products);
            if (norm.present && !batch_stats) {
              kernels.rows.norm_grad(to, nullptr, rows * half.w, g.in_channels, nullptr, norm.form(image, 1).scale,
                                     nullptr, nullptr);
            }
          }
        });
    for (size_t i = 0; i < parts.parts.size(); ++i) {
      if (parts.parts[i].images > 1) continue;
      for (int64_t c = 0; c < sums_size; ++c) {
        totals.sums[parts.parts[i].image * sums_size + c] += sums[i * sums_size + c];
        totals.products[parts.parts[i].image * sums_size + c] += products[i * sums_size + c];
      }
    }
    if (norm.present && batch_stats) batch_norm_grad(kernels, half, norm, totals, x.data(), out.data());
  }
  if (grad_gamma != nullptr) affine_grads(norm, half.images, totals, grad_gamma, grad_beta);
  return out.finish(kernels);
}

template <typename T>
std::tuple<Tensor, Tensor> weight_grad(const Half& half, const Tensor& grad_output, const Tensor& input,
                                       const NormTerms<T>& norm) {
  const Kernels<T>& kernels = kernels_for<T>(active_kernels());
  const ConvGeometry& g = half.geometry;
  const WeightGrid& grid = half.grid;
  Tensor result = empty_tensor("its output", {half.topology.slots, grid.block_out, grid.block_in}, input);
  Tensor bias = empty_tensor("the bias' gradient", {g.out_channels}, input);
  const NhwcInput<T> x(input, {half.images, g.in_channels, half.h, half.w}, kernels);
  const NhwcInput<T> grad(grad_output, {half.images, g.out_channels, half.out_h(), half.out_w()}, kernels);
  const RowSource<T> map = activated_map(kernels, half, norm, x.data());
  const Unpooled<T> unpooled(kernels, half, grad.data());
  const RowSource<T>& gradient = unpooled.source;
  const Topology& topo = half.topology;
  WeightGradPlan<T> plan = plan_weight_grad(kernels, g, grid.block_out, grid.block_in, topo.slots, topo.nnz,
                                            topo.row_order, topo.block_row, topo.block_col, topo.block_tap);
  clear_free_slots(topo, grid, result.mutable_data_ptr<T>());

  // What a chunk needs of the two maps, one behind the other, and the sums of its gradient: a workspace a task.
  const WeightGradJob<T>& job = plan.job;
  const int64_t in_rows = std::min(g.in_h, (job.chunk_rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1);
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto lines = [&](int64_t count) { return ceil_div(count, kLine) * kLine; };
  const int64_t in_size = map.identity() ? 0 : lines(((job.chunk_images - 1) * g.in_h + in_rows) * map.row_size());
  const int64_t out_size =
      gradient.identity() ? 0 : lines(((job.chunk_images - 1) * g.out_h + job.chunk_rows) * gradient.row_size());
  const int64_t channels = g.out_channels, sums_size = lines(channels);
  const int64_t task_size = in_size + out_size + 3 * sums_size;
  const WeightGradSplit split = weight_grad_split(plan);
  const int64_t tasks = split.chunk_tasks * split.block_tasks;
  const Tensor memory = empty_tensor("a workspace", {tasks, task_size}, input);
  Array<double> bias_sums(tasks * channels, 0.0);

  const auto stage = [&](int64_t task, bool first, int64_t chunk, WeightGradJob<T>& staged) {
    const ChunkView<T> view = chunk_view(staged, chunk);
    T* const in = memory.mutable_data_ptr<T>() + task * task_size;
    T* const out = in + in_size;
    for (int64_t n = 0; topo.nnz > 0 && !map.identity() && n < view.images; ++n)
      map.write(view.image_begin + n, view.in_row_begin, view.in_rows, in + n * map.image_size());
    for (int64_t n = 0; !gradient.identity() && n < view.images; ++n)
      gradient.write(view.image_begin + n, view.out_row_begin, view.out_rows, out + n * gradient.image_size());
    if (!map.identity()) staged.input = in - view.image_begin * map.image_size() - view.in_row_begin * map.row_size();
    if (!gradient.identity())
      staged.grad_output = out - view.image_begin * gradient.image_size() - view.out_row_begin * gradient.row_size();
    if (!first) return;
    T* const sums = out + out_size;
    std::fill(sums, sums + 3 * sums_size, T(0));
    for (int64_t n = 0; n < view.images; ++n) {
      const T* const rows = staged.grad_output + (view.image_begin + n) * gradient.image_size() +
                            view.out_row_begin * gradient.row_size();
      kernels.rows.sum(rows, view.out_rows * g.out_w, channels, sums + 2 * sums_size, sums, sums + sums_size);
    }
    for (int64_t c = 0; c < channels; ++c) bias_sums[task * channels + c] += static_cast<double>(sums[c]);
  };
  if (topo.nnz == 0) {
    WeightGradJob<T> unused = plan.job;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      unused.input = x.data();
      unused.grad_output = grad.data();
      stage(0, true, chunk, unused);
    }
  } else {
    weight_grad_pass<T>(kernels, plan, x.data(), grad.data(), result.mutable_data_ptr<T>(), stage);
  }
  T* const bias_out = bias.mutable_data_ptr<T>();
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += bias_sums[task * channels + c];
    bias_out[c] = static_cast<T>(sum);
  }
  return {result, bias};
}

Tensor channel_moments(const Tensor& input) {
  const char* op = "channel_moments";
  check_cpu(op, "input", input);
  check_floating(op, "input", input);
  if (input.dim() != 4) fail(op, "input has shape ", shape_text(input), ", expected 4 dimensions [N, C, H, W]");
  return in_dtype(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernels = kernels_for<T>(active_kernels());
    const int64_t channels = input.size(1), pixels = input.size(0) * input.size(2) * input.size(3);
    Tensor out = empty_tensor("its output", {2, channels}, input);
    if (pixels == 0) {
      std::fill_n(out.mutable_data_ptr<T>(), 2 * channels, std::numeric_limits<T>::quiet_NaN());
      return out;
    }
    const NhwcInput<T> x(input, {input.size(0), channels, input.size(2), input.size(3)}, kernels);
    // Shares of pixels whatever the number of threads: the same bits.
    const int64_t shares = std::min<int64_t>(64, ceil_div(pixels, 512));
    Array<Moments> parts;
    for (int64_t i = 0; i < shares; ++i) parts.emplace_back(channels);
    const int64_t tasks = std::min(shares, task_count(pixels * channels * 4));
    run_tasks(tasks, [&](int64_t task) {
      for (int64_t i = shares * task / tasks; i < shares * (task + 1) / tasks; ++i) {
        const int64_t begin = pixels * i / shares, end = pixels * (i + 1) / shares;
        parts[i].add(kernels, x.data() + begin * channels, end - begin);
      }
    });
    Moments all(channels);
    for (const Moments& part : parts) all.add(part);
    all.write(out.mutable_data_ptr<T>());
    return out;
  });
}

std::tuple<Tensor, Tensor> norm_act_conv2d(const Tensor& input, const Tensor& values, const MaybeTensor& bias,
                                           const MaybeTensor& residual, const MaybeTensor& mean, const MaybeTensor& var,
                                           const MaybeTensor& gamma, const MaybeTensor& beta, const Tensor& topology,
                                           const Ints& weight_shape, const Ints& stride, const Ints& padding,
                                           const Ints& dilation, double eps, double negative_slope, int64_t upsample,
                                           int64_t pool, int64_t residual_upsample, bool /*batch_stats*/, bool moments,
                                           bool channels_last, int64_t backend, int64_t /*record*/) {
  const char* op = "norm_act_conv2d";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 4);
  const Half half =
      read_half(op, input, grid, topology, stride, padding, dilation, eps, negative_slope, upsample, pool);
  check_dtype(op, "input", input, values.scalar_type(), "values");
  check_norm(op, input, mean, var, gamma, beta);
  check_slots(op, values, half.topology);
  check_factor(op, "residual_upsample", residual_upsample);
  const Tensor bias_copy = check_bias(op, bias, values, grid);
  if (residual) {
    check_cpu(op, "residual", *residual);
    check_dtype(op, "residual", *residual, values.scalar_type(), "values");
    const Ints expected{half.images, grid.out_channels, half.out_h() / residual_upsample,
                        half.out_w() / residual_upsample};
    const auto got = residual->sizes();
    if (residual->dim() != 4 || !std::equal(expected.begin(), expected.end(), got.begin()) ||
        half.out_h() % residual_upsample != 0 || half.out_w() % residual_upsample != 0) {
      fail(op, "residual has shape ", shape_text(*residual), ", expected ", shape_text(expected), " for an output of ",
           half.out_h(), " x ", half.out_w(), " pixels and residual_upsample = ", residual_upsample);
    }
  }
  return in_dtype(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(half, input, values, bias ? bias_copy.const_data_ptr<T>() : nullptr, residual, residual_upsample,
                      norm_terms<T>(half, mean, var, gamma, beta), moments, channels_last);
  });
}

void check_half_gradient(const char* op, const Tensor& grad_output, const Tensor& input, const Half& half) {
  check_cpu(op, "grad_output", grad_output);
  check_dtype(op, "grad_output", grad_output, input.scalar_type(), "input");
  const Ints expected{half.images, half.grid.out_channels, half.out_h(), half.out_w()};
  if (grad_output.dim() != 4 || !std::equal(expected.begin(), expected.end(), grad_output.sizes().begin()))
    fail(op, "grad_output has shape ", shape_text(grad_output), ", expected ", shape_text(expected));
}

std::tuple<Tensor, Tensor, Tensor> norm_act_conv2d_input_grad(
    const Tensor& grad_output, const Tensor& input, const Tensor& values, const MaybeTensor& mean,
    const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, const Tensor& topology,
    const Ints& weight_shape, const Ints& stride, const Ints& padding, const Ints& dilation, double eps,
    double negative_slope, int64_t upsample, int64_t pool, bool batch_stats, bool channels_last, int64_t backend) {
  const char* op = "norm_act_conv2d_input_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_values(op, values, weight_shape, 4);
  const Half half =
      read_half(op, input, grid, topology, stride, padding, dilation, eps, negative_slope, upsample, pool);
  check_dtype(op, "input", input, values.scalar_type(), "values");
  check_norm(op, input, mean, var, gamma, beta);
  check_slots(op, values, half.topology);
  check_half_gradient(op, grad_output, input, half);
  return in_dtype(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Ints affine{0};
    if (gamma) affine = gamma->dim() == 2 ? Ints{half.images, grid.in_channels} : Ints{grid.in_channels};
    Tensor grad_gamma = empty_tensor("gamma's gradient", affine, input);
    Tensor grad_beta = empty_tensor("beta's gradient", affine, input);
    Tensor grad = input_grad<T>(half, grad_output, input, values, norm_terms<T>(half, mean, var, gamma, beta),
                                batch_stats, channels_last, gamma ? grad_gamma.mutable_data_ptr<T>() : nullptr,
                                gamma ? grad_beta.mutable_data_ptr<T>() : nullptr);
    return std::make_tuple(grad, grad_gamma, grad_beta);
  });
}

std::tuple<Tensor, Tensor> norm_act_conv2d_weight_grad(const Tensor& grad_output, const Tensor& input,
                                                       const MaybeTensor& mean, const MaybeTensor& var,
                                                       const MaybeTensor& gamma, const MaybeTensor& beta,
                                                       const Tensor& topology, const Ints& weight_shape,
                                                       const Ints& block, const Ints& stride, const Ints& padding,
                                                       const Ints& dilation, double eps, double negative_slope,
                                                       int64_t upsample, int64_t pool, int64_t backend) {
  const char* op = "norm_act_conv2d_weight_grad";
  check_backend(op, backend);
  const WeightGrid grid = grid_of_block(op, block, weight_shape, 4);
  const Half half =
      read_half(op, input, grid, topology, stride, padding, dilation, eps, negative_slope, upsample, pool);
  check_norm(op, input, mean, var, gamma, beta);
  check_half_gradient(op, grad_output, input, half);
  return in_dtype(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return weight_grad<T>(half, grad_output, input, norm_terms<T>(half, mean, var, gamma, beta));
  });
}

}  // namespace
}  // namespace ddst::cpu

STABLE_TORCH_LIBRARY_IMPL(ddst, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&ddst::cpu::channel_moments));
  m.impl("norm_act_conv2d", TORCH_BOX(&ddst::cpu::norm_act_conv2d));
  m.impl("norm_act_conv2d_input_grad", TORCH_BOX(&ddst::cpu::norm_act_conv2d_input_grad));
  m.impl("norm_act_conv2d_weight_grad", TORCH_BOX(&ddst::cpu::norm_act_conv2d_weight_grad));
}
