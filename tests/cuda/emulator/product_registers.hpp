// The registers that a thread gives to asynchronous products (wgmma): not to be touched until a wait covers them.
//
// Accumulators are filled with a pattern while a product is in flight, and receive their sums at the wait; operands are
// compared with what they were. wgmma_fence makes writes of registers visible to products: what was written later, but
// for the results of products, is not seen.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace ddst::emu {

class ProductRegisters {
 public:
  // Empty: all is well. Otherwise what is wrong.
  using Complaint = const char*;

  void reset() {
    sums_.clear(), operands_.clear(), known_.clear(), written_.clear();
    fenced_ = false;
    committed_ = 0;
  }
  bool idle() const { return sums_.empty() && operands_.empty(); }
  int group() const { return committed_ + 1; }
  int committed() const { return committed_; }

  void fence() {
    fenced_ = true;
    written_.clear();
    for (Known& known : known_) known.take();
  }
  void commit() { ++committed_; }
  // ldmatrix and the like write registers from `at` on.
  void wrote(const void* at) {
    if (fenced_) written_.push_back(at);
  }

  // A product starts. `sum` receives the accumulators' values.
  Complaint start(float* d, int count, const std::uint32_t* a, std::vector<float>*& sum) {
    if (!fenced_) return "wgmma without wgmma_fence before";
    sum = nullptr;
    for (Sum& other : sums_) {
      if (other.d + other.values.size() <= d || d + count <= other.d) continue;
      if (other.d != d || int(other.values.size()) != count)
        return "wgmma into accumulators that a product of another shape is writing";
      if (!other.untouched()) return "accumulators touched while a wgmma is in flight";
      other.group = group();
      sum = &other.values;
    }
    if (!sum) {
      if (const Complaint complaint = seen(reinterpret_cast<const std::uint32_t*>(d), count)) return complaint;
      sums_.push_back({d, std::vector<float>(d, d + count), group()});
      sums_.back().poison();
      sum = &sums_.back().values;
    }
    if (a) {
      for (const void* at : written_)
        if (at == a) return "operand registers written after wgmma_fence";
      if (const Complaint complaint = seen(a, 4)) return complaint;
      operands_.push_back({a, {a[0], a[1], a[2], a[3]}, group()});
    }
    return nullptr;
  }
  // All groups but the last `left` are complete.
  Complaint wait(int left) {
    const int complete = committed_ - left;
    for (const Operand& operand : operands_)
      if (operand.group <= complete && std::memcmp(operand.at, operand.words, 16))
        return "operand registers changed while a wgmma is in flight";
    std::erase_if(operands_, [&](const Operand& operand) { return operand.group <= complete; });
    for (Sum& sum : sums_)
      if (sum.group <= complete) {
        if (!sum.untouched()) return "accumulators touched while a wgmma is in flight";
        std::memcpy(sum.d, sum.values.data(), sum.values.size() * 4);
        for (Known& known : known_)
          if (known.at == reinterpret_cast<const std::uint32_t*>(sum.d)) known.take();
      }
    std::erase_if(sums_, [&](const Sum& sum) { return sum.group <= complete; });
    return nullptr;
  }

 private:
  static constexpr std::uint32_t kPoison = 0xffffdead;  // a NaN
  struct Sum {
    float* d;
    std::vector<float> values;
    int group;
    void poison() {
      for (std::size_t i = 0; i < values.size(); ++i) std::memcpy(d + i, &kPoison, 4);
    }
    bool untouched() const {
      for (std::size_t i = 0; i < values.size(); ++i)
        if (std::memcmp(d + i, &kPoison, 4)) return false;
      return true;
    }
  };
  struct Operand {
    const std::uint32_t* at;
    std::uint32_t words[4];
    int group;
  };
  struct Known {  // registers, and what the last fence or product left in them
    const std::uint32_t* at;
    std::vector<std::uint32_t> words;
    void take() { std::memcpy(words.data(), at, words.size() * 4); }
  };

  Complaint seen(const std::uint32_t* at, int count) {
    for (const Known& known : known_)
      if (known.at == at && int(known.words.size()) == count)
        return std::memcmp(at, known.words.data(), std::size_t(count) * 4) ? "registers written after wgmma_fence"
                                                                           : nullptr;
    known_.push_back({at, std::vector<std::uint32_t>(at, at + count)});
    return nullptr;
  }

  bool fenced_ = false;
  int committed_ = 0;
  std::vector<Sum> sums_;
  std::vector<Operand> operands_;
  std::vector<Known> known_;
  std::vector<const void*> written_;
};

}  // namespace ddst::emu
