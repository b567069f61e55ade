// The kernel for one instruction set. Compiled once for each, with that set's flags and -DMQ_ISA=<name>_isa.
// Everything but the exported table is in an anonymous namespace and no C++ library header is used: a function shared
// with another translation unit could be linked in with instructions that the machine lacks.
#include "linear.h"

#include <math.h>
#include <string.h>

#if defined(MQ_AVX512VNNI) || defined(MQ_AVXVNNI) || defined(MQ_AVX2)
#include <immintrin.h>
#elif defined(MQ_NEON)
#include <arm_neon.h>
#endif

namespace mq {
namespace {

// An instruction set: vectors of 4 * kLanes bytes and dot(sum, x, w), which adds to each int32 lane the four products
// of its bytes. kVectors: vectors of a register tile side by side.
#if defined(MQ_AVX512VNNI)
struct V {
  static constexpr int kLanes = 16, kVectors = 4, kOffset = 0;
  using Sum = __m512i;
  using Act = __m512i;
  using Raw = __m512i;
  using Wgt = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Raw load(const int8_t* p) { return _mm512_loadu_si512(p); }
  static void save(int8_t* p, Raw v) { _mm512_storeu_si512(p, v); }
  static Raw high(Raw v) { return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(0xF0))); }
  static Raw low(Raw v) { return high(_mm512_slli_epi16(v, 4)); }
  static Wgt weight(Raw v) { return v; }
  static Act activation(int32_t four) { return _mm512_set1_epi32(four); }
  static Sum dot(Sum sum, Act x, Wgt w) { return _mm512_dpbusd_epi32(sum, x, w); }
  static void store(int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
};
#elif defined(MQ_AVXVNNI) || defined(MQ_AVX2)
struct V {
  static constexpr int kLanes = 8, kVectors = 2, kOffset = 0;
  using Sum = __m256i;
  using Raw = __m256i;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Raw load(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void save(int8_t* p, Raw v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Raw high(Raw v) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(0xF0))); }
  static Raw low(Raw v) { return high(_mm256_slli_epi16(v, 4)); }
  static void store(int32_t* p, Sum v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
#if defined(MQ_AVXVNNI)
  using Act = __m256i;
  using Wgt = __m256i;
  static Wgt weight(Raw v) { return v; }
  static Act activation(int32_t four) { return _mm256_set1_epi32(four); }
  static Sum dot(Sum sum, Act x, Wgt w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
#else
  // vpmaddubsw saturates at 16 bits, so bytes are widened to 16 bits, even and odd ones apart: the two vpmaddwd are
  // exact and leave the four products of each 32-bit lane in that lane.
  struct Pair {
    __m256i even, odd;
  };
  using Act = Pair;
  using Wgt = Pair;
  static Wgt weight(Raw v) { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)}; }
  static Act activation(int32_t four) {
    const __m256i v = _mm256_set1_epi32(four);
    return {_mm256_and_si256(v, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(v, 8)};
  }
  static Sum dot(Sum sum, Act x, Wgt w) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, w.odd));
  }
#endif
};
#elif defined(MQ_NEON)
// sdot multiplies signed bytes: the activations are shifted by -128, and 128 * row_sum is added at the end.
struct V {
  static constexpr int kLanes = 4, kVectors = 4, kOffset = 128;
  using Sum = int32x4_t;
  using Act = int8x16_t;
  using Raw = int8x16_t;
  using Wgt = int8x16_t;
  static Sum zero() { return vdupq_n_s32(0); }
  static Raw load(const int8_t* p) { return vld1q_s8(p); }
  static void save(int8_t* p, Raw v) { vst1q_s8(p, v); }
  static Raw high(Raw v) { return vandq_s8(v, vdupq_n_s8(static_cast<int8_t>(0xF0))); }
  static Raw low(Raw v) { return vshlq_n_s8(v, 4); }
  static Wgt weight(Raw v) { return v; }
  static Act activation(int32_t four) {
    return vreinterpretq_s8_s32(veorq_s32(vdupq_n_s32(four), vdupq_n_s32(static_cast<int32_t>(0x80808080u))));
  }
  static Sum dot(Sum sum, Act x, Wgt w) { return vdotq_s32(sum, w, x); }
  static void store(int32_t* p, Sum v) { vst1q_s32(p, v); }
};
#else
struct V {
  static constexpr int kLanes = 4, kVectors = 1, kOffset = 0;
  struct Sum {
    uint32_t lane[kLanes];  // unsigned: wraps without undefined behaviour
  };
  struct Raw {
    int8_t byte[4 * kLanes];
  };
  struct Act {
    uint8_t byte[4];
  };
  using Wgt = Raw;
  static Sum zero() { return Sum{}; }
  static Raw load(const int8_t* p) {
    Raw v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void save(int8_t* p, Raw v) { memcpy(p, &v, sizeof v); }
  static Raw high(Raw v) {
    for (int i = 0; i < 4 * kLanes; ++i) v.byte[i] = static_cast<int8_t>(v.byte[i] & 0xF0);
    return v;
  }
  static Raw low(Raw v) {
    for (int i = 0; i < 4 * kLanes; ++i) v.byte[i] = static_cast<int8_t>(static_cast<uint8_t>(v.byte[i]) << 4);
    return v;
  }
  static Wgt weight(Raw v) { return v; }
  static Act activation(int32_t four) {
    Act x;
    memcpy(&x, &four, 4);
    return x;
  }
  static Sum dot(Sum sum, Act x, Wgt w) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) sum.lane[i] += static_cast<uint32_t>(x.byte[j] * w.byte[4 * i + j]);
    return sum;
  }
  static void store(int32_t* p, Sum v) { memcpy(p, &v, sizeof v); }
};
#endif

constexpr int kColumns = V::kLanes * V::kVectors;  // channels of a register tile
constexpr int kBytes = 4 * V::kLanes;              // of a vector

// Register arrays stay in registers only if the loops over them are unrolled before the compiler splits arrays.
#if defined(__clang__)
#define MQ_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define MQ_UNROLL _Pragma("GCC unroll 16")
#else
#define MQ_UNROLL
#endif

// What to fetch into the second-level cache while a tile is computed: the next panel. Without it memory waits while
// the second and later tiles of a panel compute on cached weights.
struct Ahead {
  const int8_t* at;
  const int8_t* end;
  int lines;  // of 64 bytes, for each step
};

inline int32_t four_at(const uint8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return four;
}

// sums[MR][kPanel] of MR rows and kColumns channels over all of k. `steps` counts stored 256-byte groups.
template <int MR, bool kFourBit>
__attribute__((always_inline)) inline void register_tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps,
                                                          Ahead ahead, int32_t* sums) {
  typename V::Sum sum[MR][V::kVectors];
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < V::kVectors; ++v) sum[r][v] = V::zero();
  for (int64_t s = 0; s < steps; ++s, w += 4 * kPanel) {
    for (int l = 0; l < ahead.lines; ++l, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
    if constexpr (kFourBit) {
      typename V::Wgt high[V::kVectors], low[V::kVectors];
      MQ_UNROLL
      for (int v = 0; v < V::kVectors; ++v) {
        const typename V::Raw raw = V::load(w + v * kBytes);
        high[v] = V::weight(V::high(raw));
        low[v] = V::weight(V::low(raw));
      }
      MQ_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename V::Act first = V::activation(four_at(x + r * ldx + 8 * s));
        MQ_UNROLL
        for (int v = 0; v < V::kVectors; ++v) sum[r][v] = V::dot(sum[r][v], first, high[v]);
        const typename V::Act second = V::activation(four_at(x + r * ldx + 8 * s + 4));
        MQ_UNROLL
        for (int v = 0; v < V::kVectors; ++v) sum[r][v] = V::dot(sum[r][v], second, low[v]);
      }
    } else {
      typename V::Wgt weight[V::kVectors];
      MQ_UNROLL
      for (int v = 0; v < V::kVectors; ++v) weight[v] = V::weight(V::load(w + v * kBytes));
      MQ_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename V::Act four = V::activation(four_at(x + r * ldx + 4 * s));
        MQ_UNROLL
        for (int v = 0; v < V::kVectors; ++v) sum[r][v] = V::dot(sum[r][v], four, weight[v]);
      }
    }
  }
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < V::kVectors; ++v) V::store(sums + r * kPanel + v * V::kLanes, sum[r][v]);
}

template <int MR, bool kFourBit>
void rows_of_panel(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps, Ahead ahead, int32_t* sums) {
  for (int c = 0; c < kPanel; c += kColumns, ahead.lines = 0)
    register_tile<MR, kFourBit>(x, ldx, w + 4 * c, steps, ahead, sums + c);
}

using TileFn = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, Ahead, int32_t*);
const TileFn kTiles[2][kRows] = {
    {rows_of_panel<1, false>, rows_of_panel<2, false>, rows_of_panel<3, false>, rows_of_panel<4, false>,
     rows_of_panel<5, false>, rows_of_panel<6, false>},
    {rows_of_panel<1, true>, rows_of_panel<2, true>, rows_of_panel<3, true>, rows_of_panel<4, true>,
     rows_of_panel<5, true>, rows_of_panel<6, true>},
};

// Nibbles to bytes 16 * code.
void unpack(const int8_t* packed, int64_t steps, int8_t* out) {
  for (int64_t s = 0; s < steps; ++s, packed += 4 * kPanel, out += 8 * kPanel)
    for (int b = 0; b < 4 * kPanel; b += kBytes) {
      const typename V::Raw raw = V::load(packed + b);
      V::save(out + b, V::high(raw));
      V::save(out + 4 * kPanel + b, V::low(raw));
    }
}

inline uint16_t to_bfloat16(float value) {  // round to nearest, ties to even; values are finite
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Plain loops: the compiler vectorises them, and every instruction set rounds in the same way. The rounding of codes
// is that of optimum_mobilequant.numerics.integer.requantize, bit for bit.
void finish_row(const Linear& a, int64_t row, int64_t column, int width, const int32_t* row_sum, int32_t* sums) {
  const int shift = a.bits == 4 ? 4 : 0;
  const int32_t* bias = a.bias + column;
  for (int i = 0; i < width; ++i)
    sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i] >> shift) + static_cast<uint32_t>(bias[i]));
  if (V::kOffset != 0)
    for (int i = 0; i < width; ++i)
      sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) +
                                     static_cast<uint32_t>(V::kOffset) * static_cast<uint32_t>(row_sum[i]));
  if (a.weight_zero) {
    const uint32_t x_sum = static_cast<uint32_t>(a.x_sum[row]);
    for (int i = 0; i < width; ++i)
      sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) -
                                     x_sum * static_cast<uint32_t>(a.weight_zero[column + i]));
  }
  const int64_t at = row * a.n + column;
  if (a.output == kTotal) {
    memcpy(static_cast<int32_t*>(a.out) + at, sums, width * sizeof(int32_t));
    return;
  }
  float value[kPanel];
  int32_t steps[kPanel];  // from the zero point, clamped to the grid
  if (a.output == kFloat || a.output == kBFloat16) {
    const float* factor = a.factor + column;
    for (int i = 0; i < width; ++i) value[i] = static_cast<float>(sums[i]) * factor[i];
  } else {
    const int32_t* mantissa = a.mantissa + column;
    const int32_t* shift_by = a.mantissa + a.n + column;
    const int64_t low = -a.zero_point, high = a.qmax - a.zero_point;
    for (int i = 0; i < width; ++i) {
      const int64_t product = static_cast<int64_t>(sums[i]) * mantissa[i];
      const int64_t places = shift_by[i];
      int64_t v = (product + ((int64_t{1} << (places - 1)) - 1) + ((product >> places) & 1)) >> places;
      v = v < low ? low : v;
      v = v > high ? high : v;
      steps[i] = static_cast<int32_t>(v);
    }
  }
  switch (a.output) {
    case kCodesU8: {
      uint8_t* out = static_cast<uint8_t*>(a.out) + at;
      for (int i = 0; i < width; ++i) out[i] = static_cast<uint8_t>(steps[i] + a.zero_point);
      return;
    }
    case kCodesI32: {
      int32_t* out = static_cast<int32_t*>(a.out) + at;
      for (int i = 0; i < width; ++i) out[i] = steps[i] + a.zero_point;
      return;
    }
    case kGridFloat:
    case kGridBFloat16:
      for (int i = 0; i < width; ++i) value[i] = static_cast<float>(steps[i]) * a.scale;
      break;
    default:
      break;
  }
  if (a.output == kFloat || a.output == kGridFloat) {
    memcpy(static_cast<float*>(a.out) + at, value, width * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(a.out) + at;
    for (int i = 0; i < width; ++i) out[i] = to_bfloat16(value[i]);
  }
}

void run_panel(const Linear& a, int64_t panel, int64_t m0, int64_t m1, int8_t* scratch) {
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  const int32_t* row_sum = reinterpret_cast<const int32_t*>(a.packed) + panel * kPanel;
  const int64_t group_count = groups(a);
  int64_t steps = a.bits == 4 ? group_count / 2 : group_count;
  const int8_t* w = reinterpret_cast<const int8_t*>(a.packed) + panels * kPanel * 4 + panel * steps * 4 * kPanel;
  const int64_t tiles = (m1 - m0 + kRows - 1) / kRows;
  // One tile streams its own panel; several share the fetching of the next one (4 lines a step in all).
  const int lines = tiles < 2 ? 0 : static_cast<int>(tiles < 4 ? (4 + tiles - 1) / tiles : 1);
  Ahead ahead{w + steps * 4 * kPanel, w + 2 * steps * 4 * kPanel, panel + 1 < panels ? lines : 0};
  bool four_bit = a.bits == 4;
  if (four_bit && m1 - m0 >= kUnpackFrom) {
    unpack(w, steps, scratch);
    w = scratch, steps = group_count, four_bit = false;
  }
  const int64_t column = panel * kPanel;
  const int width = static_cast<int>(a.n - column < kPanel ? a.n - column : kPanel);
  int32_t sums[kRows * kPanel];
  for (int64_t row = m0; row < m1;) {
    // Tiles of even height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
    const int64_t left = m1 - row, tiles_left = (left + kRows - 1) / kRows;
    const int rows = static_cast<int>((left + tiles_left - 1) / tiles_left);
    kTiles[four_bit][rows - 1](a.x + row * a.ldx, a.ldx, w, steps, ahead, sums);
    ahead.at += 64 * ahead.lines * steps;
    if (ahead.at >= ahead.end) ahead.lines = 0;
    for (int r = 0; r < rows; ++r) finish_row(a, row + r, column, width, row_sum, sums + r * kPanel);
    row += rows;
  }
}

inline uint8_t code_of(float value, float scale, float low, float high, int32_t zero_point) {
  float v = rintf(value / scale);
  v = v < low ? low : v;
  v = v > high ? high : v;
  return static_cast<uint8_t>(static_cast<int32_t>(v) + zero_point);
}

void quantize(const void* x, int bf16, int64_t count, float scale, int32_t zero_point, uint8_t* codes) {
  const float low = static_cast<float>(-zero_point), high = static_cast<float>(255 - zero_point);
  if (bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
      float value;
      memcpy(&value, &bits, 4);
      codes[i] = code_of(value, scale, low, high, zero_point);
    }
  } else {
    const float* in = static_cast<const float*>(x);
    for (int64_t i = 0; i < count; ++i) codes[i] = code_of(in[i], scale, low, high, zero_point);
  }
}

}  // namespace

extern const Isa MQ_ISA = {run_panel, quantize};

}  // namespace mq
