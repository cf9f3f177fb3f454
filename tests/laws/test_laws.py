"""The laws on tiny models of every family and kind of block, in float32 and bfloat16, and what each law catches."""

from dataclasses import replace

import pytest
import torch

from freehold.checkpoint.load import load_decoder, open_described
from freehold.checkpoint.rules import stored_tensors
from freehold.checkpoint.save import save_checkpoint
from freehold.evaluate.laws import Finding, check_laws, company, finite_weights, prefill_equals_decode, round_trip, twin
from freehold.models import attention, mamba2
from freehold.models.block import Block, RmsNorm
from freehold.models.decoder import Decoder
from freehold.models.families import family_of_config
from freehold.models.layout import Layout
from freehold.models.names import SAME, Rule, Transform
from freehold.ops.mixers import Norm
from models.forms import needs_kernels, running
from models.packing import PACKED_LLAMA, PACKED_NEMOTRON, SUPER_QWEN, pack_decoder
from models.tiny import CONFIGS, LLAMA, MTP, NEMOTRON, QWEN, saved_names, tiny_decoder

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
FAMILIES = {"llama": LLAMA, "qwen": QWEN, "nemotron": NEMOTRON, "nemotron-mtp": MTP}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.usefixtures("references")
def test_every_law_holds_without_kernels(config, dtype):
    decoder = tiny_decoder(config, dtype=dtype)
    findings = list(check_laws(decoder, saved_names(decoder, config), seed=1))
    assert [finding for finding in findings if not finding.holds] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", (CONFIGS | {"nemotron-mtp": MTP}).values(), ids=(CONFIGS | {"nemotron-mtp": MTP}))
def test_every_law_holds(config, dtype):
    decoder = tiny_decoder(config, dtype=dtype)
    findings = list(check_laws(decoder, saved_names(decoder, config), seed=1))
    assert [finding for finding in findings if not finding.holds] == []
    assert len({finding.law for finding in findings}) == 5


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("config", "format"),
    [(PACKED_LLAMA, "Q8_0"), (PACKED_LLAMA, "Q4_1"), (PACKED_NEMOTRON, "Q4_0"), (SUPER_QWEN, "Q4_K")],
    ids=["llama-Q8_0", "llama-Q4_1", "nemotron-Q4_0", "qwen-Q4_K"],
)
def test_every_law_holds_with_packed_weights(config, format, dtype):
    decoder = pack_decoder(tiny_decoder(config, dtype=dtype), format)
    findings = list(check_laws(decoder, saved_names(decoder, config), seed=1))
    assert [finding for finding in findings if not finding.holds] == []


def test_progress_names_the_law_that_is_next():
    told = []
    decoder = tiny_decoder(LLAMA)
    list(check_laws(decoder, saved_names(decoder, LLAMA), seed=0, progress=lambda *step: told.append(step)))
    assert [(done, total) for done, total, _ in told] == [(done, 5) for done in range(5)]
    assert told[0][2] == "finite weights"


def test_the_same_seed_gives_the_same_findings():
    decoder = tiny_decoder(NEMOTRON)
    assert prefill_equals_decode(decoder, seed=3) == prefill_equals_decode(decoder, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_saved_checkpoint_loads_with_the_same_bits(config, dtype, tmp_path):
    decoder, family = tiny_decoder(config, dtype=dtype), family_of_config(config)
    save_checkpoint(tmp_path / "saved", decoder, family=family, config=config)
    source, described = open_described(tmp_path / "saved")
    with source:
        loaded, _ = load_decoder(source, described, dtype=dtype, device=torch.device("cpu"))
        expected = dict(stored_tensors(decoder, described.names))
        found = dict(stored_tensors(loaded, described.names))
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_a_second_save_writes_the_same_bytes(tmp_path):
    family = family_of_config(NEMOTRON)
    save_checkpoint(tmp_path / "first", tiny_decoder(NEMOTRON), family=family, config=NEMOTRON)
    source, described = open_described(tmp_path / "first")
    with source:
        loaded, _ = load_decoder(source, described, dtype=torch.float32, device=torch.device("cpu"))
        save_checkpoint(tmp_path / "second", loaded, family=family, config=described.config)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second


# What each law catches. Kernels that are told something else: test_bits.py.


@pytest.fixture
def references():
    """Run the references, parts of which a test breaks."""
    with running("off"):
        yield


def test_a_nan_is_named_by_its_parameter():
    decoder = tiny_decoder(NEMOTRON)
    decoder.blocks[2].mixer.up_proj.weight[3, 5] = float("nan")
    decoder.blocks[0].mixer.D[1:3] = float("inf")
    finding = finite_weights(decoder)
    assert not finding.holds
    assert "blocks.2.mixer.up_proj.weight (1)" in finding.detail
    assert "blocks.0.mixer.D (2)" in finding.detail


@pytest.mark.parametrize("law", [prefill_equals_decode, company, pytest.param(twin, marks=needs_kernels)])
def test_a_nan_holds_under_no_law_that_compares(law):
    decoder = tiny_decoder(LLAMA)
    decoder.blocks[0].norm.weight[0] = float("nan")
    assert not law(decoder, seed=0).holds


def fails(finding: Finding) -> bool:
    assert finding.measured is not None
    assert finding.tolerance is not None
    return not finding.holds and finding.measured > finding.tolerance


@pytest.mark.usefixtures("references")
def test_a_convolution_that_forgets_its_tail_breaks_prefill_equals_decode(monkeypatch):
    forgetful = mamba2.causal_conv
    monkeypatch.setattr(
        mamba2, "causal_conv", lambda x_LC, tail_YC, *rest: forgetful(x_LC, torch.zeros_like(tail_YC), *rest)
    )
    assert fails(prefill_equals_decode(tiny_decoder(NEMOTRON), seed=0))


@pytest.mark.usefixtures("references")
def test_a_state_that_is_rounded_breaks_prefill_equals_decode(monkeypatch):
    exact = mamba2.scan_step

    def rounding(*arguments):
        y_BHP, state_BHPN = exact(*arguments)
        return y_BHP, state_BHPN.bfloat16().float()

    monkeypatch.setattr(mamba2, "scan_step", rounding)
    assert fails(prefill_equals_decode(tiny_decoder(NEMOTRON), seed=0))


@pytest.mark.usefixtures("references")
def test_positions_that_start_anew_break_prefill_equals_decode(monkeypatch):
    step = Layout.step

    def without_contexts(lengths, contexts, **rest):
        layout = step(lengths, contexts, **rest)
        vars(layout)["positions_T"] = Layout.packed(lengths).positions_T
        return layout

    monkeypatch.setattr(Layout, "step", without_contexts)
    assert fails(prefill_equals_decode(tiny_decoder(LLAMA), seed=0))


@pytest.mark.usefixtures("references")
def test_attention_that_sees_its_neighbours_breaks_company(monkeypatch):
    correct = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, k, v, *, spans: correct(q, k, v, spans=[(0, spans[-1][1])]))
    finding = company(tiny_decoder(QWEN), seed=0)
    assert fails(finding)
    assert "packed" in finding.detail


@pytest.mark.usefixtures("references")
def test_a_state_that_leaks_into_the_next_sequence_breaks_company(monkeypatch):
    class Leaky(mamba2.Mamba2):
        def _mix(self, projected_TP, layout, state):
            whole = Layout.packed([layout.num_tokens]) if state is None else layout
            return super()._mix(projected_TP, whole, state)

    decoder = tiny_decoder(NEMOTRON)
    decoder.blocks[0].mixer.__class__ = Leaky
    assert fails(company(decoder, seed=0))
    assert prefill_equals_decode(decoder, seed=0).holds


@pytest.mark.usefixtures("references")
def test_slots_of_neighbours_that_are_mixed_up_break_company(monkeypatch):
    monkeypatch.setattr(Layout, "slots_B", property(lambda self: torch.tensor(self.slots).roll(1)))
    assert fails(company(tiny_decoder(NEMOTRON), seed=0))


def test_a_norm_that_adds_up_over_the_whole_batch_breaks_company(monkeypatch):
    class Batched(RmsNorm):
        def forward(self, hidden_TD):
            return hidden_TD / hidden_TD.square().mean().sqrt()

    decoder = tiny_decoder(LLAMA)
    decoder.norm.__class__ = Batched
    assert fails(company(decoder, seed=0))


def broken_rule(decoder: Decoder, parameter: str, transform: Transform) -> Finding:
    names = saved_names(decoder, NEMOTRON)
    rules = [replace(r, transform=transform) if r.parameter == parameter else r for r in names.rules]
    return round_trip(decoder, replace(names, rules=tuple(rules)))


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(Transform(load=torch.Tensor.float, save=torch.Tensor.bfloat16), id="rounds"),
        pytest.param(Transform(load=lambda t: t.flip(0), save=lambda t: t), id="reorders"),
        pytest.param(Transform(load=torch.Tensor.double, save=lambda t: t), id="changes-dtype"),
    ],
)
def test_a_rule_that_is_no_way_back_breaks_the_round_trip(transform):
    decoder = tiny_decoder(NEMOTRON)
    assert broken_rule(decoder, "blocks.1.mixer.q_proj.weight", SAME).holds
    finding = broken_rule(decoder, "blocks.1.mixer.q_proj.weight", transform)
    assert not finding.holds
    assert "blocks.1.mixer.q_proj.weight" in finding.detail


def test_a_parameter_without_a_rule_breaks_the_round_trip():
    decoder = tiny_decoder(LLAMA)
    names = saved_names(decoder, LLAMA)
    kept = tuple(rule for rule in names.rules if rule != Rule(parameter="norm.weight", stored="model.norm.weight"))
    finding = round_trip(decoder, replace(names, rules=kept))
    assert not finding.holds
    assert "norm.weight" in finding.detail


@needs_kernels
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_kernel_with_another_epsilon_breaks_the_twin_law(config, monkeypatch):
    def add_with_other_epsilon(block, program, state):
        block.mixer.add_to(program, Norm(weight_D=block.norm.weight, eps=0.1, order=block.norm.order), state)

    assert twin(tiny_decoder(config), seed=0).holds
    monkeypatch.setattr(Block, "add_to", add_with_other_epsilon)
    assert fails(twin(tiny_decoder(config), seed=0))
