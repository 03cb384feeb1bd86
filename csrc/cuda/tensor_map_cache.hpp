// Encoded tensor maps by what they describe. A map is a function of its description, address included, and is handed to
// a kernel by value: an entry is never stale, also if its memory was freed and belongs to somebody else, and keeps
// nothing alive. Encoding takes about a microsecond of host time; the cache forgets what was not asked for the longest.
#pragma once
#include <cstddef>
#include <cstring>
#include <list>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "tensor_maps.h"

namespace ddst::cuda {

class TensorMapCache {
 public:
  using Encode = int (*)(const TensorMap&, EncodedTensorMap&);  // returns an error, 0 for none
  TensorMapCache(Encode encode, std::size_t capacity) : encode_(encode), capacity_(capacity) {}

  // The map's encoding; errors are returned and not remembered. For any number of threads.
  int get(const TensorMap& map, EncodedTensorMap& encoded) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = places_.find(map);
    if (known != places_.end()) {
      entries_.splice(entries_.begin(), entries_, known->second);
      encoded = known->second->encoded;
      return 0;
    }
    if (const int error = encode_(map, encoded)) return error;
    if (places_.size() == capacity_) {
      places_.erase(entries_.back().map);
      entries_.pop_back();
    }
    entries_.push_front({map, encoded});
    places_.emplace(map, entries_.begin());
    return 0;
  }

 private:
  struct Entry {
    TensorMap map;
    EncodedTensorMap encoded;
  };
  struct Hash {
    std::size_t operator()(const TensorMap& map) const {
      return std::hash<std::string_view>()({reinterpret_cast<const char*>(&map), sizeof map});
    }
  };
  struct Same {
    bool operator()(const TensorMap& a, const TensorMap& b) const { return std::memcmp(&a, &b, sizeof a) == 0; }
  };

  const Encode encode_;
  const std::size_t capacity_;
  std::mutex mutex_;
  std::list<Entry> entries_;  // the last one asked for comes first
  std::unordered_map<TensorMap, std::list<Entry>::iterator, Hash, Same> places_;
};

}  // namespace ddst::cuda
