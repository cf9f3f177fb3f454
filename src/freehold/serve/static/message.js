// Draws messages: what the user wrote, with editing, and what the model answered, with everything that belongs to it.

import { copyButton, fitHeight, icon, make } from "./dom.js";
import { hasContent } from "./conversation.js";
import { Markdown } from "./markdown.js";

const LEAST_TIMED_S = 0.05; // what comes at once has no rate

/** Returns the element of a user's message. acts: edit(node, text), version(node, step). */
export function drawQuestion(node, versions, acts) {
  const text = make("div", { class: "said" }, node.text);
  const edit = make("button", { type: "button", class: "action" }, "Edit");
  const actions = make("div", { class: "actions" }, copyButton(() => node.text, "Copy your message"), edit);
  actions.append(...versionSwitch(node, versions, acts));
  const element = make("li", { class: "question", "data-id": node.id }, unseen("You wrote:"), text, actions);
  edit.setAttribute("aria-label", "Edit your message");
  edit.addEventListener("click", () => openEditor(element, node, acts));
  return element;
}

function openEditor(element, node, acts) {
  const field = make("textarea", { "aria-label": "Your message", rows: "1" });
  field.value = node.text;
  const cancel = make("button", { type: "button", class: "plain" }, "Cancel");
  const form = make("form", { class: "editor" }, field);
  form.append(make("div", { class: "buttons" }, cancel, make("button", { class: "strong" }, "Send")));
  const shown = [...element.children].filter((child) => !child.classList.contains("unseen"));
  const close = () => {
    form.remove();
    for (const child of shown) child.hidden = false;
    element.querySelector('[aria-label="Edit your message"]').focus();
  };
  const send = () => field.value.trim() && acts.edit(node, field.value);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  cancel.addEventListener("click", close);
  field.addEventListener("input", () => fitHeight(field));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (isSending(event)) {
      event.preventDefault();
      send();
    }
  });
  for (const child of shown) child.hidden = true;
  element.append(form);
  fitHeight(field);
  field.focus();
}

/** Whether a key press in a text field means "send". While an input method is open, Enter belongs to that. */
export function isSending(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** An answer on the page. acts: regenerate(node), retry(node), version(node, step). */
export class AnswerView {
  constructor(node, versions, acts) {
    this.node = node;
    this.acts = acts;
    this.text = make("div", { class: "answer" });
    this.markdown = new Markdown(this.text);
    this.thought = null;
    this.calls = make("div", { class: "calls" });
    this.status = make("p", { class: "status", "aria-hidden": "true" });
    this.foot = make("div", { class: "actions" });
    this.numbers = make("span", { class: "numbers" });
    this.element = make("li", { class: "reply", "data-id": node.id }, unseen("The model answered:"));
    this.element.append(this.text, this.calls, this.status, this.foot);
    this.switch = versionSwitch(node, versions, acts);
    this.update();
  }

  /** Draws what the node now holds. */
  update() {
    const { node } = this;
    const isLive = node.state === "waiting" || node.state === "writing";
    this.element.classList.toggle("live", isLive);
    this.element.setAttribute("aria-busy", String(isLive));
    if (node.reasoning) this.showThought(isLive);
    this.markdown.show(node.text);
    this.showCalls();
    this.status.hidden = !isLive;
    if (isLive) this.status.textContent = liveStatus(node);
    else this.showFoot();
  }

  showThought(isLive) {
    if (!this.thought) {
      const summary = make("summary");
      const body = make("div", { class: "answer" });
      this.thought = { summary, markdown: new Markdown(body) };
      this.text.before(make("details", { class: "fold thought" }, summary, make("div", { class: "fold-body" }, body)));
    }
    const isThinking = isLive && !this.node.text && !this.node.calls.length;
    this.thought.summary.textContent = isThinking ? "Thinking…" : thoughtFor(this.node);
    this.thought.markdown.show(this.node.reasoning);
  }

  showCalls() {
    const { calls } = this.node;
    while (this.calls.children.length < calls.length) {
      const summary = make("summary", {}, "Calls ", make("code"));
      const pre = make("pre", { tabindex: "0", role: "group", "aria-label": "Arguments" });
      this.calls.append(make("details", { class: "fold" }, summary, make("div", { class: "fold-body" }, pre)));
    }
    [...this.calls.children].forEach((fold, place) => {
      fold.querySelector("code").textContent = calls[place].name || "a tool";
      fold.querySelector("pre").textContent = indented(calls[place].arguments);
    });
  }

  showFoot() {
    const { node, acts } = this;
    const again = make("button", { type: "button", class: "action" }, "Regenerate");
    again.addEventListener("click", () => acts.regenerate(node));
    this.numbers.textContent = numbersOf(node);
    const copy = hasContent(node) ? [copyButton(() => node.text, "Copy the answer")] : [];
    const isFailed = node.state === "failed";
    this.foot.replaceChildren(...copy, ...(isFailed ? [] : [again]), ...this.switch, this.numbers);
    this.element.querySelector(".failure")?.remove();
    if (isFailed) this.foot.before(failure(node, acts));
  }
}

function failure(node, acts) {
  const retry = make("button", { type: "button", class: "action" }, "Try again");
  retry.addEventListener("click", () => acts.retry(node));
  return make("p", { class: "failure" }, make("span", {}, node.error), retry);
}

function versionSwitch(node, versions, acts) {
  if (versions.length < 2) return [];
  const place = versions.indexOf(node);
  const step = (by, name, label) => {
    const button = make("button", { type: "button", class: "icon small", "aria-label": label }, icon(name));
    button.disabled = !versions[place + by];
    button.addEventListener("click", () => acts.version(versions[place + by]));
    return button;
  };
  const count = make("span", { class: "numbers" }, `${place + 1}/${versions.length}`);
  const group = make("span", { class: "versions", role: "group", "aria-label": "Versions" });
  group.append(step(-1, "left", "Earlier version"), count, step(1, "right", "Later version"));
  return [group];
}

function liveStatus(node) {
  if (node.state === "waiting") return "Reading…";
  return node.numParts > 1 ? `Writing, about ${node.numParts} tokens` : "Writing…";
}

function thoughtFor(node) {
  if (!node.thoughtS) return "Thoughts";
  return node.thoughtS < 1.5 ? "Thought for a moment" : `Thought for ${Math.round(node.thoughtS)} s`;
}

/** How an answer went, in a line: why it ended where that is not its own end, how long it is, how fast it came. */
function numbersOf(node) {
  const told = [];
  if (node.state === "stopped") told.push("stopped");
  if (node.state === "interrupted") told.push("interrupted");
  if (node.finish === "length") told.push("cut at the longest length");
  const count = node.usage?.completion_tokens ?? node.numParts;
  if (count) told.push(`${node.usage ? "" : "about "}${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`);
  if (count > 1 && node.writingS > LEAST_TIMED_S) told.push(`${((count - 1) / node.writingS).toFixed(1)} tokens/s`);
  return told.join(" · ");
}

function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not whole yet
  }
}

function unseen(text) {
  return make("span", { class: "unseen" }, text);
}
