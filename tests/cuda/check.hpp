// What the test programs share: checks that are counted, faults that the emulator must name, an exit status.
#pragma once
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>

#include "emulator/block.hpp"

inline int failures = 0, checks = 0;

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok) ++failures, std::printf("FAIL %s\n", what.c_str());
}

// `body` must be stopped by the emulator with a message that contains `text`.
inline void expect_caught(const std::string& what, const std::string& text, const std::function<void()>& body) {
  try {
    body();
    expect(false, what + ": not caught");
  } catch (const ddst::emu::Failure& e) {
    expect(std::string(e.what()).find(text) != std::string::npos, what + ": " + e.what());
    std::printf("  caught %-28s %s\n", what.c_str(), e.what());
  }
}

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures != 0;
}
