// Integer linear layer on CPUs: uint8 activations, int8 or int4 weights, int32 accumulators, three kinds of output.
//
// Packed weights (made by mq_pack), for an [n, k] matrix of signed codes:
//   int32 row_sum[panels * 64]                    sum of the codes of each output channel
//   8 bits: int8  [panels][k4][64][4]             panels = ceil(n / 64), k4 = ceil(k / 4)
//   4 bits: uint8 [panels][k4 / 2][64][4]         byte = code at 4-group 2p in the high nibble, at 2p + 1 in the low
// so that one vector load brings four consecutive k of 16 (512 bits) channels: the operand of a dot-product
// instruction. Missing rows and columns are zero. A nibble is used as the int8 value 16 * code (its sign comes free);
// the sum is shifted back by 4 at the end, exactly.
//
// No torch header is included: the library is the same for every torch version, and builds in seconds.
#pragma once
#include <stdint.h>

namespace mq {

constexpr int kPanel = 64;     // output channels of a panel
constexpr int kRows = 6;       // most activation rows of a register tile
constexpr int kUnpackFrom = 25;  // rows from which a 4-bit panel is unpacked once instead of in each register tile

// Kinds of output. Each starts from total = sum_k x * w + bias - weight_zero_point * sum_k x.
enum Output : int32_t {
  kTotal = 0,        // int32: total
  kCodesU8 = 1,      // uint8: clamp(round(total * mantissa / 2^shift) + zero_point, 0, qmax), ties to even, exact
  kCodesI32 = 2,     // int32: the same, for grids of more than 8 bits
  kFloat = 3,        // float32: total * factor
  kBFloat16 = 4,     // bfloat16 of it
  kGridFloat = 5,    // float32: (code - zero_point) * scale
  kGridBFloat16 = 6  // bfloat16 of it
};

struct Linear {
  const uint8_t* x;  // [m, ldx]; reads stay inside the first k4 * 4 columns of a row
  int64_t ldx;
  const uint8_t* packed;
  const int32_t* bias;        // [n]
  const int32_t* weight_zero; // [n] or null
  const int32_t* x_sum;       // [m], if weight_zero
  const float* factor;        // [n], for kFloat and kBFloat16
  const int32_t* mantissa;    // [2, n]: mantissas, then shifts (13 to 62), for codes and grids
  void* out;                  // [m, n]
  int64_t m, n, k;
  int32_t bits;
  int32_t output;
  int32_t zero_point, qmax;
  float scale;
};

// Rows [m0, m1) of one panel. scratch: 64 * 4 * k4 bytes for unpacked weights, aligned to 64.
using PanelFn = void (*)(const Linear&, int64_t panel, int64_t m0, int64_t m1, int8_t* scratch);
// codes[i] = clamp(round(x[i] / scale) + zero_point, 0, 255); bf16: x holds bfloat16.
using QuantizeFn = void (*)(const void* x, int bf16, int64_t count, float scale, int32_t zero_point, uint8_t* codes);

struct Isa {
  PanelFn panel;
  QuantizeFn quantize;
};

inline int64_t groups(const Linear& a) { return a.bits == 4 ? (a.k + 7) / 8 * 2 : (a.k + 3) / 4; }

extern const Isa generic_isa, avx2_isa, avxvnni_isa, avx512vnni_isa, neon_isa;

}  // namespace mq
