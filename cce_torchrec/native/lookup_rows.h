// Ids to rows: stored assignments, hashes, or the ids themselves.

#pragma once

#include <cstdint>

#include "hashing.h"
#include "lookup_shapes.h"
#include "memory.h"

namespace {

constexpr int64_t AHEAD = 128;  // ids whose assignments are on their way from memory

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
      if (i + AHEAD < left) prefetch(assignments + ids[i + AHEAD] * Shape::PIECES);
      const Word* words = assignments + ids[i] * Shape::PIECES;
      *reinterpret_cast<Rows*>(rows + i * stride) = __builtin_convertvector(*reinterpret_cast<const Words*>(words), Rows);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    if (i + AHEAD < left) prefetch(assignments + ids[i + AHEAD] * width);
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

}  // namespace
