// Ids to pooled vectors of many tables, and the way back: gradients summed a row, then the optimizer's step of that row.
//
// One pass over ids a table: rows of a block of ids (stored assignments, hashes, or the ids themselves), then sums of rows
// straight into the output. Rows are kept, 4 bytes each, for the backward. Gradients add up in a buffer as large as the
// codebooks of one table, which stays in the cache; nothing is sorted.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "hashing.h"

namespace {

constexpr int64_t BAGS = 256;  // of a table whose rows are computed at a time
constexpr int64_t AHEAD = 64;  // ids whose assignments are on their way from memory
constexpr int64_t BAGS_AHEAD = 8;  // bags whose gradients are
constexpr int64_t LINE = 64;  // bytes of a cache line
constexpr int64_t LARGE = 1 << 20;  // floats of an output that is written past the cache

// Tables, pieces and batches are mirrored by lookup.py.
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

// LANES floats side by side, wherever they lie; a vector of dim floats is dim / LANES of them.
template <int LANES>
struct Lanes {
  typedef float type __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
  typedef uint64_t words __attribute__((vector_size(LANES * 8)));
  typedef uint32_t rows __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
};

template <int LANES>
float total(typename Lanes<LANES>::type lanes) {
  typename Lanes<LANES / 2>::type low, high;
  std::memcpy(&low, &lanes, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&lanes) + sizeof(low), sizeof(high));
  return total<LANES / 2>(low + high);
}

template <>
float total<1>(Lanes<1>::type lanes) {
  return lanes[0];
}

// What the compiler knows of a table: PIECES of PARTS * LANES dims and ROWS rows an id each; 0 where it does not know.
template <int PIECES_, int ROWS_, int LANES_, int PARTS_>
struct Shape {
  static constexpr int PIECES = PIECES_, ROWS = ROWS_, LANES = LANES_, PARTS = PARTS_;
  using Part = typename Lanes<LANES>::type;
  int64_t some_pieces, some_rows;
  int64_t between;  // one of an id's rows in a piece and the next: the pieces of the table
  Shape(const Table& table, int64_t count)
      : some_pieces(count), some_rows(table.rows_per_piece()), between(table.num_pieces) {}
  int64_t pieces() const { return PIECES != 0 ? PIECES : some_pieces; }
  int64_t rows() const { return ROWS != 0 ? ROWS : some_rows; }
  int64_t dim(const Piece& piece) const { return PARTS != 0 ? PARTS * LANES : piece.dim; }
};

// An array of as many elements as there are pieces.
template <typename Shape, typename Element>
struct PerPiece {
  Element known[Shape::PIECES != 0 ? Shape::PIECES : 1];
  std::vector<Element> others;
  Element* at;
  explicit PerPiece(const Shape& shape)
      : others(Shape::PIECES != 0 ? 0 : shape.pieces()), at(Shape::PIECES != 0 ? known : others.data()) {}
  Element& operator[](int64_t p) { return Shape::PIECES != 0 ? known[p] : at[p]; }
};

// Rows by assignment of ids; rows of an id are [rows][pieces].
template <typename Shape, typename Word>
void stored_rows(const Shape& shape, const Table& table, const Piece* pieces, const int64_t* ids, int64_t n, int64_t left,
                 uint32_t* rows) {
  const int64_t width = table.columns * table.stored, stride = shape.pieces() * shape.rows();
  const Word* assignments = static_cast<const Word*>(table.assignments) - table.first_id * width;
  bool straight = Shape::PIECES != 0 && table.columns == Shape::PIECES && table.stored == 1;
  for (int64_t p = 0; p < shape.pieces(); ++p) straight &= pieces[p].column == p;
  constexpr int KNOWN = Shape::PIECES != 0 ? Shape::PIECES : 1;
  typedef Word Words __attribute__((vector_size(KNOWN * sizeof(Word)), aligned(sizeof(Word)), may_alias));
  using Rows = typename Lanes<KNOWN>::rows;
  if (straight) {  // all columns in their order, as most often, and known to the compiler
    for (int64_t i = 0; i < n; ++i) {
      if (i + AHEAD < left) __builtin_prefetch(assignments + ids[i + AHEAD] * Shape::PIECES);
      const Word* words = assignments + ids[i] * Shape::PIECES;
      *reinterpret_cast<Rows*>(rows + i * stride) = __builtin_convertvector(*reinterpret_cast<const Words*>(words), Rows);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (i + AHEAD < left) __builtin_prefetch(assignments + ids[i + AHEAD] * width);
    const Word* words = assignments + ids[i] * width;
    for (int64_t s = 0; s < table.stored; ++s)
      for (int64_t p = 0; p < shape.pieces(); ++p)
        rows[i * stride + s * shape.pieces() + p] =
            static_cast<uint32_t>(s * table.level_rows + words[pieces[p].column * table.stored + s]);
  }
}

template <typename Shape>
void hashed_rows(const Shape& shape, const Table& table, const Piece* pieces, const int64_t* ids, int64_t n,
                 uint32_t* rows) {
  constexpr int KNOWN = Shape::PIECES != 0 ? Shape::PIECES : 1;
  using Words = typename Lanes<KNOWN>::words;
  using Rows = typename Lanes<KNOWN>::rows;
  const int64_t stride = shape.pieces() * shape.rows();
  const uint64_t num_rows = table.hashed_rows, from = table.hashed_from, seed = table.coefficients[0];
  for (int64_t h = 0; h < table.hashes; ++h)
    for (int64_t first = 0; first < shape.pieces(); first += KNOWN) {
      Words multipliers;
      for (int64_t p = 0; p < KNOWN; ++p)
        multipliers[p] = table.coefficients[1 + pieces[first + p].column * table.hashes + h];
      uint32_t* out = rows + (table.stored + h) * shape.pieces() + first;
      for (int64_t i = 0; i < n; ++i) {
        const Words mixed = mix64(static_cast<uint64_t>(ids[i]) ^ seed) * multipliers;
        const Words row = ((mixed >> 32) * num_rows >> 32) + from;
        *reinterpret_cast<Rows*>(out + i * stride) = __builtin_convertvector(row, Rows);
      }
    }
}

// Rows of hot ids, once all others are there.
template <typename Shape>
void hot_rows(const Shape& shape, const Table& table, int64_t n, uint32_t* rows) {
  const int64_t count = shape.pieces(), stride = count * shape.rows();
  const uint32_t hot_from = static_cast<uint32_t>(table.hot_from);
  for (int64_t h = 1; h < shape.rows(); ++h)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < count; ++p) {
        const uint32_t stored = rows[i * stride + p];
        uint32_t& hashed = rows[i * stride + h * count + p];
        hashed = stored >= hot_from ? stored : hashed;
      }
}

template <typename Shape>
void rows_of(const Shape& shape, const Table& table, const Piece* pieces, const int64_t* ids, int64_t n, int64_t left,
             uint32_t* rows) {
  if (table.assignments != nullptr) {
    const auto stored = table.bytes == 1   ? stored_rows<Shape, uint8_t>
                        : table.bytes == 2 ? stored_rows<Shape, int16_t>
                                           : stored_rows<Shape, int32_t>;
    stored(shape, table, pieces, ids, n, left, rows);
  }
  if (table.coefficients != nullptr) hashed_rows(shape, table, pieces, ids, n, rows);
  if (table.hot_from >= 0) hot_rows(shape, table, n, rows);
  if (table.assignments == nullptr && table.coefficients == nullptr)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < shape.pieces(); ++p) rows[i * shape.pieces() + p] = static_cast<uint32_t>(ids[i]);
}

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

// Brings a codebook into the cache in order, which is faster than row by row. It is read, not prefetched: processors drop
// prefetches of which too many are under way.
void sweep(const Piece& piece) {
  const volatile float* weights = piece.weights;
  for (int64_t i = 0; i < piece.rows * piece.dim; i += LINE / 4) static_cast<void>(weights[i]);
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
      if (ends[end] - ends[first] >= pieces[p].rows) sweep(pieces[p]);
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
          __builtin_prefetch(vectors + BAGS_AHEAD * batch.width + outs[p] + d);
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

// Row-wise Adagrad: m += mean(g^2), w -= lr g / (sqrt(m) + eps); plain SGD without m. Rows without a gradient stay as they
// are. The gradient is 0 afterwards.
template <typename Shape>
void step(const Shape& shape, const Piece& piece, float* gradient, const Step& settings) {
  using Part = typename Shape::Part;
  const int64_t dim = shape.dim(piece), parts = dim / Shape::LANES;
  for (int64_t row = 0; row < piece.rows; ++row) {
    Part* sum = reinterpret_cast<Part*>(gradient + row * dim);
    Part squares = {};
    for (int64_t p = 0; p < parts; ++p) squares += sum[p] * sum[p];
    const float square = total<Shape::LANES>(squares);
    if (square == 0) continue;
    float scale = settings.learning_rate;
    if (piece.momentum != nullptr)
      scale /= std::sqrt(piece.momentum[row] += square / static_cast<float>(dim)) + settings.eps;
    Part* weights = reinterpret_cast<Part*>(piece.weights + row * dim);
    for (int64_t p = 0; p < parts; ++p) {
      weights[p] -= scale * sum[p];
      sum[p] = Part{};
    }
  }
}

// Floats that are 0 at first, in huge pages where the system has some: rows are touched in no order.
class HugeBuffer {
 public:
  ~HugeBuffer() { std::free(floats_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(floats_);
      size_ = (count + PAGE / 4 - 1) / (PAGE / 4) * (PAGE / 4);
      floats_ = static_cast<float*>(std::aligned_alloc(PAGE, size_ * 4));
      if (floats_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(floats_, size_ * 4, MADV_HUGEPAGE);
#endif
      std::memset(floats_, 0, size_ * 4);
    }
    return floats_;
  }

 private:
  static constexpr int64_t PAGE = 1 << 21;
  float* floats_ = nullptr;
  int64_t size_ = 0;
};

template <typename Shape>
void backward(const Table& table, const Piece* pieces, int64_t count, const Batch& batch, const uint32_t* rows, const float* gradient,
              const Step& settings) {
  const Shape shape(table, count);
  static thread_local HugeBuffer buffer;  // 0 wherever no step is under way
  int64_t size = 0;
  std::vector<float*> sums;
  for (int64_t p = 0; p < shape.pieces(); ++p) size += pieces[p].rows * pieces[p].dim;
  float* next = settings.gradient == nullptr ? buffer.floats(size) : nullptr;
  for (int64_t p = 0; p < shape.pieces(); ++p) {
    sums.push_back(settings.gradient != nullptr ? settings.gradient + pieces[p].start : next);
    if (next != nullptr) next += pieces[p].rows * pieces[p].dim;
  }
  add_gradients(shape, table, pieces, batch, rows, gradient, sums.data());
  if (settings.gradient != nullptr) return;
  for (int64_t p = 0; p < shape.pieces(); ++p) step(shape, pieces[p], sums[p], settings);
}

template <typename Shape>
struct Tag {
  using type = Shape;
};

template <int PIECES, int ROWS, typename Work>
bool with_dim(int64_t dim, const Work& work) {
  if (dim == 4) return work(Tag<Shape<PIECES, ROWS, 4, 1>>{}), true;
  if (dim == 8) return work(Tag<Shape<PIECES, ROWS, 8, 1>>{}), true;
  if (dim == 16) return work(Tag<Shape<PIECES, ROWS, 16, 1>>{}), true;
  if (dim == 32) return work(Tag<Shape<PIECES, ROWS, 16, 2>>{}), true;
  if (dim == 64) return work(Tag<Shape<PIECES, ROWS, 16, 4>>{}), true;
  return false;
}

// Calls work with what the compiler knows of `count` pieces of a table.
template <typename Work>
void with_shape(const Table& table, const Piece* pieces, int64_t count, const Work& work) {
  const int64_t dim = pieces[0].dim, rows = table.rows_per_piece();
  bool equal = true, fours = true;
  for (int64_t p = 0; p < count; ++p) equal &= pieces[p].dim == dim, fours &= pieces[p].dim % 4 == 0;
  if (equal) {
    if (count == 4 && rows == 2 && with_dim<4, 2>(dim, work)) return;
    if (count == 8 && rows == 2 && with_dim<8, 2>(dim, work)) return;
    if (count == 1 && rows == 1 && with_dim<1, 1>(dim, work)) return;
    if (with_dim<0, 0>(dim, work)) return;
  }
  fours ? work(Tag<Shape<0, 0, 4, 0>>{}) : work(Tag<Shape<0, 0, 1, 0>>{});
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

// Where the kept rows of each table begin.
std::vector<int64_t> kept_starts(const Tables& tables, const Batch& batch) {
  std::vector<int64_t> starts;
  int64_t next = 0;
  for (int64_t t = 0; t < tables.num_tables; ++t) {
    const Table& table = tables.tables[t];
    const int64_t* bags = batch.offsets + table.first_feature * batch.size;
    starts.push_back(next);
    next += (bags[table.num_features * batch.size] - bags[0]) * table.num_pieces * table.rows_per_piece();
  }
  return starts;
}

// In how many parts a table is worked on, so that there is something to do for all threads.
int64_t parts_of_a_table(const Tables& tables, int64_t threads, int64_t most) {
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + tables.num_tables - 1) / tables.num_tables;
  return std::max<int64_t>(1, std::min(wanted, most));
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
