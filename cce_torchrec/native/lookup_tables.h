// What a lookup is given, and how its work is shared out.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Tables, pieces and batches are mirrored by lookup_tables.py.
struct Piece {     // a column of a table, or some of its dims
  float* weights;  // [rows, dim]
  float* momentum;  // [rows], or null
  int64_t start;    // where its gradient begins among those of all pieces
  int64_t rows;
  int64_t dim;
  int64_t column;
  int64_t first_out;  // where the columns of the output are listed that its vectors go to, one for each feature
};

struct Table {
  const void* assignments;  // [num_ids, columns * stored] words of `bytes` bytes (1: uint8, 2: int16, 4: int32), or null
  const int64_t* coefficients;  // [1 + columns * hashes] of hash functions, or null; without both, an id is its row
  int64_t bytes;
  int64_t first_id;  // of the assignments; ids below it, or num_ids above it, are out of bounds
  int64_t num_ids;   // -1: any id
  int64_t columns;
  int64_t stored;      // rows by assignment of an id and column,
  int64_t level_rows;  // each of which begins as many rows after the one before
  int64_t hashes;      // rows by hash, after those
  int64_t hashed_rows;
  int64_t hashed_from;
  int64_t hot_from;  // stored rows from here on are the hashed ones, too; -1: none
  int64_t first_feature;
  int64_t num_features;
  int64_t first_piece;
  int64_t num_pieces;

  int64_t rows_per_piece() const { return std::max<int64_t>(stored + hashes, 1); }
};

struct Batch {
  const int64_t* ids;
  const int64_t* offsets;       // [features * size + 1]
  const float* sample_weights;  // [ids], or null
  const int64_t* outs;
  int64_t size;   // bags a feature
  int64_t width;  // of a row of the output
};

struct Step {
  float* gradient;  // of all pieces, to be added to instead of stepping; or null
  float learning_rate;
  float eps;
};

struct Tables {
  const Table* tables;
  const Piece* pieces;
  int64_t num_tables;
};

// Runs work(i) for all i < count, shared by threads as they become free.
template <typename Work>
void share(int64_t count, int64_t threads, Work work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads && t < count; ++t) others.emplace_back(run);
  run();
  for (auto& other : others) other.join();
}

// How many ids of a batch are looked up in a table.
inline int64_t num_ids(const Table& table, const Batch& batch) {
  const int64_t* bags = batch.offsets + table.first_feature * batch.size;
  return bags[table.num_features * batch.size] - bags[0];
}

// Where the kept rows of each table begin.
inline std::vector<int64_t> kept_starts(const Tables& tables, const Batch& batch) {
  std::vector<int64_t> starts;
  int64_t next = 0;
  for (int64_t t = 0; t < tables.num_tables; ++t) {
    const Table& table = tables.tables[t];
    starts.push_back(next);
    next += num_ids(table, batch) * table.num_pieces * table.rows_per_piece();
  }
  return starts;
}

// In how many parts a table is worked on, so that there is something to do for all threads.
inline int64_t parts_of_a_table(const Tables& tables, int64_t threads, int64_t most) {
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + tables.num_tables - 1) / tables.num_tables;
  return std::max<int64_t>(1, std::min(wanted, most));
}

}  // namespace
