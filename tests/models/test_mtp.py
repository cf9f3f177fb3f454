"""The MTP module against an assembly of transformers' own parts, put together as the published description says.

No other implementation can be asked: transformers leaves the module out. What is assembled here:

    h' = eh_proj([enorm(embedding of token i + 1); hnorm(h_i)])
    h' = h' + attention(norm_0(h'));  h' = h' + moe(norm_1(h'));  out = final_layernorm(h')
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention, NemotronHMoE, NemotronHRMSNorm

from freehold.checkpoint.load import open_described
from freehold.checkpoint.save import save_checkpoint
from freehold.evaluate.laws import relative_difference
from freehold.models.families import family_of_config
from freehold.models.layout import Layout
from models.tiny import MTP, random_tokens, tiny_decoder
from models.witness import load_ours

# float32, sums in another order over two blocks; 5e-7 at most.
TOLERANCE = 2e-6
LENGTH = 12


class AssembledMtp:
    """The module made of transformers' parts, its weights by the names that published files have."""

    def __init__(self, stored: dict[str, Tensor]):
        width, eps = MTP["hidden_size"], 1e-5
        names = {"layers_block_type": ["full_attention", "moe"], "attn_implementation": "eager"}
        kept = {key: value for key, value in MTP.items() if key not in ("model_type", "hybrid_override_pattern")}
        config = NemotronHConfig(**kept, **names)
        self.norms = {
            name: norm_with(stored[f"mtp.layers.{name}.weight"], width, eps)
            for name in ("0.enorm", "0.hnorm", "0.norm", "1.norm", "1.final_layernorm")
        }
        self.eh_proj = stored["mtp.layers.0.eh_proj.weight"]
        self.attention = NemotronHAttention(config, layer_idx=0)
        self.attention.load_state_dict(part(stored, "mtp.layers.0.mixer."))
        self.moe = NemotronHMoE(config)
        self.moe.load_state_dict(with_stacked_experts(part(stored, "mtp.layers.1.mixer.")))

    def __call__(self, hidden_LD: Tensor, next_embedding_LD: Tensor) -> Tensor:
        halves = (self.norms["0.enorm"](next_embedding_LD), self.norms["0.hnorm"](hidden_LD))
        mixed_LD = torch.cat(halves, dim=-1) @ self.eh_proj.T
        length = len(hidden_LD)
        future = torch.full((length, length), -torch.inf).triu(1)[None, None]
        mixed_LD = mixed_LD + self.attention(self.norms["0.norm"](mixed_LD)[None], attention_mask=future)[0][0]
        mixed_LD = mixed_LD + self.moe(self.norms["1.norm"](mixed_LD)[None])[0]
        return self.norms["1.final_layernorm"](mixed_LD)


def norm_with(weight: Tensor, width: int, eps: float) -> NemotronHRMSNorm:
    norm = NemotronHRMSNorm(width, eps)
    norm.load_state_dict({"weight": weight})
    return norm


def part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}


def with_stacked_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("experts.")}
    for which in ("up_proj", "down_proj"):
        kept[f"experts.{which}"] = torch.stack([tensors[f"experts.{e}.{which}.weight"] for e in range(8)])
    return kept


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    save_checkpoint(folder, tiny_decoder(MTP), family=family_of_config(MTP), config=MTP)
    return folder


@torch.inference_mode()
def test_two_drafts_equal_the_assembled_module(saved):
    decoder, assembled = load_ours(saved, torch.float32), AssembledMtp(load_file(saved / "model.safetensors"))
    tokens_L, layout = random_tokens(LENGTH + 2), Layout.packed([LENGTH])
    expected_LD = hidden_LD = decoder(tokens_L[:-2], layout)
    for depth in (1, 2):  # the second draft takes the first one's output: one module, used twice
        next_LD = decoder.embeddings(tokens_L[depth : depth + LENGTH])
        hidden_LD, expected_LD = decoder.mtp(hidden_LD, next_LD, layout), assembled(expected_LD, next_LD)
        assert relative_difference(hidden_LD, expected_LD) <= TOLERANCE


@torch.inference_mode()
def test_the_halves_of_the_combiner_are_not_exchanged(saved):
    decoder, assembled = load_ours(saved, torch.float32), AssembledMtp(load_file(saved / "model.safetensors"))
    tokens_L, layout = random_tokens(LENGTH + 1), Layout.packed([LENGTH])
    hidden_LD, next_LD = decoder(tokens_L[:-1], layout), decoder.embeddings(tokens_L[1:])
    assert relative_difference(decoder.mtp(next_LD, hidden_LD, layout), assembled(hidden_LD, next_LD)) > 0.1


@torch.inference_mode()
def test_packed_drafts_do_not_see_their_neighbours():
    decoder, lengths = tiny_decoder(MTP), [5, 1, 6]
    tokens_T, layout = random_tokens(LENGTH), Layout.packed(lengths)
    hidden_TD, next_TD = decoder(tokens_T, layout), decoder.embeddings(random_tokens(LENGTH, seed=1))
    together = decoder.mtp(hidden_TD, next_TD, layout).split(lengths)
    for (start, stop), found_LD in zip(layout.spans, together, strict=True):
        alone_LD = decoder.mtp(hidden_TD[start:stop], next_TD[start:stop], Layout.packed([stop - start]))
        assert relative_difference(found_LD, alone_LD) <= TOLERANCE


def test_gradients_reach_every_parameter_of_the_module_and_the_decoder_below():
    decoder = tiny_decoder(MTP).requires_grad_(True)
    tokens_L, layout = random_tokens(LENGTH + 1), Layout.packed([LENGTH])
    hidden_LD = decoder(tokens_L[:-1], layout)
    decoder.logits(decoder.mtp(hidden_LD, decoder.embeddings(tokens_L[1:]), layout)).square().mean().backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert [name for name in without if not name.endswith("e_score_correction_bias")] == []


def test_a_config_with_the_module_and_a_file_without_it_is_loaded_and_noted(tmp_path):
    config = MTP | {"num_nextn_predict_layers": 0}
    save_checkpoint(tmp_path / "saved", tiny_decoder(config), family=family_of_config(config), config=MTP)
    source, described = open_described(tmp_path / "saved")
    source.close()
    assert described.spec.mtp is None
    assert any("MTP" in note for note in described.notes)
