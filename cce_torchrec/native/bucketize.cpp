// Rows to the ranks that hold them: bags are split by rank, and rows counted from the rank's first.

#include <cstdint>
#include <vector>

namespace {

// row / block for rows below 2^31 without a division: row * magic / 2^63 with magic = ceil(2^63 / block).
struct Divider {
  explicit Divider(int64_t block) : magic(((uint64_t{1} << 63) + block - 1) / block) {}
  int64_t operator()(int64_t row) const {
    return static_cast<int64_t>((static_cast<unsigned __int128>(row) * magic) >> 63);
  }
  uint64_t magic;
};

}  // namespace

extern "C" {

// Feature f has bags of lengths[f, b] rows, each below 2^31; rank w holds the rows from w * blocks[f] on.
//   out_lengths [ranks, features, bags] zeroed, out_rows [rows], out_weights [rows] or null
void cce_bucketize(const int64_t* rows, const float* weights, const int64_t* lengths, const int64_t* blocks,
                   int64_t features, int64_t bags, int64_t ranks, int32_t* out_lengths, int32_t* out_rows,
                   float* out_weights) {
  std::vector<int64_t> next(ranks * features, 0);  // first the number of rows, then where the next one goes
  int64_t at = 0;
  for (int64_t f = 0; f < features; ++f) {
    const Divider rank_of(blocks[f]);
    for (int64_t b = 0; b < bags; ++b) {
      for (const int64_t end = at + lengths[f * bags + b]; at < end; ++at) {
        const int64_t place = rank_of(rows[at]) * features + f;
        ++out_lengths[place * bags + b];
        ++next[place];
      }
    }
  }
  int64_t total = 0;
  for (auto& place : next) {
    const int64_t count = place;
    place = total;
    total += count;
  }
  at = 0;
  for (int64_t f = 0; f < features; ++f) {
    const Divider rank_of(blocks[f]);
    int64_t count = 0;
    for (int64_t b = 0; b < bags; ++b) count += lengths[f * bags + b];
    for (const int64_t end = at + count; at < end; ++at) {
      const int64_t rank = rank_of(rows[at]);
      const int64_t to = next[rank * features + f]++;
      out_rows[to] = static_cast<int32_t>(rows[at] - rank * blocks[f]);
      if (out_weights != nullptr) out_weights[to] = weights[at];
    }
  }
}

}  // extern "C"
