// Memory for working sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "vec.h"

namespace skv {

// A thread's memory for working sets, which calls take from in turn: asking the system anew costs
// as much as a short attention.
class Arena {
 public:
  static Arena& mine() {
    static thread_local Arena arena;
    return arena;
  }

  // ``size`` bytes, a multiple of 64; from elsewhere when there are not so many left.
  void* take(size_t size) {
    used_ += size;
    wanted_ = wanted_ > used_ ? wanted_ : used_;
    if (used_ <= size_) return memory_ + used_ - size;
    if (used_ > size) return ::operator new(size, std::align_val_t(64));
    if (memory_) ::operator delete(memory_, std::align_val_t(64));  // nothing is in use
    size_ = 0, memory_ = nullptr;
    memory_ = (uint8_t*)::operator new(wanted_, std::align_val_t(64));
    size_ = wanted_;
    return memory_;
  }

  // What was taken last.
  void give_back(void* what, size_t size) {
    used_ -= size;
    if (what < memory_ || what >= memory_ + size_) ::operator delete(what, std::align_val_t(64));
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0, used_ = 0, wanted_ = 0;

  ~Arena() {
    if (memory_) ::operator delete(memory_, std::align_val_t(64));
  }
};

// Memory for a loop's working set, aligned for vectors and never smaller than a vector. The last to
// be made goes first, in its own thread.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t n)
      : size_((4 * LANES + n * sizeof(T) + 63) / 64 * 64), data_((T*)Arena::mine().take(size_)) {}
  ~Buffer() { Arena::mine().give_back(data_, size_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  const size_t size_;
  T* const data_;
};

}  // namespace skv
