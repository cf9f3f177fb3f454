// The Python side of the kernels: a submodule per form (portable, avx512), the same names in each.
//
// Tensors come as addresses, so nothing here is compiled or linked against torch. The callers in src/freehold/ops have
// checked dtype, contiguity and shape, and hold the tensors for the length of the call; the GIL is released meanwhile.
#include <nanobind/nanobind.h>

#include "cpu.h"
#include "rms_norm.h"

namespace nb = nanobind;

namespace freehold {
namespace {

Element element(bool is_bfloat16) { return is_bfloat16 ? Element::bfloat16 : Element::float32; }

template <void (*kernel)(const RmsNorm&)>
void rms_norm(std::uintptr_t out, std::uintptr_t hidden, std::uintptr_t weight, std::size_t num_tokens,
              std::size_t width, float eps, bool hidden_is_bfloat16, bool weight_is_bfloat16,
              bool cast_then_multiply) {
  const RmsNorm call{reinterpret_cast<void*>(out),
                     reinterpret_cast<const void*>(hidden),
                     reinterpret_cast<const void*>(weight),
                     num_tokens,
                     width,
                     eps,
                     element(hidden_is_bfloat16),
                     element(weight_is_bfloat16),
                     cast_then_multiply};
  nb::gil_scoped_release unlocked;
  kernel(call);
}

void bind_portable(nb::module_ form) { form.def("rms_norm", &rms_norm<rms_norm_portable>); }

#ifdef FREEHOLD_AVX512
void bind_avx512(nb::module_ form) { form.def("rms_norm", &rms_norm<rms_norm_avx512>); }
#endif

}  // namespace
}  // namespace freehold

NB_MODULE(_kernels, module) {
  freehold::bind_portable(module.def_submodule("portable"));
#ifdef FREEHOLD_AVX512
  if (freehold::has_avx512()) freehold::bind_avx512(module.def_submodule("avx512"));
#endif
}
