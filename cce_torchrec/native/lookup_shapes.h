// What the compiler knows of a table, so that the loops over its pieces, rows and dims unroll.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "lookup_tables.h"

namespace {

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
inline float total<1>(Lanes<1>::type lanes) {
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

}  // namespace
