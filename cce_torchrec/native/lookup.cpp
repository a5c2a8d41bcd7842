// Pooled lookups of many small tables, and their backward: gradients summed a row, then the optimizer's step of that row.
//
// Indices need no sorting where a table is not much larger than a batch: gradients add up in a buffer as large as the table.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

struct Feature {
  const int64_t* ends;  // [B + 1] offsets of its bags
  int64_t column;       // where its vectors lie in a row of the output
};

// Mirrored by lookup.py.
struct Table {
  float* weights;   // [rows, dim]
  float* momentum;  // [rows], or null
  float* gradient;  // [rows, dim] to add to instead of stepping, or null
  int64_t rows;
  int64_t dim;
  int64_t first_feature;
  int64_t num_features;
};

struct Batch {
  const int64_t* indices;
  const int64_t* offsets;       // [features * size + 1]
  const float* sample_weights;  // [indices], or null
  const int64_t* columns;       // [features]
  int64_t size;                 // bags a feature
  int64_t width;                // of a row of the output
  Feature feature(int64_t f) const { return {offsets + f * size, columns[f]}; }
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

// LANES floats side by side, wherever they lie; a vector of dim floats is dim / LANES of them.
template <int LANES>
struct Lanes {
  typedef float type __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
};

// LANES divides the dim and PARTS * LANES is it, where the compiler knows; PARTS is 0 where it does not.
template <int LANES, int PARTS>
bool pool(const Table& table, const Batch& batch, float* out) {
  using Part = typename Lanes<LANES>::type;
  const int64_t dim = PARTS != 0 ? PARTS * LANES : table.dim;
  for (int64_t f = table.first_feature; f < table.first_feature + table.num_features; ++f) {
    const Feature feature = batch.feature(f);
    for (int64_t b = 0; b < batch.size; ++b) {
      const int64_t start = feature.ends[b], end = feature.ends[b + 1];
      for (int64_t n = start; n < end; ++n)
        if (static_cast<uint64_t>(batch.indices[n]) >= static_cast<uint64_t>(table.rows)) return false;
      Part* vector = reinterpret_cast<Part*>(out + b * batch.width + feature.column);
      for (int64_t d = 0; d < dim / LANES; d += PARTS != 0 ? PARTS : 1) {
        Part sum[PARTS != 0 ? PARTS : 1] = {};
        for (int64_t n = start; n < end; ++n) {
          const Part* row = reinterpret_cast<const Part*>(table.weights + batch.indices[n] * dim) + d;
          const float weight = batch.sample_weights == nullptr ? 1 : batch.sample_weights[n];
          for (int p = 0; p < (PARTS != 0 ? PARTS : 1); ++p) sum[p] += weight * row[p];
        }
        for (int p = 0; p < (PARTS != 0 ? PARTS : 1); ++p) vector[d + p] = sum[p];
      }
    }
  }
  return true;
}

// Adds gradient vectors to the rows that `place` gives.
template <int LANES, int PARTS, typename Place>
void add_gradients(const Table& table, const Batch& batch, const float* gradient, Place place) {
  using Part = typename Lanes<LANES>::type;
  const int64_t parts = PARTS != 0 ? PARTS : table.dim / LANES;
  for (int64_t f = table.first_feature; f < table.first_feature + table.num_features; ++f) {
    const Feature feature = batch.feature(f);
    for (int64_t b = 0; b < batch.size; ++b) {
      const Part* vector = reinterpret_cast<const Part*>(gradient + b * batch.width + feature.column);
      for (int64_t n = feature.ends[b]; n < feature.ends[b + 1]; ++n) {
        Part* sum = reinterpret_cast<Part*>(place(batch.indices[n]));
        const float weight = batch.sample_weights == nullptr ? 1 : batch.sample_weights[n];
        for (int64_t p = 0; p < parts; ++p) sum[p] += weight * vector[p];
      }
    }
  }
}

// Row-wise Adagrad: m += mean(g^2), w -= lr g / (sqrt(m) + eps); plain SGD without m.
template <int LANES, int PARTS>
void step(const Table& table, int64_t row, const float* gradient, float learning_rate, float eps) {
  using Part = typename Lanes<LANES>::type;
  const int64_t parts = PARTS != 0 ? PARTS : table.dim / LANES;
  const Part* sum = reinterpret_cast<const Part*>(gradient);
  float scale = learning_rate;
  if (table.momentum != nullptr) {
    Part squares = {};
    for (int64_t p = 0; p < parts; ++p) squares += sum[p] * sum[p];
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += squares[lane];
    const float momentum = table.momentum[row] += total / static_cast<float>(table.dim);
    scale = learning_rate / (std::sqrt(momentum) + eps);
  }
  Part* weights = reinterpret_cast<Part*>(table.weights + row * table.dim);
  for (int64_t p = 0; p < parts; ++p) weights[p] -= scale * sum[p];
}

template <int LANES, int PARTS>
void backward(const Table& table, const Batch& batch, const float* gradient, float learning_rate, float eps) {
  const int64_t dim = table.dim;
  if (table.gradient != nullptr) {
    add_gradients<LANES, PARTS>(table, batch, gradient, [&](int64_t row) { return table.gradient + row * dim; });
    return;
  }
  static thread_local std::vector<float> sums;
  static thread_local std::vector<uint8_t> occurs;
  sums.assign(table.rows * dim, 0);
  occurs.assign(table.rows, 0);
  float* const first_sum = sums.data();
  uint8_t* const first = occurs.data();
  add_gradients<LANES, PARTS>(table, batch, gradient, [=](int64_t row) {
    first[row] = 1;
    return first_sum + row * dim;
  });
  for (int64_t row = 0; row < table.rows; ++row)
    if (first[row]) step<LANES, PARTS>(table, row, first_sum + row * dim, learning_rate, eps);
}

}  // namespace

extern "C" {

// out [size, width] = pooled rows. Returns whether every index is a row of its table; `out` is undefined where not.
int cce_lookup(const Table* tables, int64_t num_tables, const Batch* batch, float* out, int64_t threads) {
  std::atomic<bool> fine{true};
  share(num_tables, threads, [&](int64_t t) {
    const Table& table = tables[t];
    const auto run = table.dim == 4       ? pool<4, 1>
                     : table.dim == 8     ? pool<8, 1>
                     : table.dim == 16    ? pool<16, 1>
                     : table.dim == 32    ? pool<16, 2>
                     : table.dim == 64    ? pool<16, 4>
                     : table.dim % 4 == 0 ? pool<4, 0>
                                          : pool<1, 0>;
    if (!run(table, *batch, out)) fine = false;
  });
  return fine;
}

// Steps every row that was looked up, or adds to the tables' gradients, given that of the output [size, width].
void cce_lookup_backward(const Table* tables, int64_t num_tables, const Batch* batch, const float* gradient,
                         float learning_rate, float eps, int64_t threads) {
  share(num_tables, threads, [&](int64_t t) {
    const Table& table = tables[t];
    const auto run = table.dim == 4       ? backward<4, 1>
                     : table.dim == 8     ? backward<8, 1>
                     : table.dim == 16    ? backward<16, 1>
                     : table.dim == 32    ? backward<16, 2>
                     : table.dim == 64    ? backward<16, 4>
                     : table.dim % 4 == 0 ? backward<4, 0>
                                          : backward<1, 0>;
    run(table, *batch, gradient, learning_rate, eps);
  });
}

}  // extern "C"
