// Which instruction set the CPU lane uses. Kernels are compiled once per set; results are bitwise equal on all of them.
#pragma once

namespace rainkernels {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set this CPU has, or the one RAINKERNELS_ISA names when the CPU has it. Decided at the first call.
Isa detected_isa();
const char* isa_name(Isa isa);

}  // namespace rainkernels
