// Caches and pages.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t LINE = 64;            // bytes of a cache line
constexpr int64_t HUGE_PAGE = 1 << 21;  // bytes

// Asks for what will be needed some time later, so into the second level: the first is small, and has few lines under way.
inline void prefetch(const void* place) { __builtin_prefetch(place, 0, 2); }

// Brings floats into the cache in order, which is faster than as they are needed. They are read, not prefetched: processors
// drop prefetches of which too many are under way.
inline void sweep(const volatile float* floats, int64_t count) {
  for (int64_t i = 0; i < count; i += LINE / 4) static_cast<void>(floats[i]);
}

// Asks for huge pages where memory has none yet, so that what is written to it for the first time waits for fewer of them.
inline void use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uint64_t start = reinterpret_cast<uint64_t>(memory), mask = HUGE_PAGE - 1;
  const uint64_t first = (start + mask) & ~mask, end = (start + static_cast<uint64_t>(bytes)) & ~mask;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // without it, all works as well
#endif
}

// Floats that are 0 at first, in huge pages where the system has some: rows are touched in no order.
class HugeBuffer {
 public:
  ~HugeBuffer() { std::free(floats_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(floats_);
      size_ = (count + HUGE_PAGE / 4 - 1) / (HUGE_PAGE / 4) * (HUGE_PAGE / 4);
      floats_ = static_cast<float*>(std::aligned_alloc(HUGE_PAGE, size_ * 4));
      if (floats_ == nullptr) throw std::bad_alloc();
      use_huge_pages(floats_, size_ * 4);
      std::memset(floats_, 0, size_ * 4);
    }
    return floats_;
  }

 private:
  float* floats_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
