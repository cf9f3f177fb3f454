"""The short causal convolution in front of the Mamba-2 scan."""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import silu


def causal_conv(x_LC: Tensor, tail_YC: Tensor, weight_CW: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return silu of the depthwise convolution of one sequence, and the tail that the next tokens need.

        out[l] = silu(bias + sum over w of weight[w] * x[l - (W-1) + w]),  x before the sequence taken from the tail

    Shapes: x [L, C]; tail [W-1, C], zeros at the start of a sequence; weight [C, W], its last tap on the current token.
    Precision: float32 inside, one rounding at the end.
    Paper: Gu and Dao, 2023, arXiv 2312.00752, section 3.4.
    """
    rows_LC = torch.cat((tail_YC, x_LC))
    length, num_taps = len(x_LC), weight_CW.shape[1]
    out_LC = bias_C.float().expand(length, -1)
    for tap in range(num_taps):
        out_LC = torch.addcmul(out_LC, rows_LC[tap : tap + length].float(), weight_CW[:, tap].float())
    return silu(out_LC).to(x_LC.dtype), rows_LC[length:]


def causal_conv_anew(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor, positions_T: Tensor) -> Tensor:
    """Return `causal_conv` of packed sequences that all begin anew, [T, C].

    positions_T: of each token in its sequence.
    """
    num_taps = weight_CW.shape[1]
    rows_TC = functional.pad(x_TC.float(), (0, 0, num_taps - 1, 0))
    out_TC = bias_C.float().expand(len(x_TC), -1)
    for tap in range(num_taps):
        is_other_T = positions_T < num_taps - 1 - tap  # the row so far back is of the sequence before, or of none
        own_TC = rows_TC[tap : tap + len(x_TC)].masked_fill(is_other_T[:, None], 0.0)
        out_TC = torch.addcmul(out_TC, own_TC, weight_CW[:, tap].float())
    return silu(out_TC).to(x_TC.dtype)


def causal_conv_step(x_BC: Tensor, tail_BYC: Tensor, weight_CW: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return `causal_conv` of one token for each of B sequences, and their new tails.

    Shapes: x [B, C], tail [B, W-1, C].
    """
    rows_BWC = torch.cat((tail_BYC, x_BC[:, None]), dim=1)
    out_BC = bias_C.float().expand(len(x_BC), -1)
    for tap in range(weight_CW.shape[1]):
        out_BC = torch.addcmul(out_BC, rows_BWC[:, tap].float(), weight_CW[:, tap].float())
    return silu(out_BC).to(x_BC.dtype), rows_BWC[:, 1:]
