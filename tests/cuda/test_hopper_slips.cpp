// Slips planted in the kernels of hopper_samples.hpp are each found, whatever the order of threads and copies; so is
// the loss of each of their waits and fences.
#include "hopper_faults.hpp"
#include "hopper_samples.hpp"

using namespace ddst;
using namespace ddst::test;

namespace {

struct Planted {
  Slip slip;
  const char* name;
  std::vector<const char*> texts;  // one of them is said: which, may depend on the order
};

const Planted kRing[] = {
    {Slip::no_full_wait, "no wait for copies", {"uninitialised", "bulk copy in flight"}},
    {Slip::wrong_parity, "wrong parity", {"uninitialised", "bulk copy in flight", "completes while"}},
    {Slip::one_lane_waits, "one lane waits", {"bulk copy in flight"}},
    {Slip::one_warp_waits, "one warp waits", {"uninitialised", "bulk copy in flight"}},
    {Slip::no_empty_wait, "no wait for consumers", {"more arrivals than", "write after write", "write after read"}},
    {Slip::no_empty_arrival, "consumers keep a stage", {"deadlock"}},
    {Slip::early_arrival, "early arrival", {"wgmma in flight", "bulk copy in flight"}},
    {Slip::lane_arrives_for_warp, "a lane arrives for its warp", {"write after read"}},
    {Slip::forgets_other_cta, "the other CTA is not told", {"deadlock"}},
    {Slip::expects_too_much, "16 bytes too many expected", {"16 bytes missing"}},
    {Slip::expects_too_little, "16 bytes too few expected", {"16 bytes more than", "did not wait for its bytes"}},
    {Slip::expects_nothing, "no bytes expected", {"bytes more than", "did not wait for its bytes", "copy in flight"}},
    {Slip::no_init, "no barrier", {"uninitialised barrier"}},
    {Slip::no_init_fence, "no fence of barriers", {"fence_barrier_init", "nothing orders before"}},
    {Slip::no_cluster_sync, "no cluster barrier", {"nothing orders before", "uninitialised barrier"}},
    {Slip::init_of_too_few, "too few arrivals asked for", {"copy in flight", "more arrivals than", "write after"}},
    {Slip::init_of_too_many, "too many arrivals asked for", {"1 arrivals and 0 bytes missing"}},
    {Slip::leaves_early, "a CTA leaves early", {"may end before", "has ended", "ends while"}},
    {Slip::wrong_rank, "wrong rank", {"deadlock", "more arrivals than", "bytes more than"}},
    {Slip::no_such_cta, "no such CTA", {"to CTA 2 of 2"}},
    {Slip::stray_box, "stray box", {"shared access out of bounds"}},
    {Slip::misaligned_box, "misaligned box", {"no multiple of 256"}},
    {Slip::overlapping_box, "overlapping box", {"write after write", "write after read"}},
    {Slip::no_product_wait, "no wait for products", {"wgmma in flight"}},
    {Slip::no_last_product_wait, "no wait for the last", {"ends with a wgmma in flight"}},
    {Slip::product_wait_of_one_less, "wait that leaves one", {"wgmma in flight"}},
    {Slip::no_product_fence, "no fence of registers", {"wgmma without wgmma_fence"}},
    {Slip::product_without_commit, "a warp does not commit", {"another number of wgmma_commit"}},
    {Slip::operand_changed, "operand changed", {"operand registers changed"}},
    {Slip::operand_after_fence, "operand after the fence", {"written after wgmma_fence"}},
    {Slip::sum_touched, "sum touched", {"accumulators touched"}},
    {Slip::warp_misses_product, "a warp misses a product", {"warpgroup diverged"}},
    {Slip::other_product, "a warp is at another product", {"warpgroup diverged"}},
    {Slip::other_descriptor, "another descriptor", {"matrix descriptor differs"}},
    {Slip::barrier_as_data, "barrier read as data", {"read of an mbarrier"}},
    {Slip::write_to_copy, "a copy over a write", {"without fence_async_shared", "write after"}},
};
const Planted kRewrite[] = {
    {Slip::no_async_fence, "no fence before a product", {"without fence_async_shared"}},
    {Slip::fence_after_barrier, "fence after the barrier", {"without fence_async_shared"}},
    {Slip::no_barrier_before, "no barrier before a product", {"read after write", "uninitialised"}},
    {Slip::barrier_of_too_few, "barrier of too few", {"barrier 1 of 96 threads"}},
};

std::vector<emu::Options> orders() {
  std::vector<emu::Options> result;
  for (const std::uint64_t seed : {0, 1, 2, 3})
    for (const bool delay : {true, false}) {
      result.emplace_back();
      result.back().seed = seed, result.back().delay_copies = delay;
    }
  return result;
}

void expect_found(const Planted& planted, const std::function<void(const emu::Options&)>& run) {
  for (const auto& options : orders()) {
    const std::string name = std::string(planted.name) + ", seed " + std::to_string(options.seed) +
                             (options.delay_copies ? ", late: " : ", early: ");
    try {
      run(options);
      expect(false, name + "not found");
    } catch (const emu::Failure& failure) {
      const std::string said = failure.what();
      bool known = false;
      for (const char* text : planted.texts) known = known || said.find(text) != std::string::npos;
      expect(known, name + said);
      expect(said.find("hopper_samples.hpp:") != std::string::npos && said.find(", thread ") != std::string::npos,
             name + "names no place: " + said);
      if (options.seed == 0 && options.delay_copies) std::printf("  %-28s %s\n", planted.name, said.c_str());
    }
  }
}

// Nobody misses the wait for the product before the last one and the last two times that lanes wait for each other:
// those stages are not filled again, and the last wait is for both products. Nor the producer's first wait for each
// stage, whose barrier has not been used yet.
void test_each_wait(const SampleProblem& problem) {
  for (const auto& options : orders()) {
    if (options.seed > 1) continue;
    std::string turns, names;
    for (const auto& place : unnoticed([&](const emu::Options& o) { return problem.ring(o); }, options, true))
      turns += place.substr(std::min(place.find('#'), place.size())) + ' ', names += ' ' + place;
    expect(turns == "#3 #3 #4 #0 #1 ", "waits of the ring that nobody misses:" + names);
    const auto rewrite = unnoticed([&](const emu::Options& o) { return problem.rewrite(o); }, options, true);
    expect(rewrite.empty(), "waits that nobody misses: " + (rewrite.empty() ? "" : rewrite[0]));
  }
  emu::Options options;
  options.list_waits = true;
  expect(problem.ring(options).wait_places.size() == 8, "waits and fences of the ring");
  expect(problem.rewrite(options).wait_places.size() == 4, "waits and fences of the rewritten operand");
}

// Nothing tells of a read before the wait, but what is read is not a number.
void test_early_read(const SampleProblem& problem) {
  for (const auto& options : orders())
    expect_caught("sum read early", "wrong result", [&] { problem.ring(options, Slip::sum_read_early); });
}

void test_barriers() {
  const auto launch = [](int arrivals, auto kernel) {
    return [=] {
      emu::Block().launch({1, 1, 1}, 64, 16, [=] {
        const auto b = dev::dynamic_shared<dev::Barrier>();
        if (dev::thread_index() == 0) dev::barrier_init(b, arrivals);
        dev::sync_threads();
        kernel(dev::thread_index(), b);
      });
    };
  };
  launch(1, [](int t, auto b) { t < 32 ? dev::barrier_wait(b, 0) : t == 32 ? dev::barrier_arrive(b) : void(); })();
  expect_caught("two phases in a row", "may still wait for the one before", launch(1, [](int t, auto b) {
                  if (t < 32) dev::barrier_wait(b, 0);
                  if (t == 32) dev::barrier_arrive(b), dev::barrier_arrive(b);
                }));
  expect_caught("a phase that never comes", "deadlock: threads 0...31 at barrier_wait", launch(2, [](int t, auto b) {
                  if (t < 32) dev::barrier_wait(b, 0);
                  if (t == 32) dev::barrier_arrive(b);
                }));
  expect_caught("no arrivals", "barrier_init with 0 arrivals", launch(0, [](int, auto) {}));
  expect_caught("initialised twice", "initialised twice", launch(1, [](int t, auto b) {
                  if (t == 5) dev::barrier_init(b, 1);
                }));
  expect_caught("parity", "for parity 2", launch(1, [](int, auto b) { dev::barrier_wait(b, 2); }));
  expect_caught("write to a barrier", "write over an mbarrier", launch(1, [](int t, auto b) {
                  if (t == 0) dev::store(b.template as<int>(), 0);
                }));
  expect_caught("phase without end", "bytes missing", launch(1, [](int t, auto b) {
                  if (t == 0) dev::barrier_arrive_expect(b, 16);
                }));
}

void test_registers() {
  const auto launch = [](int threads, auto kernel) {
    return [=] { emu::Block().launch({1, 1, 1}, threads, 0, kernel); };
  };
  launch(256, [] { dev::thread_index() < 128 ? dev::give_registers<24>() : dev::take_registers<240>(); })();
  expect_caught("registers", "registers are asked for", launch(384, [] { dev::take_registers<176>(); }));
  expect_caught("registers of a warp", "the warpgroup's warps ask for",
                launch(256, [] { dev::thread_index() < 32 ? dev::give_registers<24>() : dev::give_registers<32>(); }));
}

// Maps that the driver would refuse, and copies that fit no map.
void test_maps() {
  emu::Buffer buffer("x", 4096, emu::Buffer::Role::input);
  const auto copy = [&](auto change, auto start) {
    return [=, &buffer] {
      auto map = cuda::patch_map(buffer.host<char>(), 2, 2, 4, 4, 16, {16, 4, 4, 1}, 32);
      change(map);
      emu::Block().launch({1, 1, 1}, 32, 1024 + 8, [&] {
        const auto b = dev::shared_ptr<dev::Barrier>(1024);
        if (!dev::elect_one()) return;
        dev::barrier_init(b, 1);
        dev::fence_barrier_init();
        dev::barrier_arrive_expect(b, 512);
        start(dev::dynamic_shared<Bf>(), map, b);
        dev::barrier_wait(b, 0);
      });
    };
  };
  const auto box = [](auto to, auto& map, auto b) { dev::copy_box(to, &map, {0, 0, 0, 0}, b); };
  const auto column = [](auto to, auto& map, auto b) { dev::copy_im2col(to, &map, {0, 0, 0, 0}, {0, 0}, b); };
  copy([](auto&) {}, box)();
  expect_caught("stride", "strides[1]", copy([](auto& m) { m.strides[1] = 24; }, box));
  expect_caught("box", "box[1]", copy([](auto& m) { m.box[1] = 257; }, box));
  expect_caught("wide box", "swizzle", copy([](auto& m) { m.box[0] = 32; }, box));
  expect_caught("narrow box", "pads them", copy([](auto& m) { m.box[0] = 8; }, box));
  expect_caught("mode", "copy_im2col of a map in tile mode", copy([](auto&) {}, column));
  expect_caught("dimensions", "copy_box of 4 dimensions of a map with 3", copy([](auto& m) { m.rank = 3; }, box));
  expect_caught("elsewhere", "memory that is not there",
                copy([](auto& m) { m.base = reinterpret_cast<void*>(4096); }, box));
  expect_caught(
      "beyond the allocation", "out of bounds",
      copy([](auto& m) { m.sizes[3] = 9; }, [](auto to, auto& m, auto b) { dev::copy_box(to, &m, {0, 0, 0, 8}, b); }));
  const auto as_columns = [](auto& m) {
    m = cuda::column_map(m.base, 2, 2, 4, 4, 16, {3, 3}, {1, 1}, {1, 1}, 16, 16, 32);
  };
  copy(as_columns, [](auto to, auto& map, auto b) { dev::copy_im2col(to, &map, {0, -1, -1, 0}, {2, 2}, b); })();
  expect_caught("first pixel", "outside of its bounding box", copy(as_columns, [](auto to, auto& map, auto b) {
                  dev::copy_im2col(to, &map, {0, 3, 0, 0}, {0, 0}, b);
                }));
  expect_caught("offset", "im2col offset -1", copy(as_columns, [](auto to, auto& map, auto b) {
                  dev::copy_im2col(to, &map, {0, 0, 0, 0}, {-1, 0}, b);
                }));
  expect_caught("tile mode of columns", "copy_box of an im2col map", copy(as_columns, box));
}

}  // namespace

int main() {
  const SampleProblem problem;
  for (const auto& options : orders()) {
    problem.ring(options);
    problem.rewrite(options);
  }
  for (const auto& planted : kRing)
    expect_found(planted, [&](const emu::Options& options) { problem.ring(options, planted.slip); });
  for (const auto& planted : kRewrite)
    expect_found(planted, [&](const emu::Options& options) { problem.rewrite(options, planted.slip); });
  test_early_read(problem);
  test_each_wait(problem);
  test_barriers();
  test_registers();
  test_maps();
  return finish("hopper slips");
}
