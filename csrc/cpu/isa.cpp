#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace rainkernels {
namespace {

Isa best_isa() {
#if defined(RK_HAS_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa wanted_isa() {
  const Isa best = best_isa();
  const char* named = std::getenv("RAINKERNELS_ISA");
  if (named == nullptr) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(named, isa_name(isa)) == 0 && static_cast<int>(isa) <= static_cast<int>(best)) return isa;
  }
  return best;
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = wanted_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace rainkernels
