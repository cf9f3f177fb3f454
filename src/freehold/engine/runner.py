"""Runs the steps that the scheduler plans: tokens through the decoder, logits to tokens."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from freehold.engine.draw import Place, draw, scores
from freehold.engine.request import Score
from freehold.engine.scheduler import Run
from freehold.engine.sequence import Sequence
from freehold.errors import BadInput
from freehold.models.decoder import Decoder
from freehold.models.layout import Capacity, Layout, Recurrent

SCORED_ROWS = 64  # whose logits are held at once when a prompt is scored


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run brought.

    token: the one drawn, None where the run was not the last or none is wanted. logits_V: those that it was drawn from,
    where scores are wanted. prompt_scores: of the prompt's tokens after those of this run. hidden_sum_D: of an
    embedding, over this run's rows.
    error: what befell this sequence alone.
    """

    token: int | None = None
    logits_V: Tensor | None = None
    prompt_scores: tuple[Score, ...] = ()
    hidden_sum_D: Tensor | None = None
    error: BadInput | None = None


class Runner:
    """A decoder with the states of all sequences that run at once."""

    def __init__(
        self, decoder: Decoder, capacity: Capacity, *, num_ids: int | None = None, kv_dtype: torch.dtype | None = None
    ):
        """num_ids: how many ids the tokenizer has; a vocabulary padded beyond them is not drawn from."""
        self._decoder = decoder
        self._page_size = capacity.page_size
        self._num_ids = num_ids
        with torch.inference_mode():
            self._states = decoder.allocate_states(capacity, kv_dtype=kv_dtype)

    @torch.inference_mode()
    def run(self, runs: Rows[Run]) -> list[Outcome]:
        """Return the outcome of each run of a step. Mutates: the states in the pages and slots of its sequences."""
        self._clear_new(runs)
        tokens_T = torch.tensor([token for run in runs for token in run.tokens], device=self._decoder.device)
        layout = Layout.step(
            [run.num_tokens for run in runs],
            [run.sequence.num_computed for run in runs],
            slots=[_slot(run.sequence) for run in runs],
            pages=[run.sequence.pages for run in runs],
            page_size=self._page_size,
            device=self._decoder.device,
        )
        if any(_wants_hidden(run) for run in runs):
            return self._with_hidden(runs, tokens_T, layout)
        logits_BV = self._decoder.predict(tokens_T, layout, self._states)
        return self._drawn(runs, list(logits_BV), [Outcome()] * len(runs))

    def _clear_new(self, runs: Rows[Run]) -> None:
        """Set the recurrent states of sequences that begin to zero: their slots are left as they were."""
        slots = [_slot(run.sequence) for run in runs if run.sequence.num_computed == 0]
        for state in self._states if slots else ():
            if isinstance(state, Recurrent):
                state.conv_tail[slots] = 0
                state.ssm[slots] = 0

    def _with_hidden(self, runs: Rows[Run], tokens_T: Tensor, layout: Layout) -> list[Outcome]:
        hidden_TD = self._decoder(tokens_T, layout, self._states)
        outcomes = []
        for run, (begin, end) in zip(runs, layout.spans, strict=True):
            rows_TD = hidden_TD[begin:end]
            if run.sequence.request.embeds:
                outcomes.append(Outcome(hidden_sum_D=rows_TD.double().sum(dim=0)))
            else:
                outcomes.append(Outcome(prompt_scores=self._prompt_scores(run, rows_TD) if _wants_hidden(run) else ()))
        logits_BV = self._decoder.logits(hidden_TD[[end - 1 for _, end in layout.spans]])
        return self._drawn(runs, list(logits_BV), outcomes)

    def _prompt_scores(self, run: Run, hidden_TD: Tensor) -> tuple[Score, ...]:
        """Return the scores of those tokens of the prompt that follow this run's."""
        sequence = run.sequence
        following = sequence.request.prompt[sequence.num_computed + 1 : sequence.num_computed + 1 + run.num_tokens]
        found: list[Score] = []
        for begin in range(0, len(following), SCORED_ROWS):
            tokens = following[begin : begin + SCORED_ROWS]
            logits_TV = self._decoder.logits(hidden_TD[begin : begin + len(tokens)])
            found += scores(logits_TV, tokens, sequence.request.num_logprobs or 0)
        return tuple(found)

    def _drawn(self, runs: Rows[Run], logits: list[Tensor], outcomes: list[Outcome]) -> list[Outcome]:
        """Return the outcomes with the tokens of those runs that were the last and want one."""
        drawing = [index for index, run in enumerate(runs) if run.is_last and not run.sequence.request.embeds]
        places = [self._place(runs[index].sequence, logits[index]) for index in drawing]
        tokens = iter(draw([place for place in places if isinstance(place, Place)]))
        drawn = list(outcomes)
        for index, place in zip(drawing, places, strict=True):
            token = next(tokens) if isinstance(place, Place) else place
            if isinstance(token, BadInput):
                drawn[index] = replace(outcomes[index], error=token)
            else:
                kept = None if runs[index].sequence.request.num_logprobs is None else logits[index]
                drawn[index] = replace(outcomes[index], token=token, logits_V=kept)
        return drawn

    def _place(self, sequence: Sequence, logits_V: Tensor) -> Place | BadInput:
        request = sequence.request
        try:
            allowed = sequence.matcher.allowed() if sequence.matcher else None
        except BadInput as error:
            return error
        return Place(
            logits_V=logits_V[: self._num_ids],
            prompt=request.prompt,
            answer=sequence.known[sequence.prompt_length :],
            sampling=request.sampling,
            banned=request.end_ids if sequence.must_go_on else (),
            allowed=allowed,
        )


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None, "the sequence runs"
    return sequence.slot


def _wants_hidden(run: Run) -> bool:
    """Return whether a run needs more than its last row: for an embedding, or to score a prompt."""
    request = run.sequence.request
    is_reading = run.sequence.num_computed < run.sequence.prompt_length
    return request.embeds or (request.scores_prompt and is_reading)
