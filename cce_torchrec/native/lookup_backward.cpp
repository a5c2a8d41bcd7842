// Gradients of pooled vectors back to rows: summed a row, then the optimizer's step of that row.
//
// Sums of one table lie in a buffer that stays in the cache: one a row of its codebooks or, where those have many more rows
// than a batch looks up, one a row that is looked up.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lookup_shapes.h"
#include "lookup_tables.h"
#include "memory.h"
#include "row_numbers.h"

namespace {

constexpr int64_t BAGS_AHEAD = 16;  // bags whose gradients are on their way from memory
constexpr int64_t ROWS = 64;        // that are stepped at a time
constexpr int64_t SPARSE = 3;       // rows of codebooks for each that is looked up, above which only those have sums

// sums[p] [rows, dim] += the gradients of the vectors that its rows are part of.
template <typename Shape>
void add_gradients(const Shape& shape, const Table& table, const Piece* pieces, const Batch& batch, const uint32_t* rows,
                   const float* gradient, float* const* sums) {
  using Part = typename Shape::Part;
  const int64_t stride = shape.between * shape.rows(), begin = batch.offsets[table.first_feature * batch.size];
  PerPiece<Shape, int64_t> outs(shape);
  PerPiece<Shape, float*> sum_of(shape);
  for (int64_t p = 0; p < shape.pieces(); ++p) sum_of[p] = sums[p];
  for (int64_t f = 0; f < table.num_features; ++f) {
    const int64_t* ends = batch.offsets + (table.first_feature + f) * batch.size;
    for (int64_t p = 0; p < shape.pieces(); ++p) outs[p] = batch.outs[pieces[p].first_out + f];
    for (int64_t b = 0; b < batch.size; ++b) {
      const float* vectors = gradient + b * batch.width;
      for (int64_t p = 0; p < shape.pieces(); ++p)
        for (int64_t d = -(outs[p] % (LINE / 4)) & (LINE / 4 - 1); d < shape.dim(pieces[p]); d += LINE / 4)
          prefetch(vectors + BAGS_AHEAD * batch.width + outs[p] + d);
      for (int64_t n = ends[b]; n < ends[b + 1]; ++n) {
        const float weight = batch.sample_weights == nullptr ? 1 : batch.sample_weights[n];
        const uint32_t* mine = rows + (n - begin) * stride;
        for (int64_t p = 0; p < shape.pieces(); ++p) {
          const int64_t dim = shape.dim(pieces[p]);
          const Part* vector = reinterpret_cast<const Part*>(vectors + outs[p]);
          for (int64_t r = 0; r < shape.rows(); ++r) {
            Part* sum = reinterpret_cast<Part*>(sum_of[p] + mine[r * shape.between + p] * dim);
            for (int64_t d = 0; d < dim / Shape::LANES; ++d) sum[d] += weight * vector[d];
          }
        }
      }
    }
  }
}

// What the gradients of rows are multiplied by, whose squares sum up to `squares`; their momentum, if any, grows.
inline void scale_rows(const Step& settings, float* momentum, const float* squares, int64_t dim, int64_t count,
                       float* scales) {
  for (int64_t r = 0; r < count; ++r) scales[r] = settings.learning_rate;
  if (momentum == nullptr) return;
  for (int64_t r = 0; r < count; ++r) {
    momentum[r] += squares[r] / static_cast<float>(dim);
    scales[r] /= std::sqrt(momentum[r]) + settings.eps;
  }
}

// The rows of a piece that have sums, by number; null: all, in their order.
struct Summed {
  const uint32_t* rows;
  int64_t count;
  int64_t operator[](int64_t number) const { return rows == nullptr ? number : rows[number]; }
};

// Row-wise Adagrad: m += mean(g^2), w -= lr g / (sqrt(m) + eps); plain SGD without m. Rows without a gradient stay as they
// are. The gradient is 0 afterwards.
template <typename Shape>
void step(const Shape& shape, const Piece& piece, const Summed& rows, float* gradient, const Step& settings) {
  using Part = typename Shape::Part;
  const int64_t dim = shape.dim(piece), parts = dim / Shape::LANES;
  float squares[ROWS], scales[ROWS], momenta[ROWS];
  for (int64_t first = 0; first < rows.count; first += ROWS) {
    const int64_t count = std::min(ROWS, rows.count - first);
    for (int64_t r = 0; r < count; ++r) {
      const Part* sum = reinterpret_cast<const Part*>(gradient + (first + r) * dim);
      Part square = {};
      for (int64_t p = 0; p < parts; ++p) square += sum[p] * sum[p];
      squares[r] = total<Shape::LANES>(square);
    }
    if (piece.momentum != nullptr)
      for (int64_t r = 0; r < count; ++r) momenta[r] = piece.momentum[rows[first + r]];
    scale_rows(settings, piece.momentum == nullptr ? nullptr : momenta, squares, dim, count, scales);
    if (piece.momentum != nullptr)
      for (int64_t r = 0; r < count; ++r) piece.momentum[rows[first + r]] = momenta[r];
    for (int64_t r = 0; r < count; ++r) {
      if (squares[r] == 0) continue;
      Part* sum = reinterpret_cast<Part*>(gradient + (first + r) * dim);
      Part* weights = reinterpret_cast<Part*>(piece.weights + rows[first + r] * dim);
      for (int64_t p = 0; p < parts; ++p) {
        weights[p] -= scales[r] * sum[p];
        sum[p] = Part{};
      }
    }
  }
}

// Steps the rows that have sums; `numbers`: which sums the vectors of a batch add their gradients to, as `rows` of backward.
template <typename Shape>
void step_rows(const Shape& shape, const Table& table, const Piece* pieces, const Batch& batch, const uint32_t* numbers,
               const std::vector<Summed>& summed, const float* gradient, const Step& settings) {
  static thread_local HugeBuffer buffer;  // 0 wherever no step is under way
  int64_t size = 0;
  for (int64_t p = 0; p < shape.pieces(); ++p) size += summed[p].count * pieces[p].dim;
  std::vector<float*> sums{buffer.floats(size)};
  for (int64_t p = 0; p + 1 < shape.pieces(); ++p) sums.push_back(sums[p] + summed[p].count * pieces[p].dim);
  add_gradients(shape, table, pieces, batch, numbers, gradient, sums.data());
  for (int64_t p = 0; p < shape.pieces(); ++p) step(shape, pieces[p], summed[p], sums[p], settings);
}

template <typename Shape>
void backward(const Table& table, const Piece* pieces, int64_t count, const Batch& batch, const uint32_t* rows,
              const float* gradient, const Step& settings) {
  Shape shape(table, count);
  if (settings.gradient != nullptr) {
    std::vector<float*> sums;
    for (int64_t p = 0; p < count; ++p) sums.push_back(settings.gradient + pieces[p].start);
    return add_gradients(shape, table, pieces, batch, rows, gradient, sums.data());
  }
  const int64_t n = num_ids(table, batch) * shape.rows();  // looked up in each piece
  std::vector<Summed> summed;
  int64_t num_rows = 0;
  for (int64_t p = 0; p < count; ++p) {
    summed.push_back({nullptr, pieces[p].rows});
    num_rows += pieces[p].rows;
  }
  if (num_rows <= SPARSE * n * count) return step_rows(shape, table, pieces, batch, rows, summed, gradient, settings);
  static thread_local RowNumbers numbering;
  std::vector<uint32_t> numbers(n * count), distinct(n * count);
  for (int64_t p = 0; p < count; ++p) {
    uint32_t* mine = distinct.data() + p * n;
    summed[p] = {mine, numbering.assign(rows + p, shape.between, n, pieces[p].rows, numbers.data() + p, count, mine)};
  }
  shape.between = count;
  step_rows(shape, table, pieces, batch, numbers.data(), summed, gradient, settings);
}

}  // namespace

extern "C" {

// Steps every row that was looked up, or adds to the gradients of pieces, given that of the output [size, width].
void cce_lookup_backward(const Tables* tables, const Batch* batch, const uint32_t* kept, const float* gradient,
                         const Step* settings, int64_t threads) {
  const std::vector<int64_t> starts = kept_starts(*tables, *batch);
  int64_t most = 1;
  for (int64_t t = 0; t < tables->num_tables; ++t) most = std::max(most, tables->tables[t].num_pieces);
  const int64_t parts = parts_of_a_table(*tables, threads, most);
  share(tables->num_tables * parts, threads, [&](int64_t i) {
    const Table& table = tables->tables[i / parts];
    const Piece* pieces = tables->pieces + table.first_piece;
    const int64_t some = (table.num_pieces + parts - 1) / parts, first = std::min(i % parts * some, table.num_pieces);
    const int64_t count = std::min(some, table.num_pieces - first);
    if (count == 0) return;
    with_shape(table, pieces + first, count, [&](auto tag) {
      backward<typename decltype(tag)::type>(table, pieces + first, count, *batch, kept + starts[i / parts] + first, gradient,
                                             *settings);
    });
  });
}

}  // extern "C"
