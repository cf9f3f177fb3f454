"""A loaded model: text in, text out. What `freehold.load` returns, and what every command works with."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freehold import __version__
from freehold.checkpoint.dtypes import dtype_name, parse_dtype
from freehold.checkpoint.fetch import find
from freehold.checkpoint.load import Described, LoadReport, default_dtype, load_decoder, open_described
from freehold.checkpoint.source import Source, open_adapter
from freehold.checkpoint.text_side import TextSide, load_text_side
from freehold.engine.adapter import load_adapter
from freehold.engine.generate import check_prompt, generate
from freehold.engine.machine import memory_of
from freehold.engine.request import SamplingParams
from freehold.errors import BadInput, BadRequest, UnsupportedModel
from freehold.models.decoder import Decoder
from freehold.models.layout import Layout
from freehold.ops.native import kernels, native_report
from freehold.settings import Settings
from freehold.text.answer import AnswerParser, Piece, ToolCallPiece, join_pieces
from freehold.text.stream import Detokenizer, StopStrings
from freehold.text.tokenizer import Tokenizer
from freehold.trust.identity import Identity, digest_config, digest_files


@dataclass(kw_only=True)
class Usage:
    """What an answer cost, filled while it is made.

    Units: prefill_s and decode_s are seconds; decode starts with the first token of the answer.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""  # "stop" or "length"; nothing while the answer is not at its end
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """A whole answer: its text, its reasoning, the tools it calls, and what it cost."""

    text: str
    reasoning: str
    tool_calls: tuple[ToolCallPiece, ...]
    usage: Usage = field(repr=False)


class Model:
    """A decoder with its text side; made by `load`."""

    def __init__(
        self,
        decoder: Decoder,
        described: Described,
        *,
        text: TextSide,
        report: LoadReport,
        files: Sequence[Path],
        adapter_sha256: str | None = None,
    ):
        self.decoder = decoder
        self.described = described
        self.text = text
        self.report = report
        self._files = tuple(files)
        self._adapter_sha256 = adapter_sha256

    @property
    def tokenizer(self) -> Tokenizer:
        if self.text.tokenizer is None:
            raise BadInput("this checkpoint has no tokenizer", hint="put its tokenizer.json beside the weights")
        return self.text.tokenizer

    @cached_property
    def identity(self) -> Identity:
        """Digests of what decides this model's answers; reads the weight files once more."""
        return Identity(
            weights=digest_files(self._files),
            config=digest_config(self.described.config),
            tokenizer=self.text.tokenizer.digest if self.text.tokenizer else None,
            template=self.text.template.digest if self.text.template else None,
            dtype=dtype_name(self.decoder.dtype),
            kernels=f"{__version__} {native_report()}",
            adapter=self._adapter_sha256,
        )

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return float32 logits [T, V] of one sequence of token ids, each row for what follows that token."""
        check_prompt(self.decoder, tokens, room_tokens=0)
        device = self.decoder.device
        hidden_TD = self.decoder(torch.tensor(tokens, device=device), Layout.packed([len(tokens)], device))
        return self.decoder.logits(hidden_TD)

    def stream(
        self,
        prompt: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        usage: Usage | None = None,
    ) -> Iterator[str]:
        """Return the text that continues a prompt, piece by piece; what is given by name replaces what `sampling` says.

        Mutates: usage, where it is given.
        """
        chosen = _chosen(sampling, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return self._texts(self.tokenizer.encode(prompt), chosen, usage or Usage())

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        switches: Mapping[str, Any] | None = None,
        usage: Usage | None = None,
    ) -> Iterator[Piece]:
        """Return the answer to a conversation, to be read as pieces of text, reasoning and tool calls.

        switches: what the model's template offers, such as {"enable_thinking": False}.
        Mutates: usage, where it is given.
        """
        chosen = _chosen(sampling, max_tokens=max_tokens, temperature=temperature, seed=seed)
        prompt = self.render(messages, tools=tools, switches=switches)
        parser = AnswerParser(self.text.dialect, tools=tools, prompt=prompt)
        texts = self._texts(self.tokenizer.encode_rendered(prompt), chosen, usage or Usage())
        return _pieces(parser, texts)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> ChatAnswer:
        """Return the whole answer to a conversation; see `chat_stream`."""
        usage = Usage()
        chosen = _chosen(sampling, max_tokens=max_tokens, temperature=temperature, seed=seed)
        pieces = self.chat_stream(messages, tools=tools, sampling=chosen, switches=switches, usage=usage)
        answer = join_pieces(list(pieces))
        return ChatAnswer(text=answer.text, reasoning=answer.reasoning, tool_calls=answer.tool_calls, usage=usage)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt that the model's chat template makes of a conversation."""
        if self.text.template is None:
            raise BadRequest(
                "this model has no chat template", hint="it continues text: use `freehold run` with a prompt"
            )
        return self.text.template.render(messages, tools=list(tools) or None, switches=switches)

    def _texts(self, prompt: Sequence[int], sampling: SamplingParams, usage: Usage) -> Iterator[str]:
        detokenizer, stops = Detokenizer(self.tokenizer), StopStrings(sampling.stop)
        start = time.perf_counter()
        usage.prompt_tokens = len(prompt)
        stop_ids = sampling.end_ids(self.tokenizer.stop_ids)
        for token in generate(self.decoder, prompt, sampling, stop_ids=stop_ids, num_ids=self.tokenizer.vocab_size):
            now = time.perf_counter()
            usage.completion_tokens += 1
            if usage.completion_tokens == 1:
                usage.prefill_s, start = now - start, now
            usage.decode_s = now - start
            if token in stop_ids:
                usage.finish_reason = "stop"
                break
            text = detokenizer.add(token)
            if usage.completion_tokens > sampling.min_tokens:
                text = stops.feed(text)
            if text:
                yield text
            if stops.matched is not None:
                usage.finish_reason = "stop"
                return
        else:
            usage.finish_reason = "length"
        if text := stops.feed(detokenizer.finish()) + stops.finish():
            yield text


def _pieces(parser: AnswerParser, texts: Iterator[str]) -> Iterator[Piece]:
    for text in texts:
        yield from parser.feed(text)
    yield from parser.finish()


def _chosen(sampling: SamplingParams | None, **given: Any) -> SamplingParams:
    named = {name: value for name, value in given.items() if value is not None}
    return replace(sampling or SamplingParams(), **named)


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """Return a model, ready to run.

    model: a folder, a .safetensors or .gguf file, or a name of the catalogue that `freehold fetch` has fetched.
    dtype: "float32", "bfloat16" or "float16", weights as tensors of it; None takes the stored one, see
        `default_dtype`, and on a CPU packs quantized and bfloat16 matrices for the kernels at their stored width.
    adapter: a folder with an adapter in PEFT's format, which stays beside the weights: answers are the adapted model's.
    progress: called with bytes loaded so far and bytes in all.
    Raises: BadInput and its kinds, each with one clear line.
    """
    source, described = open_described(find(str(model), Settings().models_dir))
    with source:
        return load_opened(source, described, device=device, dtype=dtype, adapter=adapter, progress=progress)


def load_opened(
    source: Source,
    described: Described,
    *,
    device: str,
    dtype: str | None,
    adapter: str | Path | None,
    progress: Callable[[int, int], None],
) -> Model:
    """Return what `load` returns, of a checkpoint that has been opened; whoever opened it closes it."""
    if adapter is not None:
        open_adapter(Path(adapter)).close()  # its headers before minutes of loading
    target = parse_device(device)
    text = load_text_side(source, described)
    decoder, report = load_decoder(
        source,
        described,
        dtype=parse_dtype(dtype) if dtype else default_dtype(described, target),
        device=target,
        keep_packed=dtype is None and target.type == "cpu" and kernels() is not None,
        memory_bytes=memory_of(target).available_bytes,
        progress=progress,
    )
    if adapter is None:
        return Model(decoder, described, text=text, report=report, files=source.files)
    found = load_adapter(
        Path(adapter), decoder, family=described.family, base_sha256=lambda: digest_files(source.files)
    )
    report = replace(report, notes=(*report.notes, *found.notes))
    return Model(decoder, described, text=text, report=report, files=source.files, adapter_sha256=found.sha256)


def parse_device(name: str) -> torch.device:
    """Return the device of a name, after checking that this machine has it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"device {name!r} is not known", hint="use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedModel(f"device {name!r} is not supported", hint="use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"device {name!r} is not in this machine", hint="use cpu")
    return device
