// Row operations of a decoder layer on integers. Included in kernel.cpp's namespace. Each computes, bit for bit, what
// optimum_mobilequant.numerics.integer* defines; plain loops, which the compiler vectorises.
#pragma once

inline int64_t rounding_shift(int64_t value, int64_t places) {  // ties to even
  return (value + ((int64_t{1} << (places - 1)) - 1) + ((value >> places) & 1)) >> places;
}

inline int32_t clamped(int64_t value, int64_t low, int64_t high) {
  value = value < low ? low : value;
  return static_cast<int32_t>(value > high ? high : value);
}

// Doubles round value * factor once, where value and the 31-bit factor are exact; and since a tie is a double, rint of
// the product can differ from rint of the exact one only where the product *is* a tie. Such runs (`ties`) are computed
// again in integers. It is twice as fast where rounding doubles is one instruction.
#if defined(MQ_GENERIC)
constexpr bool kDoubles = false;
#else
constexpr bool kDoubles = true;
#endif

inline double power_of_two(int64_t exponent) {
  const int64_t bits = (exponent + 1023) << 52;
  double out;
  memcpy(&out, &bits, 8);
  return out;
}

inline double factor_of(int64_t mantissa, int64_t shift) { return static_cast<double>(mantissa) * power_of_two(-shift); }

// rint of a product, to int32 within +-2^30; notes a tie.
inline int32_t nearest(double product, int64_t* ties) {
  double v = rint(product);
  *ties |= fabs(product - v) == 0.5;
  v = v < -1073741824.0 ? -1073741824.0 : v;
  return static_cast<int32_t>(v > 1073741824.0 ? 1073741824.0 : v);
}

inline int32_t clamped32(int32_t value, int32_t low, int32_t high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// value * mantissa / 2^shift for magnitudes of up to 2^43: the low 13 bits apart, and one bit for what they lose.
inline int64_t requantize_wide(int64_t value, int64_t mantissa, int64_t shift) {
  const int64_t low = (value & 8191) * mantissa;
  const int64_t kept = static_cast<int64_t>(static_cast<int32_t>(value >> 13)) * mantissa + (low >> 13);
  return rounding_shift(kept * 2 | ((low & 8191) != 0), shift - 12);
}

void wide_row(const Linear& a, const int64_t* bias, const int32_t* high, const int32_t* low, int64_t x_sum,
              int64_t column, int64_t count, int32_t* steps) {
  const int32_t *mantissa = a.mantissa + column, *shift = a.mantissa + a.n + column;
  for (int64_t i = 0; i < count; ++i) {
    int64_t total = static_cast<int64_t>(high[i]) * 256 + low[i] + bias[column + i];
    if (a.weight_zero) total -= x_sum * a.weight_zero[column + i];
    const int64_t least = a.low ? a.low[column + i] : -a.zero_point;
    const int64_t most = a.low ? a.high[column + i] : a.qmax - a.zero_point;
    steps[i] = clamped(requantize_wide(total, mantissa[i], shift[i]), least, most);
  }
}

void centre_row(const float* x, float scale, int64_t low, int64_t high, int64_t count, int32_t* steps) {
  const float bottom = static_cast<float>(low), top = static_cast<float>(high);
  for (int64_t i = 0; i < count; ++i) {
    float v = rintf(x[i] / scale);
    v = v < bottom ? bottom : v;
    v = v > top ? top : v;
    steps[i] = static_cast<int32_t>(v);
  }
}

void add_row(const Sum& k, const int32_t* a, const int32_t* b, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = clamped(rounding_shift(a[i] * k.first + b[i] * k.second, k.shift), k.low, k.high);
}

inline int64_t nearest_root(int64_t value) {  // of a value in [2^60, 2^62)
  int64_t root = static_cast<int64_t>(sqrt(static_cast<double>(value)));
  while (root * root > value) --root;
  while ((root + 1) * (root + 1) <= value) ++root;
  return root + (value - root * root > root);
}

inline int64_t rounding_divide(int64_t value, int64_t divisor) {  // of a value from 0
  const int64_t quotient = value / divisor, twice = (value - quotient * divisor) * 2;
  return quotient + (twice > divisor || (twice == divisor && (quotient & 1)));
}

void norm_row(const Norm& k, const int32_t* x, int32_t* out) {
  const int64_t n = k.width;
  int64_t squares = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<int64_t>(x[i]) * x[i];
  if (k.centre)
    for (int64_t i = 0; i < n; ++i) total += x[i];
  int64_t spread = squares * n - total * total;
  spread = k.fraction >= 0 ? spread << k.fraction : rounding_shift(spread, -k.fraction);
  spread += k.epsilon;
  if (spread < 1) spread = 1;
  int64_t bits = 0;
  for (int64_t v = spread; v; v >>= 1) ++bits;
  const int64_t lift = (62 - bits) >> 1;
  const int64_t reciprocal = rounding_divide(int64_t{1} << 61, nearest_root(spread << (2 * lift)));
  int64_t shift = 61 - 30 - k.fraction / 2 - lift;
  if (shift < 1) shift = 1;
  const int32_t *mantissa = k.mantissa, *places = k.mantissa + n;
  if (kDoubles && !k.bias) {
    const int32_t low = static_cast<int32_t>(k.low), high = static_cast<int32_t>(k.high);
    int64_t ties = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t normal = rounding_shift((x[i] * n - total) * reciprocal, shift);
      out[i] = clamped32(nearest(static_cast<double>(normal) * factor_of(mantissa[i], places[i]), &ties), low, high);
    }
    if (!ties) return;
  }
  if (k.bias) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t normal = rounding_shift((x[i] * n - total) * reciprocal, shift);
      out[i] = clamped(rounding_shift(requantize_wide(normal, mantissa[i], places[i]) + k.bias[i], 27), k.low, k.high);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t normal = rounding_shift((x[i] * n - total) * reciprocal, shift);
      out[i] = clamped(requantize_wide(normal, mantissa[i], places[i]), k.low, k.high);
    }
  }
}

void store_row(const int32_t* steps, int64_t zero_point, int64_t count, uint8_t* high, uint8_t* low) {
  const int32_t zero = static_cast<int32_t>(zero_point);
  if (!low) {
    for (int64_t i = 0; i < count; ++i) high[i] = static_cast<uint8_t>(steps[i] + zero);
    return;
  }
  for (int64_t i = 0; i < count; ++i) high[i] = static_cast<uint8_t>((steps[i] + zero) >> 8);
  for (int64_t i = 0; i < count; ++i) low[i] = static_cast<uint8_t>(steps[i] + zero);
}

void reals_row(const int32_t* steps, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(steps[i]) * scale;
}

constexpr int64_t kRun = 256;

void product_row(const int32_t* table, int64_t gate_zero, int64_t mantissa, int64_t shift, int64_t low, int64_t high,
                 int wide, int32_t* gate, const int32_t* up, int64_t count) {
  if (wide) {  // 16 bits on both sides: 64 bits do not hold the product with a mantissa
    for (int64_t i = 0; i < count; ++i) {
      const int64_t product = static_cast<int64_t>(table[gate[i] + gate_zero]) * up[i];
      gate[i] = clamped(requantize_wide(product, mantissa, shift), low, high);
    }
    return;
  }
  if (kDoubles) {
    const double factor = factor_of(mantissa, shift);
    const int32_t zero = static_cast<int32_t>(gate_zero), least = static_cast<int32_t>(low);
    const int32_t most = static_cast<int32_t>(high);
    int32_t result[kRun];
    for (int64_t start = 0; start < count; start += kRun) {
      const int64_t run = count - start < kRun ? count - start : kRun;
      int64_t ties = 0;
      int32_t* from = gate + start;
      const int32_t* with = up + start;
      for (int64_t i = 0; i < run; ++i) {
        // 24 bits at most: one of the two has 8 bits.
        const int32_t product = table[from[i] + zero] * with[i];
        result[i] = clamped32(nearest(static_cast<double>(product) * factor, &ties), least, most);
      }
      if (ties)
        for (int64_t i = 0; i < run; ++i)
          result[i] = clamped(rounding_shift(static_cast<int64_t>(table[from[i] + zero] * with[i]) * mantissa, shift),
                              low, high);
      memcpy(from, result, run * sizeof(int32_t));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t product = static_cast<int64_t>(table[gate[i] + gate_zero]) * up[i];
    gate[i] = clamped(rounding_shift(product * mantissa, shift), low, high);
  }
}

template <bool kAdds>
void rotated_row(const Rotation& k, const int32_t* x, const int32_t* cos, const int32_t* sin, int32_t* codes) {
  const int32_t* addend = k.addend;
  const int64_t half = k.half, low = -k.zero_point, high = k.qmax - k.zero_point;
  const int32_t zero = static_cast<int32_t>(k.zero_point);
  if (kDoubles) {
    const double factor = factor_of(k.mantissa, k.shift);
    const int32_t least = static_cast<int32_t>(low), most = static_cast<int32_t>(high);
    int64_t ties = 0;
    for (int64_t i = 0; i < half; ++i) {  // sums of two 31-bit products and 32 bits, exact
      const double a = x[i], b = x[half + i], c = cos[i], s = sin[i];
      double first = a * c - b * s, second = b * c + a * s;
      if (kAdds) first += addend[i], second += addend[half + i];
      codes[i] = clamped32(nearest(first * factor, &ties), least, most) + zero;
      codes[half + i] = clamped32(nearest(second * factor, &ties), least, most) + zero;
    }
    for (int64_t i = 2 * half; i < k.dims; ++i) {
      double value = static_cast<double>(x[i]) * 16384.0;
      if (kAdds) value += addend[i];
      codes[i] = clamped32(nearest(value * factor, &ties), least, most) + zero;
    }
    if (!ties) return;
  }
  // With an addend the sum has up to 33 bits, whose product with a mantissa and what rounds it can leave int64.
  auto code = [&](int64_t value) {
    if (kAdds) return clamped(requantize_wide(value, k.mantissa, k.shift), low, high) + zero;
    return clamped(rounding_shift(value * k.mantissa, k.shift), low, high) + zero;
  };
  for (int64_t i = 0; i < half; ++i) {
    const int64_t a = x[i], b = x[half + i];
    codes[i] = code(a * cos[i] - b * sin[i] + (kAdds ? addend[i] : 0));
    codes[half + i] = code(b * cos[i] + a * sin[i] + (kAdds ? addend[half + i] : 0));
  }
  for (int64_t i = 2 * half; i < k.dims; ++i)
    codes[i] = code(static_cast<int64_t>(x[i]) * 16384 + (kAdds ? addend[i] : 0));
}

void head_row(const Rotation& k, const int32_t* x, const int32_t* cos, const int32_t* sin, int32_t* codes) {
  k.addend ? rotated_row<true>(k, x, cos, sin, codes) : rotated_row<false>(k, x, cos, sin, codes);
}
