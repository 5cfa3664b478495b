// What the edits driver and the per-ISA kernels share on the CPU.
#pragma once

#include <cstdint>

#include "rainkernels/edits.h"

namespace rainkernels {

// Rows handled together share what they read of the directions; a row's bits do not depend on its companions.
constexpr int kEditBlock = 4;

// Runs the call. Returns -1, or the first row whose slot is outside the table; nothing is written then.
int64_t edits(const EditParams& p);

struct EditKernels {
  // Residual add and RMSNorm of rows without an edit.
  void (*plain)(const EditParams& p, const int32_t* rows, int num_rows);
  // At most kEditBlock rows that read the same directions: one slot, or any live slots of a shared basis.
  // next: a row whose directions are wanted soon, or -1.
  void (*edited)(const EditParams& p, const int32_t* rows, int num_rows, int32_t next);
};

namespace baseline {
extern const EditKernels edit_kernels;
}
namespace avx2 {
extern const EditKernels edit_kernels;
}
namespace avx512 {
extern const EditKernels edit_kernels;
}

}  // namespace rainkernels
