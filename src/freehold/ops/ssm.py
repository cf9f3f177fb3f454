"""The state-space recurrence of Mamba-2: token by token (the specification), in chunks, packed, and one step.

    S_t = exp(dt_t * A) * S_(t-1) + dt_t * x_t ⊗ b_t          per head, S is [P, N]
    y_t = S_t c_t + D * x_t

b and c are shared by the heads of a group: head h belongs to group h // (H / G).
Precision of all: float32 throughout; x, b and c may come in the model's dtype.
Paper: Dao and Gu, 2024, arXiv 2405.21060, section 2 for the recurrence (A scalar per head), section 6 for the chunks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from freehold.ops.pieces import Pieces, cut, whole

CHUNK_LENGTH = 64  # tokens; a choice of speed, no result depends on it beyond rounding


def step_sizes(dt_TH: Tensor, dt_bias_H: Tensor, *, limit: tuple[float, float]) -> Tensor:
    """Return softplus(dt + bias) clamped to `limit`, float32 (Nemotron's limit is (0, inf): no clamp)."""
    return softplus(dt_TH.float() + dt_bias_H.float()).clamp(*limit)


def scan_reference(
    x_LHP: Tensor, dt_LH: Tensor, a_H: Tensor, b_LGN: Tensor, c_LGN: Tensor, d_H: Tensor, state_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y [L, H, P] and the state after the last token, computed token by token as the formula says."""
    heads_per_group = len(a_H) // b_LGN.shape[1]
    b_LHN = b_LGN.float().repeat_interleave(heads_per_group, dim=1)
    c_LHN = c_LGN.float().repeat_interleave(heads_per_group, dim=1)
    outputs = []
    for x_HP, dt_H, b_HN, c_HN in zip(x_LHP.float(), dt_LH.float(), b_LHN, c_LHN, strict=True):
        decay_H = torch.exp(dt_H * a_H)
        state_HPN = decay_H[:, None, None] * state_HPN + (dt_H[:, None] * x_HP)[:, :, None] * b_HN[:, None, :]
        outputs.append((state_HPN * c_HN[:, None, :]).sum(dim=-1) + d_H[:, None] * x_HP)
    return torch.stack(outputs), state_HPN


def scan(
    x_LHP: Tensor, dt_LH: Tensor, a_H: Tensor, b_LGN: Tensor, c_LGN: Tensor, d_H: Tensor, state_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `scan_reference` of the same arguments, in chunks whose inner part is a masked matrix product."""
    outputs = []
    for begin in range(0, len(x_LHP), CHUNK_LENGTH):
        part = slice(begin, begin + CHUNK_LENGTH)
        y_LHP, state_HPN = _scan_chunk(
            x_LHP[part].float(), dt_LH[part], a_H, b_LGN[part].float(), c_LGN[part].float(), state_HPN
        )
        outputs.append(y_LHP)
    return torch.cat(outputs) + d_H[:, None] * x_LHP.float(), state_HPN


def _scan_chunk(
    x_LHP: Tensor, dt_LH: Tensor, a_H: Tensor, b_LGN: Tensor, c_LGN: Tensor, state_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y without the D term and the state after one chunk; L are its tokens as outputs, S as sources."""
    heads_per_group = len(a_H) // b_LGN.shape[1]
    b_HSN = b_LGN.transpose(0, 1).repeat_interleave(heads_per_group, dim=0)
    c_HLN = c_LGN.transpose(0, 1).repeat_interleave(heads_per_group, dim=0)
    xdt_HSP = (x_LHP * dt_LH[:, :, None]).transpose(0, 1)
    log_decay_HL = (dt_LH * a_H).cumsum(dim=0).T

    weights_HLS = (c_HLN @ b_HSN.mT) * _decays(log_decay_HL, log_decay_HL)
    from_before_HLP = log_decay_HL.exp()[:, :, None] * (c_HLN @ state_HPN.mT)
    y_HLP = weights_HLS @ xdt_HSP + from_before_HLP

    to_end_HS = (log_decay_HL[:, -1:] - log_decay_HL).exp()
    added_HPN = (xdt_HSP * to_end_HS[:, :, None]).mT @ b_HSN
    state_HPN = log_decay_HL[:, -1].exp()[:, None, None] * state_HPN + added_HPN
    return y_HLP.transpose(0, 1), state_HPN


def scan_anew(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor,
    *,
    starts: Sequence[int],
) -> Tensor:
    """Return y [T, H, P] of packed sequences that all begin anew: all chunks of all of them at once.

    starts: the first token of each sequence, and the end of the last. C are the chunks, M the most of one sequence; the
    states between them come of one more masked product, over chunks.
    """
    num_heads, num_groups = len(a_H), b_TGN.shape[1]
    chunks = cut(tuple(starts), CHUNK_LENGTH, x_THP.device)
    x_THP, dt_TH = x_THP.float(), dt_TH.float()
    xdt_CSHP = chunks.spread(x_THP * dt_TH[:, :, None])
    b_CGSN, c_CGLN = (chunks.spread(shared_TGN.float()).transpose(1, 2) for shared_TGN in (b_TGN, c_TGN))
    log_decay_CLH = chunks.spread(dt_TH * a_H).cumsum(dim=1)
    log_decay_CHL = log_decay_CLH.mT

    similar_CHLS = (c_CGLN @ b_CGSN.mT).repeat_interleave(num_heads // num_groups, dim=1)
    inside_CHLS = similar_CHLS * _decays(log_decay_CHL, log_decay_CHL)
    y_CLHP = (inside_CHLS @ xdt_CSHP.transpose(1, 2)).transpose(1, 2)

    # What all heads of a group share is multiplied once, with the values of these heads side by side: X.
    to_end_CSH = (log_decay_CLH[:, -1:] - log_decay_CLH).exp()
    sources_CGSX = (xdt_CSHP * to_end_CSH[..., None]).unflatten(2, (num_groups, -1)).flatten(3).transpose(1, 2)
    added_CGXN = sources_CGSX.mT @ b_CGSN
    before_CGXN = _states_before(added_CGXN, log_decay_CLH[:, -1], chunks)
    from_before_CGLX = c_CGLN @ before_CGXN.mT
    from_before_CLHP = from_before_CGLX.transpose(1, 2).flatten(2).unflatten(2, (num_heads, -1))
    y_CLHP = y_CLHP + log_decay_CLH.exp()[..., None] * from_before_CLHP
    return chunks.gather(y_CLHP) + d_H[:, None] * x_THP


def _states_before(added_CGXN: Tensor, log_decay_CH: Tensor, chunks: Pieces) -> Tensor:
    """Return the state before each chunk, of what each adds and the decay over each."""
    sequences = whole(chunks.starts, added_CGXN.device)
    if sequences.length == 1:
        return torch.zeros_like(added_CGXN)
    through_BHM = sequences.spread(log_decay_CH).cumsum(dim=1).mT
    before_BHM = through_BHM.roll(1, dims=-1)  # of the first nothing is read: no chunk lies before it
    weights_BHMM = _decays(before_BHM, through_BHM, diagonal=0)
    added_BHMY = sequences.spread(added_CGXN.flatten(1).unflatten(1, (log_decay_CH.shape[1], -1))).transpose(1, 2)
    return sequences.gather((weights_BHMM @ added_BHMY).transpose(1, 2)).reshape(added_CGXN.shape)


def _decays(to: Tensor, since: Tensor, *, diagonal: int = 1) -> Tensor:
    """Return exp(to[l] - since[s]) as [..., L, S], zero from the diagonal that is named on."""
    between = to[..., :, None] - since[..., None, :]
    future = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(diagonal)
    return between.masked_fill(future, -torch.inf).exp()


def scan_step(
    x_BHP: Tensor, dt_BH: Tensor, a_H: Tensor, b_BGN: Tensor, c_BGN: Tensor, d_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y [B, H, P] and the new states for one token of each of B sequences."""
    heads_per_group = len(a_H) // b_BGN.shape[1]
    b_BHN = b_BGN.float().repeat_interleave(heads_per_group, dim=1)
    c_BHN = c_BGN.float().repeat_interleave(heads_per_group, dim=1)
    x_BHP = x_BHP.float()
    decay_BH = torch.exp(dt_BH * a_H)
    added_BHPN = (dt_BH[:, :, None] * x_BHP)[:, :, :, None] * b_BHN[:, :, None, :]
    state_BHPN = torch.addcmul(added_BHPN, decay_BH[:, :, None, None], state_BHPN)
    y_BHP = (state_BHPN @ c_BHN[:, :, :, None])[..., 0] + d_H[:, None] * x_BHP
    return y_BHP, state_BHPN
