#include "cpu.h"

namespace freehold {

bool has_avx512() {
#ifdef FREEHOLD_AVX512
  // The builtin also asks the operating system (XGETBV) whether it saves the wide registers.
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace freehold
