// Ids to rows: the stored assignment of every column and a hash of every column, written where they are looked up.

#include <algorithm>
#include <cstdint>

#include "hashing.h"

namespace {

constexpr int64_t BLOCK = 512;  // ids whose mixed words are held at a time: 4 KiB
constexpr int64_t AHEAD = 48;   // ids whose assignments are on their way from memory

bool all_inside(const int64_t* ids, int64_t n, int64_t first, int64_t count) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < n; ++i)
    outside |= static_cast<uint64_t>(ids[i]) - static_cast<uint64_t>(first) >= static_cast<uint64_t>(count);
  return outside == 0;
}

// main[c * BLOCK + i] = the assignment of ids[i] in column c; COLUMNS is known to the compiler, or 0.
template <int64_t COLUMNS, typename Word>
void gather(const Word* assignments, int64_t columns, const int64_t* ids, int64_t n, int64_t left, Word* main) {
  if (COLUMNS != 0) columns = COLUMNS;
  for (int64_t i = 0; i < n; ++i) {
    if (i + AHEAD < left) __builtin_prefetch(assignments + ids[i + AHEAD] * columns);
    const Word* row = assignments + ids[i] * columns;
    for (int64_t c = 0; c < columns; ++c) main[c * BLOCK + i] = row[c];
  }
}

template <typename Word>
void assigned_rows(const int64_t* ids, int64_t n, const Word* assignments, int64_t first, int64_t columns,
                   const int64_t* coefficients, int64_t num_hashed, int64_t hashed_from, Word* main,
                   int64_t* const* out) {
  uint64_t mixed[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t size = std::min(BLOCK, n - start);
    const int64_t* block = ids + start;
    const auto gathered = columns == 4 ? gather<4, Word> : columns == 8 ? gather<8, Word> : gather<0, Word>;
    gathered(assignments - first * columns, columns, block, size, n - start, main);
    for (int64_t i = 0; i < size; ++i) mixed[i] = mix64(static_cast<uint64_t>(block[i] ^ coefficients[0]));
    for (int64_t c = 0; c < columns; ++c) {
      if (out[c] == nullptr) continue;
      int64_t* rows = out[c] + 2 * start;
      const Word* mine = main + c * BLOCK;
      const uint64_t multiplier = static_cast<uint64_t>(coefficients[1 + c]);
      for (int64_t i = 0; i < size; ++i) {
        rows[2 * i] = mine[i];
        rows[2 * i + 1] =
            static_cast<int64_t>(hashed(mixed[i], multiplier, static_cast<uint64_t>(num_hashed))) + hashed_from;
      }
    }
  }
}

}  // namespace

extern "C" {

// out[c][i] = the hash of ids[i] in column c; a null pointer leaves a column out.
void cce_hashed_rows(const int64_t* ids, int64_t n, int64_t columns, const int64_t* coefficients, int64_t num_hashed,
                     int64_t* const* out) {
  uint64_t mixed[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t size = std::min(BLOCK, n - start);
    for (int64_t i = 0; i < size; ++i) mixed[i] = mix64(static_cast<uint64_t>(ids[start + i] ^ coefficients[0]));
    for (int64_t c = 0; c < columns; ++c) {
      if (out[c] == nullptr) continue;
      const uint64_t multiplier = static_cast<uint64_t>(coefficients[1 + c]);
      for (int64_t i = 0; i < size; ++i)
        out[c][start + i] = static_cast<int64_t>(hashed(mixed[i], multiplier, static_cast<uint64_t>(num_hashed)));
    }
  }
}

// out[c][2 i] = the assignment of ids[i] in column c, out[c][2 i + 1] = hashed_from + its hash. Assignments are those of ids
// first .. first + count - 1, [count, columns] words of `bytes` bytes (1: uint8, 2: int16, 4: int32); `scratch` holds
// columns * 512 words. Returns 0 and writes nothing where an id has no assignment.
int cce_assigned_rows(const int64_t* ids, int64_t n, const void* assignments, int64_t bytes, int64_t first, int64_t count,
                      int64_t columns, const int64_t* coefficients, int64_t num_hashed, int64_t hashed_from,
                      void* scratch, int64_t* const* out) {
  if (!all_inside(ids, n, first, count)) return 0;
#define ROWS_OF(Word)                                                                                          \
  assigned_rows(ids, n, static_cast<const Word*>(assignments), first, columns, coefficients, num_hashed, hashed_from, \
                static_cast<Word*>(scratch), out)
  if (bytes == 1)
    ROWS_OF(uint8_t);
  else if (bytes == 2)
    ROWS_OF(int16_t);
  else
    ROWS_OF(int32_t);
#undef ROWS_OF
  return 1;
}

}  // extern "C"
