// What the processor can do, asked at run time. No kernel here.
#pragma once

namespace freehold {

// True where the processor and the operating system run AVX-512 F, BW, DQ and VL, and this build has those kernels.
bool has_avx512();

}  // namespace freehold
