// Launchers of the kv family; no CUDA header, so that plain C++ can include it.
#pragma once

#include "rainkernels/kv.h"

namespace rainkernels {

// Enqueues the write on `stream` (a cudaStream_t); returns a cudaError_t as int, 0 for success.
int kv_write_cuda(const KvWriteParams& p, void* stream);

}  // namespace rainkernels
