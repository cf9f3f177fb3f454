// The Python side of the kernels: a `Form` object for each form that this machine runs, best first, and what is the same
// in all of them.
//
// Tensors come as addresses, so nothing here is compiled or linked against torch. The callers in src/freehold/ops have
// checked dtype, contiguity and shape, and hold the tensors for the length of the call; the GIL is released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu.h"
#include "kernels.h"
#include "memory.h"
#include "pack.h"
#include "pool.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace freehold {

#define FREEHOLD_DECLARE(form) \
  namespace form {             \
  const Kernels& kernels();    \
  }
FREEHOLD_DECLARE(portable)
#ifdef FREEHOLD_X86
FREEHOLD_DECLARE(avx2)
FREEHOLD_DECLARE(avx512)
FREEHOLD_DECLARE(avx512vnni)
#endif
#undef FREEHOLD_DECLARE

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Element element(bool is_bfloat16) { return is_bfloat16 ? Element::bfloat16 : Element::float32; }

std::vector<const Kernels*> forms() {
  std::vector<const Kernels*> found;
#ifdef FREEHOLD_X86
  if (runs_avx512vnni()) found.push_back(&avx512vnni::kernels());
  if (runs_avx512()) found.push_back(&avx512::kernels());
  if (runs_avx2()) found.push_back(&avx2::kernels());
#endif
  found.push_back(&portable::kernels());
  return found;
}

void call_rms_norm(const Kernels& form, int num_threads, Address out, Address hidden, bool is_bfloat16, std::size_t num_tokens,
                   std::size_t width, const Norm& norm) {
  nb::gil_scoped_release unlocked;
  form.rms_norm({at(hidden), element(is_bfloat16), num_tokens, width, norm}, at(out), num_threads);
}

void call_linear(const Kernels& form, int num_threads, Address out, bool out_is_bfloat16, Address rows, bool is_bfloat16,
                 std::size_t num_rows, const Matrix& matrix, Address bias, bool bias_is_bfloat16) {
  const Linear call{at(rows), element(is_bfloat16), num_rows, matrix, at(bias), element(bias_is_bfloat16), at(out),
                    element(out_is_bfloat16)};
  nb::gil_scoped_release unlocked;
  form.linear(call, num_threads);
}

void call_norm_gradient(const Kernels& form, int num_threads, Address hidden, bool is_bfloat16, std::size_t num_tokens,
                        std::size_t width, const Norm& norm, Address out, Address hidden_gradient,
                        Address weight_gradient) {
  const Residual from{at(hidden), element(is_bfloat16), num_tokens, width, norm};
  nb::gil_scoped_release unlocked;
  form.norm_gradient({from, at<const float>(out), at(hidden_gradient), at<float>(weight_gradient)}, num_threads);
}

void call_activate(const Kernels& form, int num_threads, Address gate, Address up, std::size_t count, Address out) {
  nb::gil_scoped_release unlocked;
  form.activate({at<const float>(gate), at<const float>(up), count}, at<float>(out), num_threads);
}

void call_activation_gradient(const Kernels& form, int num_threads, Address gate, Address up, std::size_t count,
                              Address out, Address gate_gradient, Address up_gradient) {
  nb::gil_scoped_release unlocked;
  form.activation_gradient({at<const float>(gate), at<const float>(up), count}, at<const float>(out),
                           at<float>(gate_gradient), at<float>(up_gradient), num_threads);
}

void call_cross_entropy(const Kernels& form, int num_threads, Address logits, Address labels, std::size_t num_rows,
                        std::size_t width, Address losses) {
  nb::gil_scoped_release unlocked;
  form.cross_entropy({at<float>(logits), at<const std::int64_t>(labels), num_rows, width, at<float>(losses)}, num_threads);
}

Attention attention_of(int num_heads, int num_kv_heads, int head_dim, Address rotation, const Batch& batch, Address qkv,
                       PageElement page_element, Address key_pages, Address value_pages, Address key_scales,
                       Address value_scales, Address out, Address log_sums) {
  return {num_heads, num_kv_heads, head_dim, batch, at<float>(qkv), at<const float>(rotation), page_element,
          at(key_pages), at(value_pages), at<float>(key_scales), at<float>(value_scales), at<float>(out),
          at<float>(log_sums)};
}

void call_attention(const Kernels& form, int num_threads, const Attention& call) {
  nb::gil_scoped_release unlocked;
  form.attention_inner(call, num_threads);
}

void call_attention_gradient(const Kernels& form, int num_threads, const Attention& call, Address out, Address qkv) {
  nb::gil_scoped_release unlocked;
  form.attention_gradient({call, at<const float>(out), at<float>(qkv)}, num_threads);
}

// Of each row: where its logits are, four numbers (temperature, top_p, min_p, uniform), and top_k.
void call_sample(const Kernels& form, int num_threads, Address logits, Address numbers, Address top_k,
                 std::size_t num_rows, std::size_t width, Address tokens) {
  nb::gil_scoped_release unlocked;
  std::vector<Draw> draws(num_rows);
  for (std::size_t m = 0; m < num_rows; ++m) {
    const double* number = at<const double>(numbers) + 4 * m;
    draws[m] = {at<const float>(at<const Address>(logits)[m]), number[0], number[1], number[2], number[3],
                at<const std::int64_t>(top_k)[m]};
  }
  form.sample(draws.data(), num_rows, width, at<std::int64_t>(tokens), num_threads);
}

double call_multiply_in_registers(const Kernels& form, int num_threads, Arithmetic arithmetic, std::size_t num_rounds) {
  nb::gil_scoped_release unlocked;
  return form.multiply_in_registers(arithmetic, num_rounds, num_threads);
}

void call_read_memory(const Kernels& form, int num_threads, Address data, std::size_t num_bytes) {
  nb::gil_scoped_release unlocked;
  form.read_memory(at<const std::uint8_t>(data), num_bytes, num_threads);
}

Norm norm_of(Address weight, bool is_bfloat16, float eps, bool cast_then_multiply) {
  return {at(weight), element(is_bfloat16), eps, cast_then_multiply};
}

Residual residual_with(const Norm& norm) { return {nullptr, Element::float32, 0, 0, norm}; }

void add_mlp(Program& program, const Norm& norm, const Matrix& gate, const Matrix& up, const Matrix& down) {
  program.add(Mlp{residual_with(norm), gate, up, down});
}

void add_attention(Program& program, const Norm& norm, const Matrix& query, const Matrix& key, const Matrix& value,
                   Address query_bias, Address key_bias, Address value_bias, bool bias_is_bfloat16, const Matrix& output,
                   int num_heads, int num_kv_heads, int head_dim, Address rotation, Address key_pages,
                   Address value_pages, PageElement page_element, Address key_scales, Address value_scales) {
  const Attention inner{num_heads, num_kv_heads, head_dim, {}, nullptr, at<const float>(rotation),
                        page_element, at(key_pages), at(value_pages), at<float>(key_scales), at<float>(value_scales),
                        nullptr, nullptr};
  program.add(AttentionMixer{residual_with(norm),
                             {query, key, value},
                             {at(query_bias), at(key_bias), at(value_bias)},
                             element(bias_is_bfloat16),
                             output,
                             inner});
}

Mamba2 mamba2_of(int num_heads, int head_dim, int state_size, int num_groups, int conv_kernel, float norm_eps,
                 float min_step, float max_step, Address conv_weight, Address conv_bias, Address norm_weight,
                 bool weights_are_bfloat16, Address a_log, Address d, Address dt_bias, bool rows_are_bfloat16) {
  Mamba2 call{};
  call.num_heads = num_heads;
  call.head_dim = head_dim;
  call.state_size = state_size;
  call.num_groups = num_groups;
  call.conv_kernel = conv_kernel;
  call.norm_eps = norm_eps;
  call.min_step = min_step;
  call.max_step = max_step;
  call.weight_element = element(weights_are_bfloat16);
  call.conv_weight = at(conv_weight);
  call.conv_bias = at(conv_bias);
  call.norm_weight = at(norm_weight);
  call.a_log = at<const float>(a_log);
  call.d = at<const float>(d);
  call.dt_bias = at<const float>(dt_bias);
  call.tail_element = element(rows_are_bfloat16);
  return call;
}

void add_mamba2(Program& program, const Norm& norm, const Matrix& input, const Matrix& output, Mamba2 inner,
                Address conv_tail, Address ssm) {
  inner.conv_tail = at(conv_tail);
  inner.ssm = at<float>(ssm);
  program.add(Mamba2Mixer{residual_with(norm), input, output, inner});
}

void call_mamba2_inner(const Kernels& form, int num_threads, Mamba2 call, const Batch& batch, Address projected,
                       Address conv_tail, Address ssm, Address mixed, Address out) {
  call.batch = batch;
  call.projected = at<const float>(projected);
  call.conv_tail = at(conv_tail);
  call.ssm = at<float>(ssm);
  call.mixed = at<float>(mixed);
  call.out = at<float>(out);
  nb::gil_scoped_release unlocked;
  form.mamba2_inner(call, num_threads);
}

// `found` is where the gradients go, in the order of Mamba2Gradient.
void call_mamba2_gradient(const Kernels& form, int num_threads, Mamba2 call, const Batch& batch, Address projected,
                          Address mixed, Address out, const std::vector<Address>& found) {
  call.batch = batch;
  call.projected = at<const float>(projected);
  const auto to = [&](int i) { return at<float>(found.at(i)); };
  const Mamba2Gradient gradient{call, at<const float>(mixed), at<const float>(out), to(0), to(1), to(2), to(3), to(4),
                                to(5), to(6)};
  nb::gil_scoped_release unlocked;
  form.mamba2_gradient(gradient, num_threads);
}

void add_moe(Program& program, const Norm& norm, const Matrix& gate, Address correction, int num_experts, int num_chosen,
             int num_groups, int num_chosen_groups, bool normalize_weights, float scale, const Matrix& up,
             std::size_t up_stride, const Matrix& down, std::size_t down_stride, const Matrix& shared_up,
             const Matrix& shared_down, const Matrix& latent_in, const Matrix& latent_out) {
  program.add(Moe{residual_with(norm), gate, at<const float>(correction), num_experts, num_chosen, num_groups,
                  num_chosen_groups, normalize_weights, scale, up, down, up_stride, down_stride, shared_up, shared_down,
                  latent_in, latent_out});
}

void call_choose_experts(const Kernels& form, int num_threads, Address logits, std::size_t num_tokens, int num_experts,
                         Address correction, int num_chosen, int num_groups, int num_chosen_groups,
                         bool normalize_weights, float scale, Address experts, Address weights) {
  Moe router{};
  router.correction = at<const float>(correction);
  router.num_experts = num_experts;
  router.num_chosen = num_chosen;
  router.num_groups = num_groups;
  router.num_chosen_groups = num_chosen_groups;
  router.normalize_weights = normalize_weights;
  router.scale = scale;
  nb::gil_scoped_release unlocked;
  form.choose_experts(router, at<float>(logits), num_tokens, at<std::int32_t>(experts), at<float>(weights), num_threads);
}

void call_sum_chosen(const Kernels& form, int num_threads, Address results, Address places, Address weights,
                     std::size_t num_tokens, int num_chosen, std::size_t width, Address out) {
  nb::gil_scoped_release unlocked;
  form.sum_chosen(at<const float>(results), at<const std::int32_t>(places), at<const float>(weights), num_tokens,
                  num_chosen, width, at<float>(out), num_threads);
}

void call_squares_gradient(const Kernels& form, int num_threads, Address squares, Address weights, std::size_t num_rows,
                           std::size_t width, Address out, Address of_weights) {
  nb::gil_scoped_release unlocked;
  form.squares_gradient(at<const float>(squares), at<const float>(weights), num_rows, width, at<float>(out),
                        at<float>(of_weights), num_threads);
}

void run_program(const Program& program, const Kernels& form, int num_threads, Address hidden, bool is_bfloat16,
                 std::size_t num_tokens, std::size_t width, const Batch& batch) {
  const Residual residual{at(hidden), element(is_bfloat16), num_tokens, width, {}};
  nb::gil_scoped_release unlocked;
  program.run(form, num_threads, residual, batch);
}

void read_program(const Program& program, const Kernels& form, int num_threads, Address tokens, Address hidden,
                  bool is_bfloat16, std::size_t num_tokens, std::size_t width, const Batch& batch) {
  const Residual residual{at(hidden), element(is_bfloat16), num_tokens, width, {}};
  nb::gil_scoped_release unlocked;
  program.read(form, num_threads, at<const std::int64_t>(tokens), residual, batch);
}

void predict_program(const Program& program, const Kernels& form, int num_threads, Address tokens, Address hidden,
                     bool is_bfloat16, std::size_t num_tokens, std::size_t width, const Batch& batch, Address logits) {
  const Residual residual{at(hidden), element(is_bfloat16), num_tokens, width, {}};
  nb::gil_scoped_release unlocked;
  program.predict(form, num_threads, at<const std::int64_t>(tokens), residual, batch, at(logits));
}

void pack(int num_threads, const Matrix& packed, Address stored) {
  constexpr std::size_t GRAIN = 4;
  nb::gil_scoped_release unlocked;
  run_team(num_threads, [&](Team& team, int) {
    const std::size_t num_panels = packed.num_panels();
    for (std::size_t first; (first = team.claim() * GRAIN) < num_panels;)
      pack_panels(packed, at<const std::uint8_t>(stored), first,
                  first + GRAIN < num_panels ? first + GRAIN : num_panels);
  });
}

void unpack_rows(int num_threads, const Matrix& packed, Address row_numbers, std::size_t num_rows, Address out) {
  nb::gil_scoped_release unlocked;
  run_team(num_threads, [&](Team& team, int) {
    for (std::size_t i; (i = team.claim()) < num_rows;)
      unpack_row(packed, at<const std::int64_t>(row_numbers)[i], at<float>(out) + i * packed.num_columns);
  });
}

}  // namespace
}  // namespace freehold

NB_MODULE(_kernels, module) {
  using namespace freehold;
  // Of what torch keeps past the interpreter's end, and with it us, once FSDP2 had our modules: no news to a user.
  // tests/cli/test_leaks.py has it speak: without FSDP2 nothing is left.
  nb::set_leak_warnings(false);
  nb::enum_<Format>(module, "Format")
      .value("F32", Format::float32)
      .value("BF16", Format::bfloat16)
      .value("BF16_PANELS", Format::bf16_panels)
      .value("Q8_0", Format::q8_0)
      .value("Q4_0", Format::q4_0)
      .value("Q4_1", Format::q4_1)
      .value("Q5_0", Format::q5_0)
      .value("Q5_1", Format::q5_1)
      .value("Q4_K", Format::q4_k)
      .value("Q5_K", Format::q5_k)
      .value("Q6_K", Format::q6_k);
  nb::enum_<Arithmetic>(module, "Arithmetic")
      .value("float32", Arithmetic::float32)
      .value("up_to_six_bits", Arithmetic::up_to_six_bits)
      .value("eight_bits", Arithmetic::eight_bits);
  nb::enum_<PageElement>(module, "PageElement")
      .value("float32", PageElement::float32)
      .value("bfloat16", PageElement::bfloat16)
      .value("int8", PageElement::int8);
  nb::class_<Matrix>(module, "Matrix")
      .def(nb::init<>())
      .def("__init__", [](Matrix* self, Format format, Address data, std::size_t num_rows, std::size_t num_columns) {
        new (self) Matrix{format, at<const std::uint8_t>(data), num_rows, num_columns};
      });
  nb::class_<Norm>(module, "Norm")
      .def("__init__", [](Norm* self, Address weight, bool is_bfloat16, float eps, bool cast_then_multiply) {
        new (self) Norm(norm_of(weight, is_bfloat16, eps, cast_then_multiply));
      });
  nb::class_<Mamba2>(module, "Mamba2");
  module.def("mamba2", &mamba2_of);
  nb::class_<Attention>(module, "Attention");
  module.def("attention", &attention_of);
  nb::class_<Batch>(module, "Batch")
      .def("__init__", [](Batch* self, int num_sequences, Address starts, Address contexts, Address slots, Address pages,
                          int pages_per_sequence, int page_size) {
        new (self) Batch{num_sequences, at<const std::int32_t>(starts), at<const std::int32_t>(contexts),
                         at<const std::int32_t>(slots), at<const std::int32_t>(pages), pages_per_sequence, page_size};
      });
  nb::class_<Program>(module, "Program")
      .def(nb::init<>())
      .def("add_mlp", &add_mlp)
      .def("add_attention", &add_attention)
      .def("add_mamba2", &add_mamba2)
      .def("add_moe", &add_moe)
      .def("set_ends", &Program::set_ends)
      .def("run", &run_program)
      .def("read", &read_program)
      .def("predict", &predict_program);
  nb::class_<Kernels>(module, "Form")
      .def_prop_ro("name", [](const Kernels& form) { return std::string(form.form); })
      .def("rms_norm", &call_rms_norm)
      .def("linear", &call_linear)
      .def("mamba2_inner", &call_mamba2_inner)
      .def("mamba2_gradient", &call_mamba2_gradient)
      .def("choose_experts", &call_choose_experts)
      .def("sum_chosen", &call_sum_chosen)
      .def("squares_gradient", &call_squares_gradient)
      .def("norm_gradient", &call_norm_gradient)
      .def("activate", &call_activate)
      .def("activation_gradient", &call_activation_gradient)
      .def("cross_entropy", &call_cross_entropy)
      .def("attention", &call_attention)
      .def("attention_gradient", &call_attention_gradient)
      .def("sample", &call_sample)
      .def("multiply_in_registers", &call_multiply_in_registers)
      .def("read_memory", &call_read_memory);
  module.def("forms", &forms, nb::rv_policy::reference);
  module.def("packed_bytes", &packed_bytes);
  module.def("pack", &pack);
  module.def("place_weights", [](Address begin, std::size_t num_bytes) { place_weights(at(begin), num_bytes); });
  module.def("keep_freed_memory", &keep_freed_memory);
  module.def("unpack_rows", &unpack_rows);
}
