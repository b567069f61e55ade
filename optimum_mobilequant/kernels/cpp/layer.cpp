// A whole decoder layer on integers: floats on the residual grid in and out, codes in between.
#include "layer.h"
#include "scratch.h"

#include <math.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mq {
namespace {

// Numbers of a layer, int64 each, at the start of its block of constants. Offsets are in bytes from the block's start;
// 0 where there is nothing. The Python side fills them by name: mq_layer_fields() lists them in this order.
#define MQ_NORM(F, p) \
  F(p##_width) F(p##_centre) F(p##_fraction) F(p##_epsilon) F(p##_gain) F(p##_bias) F(p##_zero) F(p##_qmax)
#define MQ_LINEAR(F, p) \
  F(p##_in) F(p##_out) F(p##_bits) F(p##_planes) F(p##_bias) F(p##_multiplier) F(p##_low) F(p##_high) F(p##_weight_zero)
#define MQ_ROTATION(F, p) F(p##_mantissa) F(p##_shift) F(p##_zero) F(p##_qmax)
#define MQ_FIELDS(F)                                                                                                \
  F(hidden) F(heads) F(kv_heads) F(dims) F(half) F(mlp) F(scales) F(in_zero) F(in_qmax)                              \
  MQ_NORM(F, norm1) MQ_LINEAR(F, qkv) F(has_head_norms) MQ_NORM(F, query_norm) MQ_NORM(F, key_norm)                  \
  MQ_ROTATION(F, query) F(query_planes) MQ_ROTATION(F, key) F(key_addend) F(value_zero)                              \
  F(score_mantissa) F(score_shift) F(score_zero) F(score_qmax) F(score_move) F(exp_high) F(exp_low)                  \
  F(probability_qmax) F(context_mantissa) F(context_shift) F(context_zero) F(context_qmax)                           \
  MQ_LINEAR(F, proj) F(sum1_first) F(sum1_second) F(sum1_shift) F(middle_zero) F(middle_qmax)                        \
  MQ_NORM(F, norm2) MQ_LINEAR(F, gate_up) F(table) F(gate_zero) F(product_mantissa) F(product_shift) F(product_wide) \
  F(product_zero) F(product_qmax) MQ_LINEAR(F, down)                                                                 \
  F(sum2_first) F(sum2_second) F(sum2_shift) F(out_zero) F(out_qmax)

struct Fields {
#define MQ_MEMBER(name) int64_t name;
  MQ_FIELDS(MQ_MEMBER)
#undef MQ_MEMBER
};
#define MQ_NAME(name) #name ","
const char kFieldNames[] = MQ_FIELDS(MQ_NAME);

template <class T>
const T* at(const uint8_t* block, int64_t offset) {
  return offset ? reinterpret_cast<const T*>(block + offset) : nullptr;
}

// Codes of `rows` rows as one byte plane, or as all high and then all low bytes.
struct Operand {
  uint8_t* data;
  int64_t planes, stride;
  uint8_t* high(int64_t row) const { return data + row * stride; }
  uint8_t* low(int64_t row, int64_t rows) const { return planes == 2 ? data + (rows + row) * stride : nullptr; }
};

// A linear layer's part of Fields.
struct LinearFields {
  int64_t in, out, bits, planes, bias, multiplier, low, high, weight_zero;
};
struct NormFields {
  int64_t width, centre, fraction, epsilon, gain, bias, zero, qmax;
};

Norm norm_of(const uint8_t* block, const NormFields& f) {
  return Norm{f.width, f.centre, f.fraction, f.epsilon, at<int32_t>(block, f.gain), at<int64_t>(block, f.bias),
              -f.zero, f.qmax - f.zero};
}

// steps[rows][out] = the layer's outputs, centred and clamped. Returns 0, or 1 if memory ran out.
int linear(const uint8_t* block, const LinearFields& f, const uint8_t* packed, const Operand& x, int64_t rows,
           const Isa& isa, int threads, int32_t* steps) {
  Linear a{};
  a.x = x.data, a.ldx = x.stride, a.packed = packed, a.m = rows, a.n = f.out, a.k = f.in;
  a.bits = static_cast<int32_t>(f.bits), a.output = kSteps, a.out = steps;
  a.mantissa = at<int32_t>(block, f.multiplier), a.low = at<int32_t>(block, f.low), a.high = at<int32_t>(block, f.high);
  a.weight_zero = at<int32_t>(block, f.weight_zero);
  if (f.planes == 2) return run_wide(a, at<int64_t>(block, f.bias), isa, threads);
  a.bias = at<int32_t>(block, f.bias);
  return run_linear(a, isa, threads);
}

struct Arena {  // parts of one allocation
  uint8_t* next;
  uint8_t* take(int64_t bytes) {
    uint8_t* part = next;
    next += (bytes + 63) / 64 * 64;
    return part;
  }
};

}  // namespace

const char* layer_fields() { return kFieldNames; }

// a.x: the high bytes of all rows, then the low ones; a.m: rows; a.out: int32 steps. Returns as run_linear.
int run_wide(Linear a, const int64_t* bias, const Isa& isa, int threads) {
  const int64_t rows = a.m;
  const Scratch totals(2 * rows * a.n * sizeof(int32_t));
  if (!totals.data) return 1;
  int32_t *parts = static_cast<int32_t*>(totals.data), *steps = static_cast<int32_t*>(a.out);
  Linear bytes = a;
  bytes.weight_zero = nullptr, bytes.m = 2 * rows, bytes.output = kTotal, bytes.out = parts;
  if (run_linear(bytes, isa, threads)) return 1;
  constexpr int64_t kChunk = 2048;
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  parallel(threads, rows * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / chunks, column = t % chunks * kChunk;
      int64_t sum = 0;
      if (a.weight_zero)
        for (int64_t c = 0; c < a.k; ++c) sum += a.x[row * a.ldx + c] * 256 + a.x[(rows + row) * a.ldx + c];
      isa.wide_row(a, bias, parts + row * a.n + column, parts + (rows + row) * a.n + column, sum, column,
                   a.n - column < kChunk ? a.n - column : kChunk, steps + row * a.n + column);
    }
  });
  return 0;
}

int run_norm(const NormCall& c, const Isa& isa, int threads) {
  const uint8_t* block = c.block;
  const NormFields& f = *reinterpret_cast<const NormFields*>(block + 4 * sizeof(int64_t));
  const int64_t* head = reinterpret_cast<const int64_t*>(block);  // scales, in_zero, in_qmax, unused
  const float* scales = at<float>(block, head[0]);
  const Norm norm = norm_of(block, f);
  const Scratch memory(c.rows * f.width * 8);
  if (!memory.data) return 1;
  int32_t* steps = static_cast<int32_t*>(memory.data);
  parallel(threads, c.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int32_t *from = steps + 2 * r * f.width, *to = from + f.width;
      isa.centre_row(c.x + r * f.width, scales[0], -head[1], head[2] - head[1], f.width, from);
      isa.norm_row(norm, from, to);
      isa.reals_row(to, scales[1], f.width, c.out + r * f.width);
    }
  });
  return 0;
}

// Returns 0, or 1 if memory ran out.
int run_layer(const LayerCall& c, const Isa& isa, int threads) {
  const uint8_t* block = c.block;
  const Fields& f = *reinterpret_cast<const Fields*>(block);
  const float* scales = at<float>(block, f.scales);
  const int64_t rows = c.batch * c.sequence, total = c.past + c.sequence, hidden = f.hidden;
  const int64_t dims4 = (f.dims + 3) / 4 * 4, wide = f.qkv_out;
  const int64_t query_width = f.heads * f.dims, key_width = f.kv_heads * f.dims;
  const int64_t query_rows = c.batch * f.heads * c.sequence;
  auto pad = [](int64_t bytes) { return (bytes + 63) / 64 * 64 + 64; };
  const int64_t most = wide > 2 * f.mlp ? wide : 2 * f.mlp;
  const int64_t operand = f.mlp > hidden ? f.mlp : hidden;
  const int64_t operand_width = operand > query_width ? operand : query_width;
  const Scratch memory(3 * pad(rows * hidden * 4) + pad(rows * most * 4) + pad(2 * rows * operand_width) +
                       pad(2 * query_rows * dims4) + pad(query_rows * 4) + 2 * pad(rows * f.half * 4) +
                       2 * pad(rows * 4) + 4096);
  const int64_t attend_size = (attend_bytes(total) + 63) / 64 * 64;
  const Scratch attending(attend_size * threads);
  if (!memory.data || !attending.data) return 1;
  Arena arena{static_cast<uint8_t*>(memory.data)};
  int32_t* residual = reinterpret_cast<int32_t*>(arena.take(rows * hidden * 4));
  int32_t* branch = reinterpret_cast<int32_t*>(arena.take(rows * hidden * 4));
  int32_t* normed = reinterpret_cast<int32_t*>(arena.take(rows * hidden * 4));
  int32_t* steps = reinterpret_cast<int32_t*>(arena.take(rows * most * 4));
  uint8_t* operands = arena.take(2 * rows * operand_width);
  uint8_t* query = arena.take(2 * query_rows * dims4);
  int32_t* query_sum = reinterpret_cast<int32_t*>(arena.take(query_rows * 4));
  int32_t* cos = reinterpret_cast<int32_t*>(arena.take(rows * f.half * 4));
  int32_t* sin = reinterpret_cast<int32_t*>(arena.take(rows * f.half * 4));
  int32_t* last = reinterpret_cast<int32_t*>(arena.take(rows * 4));
  int32_t* hidden_count = reinterpret_cast<int32_t*>(arena.take(rows * 4));

  const NormFields& norm1 = *reinterpret_cast<const NormFields*>(&f.norm1_width);
  const NormFields& norm2 = *reinterpret_cast<const NormFields*>(&f.norm2_width);
  const LinearFields& qkv = *reinterpret_cast<const LinearFields*>(&f.qkv_in);
  const LinearFields& proj = *reinterpret_cast<const LinearFields*>(&f.proj_in);
  const LinearFields& gate_up = *reinterpret_cast<const LinearFields*>(&f.gate_up_in);
  const LinearFields& down = *reinterpret_cast<const LinearFields*>(&f.down_in);

  // Attention.
  const Norm first = norm_of(block, norm1);
  Operand x{operands, qkv.planes, hidden};
  parallel(threads, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      isa.centre_row(c.x + r * hidden, scales[0], -f.in_zero, f.in_qmax - f.in_zero, hidden, residual + r * hidden);
      isa.norm_row(first, residual + r * hidden, normed + r * hidden);
      isa.store_row(normed + r * hidden, f.norm1_zero, hidden, x.high(r), x.low(r, rows));
    }
  });
  if (linear(block, qkv, c.qkv, x, rows, isa, threads, steps)) return 1;

  const Rotation query_rotation{f.dims, f.half, f.query_mantissa, f.query_shift, f.query_zero, f.query_qmax, nullptr};
  const int32_t* addend = at<int32_t>(block, f.key_addend);
  const Norm query_norm = norm_of(block, *reinterpret_cast<const NormFields*>(&f.query_norm_width));
  const Norm key_norm = norm_of(block, *reinterpret_cast<const NormFields*>(&f.key_norm_width));
  const int64_t panels = (f.dims + kPanel - 1) / kPanel, plane = query_rows * dims4;
  // Threads must not write one group of four positions of a value panel: they take KV heads and queries, not rows.
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = (c.rotary_batch == 1 ? r % c.sequence : r) * 2 * f.half;
    for (int64_t i = 0; i < f.half; ++i) {
      cos[r * f.half + i] = static_cast<int32_t>(rintf(c.cos[from + i] * 16384.0f));
      sin[r * f.half + i] = static_cast<int32_t>(rintf(c.sin[from + i] * 16384.0f));
    }
    const int64_t s = r % c.sequence, batch = r / c.sequence;
    int64_t end = c.past + s + 1, seen = end;
    if (c.mask) {
      const float* row = c.mask + ((c.mask_batch == 1 ? 0 : batch) * c.sequence + s) * c.mask_columns;
      end = seen = 0;
      for (int64_t t = 0; t < total; ++t)
        if (!(row[t] < 0.0f)) end = t + 1, ++seen;
    }
    last[r] = static_cast<int32_t>(end);
    hidden_count[r] = static_cast<int32_t>(total - seen);
  }
  parallel(threads, c.batch * f.kv_heads, rows < 4 ? 1 << 20 : 1, [&](int64_t begin, int64_t end) {
    int32_t codes[1024], wide_codes[1024];
    const int64_t groups = f.heads / f.kv_heads;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / f.kv_heads, kv = task % f.kv_heads;
      int8_t* keys = c.keys + task * c.capacity * dims4;
      int32_t* key_sums = c.key_sums + task * c.capacity;
      int8_t* values = c.values + task * panels * c.capacity * kPanel;
      const Rotation key_rotation{f.dims, f.half, f.key_mantissa, f.key_shift, f.key_zero, f.key_qmax,
                                  addend ? addend + kv * f.dims : nullptr};
      for (int64_t s = 0; s < c.sequence; ++s) {
        const int64_t r = batch * c.sequence + s, t = c.past + s;
        const int32_t* row = steps + r * wide;
        const int32_t* head = row + query_width + kv * f.dims;
        if (f.has_head_norms) isa.norm_row(key_norm, head, wide_codes), head = wide_codes;
        isa.head_row(key_rotation, head, cos + r * f.half, sin + r * f.half, codes);
        int8_t* key = keys + t / kPanel * dims4 * kPanel + t % kPanel * 4;
        int32_t sum = 0;
        for (int64_t d = 0; d < f.dims; ++d) {
          const int32_t code = codes[d] - 128;
          key[d / 4 * 4 * kPanel + d % 4] = static_cast<int8_t>(code);
          sum += code;
        }
        key_sums[t] = sum;
        const int32_t* value = row + query_width + key_width + kv * f.dims;
        for (int64_t d = 0; d < f.dims; ++d)
          values[((d / kPanel) * (c.capacity / 4) + t / 4) * 4 * kPanel + d % kPanel * 4 + t % 4] =
              static_cast<int8_t>(value[d] + f.value_zero - 128);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t h = kv * groups + g, at = (batch * f.heads + h) * c.sequence + s;
          head = row + h * f.dims;
          if (f.has_head_norms) isa.norm_row(query_norm, head, wide_codes), head = wide_codes;
          isa.head_row(query_rotation, head, cos + r * f.half, sin + r * f.half, codes);
          int32_t query_total = 0;
          for (int64_t d = 0; d < f.dims; ++d) query_total += codes[d];
          query_sum[at] = query_total;
          uint8_t* to = query + at * dims4;
          memset(to + f.dims, 0, dims4 - f.dims);
          if (f.query_planes == 2) memset(to + plane + f.dims, 0, dims4 - f.dims);
          isa.store_row(codes, 0, f.dims, to, f.query_planes == 2 ? to + plane : nullptr);
        }
      }
    }
  });

  Attention a{};
  a.heads = f.heads, a.kv_heads = f.kv_heads, a.dims = f.dims, a.dims4 = dims4;
  a.batch = c.batch, a.sequence = c.sequence, a.total = total, a.capacity = c.capacity;
  a.query = query, a.query_sum = query_sum, a.query_planes = f.query_planes, a.query_zero = f.query_zero;
  a.keys = c.keys, a.key_sums = c.key_sums, a.key_zero = f.key_zero - 128;
  a.values = c.values, a.value_zero = f.value_zero - 128;
  a.score_mantissa = f.score_mantissa, a.score_shift = f.score_shift, a.score_zero = f.score_zero;
  a.score_qmax = f.score_qmax, a.move = f.score_move;
  a.exp_high = at<int32_t>(block, f.exp_high), a.exp_low = at<int32_t>(block, f.exp_low);
  a.probability_qmax = f.probability_qmax, a.probability_planes = f.probability_qmax > 255 ? 2 : 1;
  a.context_mantissa = f.context_mantissa, a.context_shift = f.context_shift;
  a.context_zero = f.context_zero, a.context_qmax = f.context_qmax, a.context_planes = proj.planes;
  a.mask = c.mask, a.mask_batch = c.mask_batch, a.mask_columns = c.mask_columns;
  a.last = last, a.hidden = hidden_count;
  a.out = operands, a.out_stride = query_width, a.out_plane = rows * query_width;
  const int64_t per_head = f.heads / f.kv_heads * c.sequence, all_heads = c.batch * f.kv_heads;
  const int64_t least = (per_head * all_heads + threads * 4 - 1) / (threads * 4);
  int64_t block_rows = least < kRows ? (all_heads >= threads ? kRows : least) : 4 * kRows;
  if (block_rows > kRows) block_rows = block_rows / kRows * kRows;
  if (block_rows < 1) block_rows = 1;
  const int64_t blocks = (per_head + block_rows - 1) / block_rows, tasks = all_heads * blocks;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tasks > 1)
#endif
  for (int64_t task = 0; task < tasks; ++task) {
#if defined(_OPENMP)
    const int64_t id = omp_get_thread_num();
#else
    const int64_t id = 0;
#endif
    const int64_t kv = task / blocks, from = task % blocks * block_rows;
    isa.attend(a, kv / f.kv_heads, kv % f.kv_heads, from, from + block_rows < per_head ? from + block_rows : per_head,
               static_cast<int8_t*>(attending.data) + id * attend_size);
  }
  x = Operand{operands, proj.planes, query_width};
  if (linear(block, proj, c.proj, x, rows, isa, threads, branch)) return 1;

  // Gated MLP.
  const Sum middle{f.sum1_first, f.sum1_second, f.sum1_shift, -f.middle_zero, f.middle_qmax - f.middle_zero};
  const Norm second = norm_of(block, norm2);
  x = Operand{operands, gate_up.planes, hidden};
  parallel(threads, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      isa.add_row(middle, residual + r * hidden, branch + r * hidden, hidden, residual + r * hidden);
      isa.norm_row(second, residual + r * hidden, normed + r * hidden);
      isa.store_row(normed + r * hidden, f.norm2_zero, hidden, x.high(r), x.low(r, rows));
    }
  });
  if (linear(block, gate_up, c.gate_up, x, rows, isa, threads, steps)) return 1;
  x = Operand{operands, down.planes, f.mlp};
  const int32_t* table = at<int32_t>(block, f.table);
  const int64_t product_low = -f.product_zero, product_high = f.product_qmax - f.product_zero;
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = (f.mlp + kChunk - 1) / kChunk;
  parallel(threads, rows * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r = t / chunks, column = t % chunks * kChunk;
      const int64_t count = f.mlp - column < kChunk ? f.mlp - column : kChunk;
      int32_t* gate = steps + r * 2 * f.mlp + column;
      isa.product_row(table, f.gate_zero, f.product_mantissa, f.product_shift, product_low, product_high,
                      static_cast<int>(f.product_wide), gate, gate + f.mlp, count);
      uint8_t* low = x.low(r, rows);
      isa.store_row(gate, f.product_zero, count, x.high(r) + column, low ? low + column : nullptr);
    }
  });
  if (linear(block, down, c.down, x, rows, isa, threads, branch)) return 1;
  const Sum end_sum{f.sum2_first, f.sum2_second, f.sum2_shift, -f.out_zero, f.out_qmax - f.out_zero};
  parallel(threads, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      isa.add_row(end_sum, residual + r * hidden, branch + r * hidden, hidden, residual + r * hidden);
      isa.reals_row(residual + r * hidden, scales[1], hidden, c.out + r * hidden);
    }
  });
  return 0;
}

}  // namespace mq
