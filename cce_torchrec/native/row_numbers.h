// The rows of codebooks that a batch looks up, numbered, so that their sums lie side by side however large the codebook is.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Numbers of rows from 0, in the order in which they first occur. Time and memory grow with what is numbered, not with the
// rows there are: a hash table with linear probing, of which three quarters and more stay free. Where rows are no more than its
// places, each has its own.
class RowNumbers {
 public:
  // numbers[i * stride] = the number of rows[i * between], and distinct[number] = that row, which is below num_rows. Returns
  // how many are distinct.
  int64_t assign(const uint32_t* rows, int64_t between, int64_t n, int64_t num_rows, uint32_t* numbers, int64_t stride,
                 uint32_t* distinct) {
    int bits = 4;
    while ((int64_t{1} << bits) < 4 * n) ++bits;
    const bool direct = num_rows <= int64_t{1} << bits;
    const uint64_t multiplier = direct ? 1 : 0x9e3779b97f4a7c15, mask = (uint64_t{1} << bits) - 1;
    const int shift = direct ? 0 : 64 - bits;
    const int64_t size = direct ? num_rows : int64_t{1} << bits;
    if (static_cast<int64_t>(places_.size()) < size) places_.resize(size);
    std::fill_n(places_.begin(), size, 0);
    uint32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t row = rows[i * between];
      uint64_t place = row * multiplier >> shift;
      uint32_t found;  // 1 + its number
      while ((found = places_[place]) != 0 && distinct[found - 1] != row) place = (place + 1) & mask;
      if (found == 0) {
        distinct[count] = row;
        places_[place] = found = ++count;
      }
      numbers[i * stride] = found - 1;
    }
    return count;
  }

 private:
  std::vector<uint32_t> places_;
};

}  // namespace
