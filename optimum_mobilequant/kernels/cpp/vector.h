// Vectors of one instruction set and the register tile of integer products. Included in kernel.cpp's namespace.
#pragma once

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
  static void store(int32_t* p, Sum v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
#if defined(MQ_AVXVNNI)
  static Raw high(Raw v) { return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(0xF0))); }
  static Raw low(Raw v) { return high(_mm256_slli_epi16(v, 4)); }
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
  // 4-bit codes are used as they are, from -8 to 7, and not as 16 * code: see nibble_tile.
  static Raw signed_nibble(Raw v) {
    const __m128i codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), _mm256_and_si256(v, _mm256_set1_epi8(0xF)));
  }
  static Raw high(Raw v) { return signed_nibble(_mm256_srli_epi16(v, 4)); }
  static Raw low(Raw v) { return signed_nibble(v); }
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

constexpr int kBytes = 4 * V::kLanes;  // of a vector

// Vectors of a register tile of MR rows. A single row takes a whole panel: weights are then read in the order of memory,
// which is what a row takes its time for.
template <int MR>
constexpr int vectors_of() {
#if defined(MQ_AVXVNNI) || defined(MQ_AVX2)
  return MR == 1 ? kPanel / V::kLanes : MR == 2 ? 2 * V::kVectors : V::kVectors;
#else
  return V::kVectors;
#endif
}

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

constexpr int kStepsAhead = 16;  // how far a tile that fetches for its own later columns runs ahead of itself

inline int32_t four_at(const uint8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return four;
}

// sums[MR][kPanel] of MR rows and the channels of a tile over all of k. `steps` counts stored 256-byte groups.
template <int MR, bool kFourBit>
__attribute__((always_inline)) inline void register_tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps,
                                                          Ahead ahead, int32_t* sums) {
  constexpr int kVectors = vectors_of<MR>();
  typename V::Sum sum[MR][kVectors];
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
  for (int64_t s = 0; s < steps; ++s, w += 4 * kPanel) {
    for (int l = 0; l < ahead.lines; ++l, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
    if constexpr (kFourBit) {
      typename V::Wgt high[kVectors], low[kVectors];
      MQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const typename V::Raw raw = V::load(w + v * kBytes);
        high[v] = V::weight(V::high(raw));
        low[v] = V::weight(V::low(raw));
      }
      MQ_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename V::Act first = V::activation(four_at(x + r * ldx + 8 * s));
        MQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::dot(sum[r][v], first, high[v]);
        const typename V::Act second = V::activation(four_at(x + r * ldx + 8 * s + 4));
        MQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::dot(sum[r][v], second, low[v]);
      }
    } else {
      typename V::Wgt weight[kVectors];
      MQ_UNROLL
      for (int v = 0; v < kVectors; ++v) weight[v] = V::weight(V::load(w + v * kBytes));
      MQ_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename V::Act four = V::activation(four_at(x + r * ldx + 4 * s));
        MQ_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::dot(sum[r][v], four, weight[v]);
      }
    }
  }
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < kVectors; ++v) V::store(sums + r * kPanel + v * V::kLanes, sum[r][v]);
}

#if defined(MQ_AVX2)
// The same on nibbles as codes of -8 to 7. A pair of their products is 2 * 255 * 8 at most, and eight such pairs fit 16
// bits: one vpmaddubsw and one addition for 32 products, where bytes take two vpmaddwd and two additions. The sums are
// those of 16 * code, as everywhere.
template <int MR>
__attribute__((always_inline)) inline void nibble_tile(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps,
                                                        Ahead ahead, int32_t* sums) {
  constexpr int kVectors = vectors_of<MR>();
  constexpr int kRun = 4;  // steps, of two groups each, until 16 bits are full
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[MR][kVectors];
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
  for (int64_t start = 0; start < steps; start += kRun) {
    const int64_t end = start + kRun < steps ? start + kRun : steps;
    __m256i part[MR][kVectors];
    MQ_UNROLL
    for (int r = 0; r < MR; ++r)
      MQ_UNROLL
      for (int v = 0; v < kVectors; ++v) part[r][v] = V::zero();
    for (int64_t s = start; s < end; ++s, w += 4 * kPanel) {
      for (int l = 0; l < ahead.lines; ++l, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
      __m256i high[kVectors], low[kVectors];
      MQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const __m256i raw = V::load(w + v * kBytes);
        high[v] = V::high(raw);
        low[v] = V::low(raw);
      }
      MQ_UNROLL
      for (int r = 0; r < MR; ++r) {
        const __m256i first = _mm256_set1_epi32(four_at(x + r * ldx + 8 * s));
        MQ_UNROLL
        for (int v = 0; v < kVectors; ++v)
          part[r][v] = _mm256_add_epi16(part[r][v], _mm256_maddubs_epi16(first, high[v]));
        const __m256i second = _mm256_set1_epi32(four_at(x + r * ldx + 8 * s + 4));
        MQ_UNROLL
        for (int v = 0; v < kVectors; ++v)
          part[r][v] = _mm256_add_epi16(part[r][v], _mm256_maddubs_epi16(second, low[v]));
      }
    }
    MQ_UNROLL
    for (int r = 0; r < MR; ++r)
      MQ_UNROLL
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(part[r][v], ones));
  }
  MQ_UNROLL
  for (int r = 0; r < MR; ++r)
    MQ_UNROLL
    for (int v = 0; v < kVectors; ++v) V::store(sums + r * kPanel + v * V::kLanes, _mm256_slli_epi32(sum[r][v], 4));
}
constexpr bool kUnpacks = false;  // nibbles are faster than the bytes they unpack to
#else
constexpr bool kUnpacks = true;
#endif

template <int MR, bool kFourBit>
void rows_of_panel(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps, Ahead ahead, int32_t* sums) {
  for (int c = 0; c < kPanel; c += vectors_of<MR>() * V::kLanes, ahead.lines = 0) {
#if defined(MQ_AVX2)
    if constexpr (kFourBit) {
      nibble_tile<MR>(x, ldx, w + 4 * c, steps, ahead, sums + c);
      continue;
    }
#endif
    register_tile<MR, kFourBit>(x, ldx, w + 4 * c, steps, ahead, sums + c);
  }
}

using TileFn = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, Ahead, int32_t*);
const TileFn kTiles[2][kRows] = {
    {rows_of_panel<1, false>, rows_of_panel<2, false>, rows_of_panel<3, false>, rows_of_panel<4, false>,
     rows_of_panel<5, false>, rows_of_panel<6, false>},
    {rows_of_panel<1, true>, rows_of_panel<2, true>, rows_of_panel<3, true>, rows_of_panel<4, true>,
     rows_of_panel<5, true>, rows_of_panel<6, true>},
};
