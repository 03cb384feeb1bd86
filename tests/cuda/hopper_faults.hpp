// Which waits and fences of a kernel does nobody miss?
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "emulator/block.hpp"

namespace ddst::test {

// Runs the kernel without each of its waits and fences: without all that happen at a place ("file:line"), then, with
// `single`, without the n-th time that threads come there ("file:line#n"). `run` throws what the emulator finds or what
// it finds wrong itself; returned is what it did not notice.
inline std::vector<std::string> unnoticed(const std::function<emu::Stats(const emu::Options&)>& run,
                                          emu::Options options, bool single) {
  options.list_waits = true;
  const auto places = run(options).wait_places;
  std::vector<std::string> result;
  const auto passes = [&] {
    try {
      run(options);
      return true;
    } catch (const emu::Failure&) {
      return false;
    }
  };
  for (const auto& [place, times] : places) {
    options.drop_at = place, options.drop_turn = -1;
    if (passes()) result.push_back(place);
    for (options.drop_turn = 0; options.drop_turn < (single ? times : 0); ++options.drop_turn)
      if (passes()) result.push_back(place + '#' + std::to_string(options.drop_turn));
  }
  return result;
}

}  // namespace ddst::test
