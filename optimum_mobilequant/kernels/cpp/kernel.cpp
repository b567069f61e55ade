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

#include "vector.h"

#include "rows.h"
#include "attention.h"
#if defined(MQ_TILES)
#include "tiles.h"
#endif

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
// scale: mantissas * 2^-shift of the panel's channels, where kDoubles.
void finish_row(const Linear& a, int64_t row, int64_t column, int width, const int32_t* row_sum, const double* scale,
                int32_t* sums) {
  const int shift = a.bits == 4 ? 4 : 0;
  if (a.bias) {
    const int32_t* bias = a.bias + column;
    for (int i = 0; i < width; ++i)
      sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i] >> shift) + static_cast<uint32_t>(bias[i]));
  } else if (shift) {
    for (int i = 0; i < width; ++i) sums[i] >>= shift;
  }
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
    int64_t ties = 1;
    if (kDoubles) {
      ties = 0;
      if (a.low) {
        const int32_t *low = a.low + column, *high = a.high + column;
        for (int i = 0; i < width; ++i)
          steps[i] = clamped32(nearest(static_cast<double>(sums[i]) * scale[i], &ties), low[i], high[i]);
      } else {
        const int32_t low = -a.zero_point, high = a.qmax - a.zero_point;
        for (int i = 0; i < width; ++i)
          steps[i] = clamped32(nearest(static_cast<double>(sums[i]) * scale[i], &ties), low, high);
      }
    }
    if (!ties) {
    } else if (a.low) {
      for (int i = 0; i < width; ++i)
        steps[i] = clamped(rounding_shift(static_cast<int64_t>(sums[i]) * mantissa[i], shift_by[i]),
                           a.low[column + i], a.high[column + i]);
    } else {
      const int64_t low = -a.zero_point, high = a.qmax - a.zero_point;
      for (int i = 0; i < width; ++i)
        steps[i] = clamped(rounding_shift(static_cast<int64_t>(sums[i]) * mantissa[i], shift_by[i]), low, high);
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
    case kSteps:
      memcpy(static_cast<int32_t*>(a.out) + at, steps, width * sizeof(int32_t));
      return;
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
  // Several tiles share the fetching of the next panel (4 lines a step in all). One tile streams its own: in the order of
  // memory where it is as wide as the panel, else its first columns fetch for the others.
  const bool strided = (m1 - m0 > 1 ? vectors_of<kRows>() : vectors_of<1>()) * V::kLanes < kPanel;
  const int lines = tiles < 2 ? strided * 4 : static_cast<int>(tiles < 4 ? (4 + tiles - 1) / tiles : 1);
  Ahead ahead{w + (tiles < 2 ? kStepsAhead : steps) * 4 * kPanel, w + 2 * steps * 4 * kPanel,
              tiles < 2 || panel + 1 < panels ? lines : 0};
  bool four_bit = a.bits == 4;
  if (kUnpacks && four_bit && m1 - m0 >= kUnpackFrom) {
    unpack(w, steps, scratch);
    w = scratch, steps = group_count, four_bit = false;
  }
  const int64_t column = panel * kPanel;
  const int width = static_cast<int>(a.n - column < kPanel ? a.n - column : kPanel);
  double scale[kPanel];
  if (kDoubles && a.mantissa && a.output != kTotal && a.output != kFloat && a.output != kBFloat16)
    for (int i = 0; i < width; ++i) scale[i] = factor_of(a.mantissa[column + i], a.mantissa[a.n + column + i]);
#if defined(MQ_TILES)
  static_assert(V::kOffset == 0, "the matrix units take activations as they are");
  if (!four_bit && m1 - m0 >= kTileRows) {
    tile_panel(a.x, a.ldx, w, steps, m0, m1, [&](int64_t row, int32_t* of_row) {
      finish_row(a, row, column, width, row_sum, scale, of_row);
    });
    return;
  }
#endif
  int32_t sums[kRows * kPanel];
  for (int64_t row = m0; row < m1;) {
    // Tiles of even height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
    const int64_t left = m1 - row, tiles_left = (left + kRows - 1) / kRows;
    const int rows = static_cast<int>((left + tiles_left - 1) / tiles_left);
    kTiles[four_bit][rows - 1](a.x + row * a.ldx, a.ldx, w, steps, ahead, sums);
    ahead.at += 64 * ahead.lines * steps;
    if (ahead.at >= ahead.end) ahead.lines = 0;
    for (int r = 0; r < rows; ++r) finish_row(a, row + r, column, width, row_sum, scale, sums + r * kPanel);
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

extern const Isa MQ_ISA = {run_panel, quantize, wide_row, centre_row, add_row, norm_row, store_row, reals_row,
                           product_row, head_row, attend};

}  // namespace mq
