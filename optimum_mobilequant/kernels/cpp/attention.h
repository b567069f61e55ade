// Attention of some query rows that share a KV head. Included in kernel.cpp's namespace.
#pragma once

inline bool visible(const Attention& a, int64_t batch, int64_t s, int64_t t) {
  if (!a.mask) return t <= a.total - a.sequence + s;
  const int64_t row = (a.mask_batch == 1 ? 0 : batch) * a.sequence + s;
  return !(a.mask[row * a.mask_columns + t] < 0.0f);
}

// exp(-distance * scale) in Q30, for distances of up to 65535.
inline int64_t exponential(const Attention& a, int64_t distance) {
  return rounding_shift(static_cast<int64_t>(a.exp_high[distance >> 8]) * a.exp_low[distance & 255], 30);
}

// Products of `count` rows (at most kRows) with one panel of 64 columns, on signed codes: sums[count][kPanel].
// `origin`: the same product of a row of zeros, where the instruction shifts its operand (else unused).
inline void panel_products(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t steps, int64_t count,
                           const int32_t* origin, int32_t* sums) {
  kTiles[0][count - 1](x, ldx, w, steps, Ahead{w, w, 0}, sums);
  if (V::kOffset != 0)
    for (int64_t r = 0; r < count; ++r)
      for (int i = 0; i < kPanel; ++i) sums[r * kPanel + i] -= origin[i];
}

// Codes of masked scores of rows [r0, r0 + count) into codes[count][padded]; `panels`: how many panels are looked at.
void score_tile(const Attention& a, int64_t batch, int64_t kv_head, int64_t r0, int64_t count, int64_t panels,
                int64_t padded, uint16_t* codes, const uint8_t* zeros) {
  const int64_t groups = a.heads / a.kv_heads, rows = groups * a.sequence, steps = a.dims4 / 4;
  const int64_t head = batch * a.kv_heads + kv_head, first = head * rows + r0;
  const int64_t plane = a.batch * a.heads * a.sequence * a.dims4;
  const int32_t* key_sums = a.key_sums + head * a.capacity;
  const int32_t low = static_cast<int32_t>(-a.score_zero), high = static_cast<int32_t>(a.score_qmax - a.score_zero);
  const int32_t lift = static_cast<int32_t>(a.score_zero + a.move);
  const double factor = factor_of(a.score_mantissa, a.score_shift);
  int32_t sums[kRows * kPanel], lower[kRows * kPanel], origin[kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    const int8_t* w = a.keys + (head * (a.capacity / kPanel) + p) * steps * 4 * kPanel;
    if (V::kOffset != 0) kTiles[0][0](zeros, 0, w, steps, Ahead{w, w, 0}, origin);
    panel_products(a.query + first * a.dims4, a.dims4, w, steps, count, origin, sums);
    if (a.query_planes == 2)
      panel_products(a.query + plane + first * a.dims4, a.dims4, w, steps, count, origin, lower);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t fixed = -a.key_zero * a.query_sum[first + r] + a.dims * a.query_zero * a.key_zero;
      uint16_t* out = codes + r * padded + p * kPanel;
      const int32_t* sum = sums + r * kPanel;
      const int32_t* keys = key_sums + p * kPanel;
      if (a.query_planes == 1) {
        const int32_t base = static_cast<int32_t>(fixed), zero = static_cast<int32_t>(a.query_zero);
        if (kDoubles) {
          int64_t ties = 0;
          for (int i = 0; i < kPanel; ++i) {
            const int32_t total = sum[i] + base - zero * keys[i];
            const int32_t v = nearest(static_cast<double>(total) * factor, &ties);
            out[i] = static_cast<uint16_t>(clamped32(v, low, high) + lift);
          }
          if (!ties) continue;
        }
        for (int i = 0; i < kPanel; ++i) {
          const int32_t total = sum[i] + base - zero * keys[i];
          const int64_t v = rounding_shift(static_cast<int64_t>(total) * a.score_mantissa, a.score_shift);
          out[i] = static_cast<uint16_t>(clamped(v, low, high) + lift);
        }
      } else {
        for (int i = 0; i < kPanel; ++i) {
          const int64_t total = static_cast<int64_t>(sum[i]) * 256 + lower[r * kPanel + i] + fixed -
                                a.query_zero * keys[i];
          out[i] = static_cast<uint16_t>(
              clamped(requantize_wide(total, a.score_mantissa, a.score_shift), low, high) + lift);
        }
      }
    }
  }
}

// Softmax of one row of codes (the first `last` may be visible) into byte planes. Returns the sum of probabilities.
int64_t softmax_row(const Attention& a, int64_t batch, int64_t s, int64_t last, int64_t hidden, int64_t extent,
                    uint16_t* codes, int32_t* weights, uint8_t* high, uint8_t* low) {
  int64_t seen = a.total - hidden;
  const bool dense = seen == last;  // nothing hidden before the last visible position
  int32_t top = 0;
  if (dense) {
    for (int64_t t = 0; t < last; ++t) top = codes[t] > top ? codes[t] : top;
  } else {
    for (int64_t t = 0; t < last; ++t) {
      if (!visible(a, batch, s, t)) codes[t] = 0;
      top = codes[t] > top ? codes[t] : top;
    }
  }
  // A hidden position has the grid's lowest code, 0: its share is 0 unless every visible score is that low.
  const int64_t behind = hidden ? exponential(a, top) : 0;
  int64_t sum = behind * (a.total - last);
  for (int64_t t = 0; t < last; ++t) {
    const int32_t distance = top - codes[t];
    weights[t] = static_cast<int32_t>(
        rounding_shift(static_cast<int64_t>(a.exp_high[distance >> 8]) * a.exp_low[distance & 255], 30));
  }
  for (int64_t t = 0; t < last; ++t) sum += weights[t];
  const double whole = static_cast<double>(sum), qmax = static_cast<double>(a.probability_qmax);
  const int64_t filled = behind ? a.total : last;
  for (int64_t t = last; t < filled; ++t) weights[t] = static_cast<int32_t>(behind);
  int64_t probabilities = 0;
  for (int64_t t = 0; t < filled; ++t) {
    const double product = static_cast<double>(weights[t]) * qmax;  // below 2^46, so exact
    double quotient = rint(product / whole);
    const double twice = 2 * (product - quotient * whole);  // exact; the quotient of doubles is off by one at most
    const double step = twice > whole ? 1.0 : twice < -whole ? -1.0 : 0.0;
    // On a tie rint has chosen the even neighbour, if the quotient of doubles was the tie; it is: a tie is a double.
    const int32_t share = static_cast<int32_t>(quotient + step);
    weights[t] = share;
    probabilities += share;
  }
  if (low) {
    for (int64_t t = 0; t < filled; ++t) high[t] = static_cast<uint8_t>(weights[t] >> 8);
    for (int64_t t = 0; t < filled; ++t) low[t] = static_cast<uint8_t>(weights[t]);
  } else {
    for (int64_t t = 0; t < filled; ++t) high[t] = static_cast<uint8_t>(weights[t]);
  }
  for (int64_t t = filled; t < extent; ++t) high[t] = 0;
  if (low)
    for (int64_t t = filled; t < extent; ++t) low[t] = 0;
  return probabilities;
}

void attend(const Attention& a, int64_t batch, int64_t kv_head, int64_t r0, int64_t r1, int8_t* scratch) {
  const int64_t groups = a.heads / a.kv_heads, padded = (a.total + kPanel - 1) / kPanel * kPanel;
  const int64_t head = batch * a.kv_heads + kv_head;
  uint8_t* zeros = reinterpret_cast<uint8_t*>(scratch);
  int64_t* sums_of = reinterpret_cast<int64_t*>(scratch + padded * 4 + 4096);
  int32_t* weights = reinterpret_cast<int32_t*>(scratch + padded * 4 + 4096 + 512);
  uint16_t* codes = reinterpret_cast<uint16_t*>(weights + padded);
  uint8_t* high = reinterpret_cast<uint8_t*>(codes + kRows * padded);
  uint8_t* low = a.probability_planes == 2 ? high + kRows * padded : nullptr;
  if (V::kOffset != 0) memset(zeros, 0, padded + 4096);
  for (int64_t start = r0; start < r1; start += kRows) {
    const int64_t rows = r1 - start < kRows ? r1 - start : kRows;
    int64_t extent = 0;  // of the tile, in positions
    for (int64_t r = start; r < start + rows; ++r) {
      const int64_t last = a.last[batch * a.sequence + r % a.sequence];
      extent = last > extent ? last : extent;
    }
    score_tile(a, batch, kv_head, start, rows, (extent + kPanel - 1) / kPanel, padded, codes, zeros);
    int64_t reach = extent;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t s = (start + r) % a.sequence, at = batch * a.sequence + s;
      sums_of[r] = softmax_row(a, batch, s, a.last[at], a.hidden[at], padded, codes + r * padded, weights,
                               high + r * padded, low ? low + r * padded : nullptr);
      if (a.last[at] < a.total) {  // hidden positions that have a share after all
        for (int64_t t = a.total - 1; t >= reach; --t)
          if (high[r * padded + t] || (low && low[r * padded + t])) {
            reach = t + 1;
            break;
          }
      }
    }
    const int64_t steps = (reach + 3) / 4;
    int32_t sums[kRows * kPanel], lower[kRows * kPanel], origin[kPanel], result[kPanel];
    const int64_t panels = (a.dims + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p) {
      const int8_t* w = a.values + (head * panels + p) * a.capacity * kPanel;
      if (V::kOffset != 0) kTiles[0][0](zeros, 0, w, steps, Ahead{w, w, 0}, origin);
      panel_products(high, padded, w, steps, rows, origin, sums);
      if (low) panel_products(low, padded, w, steps, rows, origin, lower);
      const int64_t width = a.dims - p * kPanel < kPanel ? a.dims - p * kPanel : kPanel;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t flat = start + r, s = flat % a.sequence, query_head = kv_head * groups + flat / a.sequence;
        const int64_t fixed = -a.value_zero * sums_of[r];
        for (int i = 0; i < kPanel; ++i) {
          int64_t total = sums[r * kPanel + i];
          if (low) total = total * 256 + lower[r * kPanel + i];
          result[i] = clamped(rounding_shift((total + fixed) * a.context_mantissa, a.context_shift), -a.context_zero,
                              a.context_qmax - a.context_zero);
        }
        uint8_t* out = a.out + (batch * a.sequence + s) * a.out_stride + query_head * a.dims + p * kPanel;
        store_row(result, a.context_zero, width, out, a.context_planes == 2 ? out + a.out_plane : nullptr);
      }
    }
  }
}
