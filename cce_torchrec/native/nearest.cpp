// The nearest of many centroids, exactly, with bounds that say which groups of centroids need not be looked at.
//
// Centroids are put in groups of a few vectors. A *bound* of a point and a group is a proven lower bound on the distance to
// the group's nearest centroid; it is stored plus the drift (how far any centroid of the group can have moved so far), so
// that it stays valid, without being touched, when less the drift by now. A dense pass over 4 vectors of points sets all
// bounds; then a point looks at its old centroid's group and at the groups whose bound is not above the best distance.
// Scores are |c|^2 - 2 x.c in float32 with the origin amid the centroids; where rounding could have decided between the
// best and the runner-up, all distances are computed again from differences in float64.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // numbers of a vector
#else
constexpr int W = 8;
#endif
constexpr int P = W == 16 ? 4 : 2;  // vectors of points of a dense pass
constexpr int Q = 4;                // centroids at a time of a dense pass
constexpr int B = P * W;            // points of a block

typedef float Vector __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(W * 4), aligned(4), may_alias));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float DOWN = 1 - 0x1p-21f, UP = 1 + 0x1p-21f;  // more than a few roundings

inline Vector all(float value) { return value - Vector{}; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
inline Vector larger(Vector a, Vector b) { return a < b ? b : a; }

inline uint32_t where_at_most(Vector a, Vector b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#else
  const Ints at_most = a <= b;
  uint32_t bits = 0;
  for (int lane = 0; lane < W; ++lane) bits |= (at_most[lane] & 1u) << lane;
  return bits;
#endif
}

inline float least(Vector a) {
#ifdef __AVX512F__
  return _mm512_reduce_min_ps((__m512)a);
#else
  for (int half = W / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) a[lane] = std::min(a[lane], a[lane + half]);
  return a[0];
#endif
}

template <typename T>
struct Array {
  explicit Array(size_t size) : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 127) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  T& operator[](size_t at) const { return data[at]; }
  T* data;
};

struct Problem {
  const float* points;  // [n, D]
  int64_t n, D;
  const float* centroids;  // [K, D]
  int64_t K;
  const float* origin;   // [D]
  const int32_t* order;  // [G * vectors * W]: the centroid at each place of the groups, -1 for none
  int64_t G, vectors;    // groups, and vectors of a group
  float rounding;        // a score is wrong by at most this share of (|x| + |c|)^2
  float* bounds;         // [n, stride], or null: the distances are wanted once only
  int64_t stride;        // G, rounded up to a multiple of W
  const float* drift;    // [stride]: of each group since the bounds began
  bool fresh;            // there are no bounds yet
  int64_t* assignment;   // [n]: the old ones, unless fresh, and the result
  float* distances;      // [n]: squared
};

// What all threads read.
struct Packed {
  explicit Packed(const Problem& p)
      : scores(p.G * p.vectors * p.D * W), norms(p.G * p.vectors * W), group_of(p.K), transposed(p.D * p.K) {
    for (int64_t place = 0; place < p.G * p.vectors * W; ++place) {
      const int64_t k = p.order[place];
      float* to = scores.data + place / W * p.D * W + place % W;
      double norm = 0;
      for (int64_t d = 0; d < p.D; ++d) {
        to[d * W] = k < 0 ? 0 : p.centroids[k * p.D + d] - p.origin[d];
        norm += static_cast<double>(to[d * W]) * to[d * W];
      }
      norms[place] = k < 0 ? INF : static_cast<float>(norm);
      if (k >= 0) group_of[k] = static_cast<int32_t>(place / (p.vectors * W));
    }
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t d = 0; d < p.D; ++d) transposed[d * p.K + k] = p.centroids[k * p.D + d];
  }
  Array<float> scores;  // [G * vectors, D, W], less the origin
  Array<float> norms;   // [G * vectors, W]
  Array<int32_t> group_of;
  Array<float> transposed;  // [D, K], as given
};

// What each thread has of its own.
struct Workspace {
  explicit Workspace(const Problem& p)
      : columns(p.D * B), rows(p.D * B), squares(B), first(B), minima(p.G * B), bounds(B * p.stride), exact(p.K) {}
  Array<float> columns;   // [D, B]: -2 (x - origin)
  Array<float> rows;      // [B, D]: the same
  Array<float> squares;   // [B]: |x - origin|^2
  Array<int32_t> first;   // [B]: the group to look at first
  Array<float> minima;    // [G, B]
  Array<float> bounds;    // [B, stride]
  Array<double> exact;    // [K]
};

// A proven lower bound on the distance, of a score and |x|^2.
inline float lower(float score, float square, float rounding) {
  const float proven = (score + square) * (1 - 4 * rounding) - 8 * rounding * square;
  return std::sqrt(std::max(proven, 0.0f)) * DOWN;
}

inline float upper(float score, float square, float rounding) {
  const float proven = (score + square) * (1 + 4 * rounding) + 8 * rounding * square;
  return std::sqrt(std::max(proven, 0.0f)) * UP;
}

template <int DIM>
class Kernel {
 public:
  Kernel(const Problem& problem, const Packed& packed)
      : p(problem), packed(packed), work(problem) {}

  void block(int64_t start) {
    const int size = static_cast<int>(std::min<int64_t>(B, p.n - start));
    load(start, size);
    float* bounds = p.bounds != nullptr ? p.bounds + start * p.stride : work.bounds.data;
    if (p.fresh)
      dense(size, bounds);
    else
      for (int i = 0; i < size; ++i) work.first[i] = packed.group_of[p.assignment[start + i]];
    for (int i = 0; i < size; ++i) {
      const int64_t k = search(i, start + i, bounds + i * p.stride);
      p.assignment[start + i] = k;
      p.distances[start + i] = distance(start + i, k);
    }
  }

 private:
  int64_t dims() const { return DIM != 0 ? DIM : p.D; }

  void load(int64_t start, int size) {
    if (size < B) std::memset(work.columns.data, 0, dims() * B * sizeof(float));
    for (int i = 0; i < size; ++i) {
      const float* x = p.points + (start + i) * dims();
      float partial[W] = {};
      for (int64_t d = 0; d < dims(); ++d) {
        const float centred = x[d] - p.origin[d];
        partial[d % W] += centred * centred;
        work.rows[i * dims() + d] = -2 * centred;
        if (p.fresh) work.columns[d * B + i] = -2 * centred;
      }
      float square = 0;
      for (float part : partial) square += part;
      work.squares[i] = square;
    }
  }

  // All bounds of a block, and the group that holds its nearest centroid.
  void dense(int size, float* bounds) {
    Vector best[P];
    Ints first[P] = {};
    for (int j = 0; j < P; ++j) best[j] = all(INF);
    for (int64_t g = 0; g < p.G; ++g) {
      Vector minimum[P];
      for (int j = 0; j < P; ++j) minimum[j] = all(INF);
      for (int64_t v = g * p.vectors; v < (g + 1) * p.vectors; ++v)
        for (int lane = 0; lane < W; lane += Q) four_minima(v, lane, minimum);
      for (int j = 0; j < P; ++j) {
        const Ints less = minimum[j] < best[j];
        first[j] = less ? static_cast<int32_t>(g) - Ints{} : first[j];
        best[j] = smaller(minimum[j], best[j]);
        *reinterpret_cast<Vector*>(&work.minima[g * B + j * W]) = minimum[j];
      }
    }
    std::memcpy(work.first.data, first, sizeof first);
    for (int64_t g = 0; g < p.G; ++g) {
      float proven[B];
      for (int i = 0; i < B; ++i) proven[i] = lower(work.minima[g * B + i], work.squares[i], p.rounding) + p.drift[g];
      for (int i = 0; i < size; ++i) bounds[i * p.stride + g] = proven[i];
    }
    for (int i = 0; i < size; ++i)
      for (int64_t g = p.G; g < p.stride; ++g) bounds[i * p.stride + g] = INF;
  }

  void four_minima(int64_t v, int lane, Vector* minimum) {
    const float* centroid = packed.scores.data + v * dims() * W + lane;
    Vector score[Q][P];
    for (int q = 0; q < Q; ++q)
      for (int j = 0; j < P; ++j) score[q][j] = all(packed.norms[v * W + lane + q]);
    for (int64_t d = 0; d < dims(); ++d) {
      Vector x[P];
      for (int j = 0; j < P; ++j) x[j] = *reinterpret_cast<const Vector*>(&work.columns[d * B + j * W]);
      for (int q = 0; q < Q; ++q)
        for (int j = 0; j < P; ++j) score[q][j] += x[j] * centroid[d * W + q];
    }
    for (int q = 0; q < Q; ++q)
      for (int j = 0; j < P; ++j) minimum[j] = smaller(score[q][j], minimum[j]);
  }

  // The nearest centroid of point i of the block; sharpens the bounds of the groups it looks at.
  int64_t search(int i, int64_t n, float* bounds) {
    const float* x = &work.rows[i * dims()];
    Vector spread[DIM != 0 ? DIM : 1];  // in registers, where they are few
    for (int64_t d = 0; d < DIM; ++d) spread[d] = all(x[d]);
    const auto coordinate = [&](int64_t d) { return DIM != 0 ? spread[d] : all(x[d]); };
    const float square = work.squares[i];
    Vector best = all(INF), second = all(INF);
    Ints vector_of = {};
    float least_score = INF, reach = INF;
    const auto look = [&](int64_t g) {
      Vector nearest = all(INF);
      for (int64_t v = g * p.vectors; v < (g + 1) * p.vectors; ++v) {
        const float* centroid = packed.scores.data + v * dims() * W;
        Vector score = *reinterpret_cast<const Vector*>(&packed.norms[v * W]);
        Vector odd = {};  // two sums at a time take half as long
        for (int64_t d = 0; d + 1 < dims(); d += 2) {
          score += coordinate(d) * *reinterpret_cast<const Vector*>(centroid + d * W);
          odd += coordinate(d + 1) * *reinterpret_cast<const Vector*>(centroid + (d + 1) * W);
        }
        if (dims() % 2) score += coordinate(dims() - 1) * *reinterpret_cast<const Vector*>(centroid + (dims() - 1) * W);
        score += odd;
        const Ints less = score < best;
        second = smaller(second, larger(score, best));
        vector_of = less ? static_cast<int32_t>(v) - Ints{} : vector_of;
        best = smaller(score, best);
        nearest = smaller(score, nearest);
      }
      const float minimum = least(nearest);
      bounds[g] = lower(minimum, square, p.rounding) + p.drift[g];
      if (minimum < least_score) {
        least_score = minimum;
        reach = upper(minimum, square, p.rounding);
      }
    };
    const int64_t first = work.first[i];
    look(first);
    for (int64_t from = 0; from < p.G; from += W) {
      const Vector now = *reinterpret_cast<Vector*>(bounds + from) * DOWN - *reinterpret_cast<const Vector*>(p.drift + from);
      for (uint32_t open = where_at_most(now, all(reach)); open != 0; open &= open - 1) {
        const int lane = __builtin_ctz(open);
        if (from + lane != first && now[lane] <= reach) look(from + lane);
      }
    }
    // Either of two scores is wrong by at most rounding * (|x| + |c|)^2, and |c| <= |x| + d: 16 |x|^2 + 4 d^2 covers both.
    const float close = least_score + p.rounding * (20 * square + 4 * least_score);
    const uint32_t ties = where_at_most(best, all(close));
    if ((ties & (ties - 1)) != 0 || where_at_most(second, all(close)) != 0 || ties == 0) return by_differences(n);
    const int lane = __builtin_ctz(ties);
    return p.order[static_cast<int64_t>(vector_of[lane]) * W + lane];
  }

  int64_t by_differences(int64_t n) {
    double* exact = work.exact.data;
    std::fill(exact, exact + p.K, 0.0);
    for (int64_t d = 0; d < dims(); ++d) {
      const double x = p.points[n * dims() + d];
      const float* centroid = packed.transposed.data + d * p.K;
      for (int64_t k = 0; k < p.K; ++k) exact[k] += (x - centroid[k]) * (x - centroid[k]);
    }
    return std::min_element(exact, exact + p.K) - exact;
  }

  float distance(int64_t n, int64_t k) {
    const float *x = p.points + n * dims(), *centroid = p.centroids + k * dims();
    float partial[8] = {};
    int64_t d = 0;
    for (; d + 8 <= dims(); d += 8)
      for (int j = 0; j < 8; ++j) partial[j] += (x[d + j] - centroid[d + j]) * (x[d + j] - centroid[d + j]);
    for (; d < dims(); ++d) partial[0] += (x[d] - centroid[d]) * (x[d] - centroid[d]);
    return ((partial[0] + partial[1]) + (partial[2] + partial[3])) + ((partial[4] + partial[5]) + (partial[6] + partial[7]));
  }

  const Problem& p;
  const Packed& packed;
  Workspace work;
};

constexpr int64_t CHUNK = 16 * B;  // points a thread takes at a time

template <int DIM>
void take_chunks(const Problem& p, const Packed& packed, std::atomic<int64_t>& next, std::atomic<bool>& failed) {
  try {
    Kernel<DIM> kernel(p, packed);
    for (int64_t chunk = next.fetch_add(CHUNK); chunk < p.n; chunk = next.fetch_add(CHUNK))
      for (int64_t start = chunk; start < std::min(chunk + CHUNK, p.n); start += B) kernel.block(start);
  } catch (...) {
    failed = true;
  }
}

}  // namespace

extern "C" {

int64_t cce_lanes() { return W; }

// Returns 0 where it failed; the arguments are those of Problem.
int cce_nearest(const float* points, int64_t n, int64_t D, const float* centroids, int64_t K, const float* origin,
                const int32_t* order, int64_t G, int64_t vectors, float rounding, float* bounds, const float* drift,
                int fresh, int64_t* assignment, float* distances, int64_t threads) try {
  const Problem p = {points, n,        D,      centroids, K,     origin,     order,      G,
                     vectors, rounding, bounds, (G + W - 1) / W * W, drift, fresh != 0, assignment, distances};
  const Packed packed(p);
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    const auto take = D == 4 ? take_chunks<4> : D == 8 ? take_chunks<8> : D == 16 ? take_chunks<16> : take_chunks<0>;
    take(p, packed, next, failed);
  };
  std::vector<std::thread> others;
  others.reserve(threads);
  try {
    for (int64_t thread = 1; thread < std::min(threads, (n + CHUNK - 1) / CHUNK); ++thread) others.emplace_back(work);
  } catch (...) {  // no more threads to be had: those there are do it
  }
  work();
  for (std::thread& other : others) other.join();
  return !failed;
} catch (...) {
  return 0;
}

// moments[assignment[i]] += weights[i] * (points[i], 1); moments is [K, D + 1].
void cce_add_moments(const float* points, int64_t n, int64_t D, const double* weights, const int64_t* assignment,
                     double* moments) {
  for (int64_t i = 0; i < n; ++i) {
    double* moment = moments + assignment[i] * (D + 1);
    for (int64_t d = 0; d < D; ++d) moment[d] += weights[i] * points[i * D + d];
    moment[D] += weights[i];
  }
}

}  // extern "C"
