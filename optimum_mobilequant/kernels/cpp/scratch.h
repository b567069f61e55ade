// Working memory.
#pragma once
#include <stddef.h>
#include <stdlib.h>

namespace mq {

// Aligned scratch memory; the pointer is null if there is none left.
struct Scratch {
  void* data = nullptr;
  explicit Scratch(size_t bytes) {
    if (bytes && posix_memalign(&data, 64, bytes) != 0) data = nullptr;
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace mq
