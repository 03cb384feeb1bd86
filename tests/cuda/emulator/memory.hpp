// Checked stand-ins for global and shared pointers.
#pragma once
#include <type_traits>

#include "block.hpp"

namespace ddst::emu {

// A global allocation. Reads must hit initialised bytes; outputs may be written once per launch only, if asked for.
class Buffer {
 public:
  enum class Role { input, output_once, scratch };
  Buffer(std::string name, std::size_t bytes, Role role, std::size_t misalign = 0)
      : name(std::move(name)),
        role(role),
        storage_(bytes + 256 + misalign, std::byte{0xff}),
        init_(bytes, role == Role::input),
        size_(bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    data_ = storage_.data() + (256 - address % 256) % 256 + misalign;
    alive().push_back(this);
  }
  Buffer(Buffer&& other)
      : name(other.name),
        role(other.role),
        storage_(std::move(other.storage_)),
        init_(std::move(other.init_)),
        data_(other.data_),
        size_(std::exchange(other.size_, 0)) {
    alive().push_back(this);
  }
  ~Buffer() { std::erase(alive(), this); }
  // The allocation that an address lies in, nullptr if none: tensor maps hold addresses.
  static Buffer* at(const void* address) {
    const auto* const byte = static_cast<const std::byte*>(address);
    for (Buffer* buffer : alive())
      if (byte >= buffer->data_ && byte < buffer->data_ + buffer->size_) return buffer;
    return nullptr;
  }
  std::int64_t offset_of(const void* address) const { return static_cast<const std::byte*>(address) - data_; }
  std::byte* access(std::int64_t offset, std::int64_t bytes, std::int64_t align, Where where) {
    if (offset < 0 || offset + bytes > std::int64_t(size_))
      Block::current->fail(name + ": global access out of bounds, byte " + std::to_string(offset) + " + " +
                               std::to_string(bytes) + " of " + std::to_string(size_),
                           where);
    if (reinterpret_cast<std::uintptr_t>(data_ + offset) % align)
      Block::current->fail(name + ": misaligned global access, byte " + std::to_string(offset), where);
    return data_ + offset;
  }
  const std::byte* read(std::int64_t offset, std::int64_t bytes, std::int64_t align, Where where) {
    const std::byte* p = access(offset, bytes, align, where);
    for (std::int64_t i = offset; i < offset + bytes; ++i)
      if (!init_[i])
        Block::current->fail(name + ": read of uninitialised global memory, byte " + std::to_string(i), where);
    return p;
  }
  std::byte* write(std::int64_t offset, std::int64_t bytes, std::int64_t align, Where where) {
    std::byte* p = access(offset, bytes, align, where);
    if (role == Role::input) Block::current->fail(name + ": write to an input", where);
    for (std::int64_t i = offset; i < offset + bytes; ++i) {
      if (role == Role::output_once && init_[i])
        Block::current->fail(name + ": second write to byte " + std::to_string(i), where);
      init_[i] = true;
    }
    return p;
  }
  bool fully_written() const {
    return std::all_of(init_.begin(), init_.end(), [](char c) { return c; });
  }
  template <class T>
  T* host() {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }

  const std::string name;
  const Role role;

 private:
  static std::vector<Buffer*>& alive() {
    static thread_local auto* const buffers = new std::vector<Buffer*>;  // outlives static buffers
    return *buffers;
  }
  std::vector<std::byte> storage_;
  std::vector<char> init_;
  std::byte* data_;
  std::size_t size_;
};

template <class T>
class GlobalPtr {
 public:
  GlobalPtr() = default;
  explicit GlobalPtr(Buffer& buffer, std::int64_t index = 0) : buffer_(&buffer), index_(index) {}
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  GlobalPtr(GlobalPtr<U> other) : buffer_(other.buffer()), index_(other.byte_offset() / std::int64_t(sizeof(T))) {}
  explicit operator bool() const { return buffer_ != nullptr; }
  GlobalPtr operator+(std::int64_t n) const { return GlobalPtr(*buffer_, index_ + n); }
  Buffer* buffer() const { return buffer_; }
  std::int64_t byte_offset() const { return index_ * std::int64_t(sizeof(T)); }

 private:
  Buffer* buffer_ = nullptr;
  std::int64_t index_ = 0;
};

// An offset into the block's shared memory.
template <class T>
class SharedPtr {
 public:
  SharedPtr() = default;
  explicit SharedPtr(std::uint32_t offset) : offset_(offset) {}
  SharedPtr operator+(int n) const { return SharedPtr(offset_ + std::uint32_t(n) * std::uint32_t(sizeof(T))); }
  template <class U>
  SharedPtr<U> as() const {
    return SharedPtr<U>(offset_);
  }
  std::uint32_t offset() const { return offset_; }

 private:
  std::uint32_t offset_ = 0;
};

}  // namespace ddst::emu
