// What the processor can do, asked at run time. No kernel here.
#pragma once

namespace freehold {

// True where the processor and the operating system run the instructions that a form is compiled with.
bool runs_avx2();        // AVX2, FMA, F16C
bool runs_avx512();      // AVX-512 F, BW, DQ, VL
bool runs_avx512vnni();  // those, and VNNI

}  // namespace freehold
