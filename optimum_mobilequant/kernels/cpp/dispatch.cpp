// The library's C interface: packing, the choice of the instruction set, and the split of work over threads.
#include "layer.h"
#include "scratch.h"

#include <stdlib.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using mq::Isa;
using mq::kPanel;
using mq::Linear;
using mq::Scratch;

struct Entry {
  const char* name;
  const Isa* isa;
  bool (*runs_here)();
};

bool always() { return true; }
#if defined(__x86_64__)
// By hand: the compilers' own test (__builtin_cpu_supports) does not know AVX-VNNI everywhere and may not link into a
// shared library.
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{leaf, 0, subleaf, 0};
  __asm__("cpuid" : "+a"(r.a), "=b"(r.b), "+c"(r.c), "=d"(r.d));
  return r;
}

// Whether the system saves the registers of these bits of XCR0 (2: 128 bits, 4: 256 bits, 0xE0: 512 bits, 0x60000:
// matrix units).
bool saved(unsigned mask) {
  if (cpuid(0, 0).a < 7 || !((cpuid(1, 0).c >> 27) & 1)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

[[maybe_unused]] bool has_avx2() { return saved(0x6) && ((cpuid(7, 0).b >> 5) & 1); }
[[maybe_unused]] bool has_avxvnni() { return has_avx2() && cpuid(7, 0).a >= 1 && ((cpuid(7, 1).a >> 4) & 1); }
[[maybe_unused]] bool has_avx512vnni() {
  const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  return saved(0xE6) && (cpuid(7, 0).b & f_dq_bw_vl) == f_dq_bw_vl && ((cpuid(7, 0).c >> 11) & 1);
}

// Linux gives a process the registers of the matrix units on request: ARCH_REQ_XCOMP_PERM for XTILEDATA, which holds
// for all its threads.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

[[maybe_unused]] bool has_amx() {
  const unsigned tile_int8 = 1u << 24 | 1u << 25;
  return has_avx512vnni() && saved(0x60000) && (cpuid(7, 0).d & tile_int8) == tile_int8 && tiles_granted();
}
#elif defined(__aarch64__)
[[maybe_unused]] bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor
#endif
}
#endif

// Best first. MQ_HAVE_<name>: kernel.cpp was compiled for it.
const Entry kIsas[] = {
#if defined(MQ_HAVE_AMX) && defined(MQ_EMULATED_TILES)
    {"amx", &mq::amx_isa, always},
#elif defined(MQ_HAVE_AMX)
    {"amx", &mq::amx_isa, has_amx},
#endif
#if defined(MQ_HAVE_AVX512VNNI)
    {"avx512vnni", &mq::avx512vnni_isa, has_avx512vnni},
#endif
#if defined(MQ_HAVE_AVXVNNI)
    {"avxvnni", &mq::avxvnni_isa, has_avxvnni},
#endif
#if defined(MQ_HAVE_AVX2)
    {"avx2", &mq::avx2_isa, has_avx2},
#endif
#if defined(MQ_HAVE_NEON)
    {"neon", &mq::neon_isa, has_dotprod},
#endif
    {"generic", &mq::generic_isa, always},
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

void run_range(const Linear& a, const Isa& isa, int64_t chunks, int64_t begin, int64_t end, int8_t* scratch) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t chunk = t % chunks;
    isa.panel(a, t / chunks, a.m * chunk / chunks, a.m * (chunk + 1) / chunks, scratch);
  }
}

}  // namespace

namespace mq {

int run_linear(Linear& a, const Isa& chosen, int threads) {
  const int64_t m = a.m, n = a.n, k = a.k, ldx = a.ldx;
  const int bits = a.bits;
  const uint8_t* x = a.x;
  const bool needs_sums = a.weight_zero && !a.x_sum;
  const int64_t padded = mq::groups(a) * 4;
  const Scratch copy(padded == k ? 0 : m * padded), sums(needs_sums ? m * sizeof(int32_t) : 0);
  if ((padded != k && !copy.data) || (needs_sums && !sums.data)) return 1;
  if (padded != k) {  // the kernel reads whole groups
    uint8_t* rows = static_cast<uint8_t*>(copy.data);
    for (int64_t r = 0; r < m; ++r) {
      memcpy(rows + r * padded, x + r * ldx, k);
      memset(rows + r * padded + k, 0, padded - k);
    }
    a.x = rows, a.ldx = padded;
  }
  if (needs_sums) {
    int32_t* totals = static_cast<int32_t*>(sums.data);
    for (int64_t r = 0; r < m; ++r) {
      int32_t total = 0;
      for (int64_t c = 0; c < k; ++c) total += x[r * ldx + c];
      totals[r] = total;
    }
    a.x_sum = totals;
  }
  const int64_t panels = (n + kPanel - 1) / kPanel;
  if (m * n * k < 200000) threads = 1;  // below some 10 us a second thread costs more than it brings
  // Rows are split as well where there are too few panels to keep all threads busy.
  int64_t chunks = 1;
  while (threads > 1 && panels * chunks < 2 * threads && m / (chunks + 1) >= 4 * mq::kRows) ++chunks;
  const int64_t tasks = panels * chunks;
  if (threads > tasks) threads = static_cast<int>(tasks);
  const size_t unpacked = bits == 4 && m >= mq::kUnpackFrom ? padded * kPanel : 0;
  int failed = 0;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
      const Scratch scratch(unpacked);
      if (unpacked && !scratch.data) {
#pragma omp atomic write
        failed = 1;
      } else {
        run_range(a, chosen, chunks, tasks * id / count, tasks * (id + 1) / count,
                  static_cast<int8_t*>(scratch.data));
      }
    }
    return failed;
  }
#endif
  const Scratch scratch(unpacked);
  if (unpacked && !scratch.data) return 1;
  run_range(a, chosen, chunks, 0, tasks, static_cast<int8_t*>(scratch.data));
  return failed;
}

}  // namespace mq

#define MQ_EXPORT extern "C" __attribute__((visibility("default")))

MQ_EXPORT int mq_threads_supported() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// Name of the i-th instruction set if this machine has it, "" if it has not, null past the end.
MQ_EXPORT const char* mq_isa(int i) {
  if (i < 0 || i >= kIsaCount) return nullptr;
  return kIsas[i].runs_here() ? kIsas[i].name : "";
}

MQ_EXPORT int64_t mq_packed_bytes(int64_t n, int64_t k, int bits) {
  Linear a{};
  a.n = n, a.k = k, a.bits = bits;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  return panels * kPanel * 4 + panels * mq::groups(a) * 4 * kPanel / (bits == 4 ? 2 : 1);
}

// codes: int8 [n, k], row-major. packed: mq_packed_bytes, overwritten.
MQ_EXPORT void mq_pack(const int8_t* codes, int64_t n, int64_t k, int bits, uint8_t* packed) {
  const int64_t bytes = mq_packed_bytes(n, k, bits);
  memset(packed, 0, bytes);
  Linear a{};
  a.n = n, a.k = k, a.bits = bits;
  const int64_t panels = (n + kPanel - 1) / kPanel, group_count = mq::groups(a);
  int32_t* row_sum = reinterpret_cast<int32_t*>(packed);
  uint8_t* data = packed + panels * kPanel * 4;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t panel = row / kPanel, lane = row % kPanel;
    for (int64_t column = 0; column < k; ++column) {
      const int8_t code = codes[row * k + column];
      row_sum[row] += code;
      const int64_t group = column / 4, byte = lane * 4 + column % 4;
      if (bits == 8) {
        data[(panel * group_count + group) * 4 * kPanel + byte] = static_cast<uint8_t>(code);
      } else {
        const uint8_t nibble = static_cast<uint8_t>(code) & 0xF;
        data[(panel * (group_count / 2) + group / 2) * 4 * kPanel + byte] |= group % 2 ? nibble : nibble << 4;
      }
    }
  }
}

// Returns 0, 1 if memory ran out, or 2 if the packed weight has another size. Arguments as mq::Linear; multiplier: factors or mantissas, as the output needs;
// isa: index as in mq_isa.
MQ_EXPORT int mq_linear(const uint8_t* x, int64_t ldx, const uint8_t* packed, int64_t packed_bytes,
                        const int32_t* bias, const int32_t* weight_zero, const void* multiplier, void* out, int64_t m, int64_t n, int64_t k,
                        int bits, int output, int zero_point, int qmax, float scale, int threads, int isa) {
  if (packed_bytes != mq_packed_bytes(n, k, bits)) return 2;
  if (m == 0) return 0;
  Linear a{};
  a.x = x, a.ldx = ldx, a.packed = packed, a.bias = bias, a.weight_zero = weight_zero, a.out = out;
  a.factor = static_cast<const float*>(multiplier), a.mantissa = static_cast<const int32_t*>(multiplier);
  a.m = m, a.n = n, a.k = k, a.bits = bits, a.output = output;
  a.zero_point = zero_point, a.qmax = qmax, a.scale = scale;
  return mq::run_linear(a, *kIsas[isa].isa, threads);
}

// The linear layer on 16-bit codes (int32 [m, k]); bias: int64 [n]; output: kCodesI32 or kGridFloat.
MQ_EXPORT int mq_linear_wide(const int32_t* x, const uint8_t* packed, int64_t packed_bytes, const int64_t* bias,
                             const int32_t* weight_zero, const int32_t* multiplier, void* out, int64_t m, int64_t n,
                             int64_t k, int bits, int output, int zero_point, int qmax, float scale, int threads,
                             int isa) {
  if (packed_bytes != mq_packed_bytes(n, k, bits)) return 2;
  if (m == 0) return 0;
  const Scratch planes(2 * m * k);
  if (!planes.data) return 1;
  const Isa& chosen = *kIsas[isa].isa;
  uint8_t* bytes = static_cast<uint8_t*>(planes.data);
  for (int64_t r = 0; r < m; ++r) chosen.store_row(x + r * k, 0, k, bytes + r * k, bytes + (m + r) * k);
  Linear a{};
  a.x = bytes, a.ldx = k, a.packed = packed, a.weight_zero = weight_zero, a.mantissa = multiplier;
  a.m = m, a.n = n, a.k = k, a.bits = bits, a.zero_point = zero_point, a.qmax = qmax, a.out = out;
  if (mq::run_wide(a, bias, chosen, threads)) return 1;
  int32_t* steps = static_cast<int32_t*>(out);  // 4 bytes each, like what they become
  mq::parallel(threads, m * n, 65536, [&](int64_t begin, int64_t end) {
    if (output == mq::kGridFloat) {
      for (int64_t i = begin; i < end; i += 1024)
        chosen.reals_row(steps + i, scale, end - i < 1024 ? end - i : 1024, static_cast<float*>(out) + i);
    } else {
      for (int64_t i = begin; i < end; ++i) steps[i] += zero_point;
    }
  });
  return 0;
}

MQ_EXPORT const char* mq_layer_fields() { return mq::layer_fields(); }

MQ_EXPORT int mq_layer(const float* x, float* out, const float* cos, const float* sin, int64_t rotary_batch,
                       const float* mask, int64_t mask_batch, int64_t mask_columns, int8_t* keys, int32_t* key_sums,
                       int8_t* values, int64_t capacity, int64_t past, int64_t batch, int64_t sequence,
                       const uint8_t* block, const uint8_t* qkv, const uint8_t* proj, const uint8_t* gate_up,
                       const uint8_t* down, int threads, int isa) {
  if (batch == 0 || sequence == 0) return 0;
  return mq::run_layer({x, out, cos, sin, rotary_batch, mask, mask_batch, mask_columns, keys, key_sums, values,
                        capacity, past, batch, sequence, block, qkv, proj, gate_up, down},
                       *kIsas[isa].isa, threads);
}

MQ_EXPORT int mq_norm(const float* x, float* out, int64_t rows, const uint8_t* block, int threads, int isa) {
  return mq::run_norm({x, out, rows, block}, *kIsas[isa].isa, threads);
}

// x: float32 or (bf16 != 0) bfloat16, contiguous. codes[i] = clamp(round(x[i] / scale) + zero_point, 0, 255).
MQ_EXPORT void mq_quantize(const void* x, int bf16, int64_t count, float scale, int zero_point, uint8_t* codes,
                           int threads, int isa) {
  const Isa& chosen = *kIsas[isa].isa;
#if defined(_OPENMP)
  if (threads > 1 && count >= 65536) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t parts = omp_get_num_threads(), id = omp_get_thread_num();
      const int64_t begin = count * id / parts, end = count * (id + 1) / parts;
      chosen.quantize(static_cast<const char*>(x) + begin * (bf16 ? 2 : 4), bf16, end - begin, scale, zero_point,
                      codes + begin);
    }
    return;
  }
#endif
  (void)threads;
  chosen.quantize(x, bf16, count, scale, zero_point, codes);
}

// Whether an instruction set computes what the portable one does, on ragged shapes, the extreme codes and every kind
// of output. It guards machines that the kernel was never run on. 1 if it does.
MQ_EXPORT int mq_self_check(int isa) {
  // Matrix units take 16 rows and 64 columns at a time: more of both, and some that are left over.
  constexpr int kM = 50, kN = 70, kK = 141;
  static const int kRowCounts[] = {1, 2, 3, 4, 5, 6, 9, 16, 31, kM};
  const int64_t room = mq_packed_bytes(kN, kK, 8);
  const Scratch memory(kM * kK + kN * kK + room + 2 * kM * kN * 4);
  if (!memory.data) return 0;
  uint8_t* x = static_cast<uint8_t*>(memory.data) + room;
  uint8_t* packed = static_cast<uint8_t*>(memory.data);
  int8_t* codes = reinterpret_cast<int8_t*>(x + kM * kK);
  uint8_t* ours = reinterpret_cast<uint8_t*>(codes + kN * kK);
  uint8_t* theirs = ours + kM * kN * 4;
  int32_t bias[kN], zero[kN];
  float factor[kN];
  int32_t mantissa[2 * kN];
  uint32_t state = 1;
  auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (int i = 0; i < kM * kK; ++i) x[i] = i % 7 == 0 ? 255 : static_cast<uint8_t>(next());
  for (int bits = 4; bits <= 8; bits += 4) {
    const int lowest = -(1 << (bits - 1)), span = 1 << bits;
    for (int i = 0; i < kN * kK; ++i)
      codes[i] = static_cast<int8_t>(i % 5 == 0 ? lowest : lowest + static_cast<int>(next()) % span);
    for (int i = 0; i < kN; ++i) {
      bias[i] = static_cast<int32_t>(next()) - 32768;
      zero[i] = lowest + static_cast<int>(next()) % span;
      factor[i] = 1e-4f * static_cast<float>(1 + next() % 50);
      mantissa[i] = static_cast<int32_t>(0x40000000u + (next() << 13));
      mantissa[kN + i] = 39 + static_cast<int32_t>(next() % 5);
    }
    mq_pack(codes, kN, kK, bits, packed);
    const int64_t bytes = mq_packed_bytes(kN, kK, bits);
    for (int m : kRowCounts)
      for (int output = mq::kTotal; output <= mq::kGridBFloat16; ++output) {
        const int32_t* zeros = output % 2 ? zero : nullptr;
        const void* multiplier =
            output == mq::kFloat || output == mq::kBFloat16 ? static_cast<const void*>(factor) : mantissa;
        memset(ours, 0, kM * kN * 4);
        memset(theirs, 0, kM * kN * 4);
        if (mq_linear(x, kK, packed, bytes, bias, zeros, multiplier, ours, m, kN, kK, bits, output, 100, 255, 0.03f, 1, isa) ||
            mq_linear(x, kK, packed, bytes, bias, zeros, multiplier, theirs, m, kN, kK, bits, output, 100, 255, 0.03f, 1,
                      kIsaCount - 1))
          return 0;
        if (memcmp(ours, theirs, kM * kN * 4) != 0) return 0;
      }
  }
  return 1;
}
