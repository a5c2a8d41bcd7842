// Ids to rows: the stored assignment of every column and a hash of every column, written where they are looked up.

#include <algorithm>
#include <cstdint>
#include <cstring>

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

// As Stored of rows.py: the assignments of ids first .. first + count - 1, or of `slots` warm ids among those.
struct Stored {
  const void* rows;             // [ids or slots, columns] words, or [.., row_bytes] bytes
  int64_t word_bytes;           // 1: uint8, 2: int16, 4: int32
  int64_t bits;                 // of a packed assignment; 0 for words
  int64_t row_bytes, num_rows;  // of packed ones
  int64_t columns, first, count;
  const void* warm;             // [slots] sorted ids, or null where all ids have one
  int64_t warm_bytes, slots;    // 4: int32, 8: int64
  const int64_t* coefficients;  // of the hash that ids without a slot have
  int64_t num_values;           // its range
};

// An id's assignments as words; COLUMNS is known to the compiler, or 0.
template <int64_t COLUMNS, typename Word>
struct Words {
  using Value = Word;
  const Word* rows;
  int64_t all_columns;

  explicit Words(const Stored& stored) : rows(static_cast<const Word*>(stored.rows)), all_columns(stored.columns) {}
  int64_t columns() const { return COLUMNS != 0 ? COLUMNS : all_columns; }
  void prefetch(int64_t slot) const { __builtin_prefetch(rows + slot * columns()); }
  void read(int64_t slot, Word* main) const {
    const Word* row = rows + slot * columns();
    for (int64_t c = 0; c < columns(); ++c) main[c * BLOCK] = row[c];
  }
};

// An id's assignments as bits, the lowest first. The processor's byte order is taken to be little endian.
struct Bits {
  using Value = int32_t;
  const uint8_t *rows, *end;
  int64_t columns, bits, row_bytes;

  explicit Bits(const Stored& stored)
      : rows(static_cast<const uint8_t*>(stored.rows)),
        end(rows + stored.num_rows * stored.row_bytes),
        columns(stored.columns),
        bits(stored.bits),
        row_bytes(stored.row_bytes) {}
  void prefetch(int64_t slot) const { __builtin_prefetch(rows + slot * row_bytes); }
  void read(int64_t slot, int32_t* main) const {
    const uint8_t* row = rows + slot * row_bytes;
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    const bool is_near_end = end - row < row_bytes + 8;
    for (int64_t c = 0; c < columns; ++c) {
      const uint8_t* at = row + (c * bits >> 3);
      uint64_t word = 0;
      std::memcpy(&word, at, is_near_end ? std::min<int64_t>(8, end - at) : 8);
      main[c * BLOCK] = static_cast<int32_t>(word >> (c * bits & 7) & mask);
    }
  }
};

// slots[i] = where ids[i] is among the sorted ids, or any slot; returns how many are not there, and which of the block.
template <typename Id>
int64_t find(const Id* warm, int64_t count, const int64_t* ids, int64_t n, int64_t* slots, int64_t* cold) {
  constexpr int64_t TOGETHER = 16;  // searches that wait for memory at the same time
  int64_t num_cold = 0;
  for (int64_t start = 0; start < n; start += TOGETHER) {
    const int64_t size = std::min(TOGETHER, n - start);
    const int64_t* mine = ids + start;
    int64_t base[TOGETHER] = {};
    for (int64_t left = count; left > 1; left -= left / 2)
      for (int64_t i = 0; i < size; ++i)
        base[i] += static_cast<int64_t>(warm[base[i] + left / 2 - 1] < mine[i]) * (left / 2);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t place = base[i] + (warm[base[i]] < mine[i] && base[i] + 1 < count);
      slots[start + i] = place;
      cold[num_cold] = start + i;
      num_cold += warm[place] != mine[i];
    }
  }
  return num_cold;
}

// main[c * BLOCK + i] = the assignment of ids[i] in column c, for a block of n ids; `left` are there in all.
template <typename Rows>
void gather(const Stored& stored, const Rows rows, const int64_t* ids, int64_t n, int64_t left,
            typename Rows::Value* main) {
  if (stored.warm == nullptr) {
    const int64_t first = stored.first;
    for (int64_t i = 0; i < n; ++i) {
      if (i + AHEAD < left) rows.prefetch(ids[i + AHEAD] - first);
      rows.read(ids[i] - first, main + i);
    }
    return;
  }
  int64_t slots[BLOCK], cold[BLOCK];
  const int64_t num_cold =
      stored.warm_bytes == 4 ? find(static_cast<const int32_t*>(stored.warm), stored.slots, ids, n, slots, cold)
                             : find(static_cast<const int64_t*>(stored.warm), stored.slots, ids, n, slots, cold);
  for (int64_t i = 0; i < n; ++i) {
    if (i + AHEAD < n) rows.prefetch(slots[i + AHEAD]);
    rows.read(slots[i], main + i);
  }
  for (int64_t j = 0; j < num_cold; ++j) {
    const uint64_t mixed = mix64(static_cast<uint64_t>(ids[cold[j]] ^ stored.coefficients[0]));
    for (int64_t c = 0; c < stored.columns; ++c)
      main[c * BLOCK + cold[j]] = static_cast<typename Rows::Value>(
          hashed(mixed, static_cast<uint64_t>(stored.coefficients[1 + c]), static_cast<uint64_t>(stored.num_values)));
  }
}

template <typename Rows>
void assigned_rows(const int64_t* ids, int64_t n, const Stored& stored, const int64_t* coefficients,
                   int64_t num_hashed, int64_t hashed_from, int64_t hot_from, void* scratch, int64_t* const* out) {
  const Rows stored_rows(stored);
  const int64_t columns = stored.columns;
  auto* main = static_cast<typename Rows::Value*>(scratch);
  uint64_t mixed[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t size = std::min(BLOCK, n - start);
    const int64_t* block = ids + start;
    gather(stored, stored_rows, block, size, n - start, main);
    for (int64_t i = 0; i < size; ++i) mixed[i] = mix64(static_cast<uint64_t>(block[i] ^ coefficients[0]));
    for (int64_t c = 0; c < columns; ++c) {
      if (out[c] == nullptr) continue;
      int64_t* rows = out[c] + 2 * start;
      const auto* mine = main + c * BLOCK;
      const uint64_t multiplier = static_cast<uint64_t>(coefficients[1 + c]);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t row = mine[i];
        const int64_t helper =
            static_cast<int64_t>(hashed(mixed[i], multiplier, static_cast<uint64_t>(num_hashed))) + hashed_from;
        rows[2 * i] = row;
        rows[2 * i + 1] = row >= hot_from ? row : helper;
      }
    }
  }
}

// The function for words, with the number of columns known to the compiler where it is a usual one.
template <typename Word>
auto words_of(int64_t columns) {
  return columns == 4    ? assigned_rows<Words<4, Word>>
         : columns == 8  ? assigned_rows<Words<8, Word>>
         : columns == 16 ? assigned_rows<Words<16, Word>>
                         : assigned_rows<Words<0, Word>>;
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

// out[c][2 i] = the assignment of ids[i] in column c, out[c][2 i + 1] = hashed_from + its hash, or the assignment again
// where that is hot_from or above. `scratch` holds columns * 512 int32. Returns 0 and writes nothing where an id is not one
// of those that are stored, or hashed.
int cce_assigned_rows(const int64_t* ids, int64_t n, const Stored* stored, const int64_t* coefficients,
                      int64_t num_hashed, int64_t hashed_from, int64_t hot_from, void* scratch, int64_t* const* out) {
  if (!all_inside(ids, n, stored->first, stored->count)) return 0;
  auto write = assigned_rows<Bits>;
  if (stored->bits == 0) {
    if (stored->word_bytes == 1)
      write = words_of<uint8_t>(stored->columns);
    else if (stored->word_bytes == 2)
      write = words_of<int16_t>(stored->columns);
    else
      write = words_of<int32_t>(stored->columns);
  }
  write(ids, n, *stored, coefficients, num_hashed, hashed_from, hot_from, scratch, out);
  return 1;
}

}  // extern "C"
