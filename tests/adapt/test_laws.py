"""The laws with an adapter that is not merged: prefill = decode, company, and train = serve, bit for bit."""

import pytest
import torch

from adapt.adapters import SETTINGS, adapt, fill
from freehold.adapt.lora import merge, wrap
from freehold.evaluate.laws import check_laws, relative_difference
from freehold.models.layout import Capacity, Layout
from freehold.ops.attention import PAGE_TOKENS
from laws.test_train_serve import served, trained
from models.forms import FORMS, needs_kernels, on_threads, running, same_bits
from models.packing import PACKED_LLAMA, PACKED_NEMOTRON, pack_decoder
from models.tiny import CONFIGS, LLAMA, random_tokens, saved_names, tiny_decoder

pytestmark = needs_kernels

DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
# A key that lies between two of the 255 steps may take the other where the sum before it has another order, and merged
# weights are rounded (measured 4e-7 and 8e-3).
EIGHT_BIT_PAGES_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
NAMES = ["llama", "llama-llama3", "qwen-tied", "nemotron", "nemotron-latent", "nemotron-router-groups"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_laws_hold_with_an_adapter_and_no_bit_is_off(name, dtype):
    decoder = adapt(tiny_decoder(CONFIGS[name], dtype=dtype))
    findings = list(check_laws(decoder, saved_names(decoder, CONFIGS[name]), seed=1))
    assert [finding for finding in findings if not finding.holds] == []
    assert {finding.measured for finding in findings if finding.law in ("company", "prefill = decode")} == {0.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_trains_on_the_bits_that_it_serves(name, dtype):
    decoder = adapt(tiny_decoder(CONFIGS[name], dtype=dtype))
    expected_TD, expected_TV = served(decoder)
    for form in FORMS:
        with running(form), on_threads(3):
            found_TD, found_TV = trained(decoder)
        assert found_TV.requires_grad
        assert same_bits(found_TD.detach(), expected_TD), form
        assert same_bits(found_TV.detach(), expected_TV), form


@pytest.mark.parametrize(
    ("config", "format"), [(PACKED_LLAMA, "Q8_0"), (PACKED_NEMOTRON, "Q4_0")], ids=["llama-Q8_0", "nemotron-Q4_0"]
)
def test_an_adapter_on_packed_weights_trains_on_the_bits_that_it_serves(config, format):
    decoder = adapt(pack_decoder(tiny_decoder(config), format))
    expected_TD, _ = served(decoder)
    found_TD, _ = trained(decoder)
    assert found_TD.requires_grad
    assert same_bits(found_TD.detach(), expected_TD)


@torch.inference_mode()
def test_states_that_were_used_before_an_adapter_learnt_give_what_it_adds():
    decoder = tiny_decoder(LLAMA)
    wrap(decoder, SETTINGS, seed=0)
    states = decoder.allocate_states(Capacity(num_slots=1, num_pages=1, page_size=PAGE_TOKENS))
    layout = Layout.step([5], [0], slots=[0], pages=[[0]], page_size=PAGE_TOKENS)
    tokens_T = random_tokens(5)
    before_TD = decoder(tokens_T, layout, states).clone()
    fill(decoder)
    found_TD = decoder(tokens_T, layout, states)
    fresh = decoder.allocate_states(Capacity(num_slots=1, num_pages=1, page_size=PAGE_TOKENS))
    assert same_bits(found_TD, decoder(tokens_T, layout, fresh))
    assert not torch.equal(found_TD, before_TD)


@torch.inference_mode()
def over_eight_bit_pages(decoder, parts):
    """Return the hidden states of a sequence that comes in parts, its keys and values in eight bits."""
    states = decoder.allocate_states(Capacity(num_slots=1, num_pages=2, page_size=PAGE_TOKENS), kv_dtype=torch.int8)
    tokens_T, done, outputs = random_tokens(sum(parts)), 0, []
    for length in parts:
        layout = Layout.step([length], [done], slots=[0], pages=[[1, 0]], page_size=PAGE_TOKENS)
        outputs.append(decoder(tokens_T[done : done + length], layout, states))
        done += length
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_over_eight_bit_pages_gives_what_merged_weights_give(dtype):
    decoder = adapt(tiny_decoder(LLAMA, dtype=dtype))
    whole_TD = over_eight_bit_pages(decoder, [40])
    assert same_bits(over_eight_bit_pages(decoder, [33, 1, 6]), whole_TD)
    merge(decoder)
    assert relative_difference(whole_TD, over_eight_bit_pages(decoder, [40])) <= EIGHT_BIT_PAGES_TOLERANCE[dtype]
