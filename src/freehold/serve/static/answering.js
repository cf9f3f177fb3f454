// Answers while they are being written: one for each conversation, also for one that is not on the screen.

import { addPart, hasContent, messagesUpTo } from "./conversation.js";
import { apiKey, Failed, readAnswer } from "./stream.js";

const DRAW_EVERY_MS = 50;
const SAVE_EVERY_MS = 2000;

/**
 * The answers being written. hooks: model() and sampling() for requests, askForKey(isWrong), changed(live) to draw,
 * save(conversation), ended(live). A live answer is {conversation, node, controller}.
 */
export class Answering {
  constructor(hooks) {
    this.hooks = hooks;
    this.live = new Map(); // by the conversation's id
  }

  get(conversationId) {
    return this.live.get(conversationId) ?? null;
  }

  /** Ends the answer of a conversation where it is; what is there stays. */
  stop(conversationId) {
    this.live.get(conversationId)?.controller.abort();
    this.live.delete(conversationId);
  }

  /** Has the model write into an empty node; returns when it is done or has failed. Mutates: node. */
  async write(conversation, node) {
    this.stop(conversation.id);
    const live = { conversation, node, controller: new AbortController(), timer: null, savedMs: Date.now() };
    this.live.set(conversation.id, live);
    Object.assign(node, { text: "", reasoning: "", calls: [], state: "waiting", error: null, numParts: 0 });
    try {
      await this.read(live);
      node.state = "done";
    } catch (error) {
      this.fail(live, error);
    }
    clearTimeout(live.timer);
    if (this.live.get(conversation.id) === live) this.live.delete(conversation.id);
    this.hooks.save(conversation);
    this.hooks.ended(live);
  }

  async read(live) {
    const { conversation, node, controller } = live;
    for (;;) {
      try {
        const model = await this.hooks.model(controller.signal);
        const parent = conversation.nodes[node.parent];
        const request = { model, messages: messagesUpTo(conversation, parent), ...this.hooks.sampling() };
        for await (const part of readAnswer(request, controller.signal)) this.take(live, part);
        return;
      } catch (error) {
        if (error.status !== 401 || controller.signal.aborted) throw error;
        if (!(await this.hooks.askForKey(apiKey.get() !== null))) throw new Failed("This server answers only with an API key.");
      }
    }
  }

  take(live, part) {
    const { node } = live;
    addPart(node, part);
    if (part.text || part.reasoning || part.call) {
      const now = performance.now();
      live.firstMs ??= now;
      if (part.reasoning) live.thoughtFromMs ??= now;
      else if (live.thoughtFromMs) node.thoughtS ??= (now - live.thoughtFromMs) / 1000;
      node.writingS = (now - live.firstMs) / 1000;
      node.numParts += 1;
      node.state = "writing";
    }
    live.timer ??= setTimeout(() => this.show(live), DRAW_EVERY_MS);
  }

  show(live) {
    live.timer = null;
    this.hooks.changed(live);
    if (Date.now() - live.savedMs > SAVE_EVERY_MS) {
      live.savedMs = Date.now();
      this.hooks.save(live.conversation);
    }
  }

  fail(live, error) {
    const { node, controller } = live;
    live.status = error.status;
    if (controller.signal.aborted) {
      node.state = "stopped";
      return;
    }
    node.state = "failed";
    node.error = error instanceof Failed ? error.message : "The page failed at this answer.";
    if (!(error instanceof Failed)) console.error(error);
  }

  /** Keeps what is there of every answer, for when the page goes away. */
  saveAll() {
    for (const { conversation } of this.live.values()) this.hooks.save(conversation);
  }
}

/** Marks answers that no page writes any more. Mutates: conversation. */
export function markInterrupted(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    if (node.state === "waiting" || node.state === "writing") node.state = hasContent(node) ? "interrupted" : "stopped";
  }
}
