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
  kGridBFloat16 = 6, // bfloat16 of it
  kSteps = 7         // int32: code - zero_point; each channel has its own grid, from low to high
};

struct Linear {
  const uint8_t* x;  // [m, ldx]; reads stay inside the first k4 * 4 columns of a row
  int64_t ldx;
  const uint8_t* packed;
  const int32_t* bias;        // [n] or null
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
  const int32_t *low, *high;  // [n], for kSteps
};

// Rows [m0, m1) of one panel. scratch: 64 * 4 * k4 bytes for unpacked weights, aligned to 64.
using PanelFn = void (*)(const Linear&, int64_t panel, int64_t m0, int64_t m1, int8_t* scratch);
// codes[i] = clamp(round(x[i] / scale) + zero_point, 0, 255); bf16: x holds bfloat16.
using QuantizeFn = void (*)(const void* x, int bf16, int64_t count, float scale, int32_t zero_point, uint8_t* codes);

// A norm over rows of `width`, prepared as optimum_mobilequant.numerics.integer_rows.NormConstants.
struct Norm {
  int64_t width, centre, fraction, epsilon;
  const int32_t* mantissa;  // [2, width]: mantissas, then shifts
  const int64_t* bias;      // [width] or null
  int64_t low, high;        // of the output, in steps from its zero point
};

// The residual sum a * first + b * second over 2^shift.
struct Sum {
  int64_t first, second, shift, low, high;
};

// A rotation of one head and where its codes go.
struct Rotation {
  int64_t dims, half;  // of a head; pairs (i, i + half) with i < half rotate, the others pass
  int64_t mantissa, shift, zero_point, qmax;
  const int32_t* addend;  // [dims], added to what is rotated, in steps times 2^14; or null
};

// Attention of one layer. Codes of keys and values are kept less 128, as the right operands of byte products.
struct Attention {
  int64_t heads, kv_heads, dims, dims4;      // dims4: dims rounded up to 4
  int64_t batch, sequence, total, capacity;  // total: cached and new tokens; capacity: multiple of 64
  const uint8_t* query;      // planes of [batch, heads, sequence, dims4]
  const int32_t* query_sum;  // [batch, heads, sequence], sums of codes
  int64_t query_planes, query_zero;
  const int8_t* keys;        // [batch, kv_heads, capacity / 64][dims4 / 4][64][4]
  const int32_t* key_sums;   // [batch, kv_heads, capacity]
  int64_t key_zero;          // less 128, as the codes
  const int8_t* values;      // [batch, kv_heads, ceil(dims / 64)][capacity / 4][64][4]
  int64_t value_zero;
  int64_t score_mantissa, score_shift, score_zero, score_qmax, move;  // move: from scores' to masked scores' codes
  const int32_t *exp_high, *exp_low;  // 256 each, Q30
  int64_t probability_qmax, probability_planes;
  int64_t context_mantissa, context_shift, context_zero, context_qmax, context_planes;
  const float* mask;         // [batch or 1, sequence, mask_columns]: below 0 hides; null: causal
  int64_t mask_batch, mask_columns;
  const int32_t *last, *hidden;  // [batch, sequence]: index behind the last visible position; how many are hidden
  uint8_t* out;              // planes of [batch * sequence, heads * dims4...]: see attend
  int64_t out_stride, out_plane;  // bytes of a row and of a plane
};

struct Isa {
  PanelFn panel;
  QuantizeFn quantize;
  // steps of `count` channels of one row from totals of both byte planes (rows high and low)
  void (*wide_row)(const Linear&, const int64_t* bias, const int32_t* high, const int32_t* low, int64_t x_sum,
                   int64_t column, int64_t count, int32_t* steps);
  void (*centre_row)(const float* x, float scale, int64_t low, int64_t high, int64_t count, int32_t* steps);
  void (*add_row)(const Sum&, const int32_t* a, const int32_t* b, int64_t count, int32_t* out);
  void (*norm_row)(const Norm&, const int32_t* x, int32_t* out);
  // codes of steps: one byte plane, or the high and the low one
  void (*store_row)(const int32_t* steps, int64_t zero_point, int64_t count, uint8_t* high, uint8_t* low);
  void (*reals_row)(const int32_t* steps, float scale, int64_t count, float* out);
  // activation table of the gate's codes times up, requantized, in place of the gate's steps
  void (*product_row)(const int32_t* table, int64_t gate_zero, int64_t mantissa, int64_t shift, int64_t low,
                      int64_t high, int wide, int32_t* gate, const int32_t* up, int64_t count);
  // codes (not steps) of a rotated head
  void (*head_row)(const Rotation&, const int32_t* x, const int32_t* cos, const int32_t* sin, int32_t* codes);
  // rows [r0, r1) of [heads / kv_heads * sequence] of one KV head. scratch: attend_bytes(total).
  void (*attend)(const Attention&, int64_t batch, int64_t kv_head, int64_t r0, int64_t r1, int8_t* scratch);
};

inline int64_t attend_bytes(int64_t total) {
  const int64_t padded = (total + kPanel - 1) / kPanel * kPanel;
  return 4 * padded + 4096 + 512 + 4 * padded + kRows * 4 * padded;
}

inline int64_t groups(const Linear& a) { return a.bits == 4 ? (a.k + 7) / 8 * 2 : (a.k + 3) / 4; }

// Runs all panels of a layer on `threads` threads. Returns 0, or 1 if memory ran out.
int run_linear(Linear& a, const Isa& isa, int threads);

extern const Isa generic_isa, avx2_isa, avxvnni_isa, avx512vnni_isa, amx_isa, neon_isa;

}  // namespace mq
