// Compiled once per SIMD level: moments of blocks of activations, norms and cosines of rows.
#include <algorithm>
#include <cmath>

#include "common/cpu/vec.h"
#include "importance/cosine.h"
#include "importance/cpu/kernels.h"

namespace minitron::MINITRON_SIMD {
namespace {

using V = Vec<float>;
constexpr int64_t kL = kLanes<float>;
// Vectors taken from a row before the next row is touched: a cache line of 16-bit elements. Rows of
// activations often lie a multiple of 4 KiB apart, where eight of them fill a set of the L1 cache.
constexpr int64_t kUnroll = 64 / (kL * 2);

// Vectors of bf16 are loaded in pairs, of which the first gets the elements at even places, which takes fewer
// instructions than the order of memory; Sums::finish() undoes that. Only for the mean, which is bound by
// memory: with more moments a pair would not stay in registers.
template <int64_t kMoments, typename T>
constexpr bool kPaired = kMoments == kAbs && std::is_same_v<T, bf16>;

// The magnitudes of two vectors of floats from a row, of even and of odd places.
inline void load_magnitudes(const bf16* p, V (&out)[2]) {
  U32 raw;
  std::memcpy(&raw, p, sizeof(raw));
  raw &= 0x7fff7fffu;  // both at once
  out[0] = bit_cast<V>(raw << 16);
  out[1] = bit_cast<V>(raw & 0xffff0000u);
}

// How far ahead a row is prefetched: hardware prefetchers stop at the end of a page. Rows are read a group at
// a time, so behind the last bytes of a row comes that of the next group.
struct Ahead {
  int64_t bytes;      // how far
  int64_t row_bytes;  // from here on in the next group
  int64_t skip;       // bytes from a row's end to the beginning of that of the next group

  // The distance at the place `at` of a row.
  int64_t from(int64_t at) const { return at + bytes < row_bytes ? bytes : bytes + skip; }
};

// The sums of a block of values, in fp32 over a chain of tokens, in double over the chains.
template <int64_t kMoments>
class Sums {
 public:
  // `paired`: whether they are loaded so, see kPaired.
  Sums(void* scratch, int64_t values, bool paired) : values_(values), padded_(round_up(values, 16)) {
    paired_ = paired ? values / (kUnroll * kL) * (kUnroll * kL) : 0;
    total_ = static_cast<double*>(scratch);
    chain_ = reinterpret_cast<float*>(total_ + kNumSums * padded_);
    std::fill_n(total_, kNumSums * padded_, 0.0);
    std::fill_n(chain_, kNumSums * padded_, 0.0f);
  }

  // The scratch memory behind that of this object.
  float* scratch_end() const { return chain_ + kNumSums * padded_; }

  // Adds n <= kGroup tokens, row r of them at rows[r * apart].
  template <typename T>
  void add(const T* const* rows, int64_t apart, int64_t n, const Ahead& ahead) {
    const T* row[kGroup] = {};
    for (int64_t r = 0; r < n; ++r) row[r] = rows[r * apart];
    const float share = float(n) / float(in_chain_ + n), weight = float(in_chain_) * share;
    const auto whole = [](const T* p) { return load<float>(p); };
    int64_t c = 0;
    for (; c + kUnroll * kL <= values_; c += kUnroll * kL) {
      add_columns<kUnroll>(row, n, c, share, weight, ahead, whole);
    }
    for (; c + kL <= values_; c += kL) add_columns<1>(row, n, c, share, weight, ahead, whole);
    if (const int64_t left = values_ - c) {
      add_columns<1>(row, n, c, share, weight, ahead,
                     [=](const T* p) { return load_partial<float>(p, left, 0.0f); });
    }
    in_chain_ += n;
    if (in_chain_ >= kChain) flush();
  }

  // Writes the sums; returns the number of tokens added.
  int64_t finish(float* sums, int64_t values, int64_t sum_stride) {
    flush();
    for (int64_t k = 0; k < kNumSums; ++k) {
      // what was kept is the mean, but what adds up over ranks is the sum
      const double scale = (kMoments & kCentred) && k == kNumSums - 2 ? double(tokens_) : 1.0;
      const double* total = total_ + k * padded_;
      float* sum = sums + k * sum_stride;
      int64_t c = 0;
      for (; c < paired_; c += 2 * kL) {
        for (int64_t i = 0; i < kL; ++i) {
          sum[c + 2 * i] = float(total[c + i] * scale);
          sum[c + 2 * i + 1] = float(total[c + kL + i] * scale);
        }
      }
      for (; c < values; ++c) sum[c] = float(total[c] * scale);
    }
    return tokens_;
  }

 private:
  static constexpr int64_t kNumSums = num_sums(kMoments);

  float* chain(int64_t k) const { return chain_ + k * padded_; }

  template <int64_t kN, typename T, typename Load>
  void add_columns(const T* const (&rows)[kGroup], int64_t n, int64_t c, float share, float weight,
                   const Ahead& distance, Load&& load_at) {
    V magnitude[kN] = {}, square[kN] = {}, pivot[kN] = {}, shift[kN] = {}, shift_square[kN] = {};
    if constexpr (kMoments & kCentred) {
      // around the mean so far, so that little cancels; in a new chain around the first token
      for (int64_t j = 0; j < kN; ++j) {
        pivot[j] = in_chain_ ? load<float>(chain(kNumSums - 2) + c + j * kL) : load_at(rows[0] + c + j * kL);
      }
    }
    const int64_t ahead = c * sizeof(T) + distance.from(c * sizeof(T));
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t at = 0; at < int64_t(kN * kL * sizeof(T)); at += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r]) + ahead + at);
      }
      if constexpr (kPaired<kMoments, T> && kN % 2 == 0) {
        for (int64_t j = 0; j < kN; j += 2) {
          V pair[2];
          load_magnitudes(rows[r] + c + j * kL, pair);
          magnitude[j] += pair[0], magnitude[j + 1] += pair[1];
        }
        continue;
      }
      for (int64_t j = 0; j < kN; ++j) {
        const V v = load_at(rows[r] + c + j * kL);
        if constexpr (kMoments & kAbs) magnitude[j] += bit_cast<V>(bit_cast<U32>(v) & 0x7fffffffu);
        if constexpr (kMoments & kSquare) square[j] += v * v;
        if constexpr (kMoments & kCentred) {
          const V d = v - pivot[j];
          shift[j] += d;
          shift_square[j] += d * d;
        }
      }
    }
    int64_t k = 0;
    const auto accumulate = [&](const V* part) {
      for (int64_t j = 0; j < kN; ++j) {
        float* sum = chain(k) + c + j * kL;
        store(sum, load<float>(sum) + part[j]);
      }
      ++k;
    };
    if constexpr (kMoments & kAbs) accumulate(magnitude);
    if constexpr (kMoments & kSquare) accumulate(square);
    if constexpr (kMoments & kCentred) {
      // Chan's rule merges mean and m2 of the chain with those of the group
      for (int64_t j = 0; j < kN; ++j) {
        float *mean = chain(k) + c + j * kL, *m2 = chain(k + 1) + c + j * kL;
        const V offset = shift[j] / splat(float(n)), group_m2 = shift_square[j] - offset * shift[j];
        const V before = load<float>(mean);
        const V delta = in_chain_ ? offset : V{};
        store(mean, in_chain_ ? before + delta * splat(share) : pivot[j] + offset);
        store(m2, load<float>(m2) + group_m2 + delta * delta * splat(weight));
      }
    }
  }

  void flush() {
    if (in_chain_ == 0) return;
    for (int64_t k = 0; k < kNumSums - (kMoments & kCentred ? 2 : 0); ++k) {
      double* total = total_ + k * padded_;
      for (int64_t c = 0; c < padded_; ++c) total[c] += chain(k)[c];
    }
    if constexpr (kMoments & kCentred) {
      double *mean = total_ + (kNumSums - 2) * padded_, *m2 = mean + padded_;
      const double share = double(in_chain_) / double(tokens_ + in_chain_), weight = double(tokens_) * share;
      for (int64_t c = 0; c < padded_; ++c) {
        const double delta = chain(kNumSums - 2)[c] - mean[c];
        mean[c] += delta * share;
        m2[c] += chain(kNumSums - 1)[c] + delta * delta * weight;
      }
    }
    tokens_ += in_chain_;
    in_chain_ = 0;
    std::fill_n(chain_, kNumSums * padded_, 0.0f);
  }

  int64_t values_, paired_;
  int64_t padded_, tokens_ = 0, in_chain_ = 0;
  double* total_;
  float* chain_;
};

template <int kBytes>
struct LanesOf {
  typedef float type __attribute__((vector_size(kBytes)));
};

// Adds up halves of a vector in registers, not lane by lane: a head may have only 64 elements, and then this
// takes as long as its products.
template <int kBytes>
float tree(const typename LanesOf<kBytes>::type& v) {  // by reference: no ABI has vectors this long
  if constexpr (kBytes == 2 * sizeof(float)) {
    return v[0] + v[1];
  } else {
    typename LanesOf<kBytes / 2>::type half[2];
    std::memcpy(&half, &v, sizeof(v));
    return tree<kBytes / 2>(half[0] + half[1]);
  }
}

template <size_t kN>
float sum_of(const V (&parts)[kN]) {
  V sum = parts[0];
  for (size_t j = 1; j < kN; ++j) sum += parts[j];
  return tree<MINITRON_VECTOR_BYTES>(sum);
}

// Calls f(chain, vector of x, vector of y or 0) along x and y [n], in kN chains, which hide the additions'
// latency; what lies `ahead` bytes further is prefetched.
template <int64_t kN, typename T, typename F>
void each_vector(const T* x, const T* y, int64_t n, int64_t ahead, F&& f) {
  int64_t c = 0;
  for (; c + kN * kL <= n; c += kN * kL) {
    for (int64_t at = 0; at < int64_t(kN * kL * sizeof(T)); at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + c) + ahead + at);
      if (y) __builtin_prefetch(reinterpret_cast<const char*>(y + c) + ahead + at);
    }
    for (int64_t j = 0; j < kN; ++j) {
      f(j, load<float>(x + c + j * kL), y ? load<float>(y + c + j * kL) : V{});
    }
  }
  for (; c < n; c += kL) {
    const int64_t left = std::min(kL, n - c);
    f(0, load_partial<float>(x + c, left, 0.0f), y ? load_partial<float>(y + c, left, 0.0f) : V{});
  }
}

// ||x||: nothing cancels, so fp32 is enough.
template <typename T>
float norm(const T* x, int64_t n, int64_t ahead) {
  V square[4] = {};
  each_vector<4>(x, static_cast<const T*>(nullptr), n, ahead, [&](int64_t j, V a, V) { square[j] += a * a; });
  return std::sqrt(sum_of(square));
}

template <typename T>
float distance(const T* x, const T* y, int64_t n, int64_t ahead) {
  V xx[2] = {}, xy[2] = {}, yy[2] = {}, xd[2] = {}, dd[2] = {};
  each_vector<2>(x, y, n, ahead, [&](int64_t j, V a, V b) {
    const V d = b - a;
    xx[j] += a * a;
    xy[j] += a * b;
    yy[j] += b * b;
    xd[j] += a * d;
    dd[j] += d * d;
  });
  const double norms = std::sqrt(double(sum_of(xx))) * std::sqrt(double(sum_of(yy)));
  return float(cosine_distance({sum_of(xx), sum_of(xy), sum_of(yy), sum_of(xd), sum_of(dd)}, norms));
}

constexpr int64_t kLongRow = 16 << 10;  // bytes
constexpr int64_t kAhead = 512;         // bytes, along one row
// Bytes, along each of the rows of a group: the best on the processors that were tried, by what they have.
constexpr int64_t kGroupAhead = MINITRON_VECTOR_BYTES == 64 ? 512 : 256;
// The rows of a group are this many tokens apart. So groups, one after the other, read kGroup long stretches
// side by side; rows that follow each other would be as many short ones that all end at once.
constexpr int64_t kApart = 8;

// next: bytes from a row to that of the next group. Short rows are prefetched two groups ahead.
Ahead ahead_of(int64_t row_bytes, int64_t next) {
  if (row_bytes < 2 * kGroupAhead) return {2 * next, 0, 0};
  return {kGroupAhead, row_bytes, next - row_bytes};
}

template <int64_t kMoments, typename T>
int64_t moments(const MomentsTask& task, void* scratch) {
  // norms of heads are padded to whole vectors: there are few of them
  const int64_t lanes = task.heads ? round_up(task.values, kL) : task.values;
  const int64_t row_bytes = task.values * task.head_dim * sizeof(T);
  // heads are read row after row; short ones and pieces of rows are prefetched some tokens ahead
  const int64_t along = row_bytes >= kLongRow && row_bytes == task.stride ? kAhead : 2 * kGroup * task.stride;
  Sums<kMoments> sums(scratch, lanes, !task.heads && kPaired<kMoments, T>);
  float* norms = sums.scratch_end();
  if (task.heads) std::fill_n(norms, kGroup * lanes, 0.0f);
  const T* rows[kGroup * kApart];
  const auto add_heads = [&](int64_t n) {
    const float* heads[kGroup];
    for (int64_t r = 0; r < n; ++r) {
      float* out = norms + r * lanes;
      for (int64_t m = 0; m < task.values; ++m) {
        out[m] = norm(rows[r] + m * task.head_dim, task.head_dim, along);
      }
      heads[r] = out;
    }
    sums.add(heads, 1, n, Ahead{});
  };
  const auto add = [&](int64_t n) {
    if (task.heads) return add_heads(n);
    if (n == kGroup * kApart) {
      for (int64_t i = 0; i < kApart; ++i) {
        const int64_t next = i + 1 < kApart ? 1 : kGroup * kApart - i;
        sums.add(rows + i, kApart, kGroup, ahead_of(row_bytes, next * task.stride));
      }
      return;
    }
    for (int64_t i = 0; i < n; i += kGroup) {
      sums.add(rows + i, 1, std::min(kGroup, n - i), ahead_of(row_bytes, kGroup * task.stride));
    }
  };
  const int64_t most = task.heads ? kGroup : kGroup * kApart;
  int64_t n = 0;
  for (int64_t t = 0; t < task.tokens; ++t) {
    if (task.mask && !task.mask[t]) continue;
    rows[n++] = reinterpret_cast<const T*>(task.x + t * task.stride);
    if (n == most) add(n), n = 0;
  }
  if (n) add(n);
  return sums.finish(task.sums, task.values, task.sum_stride);
}

template <typename T>
void rows(const RowsTask& task) {
  const auto row = [](const char* base, int64_t stride, int64_t r) {
    return reinterpret_cast<const T*>(base + r * stride);
  };
  for (int64_t r = 0; r < task.rows; ++r) {
    const T* x = row(task.x, task.x_stride, r);
    task.out[r] =
        task.pair ? distance(x, row(task.y, task.y_stride, r), task.n, kAhead) : norm(x, task.n, kAhead);
  }
}

}  // namespace

const ImportanceKernels& importance_kernels() {
  static const ImportanceKernels table{
      [](const MomentsTask& task, DType dtype, int64_t which, void* scratch) {
        int64_t tokens = 0;
        dispatch_readable<float>(dtype, [&](auto element) {
          tokens = dispatch_moments(
              which, [&](auto constant) { return moments<constant(), decltype(element)>(task, scratch); });
        });
        return tokens;
      },
      [](const RowsTask& task, DType dtype) {
        dispatch_readable<float>(dtype, [&](auto element) { rows<decltype(element)>(task); });
      }};
  return table;
}

}  // namespace minitron::MINITRON_SIMD
