// A whole decoder layer, and the pieces that stand outside of it.
#pragma once
#include "linear.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mq {

template <class Body>
void parallel(int threads, int64_t count, int64_t least, const Body& body) {  // body(begin, end)
#if defined(_OPENMP)
  if (threads > count / least) threads = static_cast<int>(count / least);
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t parts = omp_get_num_threads(), id = omp_get_thread_num();
      body(count * id / parts, count * (id + 1) / parts);
    }
    return;
  }
#endif
  (void)threads, (void)least;
  body(0, count);
}

// One call of a layer. Keys, sums of keys and values are as Attention describes them; the new ones are written.
struct LayerCall {
  const float* x;
  float* out;
  const float *cos, *sin;  // [rotary_batch, sequence, 2 * half]
  int64_t rotary_batch;
  const float* mask;
  int64_t mask_batch, mask_columns;
  int8_t* keys;
  int32_t* key_sums;
  int8_t* values;
  int64_t capacity, past, batch, sequence;
  const uint8_t* block;
  const uint8_t *qkv, *proj, *gate_up, *down;
};

struct NormCall {
  const float* x;
  float* out;
  int64_t rows;
  const uint8_t* block;
};

const char* layer_fields();
int run_layer(const LayerCall& call, const Isa& isa, int threads);
int run_wide(Linear a, const int64_t* bias, const Isa& isa, int threads);
int run_norm(const NormCall& call, const Isa& isa, int threads);

}  // namespace mq
