// Talks to the server that this page came from, and to nobody else: every address here is relative.

const KEY = "freehold.key";

/** What went wrong, in one line for the reader. status: of the response, 0 where there was none. */
export class Failed extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let heldKey = null; // where session storage is closed to this page

/** The API key of this tab: in its session storage, and sent only to this server. */
export const apiKey = {
  get: () => attempt(() => sessionStorage.getItem(KEY)) ?? heldKey,
  set(key) {
    heldKey = key;
    attempt(() => sessionStorage.setItem(KEY, key));
  },
  forget() {
    heldKey = null;
    attempt(() => sessionStorage.removeItem(KEY));
  },
};

/** Returns the models that can be asked: their id, and how many tokens one conversation holds. */
export async function readModels() {
  const response = await ask("v1/models", {});
  const { data } = await response.json();
  const first = new Map(); // further names of a model are not further models
  for (const card of data ?? []) {
    const root = card.root ?? card.id;
    if (!first.has(root)) first.set(root, { id: card.id, length: card.max_model_len ?? null });
  }
  return [...first.values()];
}

/**
 * Yields what an answer consists of, as it comes: {text}, {reasoning}, {call}, {finish}, {usage}, {seed}.
 * Throws Failed, or an AbortError where the signal said so.
 */
export async function* readAnswer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const headers = { "Content-Type": "application/json" };
  const response = await ask("v1/chat/completions", { method: "POST", headers, body, signal });
  let isWhole = false;
  for await (const data of readEvents(response.body, signal)) {
    if (data === "[DONE]") {
      isWhole = true;
      break;
    }
    yield* partsOf(parse(data));
  }
  if (!isWhole) throw new Failed("The connection ended before the answer did.");
}

async function ask(address, options) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failed("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new Failed(await reasonOf(response), response.status);
  return response;
}

async function reasonOf(response) {
  let said = null;
  try {
    said = (await response.json())?.error?.message;
  } catch {
    // A proxy's page, or nothing: the status has to do.
  }
  const wait = Number(response.headers.get("retry-after"));
  const line = oneLine(typeof said === "string" && said ? said : `The server answered with status ${response.status}.`);
  return response.status === 429 && wait > 0 ? `${line} (try again in ${wait} s)` : line;
}

function oneLine(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > 400 ? `${line.slice(0, 400)}…` : line.charAt(0).toUpperCase() + line.slice(1);
}

/** Yields the data of each server-sent event. Comments, which keep connections alive, are passed over. */
async function* readEvents(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await readNext(reader, signal);
      if (done) return;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function readNext(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Failed("The connection to the server broke.");
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Failed("The server sent something that is not an answer.");
  }
}

function* partsOf(event) {
  if (event.error) throw new Failed(oneLine(String(event.error.message ?? "The server failed at this answer.")));
  if (Number.isSafeInteger(event.seed)) yield { seed: event.seed };
  if (event.usage) yield { usage: event.usage };
  const choice = event.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  if (delta.reasoning_content) yield { reasoning: delta.reasoning_content };
  if (delta.content) yield { text: delta.content };
  for (const call of delta.tool_calls ?? []) yield { call };
  if (choice.finish_reason) yield { finish: choice.finish_reason };
}

function attempt(access) {
  try {
    return access();
  } catch {
    return null;
  }
}
