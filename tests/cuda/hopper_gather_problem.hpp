// The gather kernel for sm_90a on random problems: the lists that it walks, as hopper_gather_geometry.hpp defines them,
// and its runs on the emulator.
#pragma once
#include <algorithm>
#include <numeric>

#include "gather_random.hpp"
#include "hopper_gather.cuh"

namespace ddst::test {

struct HopperLists {
  std::vector<int> records, order;
  long blocks = 0;  // listed
};

template <class T>
HopperLists hopper_lists(const GatherProblem<T>& problem, const HopperGatherGeometry& g, int width) {
  const auto& p = problem.p;
  const int side = 1 << g.log_channels_per_block, granules = side / kSlice, per_group = kHopperChannels / side;
  const int together = std::max(1, width * kSlice / side);  // blocks that are listed all or not at all
  const int nowhere = int(problem.values.size()) / (p.block_out * p.block_in) * p.block_out;
  HopperLists lists;
  std::vector<int> weight;
  for (int phase = 0; phase < g.phases_y * g.phases_x; ++phase)
    for (int group = 0; group < g.groups; ++group) {
      weight.push_back(0);
      for (int in_block = 0; in_block < g.in_blocks; ++in_block) {
        std::vector<int> record(std::size_t(g.record_ints), 0);
        int entry = kRecordHeader;
        for (int tap = 0; tap < problem.taps; ++tap) {
          const int kh = tap / p.kernel_width, kw = tap % p.kernel_width;
          if (kh % g.phases_y * g.phases_x + kw % g.phases_x != phase) continue;
          const auto id = [&](int n) {
            const int out = group * per_group + n, row = problem.input_gradient ? in_block : out;
            const int col = problem.input_gradient ? out : in_block;
            return row < problem.rows && col < problem.cols
                       ? problem.ids[std::size_t((row * problem.cols + col) * problem.taps + tap)]
                       : -1;
          };
          int mask = 0;
          for (int n = 0; n < per_group; ++n) {
            bool any = false;
            for (int i = 0; i < together; ++i) any = any || id(n / together * together + i) >= 0;
            if (!any) continue;
            mask |= ((1 << granules) - 1) << n * granules;
            record[std::size_t(kRecordHeader + g.padded_taps + record[0]++)] =
                id(n) < 0 ? nowhere : id(n) * p.block_out;
          }
          if (mask) record[std::size_t(entry++)] = tap | mask << 16;
        }
        weight.back() += record[0], lists.blocks += record[0];
        lists.records.insert(lists.records.end(), record.begin(), record.end());
      }
    }
  lists.order.resize(weight.size());
  std::iota(lists.order.begin(), lists.order.end(), 0);
  std::stable_sort(lists.order.begin(), lists.order.end(), [&](int a, int b) { return weight[a] > weight[b]; });
  return lists;
}

struct HopperRun {
  emu::Stats stats;
  HopperGatherGeometry g;
  HopperLists lists;
};

// Runs the kernel with `clusters` clusters at most; with `compare`, every output must be written once and be right.
template <class Traits>
HopperRun run_hopper(const GatherProblem<typename Traits::T>& problem, const emu::Options& options,
                     const std::string& name, int clusters = 3, bool compare = true) {
  using T = typename Traits::T;
  HopperRun run;
  typename Traits::Params p{};
  const std::string why = hopper_gather_geometry(problem.p, Traits::kTransposed, Traits::kForm, kSharedLimit, p.g);
  if (!why.empty()) throw emu::Failure(name + ": refused, " + why);
  run.g = p.g, run.lists = hopper_lists(problem, p.g, Traits::kWidth);
  const std::int64_t slots = std::int64_t(problem.values.size()) / p.g.block_elements;
  auto packed = problem.values;
  if (slots == 0) packed.resize(std::size_t(p.g.block_elements));  // no tensor map is of nothing
  auto input = input_buffer("input", problem.input), values = input_buffer("values", packed);
  auto records = input_buffer("records", run.lists.records), order = input_buffer("order", run.lists.order);
  auto bias = input_buffer("bias", problem.bias), residual = input_buffer("residual", problem.residual);
  emu::Buffer output("output", std::size_t(problem.written_pixels) * problem.written_channels * sizeof(T),
                     emu::Buffer::Role::output_once);
  p.input = hopper_input_map(p.g, input.template host<T>());
  p.values = hopper_weights_map(p.g, values.template host<T>(), std::max<std::int64_t>(slots, 1), Traits::kTransposed);
  p.records = dev::global_ptr<const int>(records), p.order = dev::global_ptr<const int>(order);
  p.output = dev::global_ptr<T>(output);
  if (!problem.bias.empty()) p.bias = dev::global_ptr<const T>(bias);
  if (!problem.residual.empty()) p.residual = dev::global_ptr<const T>(residual);
  p.relu = problem.relu;
  p.clusters = std::min(clusters, p.g.items);
  static emu::Block block;  // keeps the stacks of its fibers
  block.options = options;
  block.stats = {};
  block.launch(
      {p.clusters * Traits::kCluster, 1, 1}, kHopperThreads, std::size_t(p.g.bytes), [&] { hopper_gather<Traits>(p); },
      Traits::kCluster);
  run.stats = block.stats;
  if (compare) {
    expect(output.fully_written(), name + ": output not fully written");
    const double error = problem.error(output.template host<T>());
    expect(error <= 1, name + ": error " + std::to_string(error));
  }
  return run;
}

// Problems that the form refuses, which stages of 32 channels and im2col do, are drawn anew.
template <class T, bool kTransposed, int kWidth, int kCluster, int kDepth = 1, bool kIm2col = false>
void test_random_hopper(const char* name, int count, int most_channels) {
  using Traits = HopperGatherTraits<T, kTransposed, kWidth, kCluster, HopperPlain, kDepth, kIm2col>;
  Rng rng(kTransposed * 4 + kWidth + kCluster * 16);
  const double start = seconds();
  long products = 0, items = 0, refused = 0;
  for (int i = 0; i < count; ++i) {
    const double density = pick(rng, 0, 8) == 0 ? pick(rng, 0, 1) : pick(rng, 1, 6) / 10.0;
    const GatherProblem<T> problem(random_problem(rng, 8, false, most_channels), kTransposed, density, rng() % 2, rng);
    HopperGatherGeometry g;
    if ((kDepth > 1 || kIm2col) && refused < 10 * count &&
        !hopper_gather_geometry(problem.p, kTransposed, Traits::kForm, kSharedLimit, g).empty()) {
      ++refused, --i;
      continue;
    }
    emu::Options options;
    options.seed = rng(), options.delay_copies = rng() % 2;
    const auto run = run_hopper<Traits>(problem, options, std::string(name) + " " + std::to_string(i), pick(rng, 1, 3));
    products += run.stats.wgmma[kWidth * 2], items += run.g.items;
  }
  std::printf("%s: %d random problems, %ld items, %ld products, %.1f s\n", name, count, items, products,
              seconds() - start);
}

}  // namespace ddst::test
