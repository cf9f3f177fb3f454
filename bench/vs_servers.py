"""Freehold's server beside those of its peers, under one load generator, in one run, by turns.

    python bench/vs_servers.py MODEL.gguf --guidellm GUIDELLM --tokenizer FOLDER [--llama-server PATH]
        [--openvino-python PYTHON] [--vllm VLLM --vllm-model FOLDER] [--streams 1,4,16,64] [--rounds 3] [--json FILE]

GUIDELLM, PATH and VLLM are programs, PYTHON has openvino-genai, fastapi and uvicorn; a peer that is not given is left
out. The tokenizer is what guidellm makes prompts with; nothing is fetched. vLLM gets the same weights as `freehold
convert` writes them, in float32. In each round each server is started anew, one at a time, and the seconds to its
readiness are noted. All answers are of one length.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from comparing import processor_name, sizes
from turns import SETTLE_S

# A load of few streams needs few requests to be steady, and one of many lasts by itself.
REQUESTS_PER_STREAM = 2
MIN_REQUESTS = 8
READY_S = 600
# The generator runs on the processors of those it measures; its one worker takes half of what its usual ten do.
GENERATOR_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server is started, and where it says that it is ready."""

    command: list[str]
    ready_path: str = "/health"


def servers_of(arguments: argparse.Namespace, port: int) -> dict[str, Server]:
    """Return the servers to measure, Freehold's first."""
    model, streams, threads = str(arguments.model), max(arguments.streams), str(arguments.threads)
    room = 2 * (arguments.prompt + arguments.answer)
    freehold = [sys.executable, "-m", "freehold", "serve", model, "--port", str(port), "--threads", threads]
    servers = {"Freehold": Server(command=[*freehold, "--max-sequences", str(streams)], ready_path="/ready")}
    if arguments.llama_server:
        options = ["-np", streams, "-c", streams * room, "-t", threads, "-tb", threads, "--port", port, "--no-webui"]
        options += ["--no-cache-prompt", "--cache-ram", 0]
        servers["llama.cpp"] = Server(command=[arguments.llama_server, "-m", model, *map(str, options)])
    if arguments.openvino_python:
        script = str(Path(__file__).with_name("server_openvino.py"))
        servers["OpenVINO"] = Server(command=[arguments.openvino_python, script, model, str(port), threads])
    if arguments.vllm:
        options = ["--port", port, "--dtype", "float32", "--max-model-len", room, "--no-enable-prefix-caching"]
        servers["vLLM for CPU"] = Server(
            command=[arguments.vllm, "serve", str(arguments.vllm_model), *map(str, options)]
        )
    return servers


@contextmanager
def running(server: Server, port: int, threads: int) -> Iterator[float]:
    """Run a server and give the seconds from its start to its readiness."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
    }
    with tempfile.TemporaryFile(mode="w+", errors="replace") as output:
        start = time.perf_counter()
        child = subprocess.Popen(server.command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while not answers(f"http://127.0.0.1:{port}{server.ready_path}"):
                if child.poll() is not None or time.perf_counter() - start > READY_S:
                    output.seek(0)
                    raise SystemExit(f"{server.command} is not ready:\n{''.join(output.readlines()[-12:])}")
                time.sleep(0.01)
            yield time.perf_counter() - start
        finally:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait(60)


def answers(url: str) -> bool:
    """Return whether a server says yes."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def load(arguments: argparse.Namespace, port: int, num_streams: int, *, seed: int) -> dict[str, float]:
    """Return what guidellm measured of one load. seed: of the prompts, another for each, for servers may keep some."""
    num_requests = max(MIN_REQUESTS, REQUESTS_PER_STREAM * num_streams)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(arguments.guidellm, "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target=http://127.0.0.1:{port},request_format=/v1/completions"),
            *("--profile", "kind=concurrent", "--override", "profile.streams", str(num_streams)),
            *("--constraint", f"kind=max_requests,count={num_requests}"),
            *("--tokenizer", f"kind=hf_auto,model={arguments.tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={arguments.prompt},output_tokens={arguments.answer}"),
            *("--seed", f"kind=static,value={seed}"),
            *("--output", f"kind=json,path={report}"),
        ]
        ended = subprocess.run(
            command, env=os.environ | GENERATOR_ENVIRONMENT, capture_output=True, text=True, check=False
        )
        if ended.returncode or not report.exists():
            raise SystemExit(f"guidellm ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    return figures_of(benchmark, arguments, num_requests)


def figures_of(benchmark: dict[str, Any], arguments: argparse.Namespace, num_requests: int) -> dict[str, float]:
    """Return the figures of one load, from its requests. Each of them has to have come to its full length."""
    done = benchmark["requests"]["successful"]
    num_short = sum(request["output_metrics"]["text_tokens"] != arguments.answer for request in done)
    if len(done) != num_requests or num_short:
        raise SystemExit(f"{len(done)} of {num_requests} requests succeeded, {num_short} of them with another length")
    times = [request["info"]["timings"] for request in done]
    seconds = max(time["request_end"] for time in times) - min(time["request_start"] for time in times)
    first_s = median(time["first_token_iteration"] - time["request_start"] for time in times)
    rest_s = median(time["last_token_iteration"] - time["first_token_iteration"] for time in times)
    return {
        "tokens_per_s": len(done) * arguments.answer / seconds,
        "first_token_ms": 1e3 * first_s,
        "between_tokens_ms": 1e3 * rest_s / (arguments.answer - 1),
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured."""
    port = free_port()
    servers = servers_of(arguments, port)
    seen: dict[str, Any] = {name: {"ready_s": [], "streams": {}} for name in servers}
    for number in range(arguments.rounds):
        for name in list(servers) if number % 2 else list(servers)[::-1]:
            time.sleep(SETTLE_S)
            with running(servers[name], port, arguments.threads) as ready_s:
                seen[name]["ready_s"].append(ready_s)
                for seed, num_streams in enumerate(arguments.streams, start=1):
                    figures = load(arguments, port, num_streams, seed=seed)
                    seen[name]["streams"].setdefault(str(num_streams), []).append(figures)
                    print(f"round {number + 1}, {name}, {num_streams} streams: {figures}", file=sys.stderr)
    return {
        "model": arguments.model.name,
        "processor": processor_name(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt,
        "answer_tokens": arguments.answer,
        "servers": seen,
    }


def show(result: dict[str, Any]) -> None:
    """Print a comparison as a table, medians of the rounds."""
    print(
        f"\n{result['model']}, {result['processor']}, {result['threads']} threads, {result['prompt_tokens']} tokens "
        f"read and {result['answer_tokens']} written, medians of {result['rounds']}"
    )
    for name, seen in result["servers"].items():
        print(f"{name}: ready after {median(seen['ready_s']):.2f} s")
        for num_streams, rounds in seen["streams"].items():
            middle = {figure: median(one[figure] for one in rounds) for figure in rounds[0]}
            print(
                f"  {num_streams:>3} streams {middle['tokens_per_s']:9.1f} tokens/s, first token after "
                f"{middle['first_token_ms']:8.0f} ms, then one every {middle['between_tokens_ms']:6.1f} ms"
            )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def main() -> None:
    """Compare, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--guidellm", required=True)
    add("--tokenizer", required=True, type=Path, metavar="FOLDER")
    add("--llama-server", metavar="PATH")
    add("--openvino-python", metavar="PYTHON")
    add("--vllm", metavar="VLLM")
    add("--vllm-model", type=Path, metavar="FOLDER", help="the same weights, as `freehold convert` writes them")
    add("--streams", type=sizes, default=[1, 4, 16, 64], metavar="N,N,...")
    add("--rounds", type=int, default=3)
    add("--prompt", type=int, default=128, help="tokens read")
    add("--answer", type=int, default=64, help="tokens written")
    add("--threads", type=int, default=2)
    add("--json", type=Path)
    arguments = parser.parse_args()
    result = compare(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
