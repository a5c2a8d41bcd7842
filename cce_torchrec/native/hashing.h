// The hash functions of hashing.py.

#pragma once

#include <cstdint>

inline uint64_t mix64(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

// In [0, num_rows).
inline uint64_t hashed(uint64_t mixed, uint64_t multiplier, uint64_t num_rows) {
  return (((mixed * multiplier) >> 32) * num_rows) >> 32;
}
