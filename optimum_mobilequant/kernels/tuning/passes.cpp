// The elementwise work of tuning, each in one pass over memory: rounding to a grid and its gradients.
//
// Rounded values are those of numerics/fake.py bit for bit: division, rint, clamp and product in float32. Softmax and
// sums of gradients differ from torch's in the last places: sums are taken in lanes of float32 over a chunk and in double
// over the chunks, in the same order for any number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MQ_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MQ_CLONES
#endif
// Code without a target of its own gets its caller's where it is inlined.
#define MQ_INLINE __attribute__((always_inline))
#define MQ_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t CHUNK = 8192;  // elements that a thread takes at a time
constexpr int LANES = 16;

// Of codes less the zero point: ``low`` and ``high`` are the outermost ones.
struct Grid {
  float scale, low, high;
};

MQ_INLINE inline float snap(float x, Grid g) {
  float steps = std::nearbyint(x / g.scale);
  steps = steps < g.low ? g.low : steps;  // in this form NaN passes
  steps = steps > g.high ? g.high : steps;
  return steps * g.scale;
}

MQ_CLONES void snap_chunk(const float* x, float* out, int64_t n, Grid g) {
  for (int64_t i = 0; i < n; ++i) out[i] = snap(x[i], g);
}

struct Sums {
  double scale, clipped;
};

// ``out``: the gradient where x lies within (below, above), else 0.
MQ_CLONES void backward_chunk(
    const float* grad, const float* x, float* out, int64_t n, Grid g, float below, float above, Sums* sums) {
  float scale[LANES] = {}, clipped[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) {
      const float v = x[i + j], d = grad[i + j];
      const bool outside = v <= below || v >= above;
      const float kept = outside ? 0.0f : d;
      scale[j] += d * (snap(v, g) - (outside ? 0.0f : v));
      clipped[j] += d - kept;
      out[i + j] = kept;
    }
  }
  for (; i < n; ++i) {
    const float v = x[i], d = grad[i];
    const bool outside = v <= below || v >= above;
    scale[i % LANES] += d * (snap(v, g) - (outside ? 0.0f : v));
    clipped[i % LANES] += outside ? d : 0.0f;
    out[i] = outside ? 0.0f : d;
  }
  *sums = {0.0, 0.0};
  for (int j = 0; j < LANES; ++j) {
    sums->scale += scale[j];
    sums->clipped += clipped[j];
  }
}

// e^x for x <= 0, to about one unit in the last place, by the polynomial of the Cephes library (Moshier).
MQ_INLINE inline float exponential(float x) {
  const bool vanishes = x < -87.0f;
  x = vanishes ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return vanishes ? 0.0f : y * power;
}

// Scores become probabilities, these rounded to ``rounded`` unless null.
MQ_CLONES void probabilities_row(float* x, const float* mask, int64_t n, float scaling, Grid g, const Grid* rounded) {
  float most[LANES], sums[LANES] = {};
  for (int j = 0; j < LANES; ++j) most[j] = -INFINITY;
  auto score = [&](int64_t i, int j) MQ_INLINE {
    const float v = snap(x[i] * scaling, g) + (mask == nullptr ? 0.0f : mask[i]);
    x[i] = v;
    most[j] = v > most[j] ? v : most[j];
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) score(i + j, j);
  }
  for (; i < n; ++i) score(i, 0);
  float top = most[0];
  for (int j = 1; j < LANES; ++j) top = most[j] > top ? most[j] : top;
  for (i = 0; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) {
      x[i + j] = exponential(x[i + j] - top);
      sums[j] += x[i + j];
    }
  }
  for (; i < n; ++i) {
    x[i] = exponential(x[i] - top);
    sums[0] += x[i];
  }
  double sum = 0.0;
  for (int j = 0; j < LANES; ++j) sum += sums[j];
  const float share = static_cast<float>(1.0 / sum);
  if (rounded == nullptr) {
    for (i = 0; i < n; ++i) x[i] *= share;
  } else {
    const Grid r = *rounded;
    for (i = 0; i < n; ++i) x[i] = snap(x[i] * share, r);
  }
}

// The gradient of the scores takes the place of that of the probabilities, these take the place of themselves, rounded.
MQ_CLONES void slope_row(float* p, float* grad, int64_t n, float scaling, Grid g) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) lanes[j] += p[i + j] * grad[i + j];
  }
  for (; i < n; ++i) lanes[i % LANES] += p[i] * grad[i];
  double sum = 0.0;
  for (int j = 0; j < LANES; ++j) sum += lanes[j];
  const float mean = static_cast<float>(sum);
  for (i = 0; i < n; ++i) {
    grad[i] = (grad[i] - mean) * p[i] * scaling;
    p[i] = snap(p[i], g);
  }
}

MQ_CLONES float largest(const float* x, int64_t n) {
  float lanes[LANES];
  for (int j = 0; j < LANES; ++j) lanes[j] = x[0];
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  for (int j = 1; j < LANES; ++j) lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
  return lanes[0];
}

// KL(teacher || student) of a row of logits; with ``slope`` (or null) its gradient, q - p. ``room``: 2 * n numbers.
MQ_CLONES double divergence_row(const float* student, const float* teacher, float* slope, float* room, int64_t n) {
  const float top_s = largest(student, n), top_t = largest(teacher, n);
  float *q = room, *p = room + n;
  double sum_q = 0.0, sum_p = 0.0, apart = 0.0;
  for (int64_t start = 0; start < n; start += 2048) {
    const int64_t end = n - start < 2048 ? n : start + 2048;
    float qs[LANES] = {}, ps[LANES] = {}, parts[LANES] = {};
    auto add = [&](int64_t i, int j) MQ_INLINE {
      const float s = student[i] - top_s, t = teacher[i] - top_t;
      q[i] = exponential(s);
      p[i] = exponential(t);
      qs[j] += q[i];
      ps[j] += p[i];
      parts[j] += p[i] * (t - s);
    };
    int64_t i = start;
    for (; i + LANES <= end; i += LANES) {
      for (int j = 0; j < LANES; ++j) add(i + j, j);
    }
    for (; i < end; ++i) add(i, 0);
    for (int j = 0; j < LANES; ++j) sum_q += qs[j], sum_p += ps[j], apart += parts[j];
  }
  if (slope != nullptr) {
    const float of_q = static_cast<float>(1.0 / sum_q), of_p = static_cast<float>(1.0 / sum_p);
    for (int64_t i = 0; i < n; ++i) slope[i] = q[i] * of_q - p[i] * of_p;
  }
  return apart / sum_p - std::log(sum_p) + std::log(sum_q);
}

// A row of a weight, rescaled by its own factor and one for each column; null: 1.
struct Row {
  const float* x;
  float factor;
  bool rescaled;
  const float* columns;
};

MQ_INLINE inline float at(const Row& row, int64_t i) {
  const float x = row.rescaled ? row.x[i] * row.factor : row.x[i];
  return row.columns == nullptr ? x : x * row.columns[i];
}

// Calls ``work`` with the row in the one of its four forms that it has, so that loops need not ask.
template <class Work>
MQ_INLINE inline void in_form(const Row& row, Work work) {
  if (row.rescaled && row.columns) work([=](int64_t i) MQ_INLINE { return row.x[i] * row.factor * row.columns[i]; });
  else if (row.rescaled) work([=](int64_t i) MQ_INLINE { return row.x[i] * row.factor; });
  else if (row.columns) work([=](int64_t i) MQ_INLINE { return row.x[i] * row.columns[i]; });
  else work([=](int64_t i) MQ_INLINE { return row.x[i]; });
}

MQ_CLONES void range_row(const Row row, float* out, int64_t n, float* low, float* high) {
  in_form(row, [=](auto value) MQ_INLINE {
    float least[LANES], most[LANES];
    for (int j = 0; j < LANES; ++j) least[j] = INFINITY, most[j] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      for (int j = 0; j < LANES; ++j) {
        const float v = value(i + j);
        out[i + j] = v;
        least[j] = v < least[j] ? v : least[j];
        most[j] = v > most[j] ? v : most[j];
      }
    }
    for (; i < n; ++i) {
      const float v = out[i] = value(i);
      least[0] = v < least[0] ? v : least[0];
      most[0] = v > most[0] ? v : most[0];
    }
    float l = INFINITY, h = -INFINITY;
    for (int j = 0; j < LANES; ++j) l = least[j] < l ? least[j] : l, h = most[j] > h ? most[j] : h;
    *low = l;
    *high = h;
  });
}

MQ_CLONES void snap_row(const Row row, float* out, int64_t n, Grid g) {
  in_form(row, [=](auto value) MQ_INLINE {
    for (int64_t i = 0; i < n; ++i) out[i] = snap(value(i), g);
  });
}

struct RowSums {
  float scale, clipped, product;
};

// ``columns``: sums of grad * x over rows, where x is not clipped, are added to it.
MQ_CLONES void weight_row(
    const float* grad, const Row row, float* columns, int64_t n, Grid g, float below, float above, RowSums* sums) {
  in_form(row, [=](auto value) MQ_INLINE {
    float scale[LANES] = {}, clipped[LANES] = {}, product[LANES] = {};
    auto add = [&](int64_t i, int j) MQ_INLINE {
      const float v = value(i), d = grad[i];
      const bool outside = v <= below || v >= above;
      const float kept = outside ? 0.0f : d, p = kept * v;
      scale[j] += d * (snap(v, g) - (outside ? 0.0f : v));
      clipped[j] += d - kept;
      product[j] += p;
      columns[i] += p;
    };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      for (int j = 0; j < LANES; ++j) add(i + j, j);
    }
    for (; i < n; ++i) add(i, 0);
    double s = 0.0, c = 0.0, p = 0.0;
    for (int j = 0; j < LANES; ++j) s += scale[j], c += clipped[j], p += product[j];
    *sums = {static_cast<float>(s), static_cast<float>(c), static_cast<float>(p)};
  });
}

// The first place that holds ``wanted``, which the row has.
MQ_CLONES int64_t place_of(const Row row, int64_t n, float wanted) {
  int64_t start = 0;
  in_form(row, [&](auto value) MQ_INLINE {
    for (; start + 64 <= n; start += 64) {
      int found = 0;
      for (int j = 0; j < 64; ++j) found |= value(start + j) == wanted;
      if (found) return;
    }
  });
  while (start < n - 1 && at(row, start) != wanted) ++start;
  return start;
}

// A weight in steps with a learned offset, of a row whose codes lie in [low, high].
MQ_CLONES void offset_row(const float* base, const float* offset, float* out, int64_t n, Grid g) {
  for (int64_t i = 0; i < n; ++i) {
    float steps = std::nearbyint(base[i] + offset[i]);
    steps = steps < g.low ? g.low : steps;
    steps = steps > g.high ? g.high : steps;
    out[i] = steps * g.scale;
  }
}

MQ_CLONES float offset_backward_row(
    const float* grad, const float* base, const float* offset, float* out, int64_t n, Grid g) {
  float gain[LANES] = {};
  auto step = [&](int64_t i, int j) MQ_INLINE {
    const float place = base[i] + offset[i], d = grad[i] * g.scale;
    float steps = std::nearbyint(place);
    steps = steps < g.low ? g.low : steps;
    steps = steps > g.high ? g.high : steps;
    gain[j] += d * steps;
    out[i] = place > g.low - 0.5f && place < g.high + 0.5f ? d : 0.0f;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) step(i + j, j);
  }
  for (; i < n; ++i) step(i, 0);
  double sum = 0.0;
  for (int j = 0; j < LANES; ++j) sum += gain[j];
  return static_cast<float>(sum);
}

// Of gain * x / rms: the gradient of x, and the row's part of that of the gain, added to ``gains``.
MQ_CLONES void norm_backward_row(
    const float* grad, const float* x, float inverse, const float* gain, float* out, float* gains, int64_t n) {
  float lanes[LANES] = {};
  auto step = [&](int64_t i, int j) MQ_INLINE {
    const float normal = x[i] * inverse;
    lanes[j] += grad[i] * gain[i] * normal;
    gains[i] += grad[i] * normal;
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int j = 0; j < LANES; ++j) step(i + j, j);
  }
  for (; i < n; ++i) step(i, 0);
  double sum = 0.0;
  for (int j = 0; j < LANES; ++j) sum += lanes[j];
  const float mean = static_cast<float>(sum / n);
  for (i = 0; i < n; ++i) out[i] = (grad[i] * gain[i] - x[i] * inverse * mean) * inverse;
}

inline Row row_of(const float* x, const float* rows, const float* columns, int64_t r, int64_t n) {
  return {x + r * n, rows == nullptr ? 1.0f : rows[r], rows != nullptr, columns};
}

}  // namespace

MQ_API void mq_snap(const float* x, float* out, int64_t n, float scale, float low, float high, int threads) {
  const Grid g{scale, low, high};
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t start = c * CHUNK;
    snap_chunk(x + start, out + start, n - start < CHUNK ? n - start : CHUNK, g);
  }
}

// sums: sum(grad * (snap(x) - x if inside)) and sum(grad if clipped).
MQ_API void mq_snap_backward(
    const float* grad, const float* x, float* out, int64_t n, float scale, float low, float high, float below,
    float above, double* sums, int threads) {
  const Grid g{scale, low, high};
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<Sums> parts(chunks);
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t start = c * CHUNK, size = n - start < CHUNK ? n - start : CHUNK;
    backward_chunk(grad + start, x + start, out + start, size, g, below, above, &parts[c]);
  }
  sums[0] = sums[1] = 0.0;
  for (const Sums& part : parts) {
    sums[0] += part.scale;
    sums[1] += part.clipped;
  }
}

// Rows of products of queries and keys, of which ``period`` in turn have the rows of ``mask`` (or it is null), become
// probabilities, rounded to ``rounded`` (scale, low, high) unless null.
MQ_API void mq_probabilities(
    float* x, const float* mask, int64_t rows, int64_t columns, int64_t period, float scaling, float scale, float low,
    float high, const float* rounded, int threads) {
  const Grid g{scale, low, high};
  const Grid own = rounded == nullptr ? g : Grid{rounded[0], rounded[1], rounded[2]};
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > CHUNK)
  for (int64_t r = 0; r < rows; ++r) {
    const float* hidden = mask == nullptr ? nullptr : mask + r % period * columns;
    probabilities_row(x + r * columns, hidden, columns, scaling, g, rounded == nullptr ? nullptr : &own);
  }
}

MQ_API void mq_slope(
    float* p, float* grad, int64_t rows, int64_t columns, float scaling, float scale, float low, float high,
    int threads) {
  const Grid g{scale, low, high};
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > CHUNK)
  for (int64_t r = 0; r < rows; ++r) slope_row(p + r * columns, grad + r * columns, columns, scaling, g);
}

// Weights [rows, n], rescaled by ``rows`` and ``columns`` (or null). low, high: the range of each row.
MQ_API void mq_weight_range(
    const float* x, const float* by_row, const float* by_column, float* out, float* low, float* high, int64_t rows,
    int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n > CHUNK)
  for (int64_t r = 0; r < rows; ++r) range_row(row_of(x, by_row, by_column, r, n), out + r * n, n, low + r, high + r);
}

// scale, low, high: of each row's codes.
MQ_API void mq_weight_snap(
    const float* x, const float* by_row, const float* by_column, float* out, const float* scale, const float* low,
    const float* high, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n > CHUNK)
  for (int64_t r = 0; r < rows; ++r) {
    snap_row(row_of(x, by_row, by_column, r, n), out + r * n, n, Grid{scale[r], low[r], high[r]});
  }
}

// sums: [3, rows], of grad * (snap(x) - x if inside), of grad if clipped, of grad * x if inside. column_sums: [n], of the
// last. places: [2, rows], where a row holds its ``ends`` [2, rows].
MQ_API void mq_weight_backward(
    const float* grad, const float* x, const float* by_row, const float* by_column, const float* scale,
    const float* low, const float* high, const float* below, const float* above, const float* ends, int64_t rows,
    int64_t n, float* sums, float* column_sums, int64_t* places, int threads) {
  constexpr int64_t BLOCK = 64;  // rows whose column sums are taken together, whatever the number of threads
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  std::vector<float> parts(blocks * n);
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t r = b * BLOCK; r < rows && r < (b + 1) * BLOCK; ++r) {
      const Row row = row_of(x, by_row, by_column, r, n);
      RowSums found;
      const Grid g{scale[r], low[r], high[r]};
      weight_row(grad + r * n, row, parts.data() + b * n, n, g, below[r], above[r], &found);
      sums[r] = found.scale;
      sums[rows + r] = found.clipped;
      sums[2 * rows + r] = found.product;
      for (int end = 0; end < 2; ++end) places[end * rows + r] = place_of(row, n, ends[end * rows + r]);
    }
  }
  for (int64_t i = 0; i < n; ++i) column_sums[i] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < n; ++i) column_sums[i] += parts[b * n + i];
  }
}

// base, offset [rows, n]; step, low, high of each row.
MQ_API void mq_offset(
    const float* base, const float* offset, float* out, const float* step, const float* low, const float* high,
    int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n > CHUNK)
  for (int64_t r = 0; r < rows; ++r) {
    offset_row(base + r * n, offset + r * n, out + r * n, n, Grid{step[r], low[r], high[r]});
  }
}

// gains: [rows], the gradient of the logarithm of each step.
MQ_API void mq_offset_backward(
    const float* grad, const float* base, const float* offset, const float* step, const float* low, const float* high,
    float* out, float* gains, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * n > CHUNK)
  for (int64_t r = 0; r < rows; ++r) {
    const Grid g{step[r], low[r], high[r]};
    gains[r] = offset_backward_row(grad + r * n, base + r * n, offset + r * n, out + r * n, n, g);
  }
}

// grad, x [rows, n], inverse [rows], gain [n] -> out [rows, n], gains [n].
MQ_API void mq_norm_backward(
    const float* grad, const float* x, const float* inverse, const float* gain, float* out, float* gains, int64_t rows,
    int64_t n, int threads) {
  constexpr int64_t BLOCK = 64;
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  std::vector<float> parts(blocks * n);
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t r = b * BLOCK; r < rows && r < (b + 1) * BLOCK; ++r) {
      norm_backward_row(grad + r * n, x + r * n, inverse[r], gain, out + r * n, parts.data() + b * n, n);
    }
  }
  for (int64_t i = 0; i < n; ++i) gains[i] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < n; ++i) gains[i] += parts[b * n + i];
  }
}

// Sum of KL(teacher || student) over rows of logits [rows, n]; slope: null, or room for its gradient.
MQ_API double mq_divergence(
    const float* student, const float* teacher, float* slope, int64_t rows, int64_t n, int threads) {
  std::vector<double> found(rows);
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * n > CHUNK)
  {
    std::vector<float> room(2 * n);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      float* own = slope == nullptr ? nullptr : slope + r * n;
      found[r] = divergence_row(student + r * n, teacher + r * n, own, room.data(), n);
    }
  }
  double sum = 0.0;
  for (const double row : found) sum += row;
  return sum;
}
