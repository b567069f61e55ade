// Matrix units (x86 AMX): products of many rows with a whole panel. Included in kernel.cpp's namespace.
//
// A tile register holds 16 rows of 64 bytes. tdpbusd adds to an int32 tile [16 rows][16 channels] the products of
// 16 rows x 64 columns of activations (uint8) with 16 groups x 16 channels of weights (int8, four columns each): one
// vector of each of 16 groups of the packed panel. Registers 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
//
// All tiles are whole, so they are configured once for a panel: the last rows of a product begin early and compute
// some rows again; the last groups of columns are copied behind zeros.
#pragma once

constexpr int kTileRows = 16, kTileBytes = 64, kTileGroups = 16;

struct alignas(64) TileConfig {  // as ldtilecfg reads it
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

#if defined(MQ_EMULATED_TILES)
// The instructions as plain functions: their semantics, and a trap where the processor would fault. For tests.
namespace emulated {

struct Tiles {
  TileConfig config;
  uint8_t data[8][kTileRows][kTileBytes];
};
thread_local Tiles state;

inline void must(bool holds) {
  if (!holds) __builtin_trap();
}

inline bool whole(const void* p, size_t bytes) {
  const uint8_t* byte = static_cast<const uint8_t*>(p);
  for (size_t i = 0; i < bytes; ++i)
    if (byte[i]) return false;
  return true;
}

inline void ready(int t) {
  must(state.config.palette == 1 && t >= 0 && t < 8 && state.config.rows[t] && state.config.bytes[t]);
}

inline void load_config(const TileConfig* config) {
  must(config->palette == 1 && config->start_row == 0 && whole(config->reserved, sizeof config->reserved));
  must(whole(config->bytes + 8, 16) && whole(config->rows + 8, 8));
  for (int t = 0; t < 8; ++t) {
    must(config->rows[t] <= kTileRows && config->bytes[t] <= kTileBytes);
    must(!config->rows[t] == !config->bytes[t]);
  }
  state.config = *config;
  memset(state.data, 0, sizeof state.data);
}

inline void release() { memset(&state, 0, sizeof state); }

inline void zero(int t) {
  ready(t);
  memset(state.data[t], 0, sizeof state.data[t]);
}

inline void load(int t, const void* base, int64_t stride) {
  zero(t);
  for (int r = 0; r < state.config.rows[t]; ++r)
    memcpy(state.data[t][r], static_cast<const uint8_t*>(base) + r * stride, state.config.bytes[t]);
}

inline void store(int t, void* base, int64_t stride) {
  ready(t);
  for (int r = 0; r < state.config.rows[t]; ++r)
    memcpy(static_cast<uint8_t*>(base) + r * stride, state.data[t][r], state.config.bytes[t]);
}

inline void add_products(int sum, int x, int w) {  // bytes of x unsigned, of w signed; sums wrap
  ready(sum), ready(x), ready(w);
  must(sum != x && sum != w && x != w);
  const TileConfig& c = state.config;
  must(c.rows[sum] == c.rows[x] && c.bytes[sum] == c.bytes[w] && c.bytes[x] / 4 == c.rows[w]);
  must(c.bytes[sum] % 4 == 0 && c.bytes[x] % 4 == 0);
  for (int r = 0; r < c.rows[sum]; ++r)
    for (int g = 0; g < c.rows[w]; ++g)
      for (int n = 0; n < c.bytes[sum] / 4; ++n) {
        uint32_t total;
        memcpy(&total, state.data[sum][r] + 4 * n, 4);
        for (int j = 0; j < 4; ++j)
          total += static_cast<uint32_t>(state.data[x][r][4 * g + j] * static_cast<int8_t>(state.data[w][g][4 * n + j]));
        memcpy(state.data[sum][r] + 4 * n, &total, 4);
      }
}

}  // namespace emulated
#define MQ_TILE_CONFIG(config) emulated::load_config(config)
#define MQ_TILE_RELEASE() emulated::release()
#define MQ_TILE_ZERO(t) emulated::zero(t)
#define MQ_TILE_LOAD(t, base, stride) emulated::load(t, base, stride)
#define MQ_TILE_STORE(t, base, stride) emulated::store(t, base, stride)
#define MQ_TILE_PRODUCTS(sum, x, w) emulated::add_products(sum, x, w)
#else
// Macros: the compilers' intrinsics take literal numbers of registers only.
#define MQ_TILE_CONFIG(config) _tile_loadconfig(config)
#define MQ_TILE_RELEASE() _tile_release()
#define MQ_TILE_ZERO(t) _tile_zero(t)
#define MQ_TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define MQ_TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define MQ_TILE_PRODUCTS(sum, x, w) _tile_dpbusd(sum, x, w)
#endif

// Some compilers do not know that tileloadd and ldtilecfg read memory: what was written must be there before.
#define MQ_TILE_FENCE() __asm__ volatile("" ::: "memory")

// The groups of a panel that fill no tile, behind them zeros.
struct TileTail {
  int64_t groups;
  alignas(64) int8_t weights[kTileGroups * 4 * kPanel];

  TileTail(const int8_t* w, int64_t group_count) : groups(group_count % kTileGroups) {
    if (!groups) return;
    memset(weights, 0, sizeof weights);
    memcpy(weights, w + (group_count - groups) * 4 * kPanel, groups * 4 * kPanel);
  }
};

inline void copy_tail(const uint8_t* x, int64_t ldx, int64_t groups, uint8_t* rows) {
  for (int r = 0; r < kTileRows; ++r, rows += kTileBytes) {
    memset(rows, 0, kTileBytes);
    memcpy(rows, x + r * ldx, 4 * groups);
  }
}

// One step of a product: 64 columns of 16 or 32 rows with 32 channels.
#define MQ_TILE_STEP(first, second, ldx, w)                   \
  MQ_TILE_LOAD(4, first, ldx);                                \
  MQ_TILE_LOAD(6, w, 4 * kPanel);                             \
  MQ_TILE_LOAD(7, (w) + kTileBytes, 4 * kPanel);              \
  MQ_TILE_PRODUCTS(0, 4, 6);                                  \
  MQ_TILE_PRODUCTS(1, 4, 7);                                  \
  if (kTwo) {                                                 \
    MQ_TILE_LOAD(5, second, ldx);                             \
    MQ_TILE_PRODUCTS(2, 5, 6);                                \
    MQ_TILE_PRODUCTS(3, 5, 7);                                \
  }

// sums[16 or 32][kPanel] of 16 rows from `first`, and with kTwo 16 more from `second`, over all groups.
template <bool kTwo>
void tile_products(const uint8_t* first, const uint8_t* second, int64_t ldx, const int8_t* w, int64_t group_count,
                   const TileTail& tail, int32_t* sums) {
  alignas(64) uint8_t rows[2 * kTileRows * kTileBytes];
  const int64_t whole = group_count - tail.groups;
  if (tail.groups) {
    copy_tail(first + 4 * whole, ldx, tail.groups, rows);
    if (kTwo) copy_tail(second + 4 * whole, ldx, tail.groups, rows + kTileRows * kTileBytes);
  }
  MQ_TILE_FENCE();
  constexpr int kWidth = 2 * kTileBytes / 4;  // channels of two tiles of sums side by side
  for (int c = 0; c < kPanel; c += kWidth) {
    MQ_TILE_ZERO(0);
    MQ_TILE_ZERO(1);
    if (kTwo) {
      MQ_TILE_ZERO(2);
      MQ_TILE_ZERO(3);
    }
    for (int64_t g = 0; g < whole; g += kTileGroups) {
      MQ_TILE_STEP(first + 4 * g, second + 4 * g, ldx, w + g * 4 * kPanel + 4 * c)
    }
    if (tail.groups) {
      MQ_TILE_STEP(rows, rows + kTileRows * kTileBytes, kTileBytes, tail.weights + 4 * c)
    }
    MQ_TILE_STORE(0, sums + c, 4 * kPanel);
    MQ_TILE_STORE(1, sums + c + kWidth / 2, 4 * kPanel);
    if (kTwo) {
      MQ_TILE_STORE(2, sums + kTileRows * kPanel + c, 4 * kPanel);
      MQ_TILE_STORE(3, sums + kTileRows * kPanel + c + kWidth / 2, 4 * kPanel);
    }
  }
}

// Rows [m0, m1) of a panel of bytes, at least kTileRows; finish(row, sums) for each of them, once.
template <class Finish>
void tile_panel(const uint8_t* x, int64_t ldx, const int8_t* w, int64_t group_count, int64_t m0, int64_t m1,
                const Finish& finish) {
  const TileTail tail(w, group_count);
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) config.rows[t] = kTileRows, config.bytes[t] = kTileBytes;
  MQ_TILE_FENCE();
  MQ_TILE_CONFIG(&config);
  alignas(64) int32_t sums[2 * kTileRows * kPanel];
  for (int64_t row = m0; row < m1; row += 2 * kTileRows) {
    const int64_t left = m1 - row, latest = m1 - kTileRows;
    const int64_t first = row < latest ? row : latest;
    const int64_t second = row + kTileRows < latest ? row + kTileRows : latest;
    if (left > kTileRows)
      tile_products<true>(x + first * ldx, x + second * ldx, ldx, w, group_count, tail, sums);
    else
      tile_products<false>(x + first * ldx, x + first * ldx, ldx, w, group_count, tail, sums);
    for (int64_t i = 0; i < left && i < 2 * kTileRows; ++i)
      finish(row + i, sums + kPanel * (i < kTileRows ? row + i - first : kTileRows + row + i - second));
  }
  MQ_TILE_RELEASE();  // the system saves the tiles of a thread that has not released them
}
