// Ids to pooled vectors of many tables.
//
// One pass over ids a table: the rows of a block of ids, then sums of rows straight into the output. Rows are kept, 4 bytes
// each, for the backward.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "lookup_rows.h"
#include "lookup_shapes.h"
#include "lookup_tables.h"
#include "memory.h"

namespace {

constexpr int64_t BAGS = 256;       // of a table whose rows are computed at a time
constexpr int64_t LARGE = 1 << 20;  // floats of an output that is written past the cache

// Writes past the cache, where the processor can: an output that is larger than the cache is not read before it is full.
template <int LANES>
inline void stream(float* out, typename Lanes<LANES>::type lanes) {
#ifdef __AVX512F__
  if constexpr (LANES == 16) return _mm512_stream_ps(out, reinterpret_cast<const __m512&>(lanes));
#endif
#ifdef __AVX__
  if constexpr (LANES == 8) return _mm256_stream_ps(out, reinterpret_cast<const __m256&>(lanes));
#endif
  *reinterpret_cast<typename Lanes<LANES>::type*>(out) = lanes;
}

// Whether all vectors of a table may be streamed: the output is large, and they are aligned in it.
template <typename Shape>
bool streams(const Table& table, const Piece* pieces, const Batch& batch, const float* out) {
  if (batch.size * batch.width < LARGE) return false;
  uint64_t places = reinterpret_cast<uint64_t>(out) / 4 | static_cast<uint64_t>(batch.width);
  for (int64_t p = 0; p < table.num_pieces; ++p)
    for (int64_t f = 0; f < table.num_features; ++f) places |= static_cast<uint64_t>(batch.outs[pieces[p].first_out + f]);
  return places % Shape::LANES == 0;
}

// out = sum of the rows of a bag, of one piece, [ids][rows][pieces] from `rows` on.
template <bool STREAMED, typename Shape>
inline void pool_bag(const Shape& shape, const float* table, int64_t dim, const uint32_t* rows, int64_t n,
                     const float* weights, float* out) {
  using Part = typename Shape::Part;
  constexpr int64_t AT_ONCE = Shape::PARTS != 0 ? Shape::PARTS : 1;
  const int64_t stride = shape.pieces() * shape.rows();
  for (int64_t d = 0; d < dim / Shape::LANES; d += AT_ONCE) {
    Part sum[AT_ONCE] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < shape.rows(); ++r) {
        const Part* row = reinterpret_cast<const Part*>(table + rows[i * stride + r * shape.pieces()] * dim) + d;
        const float weight = weights == nullptr ? 1 : weights[i];
        for (int64_t a = 0; a < AT_ONCE; ++a) sum[a] += weight * row[a];
      }
    for (int64_t a = 0; a < AT_ONCE; ++a) {
      float* place = out + (d + a) * Shape::LANES;
      if constexpr (STREAMED)
        stream<Shape::LANES>(place, sum[a]);
      else
        *reinterpret_cast<Part*>(place) = sum[a];
    }
  }
}

// Where the pieces of a table are, and the vectors that one of its features makes of them.
template <typename Shape>
struct Places {
  PerPiece<Shape, const float*> weights;
  PerPiece<Shape, int64_t> outs;
  explicit Places(const Shape& shape) : weights(shape), outs(shape) {}
};

// Pools `count` bags, whose ids and rows begin at the first of `ends`.
template <bool STREAMED, typename Shape>
void pool_bags(const Shape& shape, Places<Shape>& places, const Piece* pieces, const Batch& batch, const int64_t* ends,
               int64_t count, const uint32_t* rows, float* out) {
  const int64_t stride = shape.pieces() * shape.rows();
  for (int64_t b = 0; b < count; ++b, out += batch.width) {
    const uint32_t* mine = rows + (ends[b] - ends[0]) * stride;
    const int64_t ids = ends[b + 1] - ends[b];
    const float* sample = batch.sample_weights == nullptr ? nullptr : batch.sample_weights + ends[b];
    if constexpr (Shape::PIECES != 0 && Shape::ROWS != 0 && Shape::PARTS == 1)  // sums before stores: nothing waits
      if (ids == 1 && sample == nullptr) {
        typename Shape::Part sums[Shape::PIECES];
        for (int64_t p = 0; p < Shape::PIECES; ++p) {
          sums[p] = typename Shape::Part{};
          for (int64_t r = 0; r < Shape::ROWS; ++r)
            sums[p] += *reinterpret_cast<const typename Shape::Part*>(places.weights[p] +
                                                                      mine[r * Shape::PIECES + p] * Shape::LANES);
        }
        for (int64_t p = 0; p < Shape::PIECES; ++p) {
          if constexpr (STREAMED)
            stream<Shape::LANES>(out + places.outs[p], sums[p]);
          else
            *reinterpret_cast<typename Shape::Part*>(out + places.outs[p]) = sums[p];
        }
        continue;
      }
    if (ids == 1 && sample == nullptr)  // as most often, and known to the compiler
      for (int64_t p = 0; p < shape.pieces(); ++p)
        pool_bag<STREAMED>(shape, places.weights[p], shape.dim(pieces[p]), mine + p, 1, nullptr, out + places.outs[p]);
    else
      for (int64_t p = 0; p < shape.pieces(); ++p)
        pool_bag<STREAMED>(shape, places.weights[p], shape.dim(pieces[p]), mine + p, ids, sample, out + places.outs[p]);
  }
}

// Brings a codebook into the cache where as many of its lines are looked up, by so many ids, as it has.
template <typename Shape>
void bring(const Shape& shape, const Piece& piece, int64_t ids) {
  constexpr int64_t FLOATS = LINE / 4;
  if (ids * shape.rows() * FLOATS >= piece.rows * std::min(piece.dim, FLOATS)) sweep(piece.weights, piece.rows * piece.dim);
}

// The pooled vectors of bags [first, end) of every feature of a table; `kept`: where its rows are written to, or null.
template <typename Shape>
void pool(const Table& table, const Piece* pieces, const Batch& batch, int64_t first, int64_t end, uint32_t* kept,
          float* out) {
  const Shape shape(table, table.num_pieces);
  const int64_t stride = shape.pieces() * shape.rows(), begin = batch.offsets[table.first_feature * batch.size];
  const bool streamed = streams<Shape>(table, pieces, batch, out);
  std::vector<uint32_t> scratch;
  Places<Shape> places(shape);
  for (int64_t f = 0; f < table.num_features; ++f) {
    const int64_t* ends = batch.offsets + (table.first_feature + f) * batch.size;
    for (int64_t p = 0; p < shape.pieces(); ++p) {
      places.weights[p] = pieces[p].weights;
      places.outs[p] = batch.outs[pieces[p].first_out + f];
      bring(shape, pieces[p], ends[end] - ends[first]);
    }
    for (int64_t start = first; start < end; start += BAGS) {
      const int64_t stop = std::min(start + BAGS, end), at = ends[start], n = ends[stop] - at;
      if (kept == nullptr && static_cast<int64_t>(scratch.size()) < n * stride) scratch.resize(n * stride);
      uint32_t* rows = kept != nullptr ? kept + (at - begin) * stride : scratch.data();
      rows_of(shape, table, pieces, batch.ids + at, n, ends[end] - at, rows);
      const auto pool_them = streamed ? pool_bags<true, Shape> : pool_bags<false, Shape>;
      pool_them(shape, places, pieces, batch, ends + start, stop - start, rows, out + start * batch.width);
    }
  }
#ifdef __AVX__
  _mm_sfence();  // whoever reads the output next sees what was streamed
#endif
}

// Whether every id of a table has assignments, or is a row.
bool all_inside(const Table& table, const Batch& batch) {
  if (table.num_ids < 0) return true;
  const int64_t* bags = batch.offsets + table.first_feature * batch.size;
  uint64_t outside = 0;
  for (int64_t n = bags[0]; n < bags[table.num_features * batch.size]; ++n)
    outside |= static_cast<uint64_t>(batch.ids[n]) - static_cast<uint64_t>(table.first_id) >=
               static_cast<uint64_t>(table.num_ids);
  return outside == 0;
}

}  // namespace

extern "C" {

// out [size, width] = pooled vectors; `kept` gets the rows of every id, or is null. Returns whether every id is inside its
// table; nothing is looked up where not.
int cce_lookup(const Tables* tables, const Batch* batch, uint32_t* kept, float* out, int64_t threads) {
  std::atomic<bool> fine{true};
  share(tables->num_tables, threads, [&](int64_t t) {
    if (!all_inside(tables->tables[t], *batch)) fine = false;
  });
  if (!fine) return 0;
  if (batch->size * batch->width >= LARGE) use_huge_pages(out, batch->size * batch->width * 4);
  const std::vector<int64_t> starts = kept_starts(*tables, *batch);
  const int64_t parts = parts_of_a_table(*tables, threads, (batch->size + BAGS - 1) / BAGS);
  const int64_t bags = (batch->size + parts - 1) / parts;
  share(tables->num_tables * parts, threads, [&](int64_t i) {
    const Table& table = tables->tables[i / parts];
    const Piece* pieces = tables->pieces + table.first_piece;
    const int64_t first = std::min(i % parts * bags, batch->size), end = std::min(first + bags, batch->size);
    with_shape(table, pieces, table.num_pieces, [&](auto tag) {
      pool<typename decltype(tag)::type>(table, pieces, *batch, first, end, kept ? kept + starts[i / parts] : nullptr, out);
    });
  });
  return 1;
}

}  // extern "C"
