"""OpenVINO GenAI behind /v1/completions, for load generators: its continuous batching has no server of its own.

    PEER_PYTHON bench/server_openvino.py MODEL.gguf PORT NUM_THREADS

Just what `vs_servers.py` needs: streams of greedy answers of a fixed length, one chunk a token. A thread steps the
pipeline while it has work, and hands each step's tokens to the event loop at once.
"""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Callable
from itertools import count
from queue import SimpleQueue
from typing import Any

import openvino_genai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

STEP_TOKENS = 512

Tell = Callable[[list[int]], object]


class Stepping:
    """A pipeline, the thread that steps it, and the answers that are being written."""

    def __init__(self, model: str, num_threads: int):
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.max_num_batched_tokens = STEP_TOKENS
        properties = {"INFERENCE_NUM_THREADS": num_threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduling, "CPU", properties)
        self.tokenizer = self._pipeline.get_tokenizer()
        self._request_ids = count()
        self._arriving: SimpleQueue[tuple[str, Any, Tell]] = SimpleQueue()
        threading.Thread(target=self._step_forever, daemon=True).start()

    def add(self, prompt: str, num_tokens: int) -> asyncio.Queue[list[int]]:
        """Return a queue that gets an answer's ids as they come."""
        config = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[list[int]]()
        self._arriving.put((prompt, config, lambda ids: loop.call_soon_threadsafe(queue.put_nowait, ids)))
        return queue

    def _step_forever(self) -> None:
        answers: list[tuple[Any, Tell]] = []
        while True:
            while not answers or not self._arriving.empty():  # waits only where there is nothing else to do
                prompt, config, tell = self._arriving.get()
                answers.append((self._pipeline.add_request(next(self._request_ids), prompt, config), tell))
            self._pipeline.step()
            for handle, tell in answers:
                while handle.can_read():
                    for output in handle.read().values():
                        tell(list(output.generated_ids))
            running = openvino_genai.GenerationStatus.RUNNING
            answers = [answer for answer in answers if answer[0].get_status() == running]


def build_app(stepping: Stepping) -> FastAPI:
    """Return the server."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "model", "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(chunks(stepping, body["prompt"], body["max_tokens"]), media_type="text/event-stream")

    return app


async def chunks(stepping: Stepping, prompt: str, num_tokens: int) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, and at last what it cost."""
    queue, num_seen = stepping.add(prompt, num_tokens), 0
    while num_seen < num_tokens:
        ids = await queue.get()
        num_seen += len(ids)
        yield event(choices=[{"index": 0, "text": stepping.tokenizer.decode(ids), "finish_reason": None}])
    num_prompt = stepping.tokenizer.encode(prompt).input_ids.shape[1]
    yield event(choices=[], usage={"prompt_tokens": num_prompt, "completion_tokens": num_seen})
    yield "data: [DONE]\n\n"


def event(**fields: Any) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps({'id': 'answer', 'object': 'text_completion', 'model': 'model', **fields})}\n\n"


if __name__ == "__main__":
    served = build_app(Stepping(sys.argv[1], int(sys.argv[3])))
    uvicorn.run(served, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
