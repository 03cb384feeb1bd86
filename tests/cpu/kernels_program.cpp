// The CPU kernels and the glue that plans them, without torch: every form of one kernel set, in both dtypes, against
// sums in float64. Runs where no torch is: on an emulated processor, too.
//   kernels_program NAME [all]   tries the set NAME, fewer problems or all; exit status 1 if anything is wrong
//   kernels_program              says which set the library would choose here
#include <cmath>
#include <cstring>
#include <exception>

#include "cpu/panel_pass.hpp"
#include "problem.hpp"
#include "rows_check.hpp"
#include "watched.hpp"

extern int64_t threads_to_pretend;
extern "C" void guard_heap(int whether);

namespace problem {
namespace {

int failures = 0, checked = 0;

void fail(const Shape& shape, const char* what, int64_t at, double got, double expected, double bound) {
  if (++failures > 20) return;
  std::printf("%s, element %ld: got %.9g, expected %.9g +- %.2g\n  %s\n", what, long(at), got, expected, bound,
              shape.text().c_str());
}

// Each sum within the bound of any order of its additions. NaN is outside.
template <typename T>
void check(const Shape& shape, const char* what, const T* got, const Sums& expected) {
  constexpr double kUnit = sizeof(T) == 4 ? 1.2e-7 : 2.3e-16;
  ++checked;
  for (size_t i = 0; i < expected.value.size(); ++i) {
    const double bound = kUnit * (expected.terms[i] + 4) * expected.magnitude[i];
    if (!(std::abs(got[i] - expected.value[i]) <= bound))
      return fail(shape, what, static_cast<int64_t>(i), got[i], expected.value[i], bound);
  }
}

template <typename T>
void fill(const Memory<T>& memory, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<T>(normal(random));
}

// The channels of block index i of an axis.
int64_t block_channels(int64_t block, int64_t channels, int64_t i) { return std::min(block, channels - i * block); }

template <typename T>
class Case {
 public:
  Case(const Kernels<T>& kernels, const Shape& shape, uint64_t seed)
      : kernels_(kernels),
        s_(shape),
        g_(shape.g),
        random_(seed),
        blocks_(shape, random_),
        input_(g_.images * g_.in_h * g_.in_w * g_.in_channels),
        output_(g_.images * g_.out_h * g_.out_w * g_.out_channels),
        values_(blocks_.slots * s_.block_out * s_.block_in),
        bias_(g_.out_channels) {
    fill(input_, random_);
    fill(output_, random_);
    fill(bias_, random_);
    std::normal_distribution<double> normal;
    for (int64_t slot = 0; slot < blocks_.slots; ++slot) {  // free slots stay NaN, as do lanes without a channel
      if (!blocks_.used[slot]) continue;
      for_weights(slot, [&](int64_t at, int64_t, int64_t) { values_[at] = static_cast<T>(normal(random_)); });
      for (int64_t i = slot * block_size(); i < (slot + 1) * block_size(); ++i)
        if (values_[i] != values_[i]) values_[i] = T(0);
    }
  }

  void run() {
    threads_to_pretend = s_.threads;
    forward();
    input_grad();
    weight_grad();
    if (blocks_.rows * blocks_.cols * blocks_.taps * block_size() < 20000) block_scores();
  }

 private:
  int64_t block_size() const { return s_.block_out * s_.block_in; }

  // f(index in values, output channel, input channel) of a slot.
  template <typename F>
  void for_weights(int64_t slot, const F& f) const {
    const int64_t row = blocks_.block_row[slot], col = blocks_.block_col[slot];
    for (int64_t o = 0; o < block_channels(s_.block_out, g_.out_channels, row); ++o)
      for (int64_t i = 0; i < block_channels(s_.block_in, g_.in_channels, col); ++i)
        f(slot * block_size() + o * s_.block_in + i, row * s_.block_out + o, col * s_.block_in + i);
  }

  void forward() {
    Memory<T> out(output_.size());
    const ImageShape from{g_.images, g_.in_channels, g_.in_h, g_.in_w},
        to{g_.images, g_.out_channels, g_.out_h, g_.out_w};
    const AxisPlan rows = forward_axis(g_.out_h, g_.in_h, g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h);
    const AxisPlan cols = forward_axis(g_.out_w, g_.in_w, g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w);
    const BlockLists lists{blocks_.rows,
                           blocks_.nnz(),
                           blocks_.row_ptr.data(),
                           blocks_.row_order.data(),
                           blocks_.block_col.data(),
                           blocks_.block_tap.data()};
    const T* const bias = s_.bias ? bias_.get() : nullptr;
    const GatherPass<T> pass(kernels_, {from, to, g_.kernel_w, s_.block_out, s_.block_in}, lists, rows, cols, true,
                             values_.get(), bias, 0, false);
    pass.run(input_.get(), out.get());
    Sums expected(out.size());
    for (int64_t i = 0; s_.bias && i < out.size(); ++i) expected.add(i, bias_[i % g_.out_channels]);
    for (int32_t slot : blocks_.row_order)
      for_pixels(g_, blocks_.block_tap[slot], [&](int64_t in, int64_t at) {
        for_weights(slot, [&](int64_t w, int64_t o, int64_t i) {
          expected.add(at * g_.out_channels + o, static_cast<double>(values_[w]) * input_[in * g_.in_channels + i]);
        });
      });
    check(s_, "forward", out.get(), expected);
    pointwise("forward by panels", lists, true, bias, input_.get(), expected);
  }

  void input_grad() {
    Memory<T> out(input_.size());
    const ImageShape from{g_.images, g_.out_channels, g_.out_h, g_.out_w},
        to{g_.images, g_.in_channels, g_.in_h, g_.in_w};
    const AxisPlan rows = input_grad_axis(g_.in_h, g_.out_h, g_.kernel_h, g_.stride_h, g_.pad_h, g_.dilation_h);
    const AxisPlan cols = input_grad_axis(g_.in_w, g_.out_w, g_.kernel_w, g_.stride_w, g_.pad_w, g_.dilation_w);
    const BlockLists lists{blocks_.cols,
                           blocks_.nnz(),
                           blocks_.col_ptr.data(),
                           blocks_.col_order.data(),
                           blocks_.block_row.data(),
                           blocks_.block_tap.data()};
    const GatherPass<T> pass(kernels_, {from, to, g_.kernel_w, s_.block_in, s_.block_out}, lists, rows, cols, false,
                             values_.get(), nullptr, 0, false);
    pass.run(output_.get(), out.get());
    Sums expected(out.size());
    for (int32_t slot : blocks_.row_order)
      for_pixels(g_, blocks_.block_tap[slot], [&](int64_t in, int64_t at) {
        for_weights(slot, [&](int64_t w, int64_t o, int64_t i) {
          expected.add(in * g_.in_channels + i, static_cast<double>(values_[w]) * output_[at * g_.out_channels + o]);
        });
      });
    check(s_, "input gradient", out.get(), expected);
    pointwise("input gradient by panels", lists, false, nullptr, output_.get(), expected);
  }

  // Where pixels know no neighbours: the same by panels of pixels, and of the first pixel alone.
  void pointwise(const char* what, const BlockLists& lists, bool forward, const T* bias, const T* source,
                 const Sums& expected) {
    if (g_.kernel_h * g_.kernel_w * g_.stride_h * g_.stride_w != 1 || g_.pad_h + g_.pad_w != 0) return;
    const int64_t pixels = g_.images * g_.in_h * g_.in_w, from = forward ? g_.in_channels : g_.out_channels;
    const int64_t to = forward ? g_.out_channels : g_.in_channels;
    const int64_t block = forward ? s_.block_out : s_.block_in, block_k = forward ? s_.block_in : s_.block_out;
    Memory<T> out(pixels * to), first(to);
    panel_pass<T>(kernels_, {{pixels, from, 1, 1}, {pixels, to, 1, 1}, 1, block, block_k}, lists, forward,
                  values_.get(), bias, source, out.get());
    check(s_, what, out.get(), expected);
    kernels_.block_vector(
        {values_.get(), source, first.get(), from, to, lists.ptr, lists.ids, lists.k_block, block, block_k, forward}, 0,
        lists.out_blocks);
    Sums of_first(to);
    for (int64_t c = 0; c < to; ++c) {
      of_first.value[c] = expected.value[c] - (bias != nullptr ? bias[c] : 0);
      of_first.magnitude[c] = expected.magnitude[c];
      of_first.terms[c] = expected.terms[c];
    }
    check(s_, "block_vector", first.get(), of_first);
  }

  // What the gradient of one block is, added at first + o * block_in + i.
  void add_gradient(Sums& sums, int64_t first, int64_t row, int64_t col, int64_t tap) const {
    for_pixels(g_, tap, [&](int64_t in, int64_t at) {
      for (int64_t o = 0; o < block_channels(s_.block_out, g_.out_channels, row); ++o)
        for (int64_t i = 0; i < block_channels(s_.block_in, g_.in_channels, col); ++i)
          sums.add(first + o * s_.block_in + i,
                   static_cast<double>(output_[at * g_.out_channels + row * s_.block_out + o]) *
                       input_[in * g_.in_channels + col * s_.block_in + i]);
    });
  }

  void weight_grad() {
    if (blocks_.nnz() == 0) return;
    Memory<T> out(values_.size());
    WeightGradPlan<T> plan = plan_weight_grad(kernels_, g_, s_.block_out, s_.block_in, blocks_.slots, blocks_.nnz(),
                                              blocks_.row_order.data(), blocks_.block_row.data(),
                                              blocks_.block_col.data(), blocks_.block_tap.data());
    weight_grad_pass<T>(kernels_, plan, input_.get(), output_.get(), out.get());
    Sums expected(out.size());
    for (int64_t slot = 0; slot < blocks_.slots; ++slot) {
      if (blocks_.used[slot]) {
        add_gradient(expected, slot * block_size(), blocks_.block_row[slot], blocks_.block_col[slot],
                     blocks_.block_tap[slot]);
        continue;
      }
      for (int64_t i = slot * block_size(); i < (slot + 1) * block_size(); ++i) {  // not the kernel's to write
        if (out[i] == out[i]) fail(s_, "weight gradient of a free slot", i, out[i], NAN, 0);
        out[i] = T(0);
      }
    }
    check(s_, "weight gradient", out.get(), expected);
  }

  void block_scores() {
    const ddst::WeightGrid grid("kernels_program", {g_.out_channels, g_.in_channels, g_.kernel_h, g_.kernel_w}, 4,
                                s_.block_out, s_.block_in);
    const int64_t count = grid.rows * grid.cols * grid.taps;
    Memory<T> out(count);
    block_scores_pass<T>(kernels_, g_, grid, input_.get(), output_.get(), out.get());
    Sums expected(count);  // of a norm: what its entries' errors and the sum of squares can amount to
    for (int64_t block = 0; block < count; ++block) {
      Sums gradient(block_size());
      add_gradient(gradient, 0, block / (grid.cols * grid.taps), block / grid.taps % grid.cols, block % grid.taps);
      double squares = 0, errors = 0;
      for (int64_t i = 0; i < block_size(); ++i) {
        squares += gradient.value[i] * gradient.value[i];
        errors += std::pow((gradient.terms[i] + 4) * gradient.magnitude[i], 2);
      }
      expected.value[block] = std::sqrt(squares);
      expected.magnitude[block] = std::sqrt(errors) + std::sqrt(squares);
      expected.terms[block] = 1;
    }
    check(s_, "block scores", out.get(), expected);
  }

  const Kernels<T>& kernels_;
  const Shape s_;
  const ConvGeometry g_;
  std::mt19937_64 random_;
  const Blocks blocks_;
  const Memory<T> input_, output_, values_, bias_;
};

Shape conv(int64_t images, int64_t h, int64_t w, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
           int64_t dilation, int64_t block_out, int64_t block_in, double density, int64_t threads = 1) {
  Shape s{{images, h, w, in, 0, 0, out, kernel, kernel, stride, stride, pad, pad, dilation, dilation},
          block_out,
          block_in,
          density,
          threads != 2,
          threads};
  s.g.out_h = out_size(h, kernel, stride, pad, dilation);
  s.g.out_w = out_size(w, kernel, stride, pad, dilation);
  return s;
}

// What each form of the kernels is for, and the sizes at which the glue changes from one to another.
std::vector<Shape> chosen_shapes(bool all) {
  std::vector<Shape> shapes;
  const int64_t sides[][2] = {{16, 16}, {8, 8}, {4, 4},  {1, 1}, {2, 2},  {16, 1}, {16, 4},  {1, 16},
                              {4, 16},  {8, 1}, {32, 1}, {4, 1}, {2, 16}, {3, 5},  {12, 20}, {7, 8}};
  for (const auto& [out, in] : sides) {
    shapes.push_back(conv(2, 7, 9, 2 * in + 3, 2 * out + 1, 3, 1, 1, 1, out, in, 0.4));     // cut blocks, few pixels
    shapes.push_back(conv(2, 17, 19, in + in / 2 + 1, out + 2, 3, 1, 1, 1, out, in, 0.3));  // over 512 pixels
    shapes.push_back(conv(3, 9, 8, 2 * in, 2 * out, 4, 2, 1, 1, out, in, 0.3, 2));          // stride
    shapes.push_back(conv(70, 1, 1, 3 * in, 3 * out, 1, 1, 0, 1, out, in, 0.5));            // linear
    shapes.push_back(conv(2, 11, 12, in, 2 * out, 3, 1, 2, 2, out, in, 0.5, 3));            // dilation
  }
  // Whole cache lines of channels: read in place.
  shapes.push_back(conv(5, 6, 6, 32, 48, 3, 1, 1, 1, 16, 16, 0.3, 2));
  shapes.push_back(conv(8, 5, 5, 64, 32, 3, 1, 1, 1, 16, 3, 0.3));
  shapes.push_back(conv(1, 40, 40, 20, 24, 5, 1, 2, 1, 8, 4, 0.2, 2));
  shapes.push_back(conv(1, 6, 6, 1024, 16, 1, 1, 0, 1, 16, 16, 0.1));  // pixels 4 KB apart
  for (const auto& [out, in] : sides) {
    if (!all) break;
    const double density = 0.6 / static_cast<double>(16 / std::min<int64_t>(16, in));
    shapes.push_back(conv(4, 64, 64, 16, 64, 1, 1, 0, 1, out, in, density));                  // 4 MB: past the caches
    shapes.push_back(conv(6, 12, 12, 4 * in + 1, 4 * out + 3, 3, 1, 1, 1, out, in, 0.2, 3));  // several tasks
  }
  return shapes;
}

Shape random_shape(std::mt19937_64& random) {
  const auto pick = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  const int64_t sizes[] = {1, 2, 3, 4, 5, 8, 11, 16, 24, 32};
  const int64_t out = sizes[pick(0, 9)], in = sizes[pick(0, 9)];
  Shape s = conv(pick(1, 5), pick(1, 20), pick(1, 20), pick(1, 2 * in + 4), pick(1, 2 * out + 4), 1, 1, 0, 1, out, in,
                 static_cast<double>(pick(1, 6)) / 6, pick(1, 3));
  ConvGeometry& g = s.g;
  do {
    g.kernel_h = pick(1, 4);
    g.kernel_w = pick(1, 4);
    g.stride_h = pick(1, 3);
    g.stride_w = pick(1, 3);
    g.pad_h = pick(0, 3);
    g.pad_w = pick(0, 3);
    g.dilation_h = pick(1, 2);
    g.dilation_w = pick(1, 2);
    g.out_h = out_size(g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
    g.out_w = out_size(g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  } while (g.out_h < 1 || g.out_w < 1);
  return s;
}

template <typename T>
void check_transpose(const Kernels<T>& kernels) {
  const Shape none{};
  for (int64_t rows = 1; rows <= 19; ++rows)
    for (int64_t cols = 1; cols <= 19; ++cols) {
      const int64_t from = cols + rows % 3, to = rows + cols % 3;
      Memory<T> src((rows - 1) * from + cols), dst((cols - 1) * to + rows);
      for (int64_t i = 0; i < src.size(); ++i) src[i] = static_cast<T>(i);
      kernels.transpose(src.get(), rows, cols, from, dst.get(), to);
      ++checked;
      for (int64_t i = 0; i < dst.size(); ++i) {
        const int64_t r = i % to, c = i / to;
        const T expected = r < rows ? src[r * from + c] : T(NAN);  // between the lines nothing is written
        if (std::memcmp(&dst[i], &expected, sizeof(T)) != 0 && (r < rows || dst[i] == dst[i]))
          return fail(none, "transpose", i, dst[i], expected, 0);
      }
    }
}

template <typename T>
void check_rows(const Kernels<T>& kernels) {
  std::mt19937_64 random(3);
  for (int64_t channels : {1, 3, 8, 15, 16, 33, 64, 130})
    for (int variant = 0; variant < 12; ++variant) {
      const T slopes[] = {T(0), T(0.25), T(1)};
      Shape shape = conv(1, 1, 5, channels, channels, 1, 1, 0, 1, 1, 1, 0);
      RowsCase<T>(kernels.rows, 5, channels, variant % 2 == 0, slopes[variant / 2 % 3], variant >= 6, random)
          .run([&](const char* what, const T* got, const Sums& expected) { check(shape, what, got, expected); });
    }
}

template <typename T>
bool check_set(const char* dtype, const Kernels<T>& kernels, bool all) {
  const Kernels<T> watched = Watched<T>::of(kernels);
  check_transpose(watched);
  check_rows(watched);
  std::vector<Shape> shapes = chosen_shapes(all);
  std::mt19937_64 random(7);
  for (int i = 0; i < (all ? 150 : 30); ++i) shapes.push_back(random_shape(random));
  for (size_t i = 0; i < shapes.size(); ++i) Case<T>(watched, shapes[i], i).run();
  bool complete = true;
  for (const std::string& form : Watched<T>::forms(kernels)) {
    if (Watched<T>::seen.count(form) != 0 || (!all && form.find("past the caches") != std::string::npos)) continue;
    std::printf("%s: no problem ran the form '%s'\n", dtype, form.c_str());
    complete = false;
  }
  return complete;
}

int run(const char* name, bool all) {
  const ddst::cpu::KernelSet* set = nullptr;
  if (std::strcmp(name, "portable") == 0) set = &kernels_portable();
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0) set = &kernels_avx2();
  if (std::strcmp(name, "avx512") == 0) set = &kernels_avx512();
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon") == 0) set = &kernels_neon();
#endif
  if (set == nullptr) {
    std::printf("no kernel set %s in this program\n", name);
    return 2;
  }
  guard_heap(1);
  const bool complete = check_set("float", set->f32, all) & check_set("double", set->f64, all);
  guard_heap(0);
  std::printf("%s: %d results checked, %d wrong\n", name, checked, failures);
  return complete && failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace problem

int main(int argc, char** argv) {
  try {
    if (argc > 1) return problem::run(argv[1], argc > 2 && std::strcmp(argv[2], "all") == 0);
    std::printf("code %d\n", ddst::cpu::active_kernels().code);
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
