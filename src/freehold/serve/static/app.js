// The page: which conversation is shown, what its buttons do, and what keys mean. Everything else is in the modules.

import { Answering, markInterrupted } from "./answering.js";
import { addMessage, hasContent, NEW_TITLE, newConversation, pathOf, showVersion, versionsOf } from "./conversation.js";
import { find, fitHeight, make } from "./dom.js";
import { AnswerView, drawQuestion, isSending } from "./message.js";
import { askForKey, askToDelete, offerColours, Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { apiKey, Failed, readModels } from "./stream.js";

const EXAMPLES = [
  ["Explain", "How does a heat pump make warmth out of cold air?"],
  ["Write", "Write a Python function that finds the median of a list."],
  ["Draft", "Draft a short, friendly note that declines a meeting."],
  ["Think along", "What should I ask before I rent a flat?"],
];
const END_PX = 80; // so near to the end counts as reading along
const TOUCH = matchMedia("(pointer: coarse)");
const ADDRESS = "#c-";

const prompt = find("prompt");
const scroller = find("scroller");
const deleted = new Set(); // so that an answer that is just ending does not bring its conversation back
let current = newConversation();
let model = null;
let views = new Map(); // of the answers on the screen, by the node's id

const answering = new Answering({
  model: async () => model ?? (await loadModel()),
  sampling: () => settings.values,
  askForKey,
  changed: showGrowth,
  save,
  ended: showEnd,
});
const settings = new Settings({ current: () => current, changed: () => current.head && save(current) });
const sidebar = new Sidebar({ open, rename, remove, create });
const acts = { edit, regenerate, retry, version };

async function loadModel() {
  const chip = find("model");
  try {
    const models = await readModels();
    model = settings.offer(models);
    if (!model) throw new Failed("The server has no model.");
    showModel(models.find(({ id }) => id === model));
    return model;
  } catch (error) {
    find("model-name").textContent = error.status === 401 ? "needs a key" : "not reachable";
    chip.dataset.state = "off";
    throw error;
  }
}

function showModel({ id, length }) {
  const chip = find("model");
  find("model-name").textContent = id;
  find("empty-model").textContent = id;
  chip.dataset.state = "on";
  chip.title = length ? `Holds ${length.toLocaleString("en")} tokens of a conversation` : "";
}

/** Loads the model's name when the page opens; asks for a key where the server wants one. */
async function greet() {
  for (;;) {
    try {
      await loadModel();
      return;
    } catch (error) {
      if (error.status !== 401 || !(await askForKey(apiKey.get() !== null))) return; // sending tries again
    }
  }
}

// What is on the screen

function draw() {
  const path = pathOf(current);
  const title = current.title || NEW_TITLE;
  find("title").textContent = title;
  document.title = current.title ? `${title} · Freehold` : "Freehold";
  find("empty").hidden = path.length > 0;
  find("thread").hidden = path.length === 0;
  views = new Map();
  find("thread").replaceChildren(...path.map(drawNode));
  showState();
  showEndButton();
}

function drawNode(node) {
  const versions = versionsOf(current, node);
  if (node.role === "user") return drawQuestion(node, versions, acts);
  const view = new AnswerView(node, versions, acts);
  views.set(node.id, view);
  return view.element;
}

function showState() {
  const isLive = answering.get(current.id) !== null;
  const hadFocus = document.activeElement === find("stop");
  find("send").hidden = isLive;
  find("stop").hidden = !isLive;
  find("send").disabled = !prompt.value.trim();
  if (hadFocus && !isLive) prompt.focus();
}

function showList() {
  sidebar.show(store.listConversations(), current.id);
}

function showGrowth({ conversation, node }) {
  if (conversation !== current) return;
  const follows = isAtEnd();
  views.get(node.id)?.update();
  if (follows) toEnd();
  showEndButton();
}

function showEnd(live) {
  const { conversation, node } = live;
  if (live.status === 404) model = null; // the server now runs another one; the next try asks which
  if (conversation !== current) return;
  showGrowth(live);
  showState();
  announce(endOf(node));
}

function endOf(node) {
  if (node.state === "failed") return `There is no answer: ${node.error}`;
  if (node.state === "stopped") return "The answer was stopped.";
  const words = node.text.split(/\s+/).filter(Boolean).length;
  return node.text.length <= 600 ? `Answer: ${node.text}` : `The answer is complete, ${words} words.`;
}

/** Has screen readers say something once; answers are said when they are complete, not token by token. */
function announce(text) {
  find("said").textContent = text;
}

function isAtEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < END_PX;
}

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

function showEndButton() {
  find("to-end").hidden = isAtEnd();
}

function focusPrompt() {
  if (!TOUCH.matches) prompt.focus(); // on a phone that would bring up the keyboard
  else scroller.focus({ preventScroll: true });
}

// What a reader does

function send(text) {
  if (!text.trim() || answering.get(current.id)) return;
  prompt.value = "";
  keepDraft();
  fitHeight(prompt);
  answer(addMessage(current, current.head, "user", text));
}

function answer(question) {
  start(addMessage(current, question.id, "assistant"));
}

function start(node) {
  const writing = answering.write(current, node);
  setAddress(current.id, history.state?.id === current.id);
  save(current);
  draw();
  toEnd();
  focusPrompt();
  announce("The model is writing.");
  return writing;
}

function edit(node, text) {
  answering.stop(current.id);
  answer(addMessage(current, node.parent, "user", text));
}

function regenerate(node) {
  answering.stop(current.id);
  answer(current.nodes[node.parent]);
}

function retry(node) {
  if (hasContent(node)) regenerate(node);
  else start(node);
}

function version(node) {
  answering.stop(current.id);
  showVersion(current, node);
  save(current);
  draw();
  find("thread").querySelector(`[data-id="${node.id}"] .versions button:enabled`)?.focus();
}

function stop() {
  if (!answering.get(current.id)) return;
  answering.stop(current.id);
  showState();
}

function create() {
  show(newConversation(store.read("system", "")));
  setAddress(null, false);
}

function open(id) {
  const conversation = conversationOf(id);
  if (!conversation) return showList();
  show(conversation);
  setAddress(id, false);
}

function show(conversation) {
  current = conversation;
  draw();
  showList();
  toEnd();
  focusPrompt();
}

function conversationOf(id) {
  const live = answering.get(id);
  if (live) return live.conversation;
  if (current.id === id) return current;
  const conversation = store.readConversation(id);
  if (conversation) markInterrupted(conversation);
  return conversation;
}

function rename(id, title) {
  const conversation = conversationOf(id);
  if (!conversation) return showList();
  if (title !== conversation.title) Object.assign(conversation, { title, isNamed: true });
  save(conversation);
  if (conversation === current) find("title").textContent = title;
}

async function remove(id) {
  const conversation = conversationOf(id);
  if (!(await askToDelete(conversation?.title || NEW_TITLE))) return;
  deleted.add(id);
  answering.stop(id);
  store.deleteConversation(id);
  showKept();
  if (id === current.id) create();
  else showList();
}

// What is kept

function save(conversation) {
  if (deleted.has(conversation.id)) return;
  store.writeConversation(conversation);
  showKept();
  showList();
}

function keepDraft() {
  store.write("draft", prompt.value);
  showKept();
}

function showKept() {
  const notice = find("notice");
  const isKept = store.isAllKept();
  if (notice.hidden === isKept) return;
  notice.hidden = isKept;
  notice.textContent = isKept
    ? ""
    : "The browser keeps no more: what is new lasts until this tab is closed. Deleting conversations makes room.";
}

/** Names the conversation in the address, so that a reload and the way back find it. */
function setAddress(id, replaces) {
  const address = id ? ADDRESS + id : location.pathname + location.search;
  history[replaces ? "replaceState" : "pushState"]({ id }, "", address);
}

function showAddressed() {
  const id = location.hash.startsWith(ADDRESS) ? location.hash.slice(ADDRESS.length) : null;
  show((id && conversationOf(id)) || newConversation(store.read("system", "")));
}

// Keys and buttons

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (!isSending(event)) return;
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("input", () => {
  fitHeight(prompt);
  showState();
  keepDraft();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) stop();
});
find("stop").addEventListener("click", stop);
find("to-end").addEventListener("click", toEnd);
scroller.addEventListener("scroll", showEndButton, { passive: true });
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is for conversations
  prompt.focus();
});
find("models").addEventListener("change", ({ target }) => {
  model = target.value;
  showModel({ id: model });
});
addEventListener("popstate", showAddressed);
addEventListener("pagehide", () => answering.saveAll());
addEventListener("resize", () => fitHeight(prompt));
store.watchOtherTabs((id) => {
  showList();
  const isBusy = answering.get(current.id) || document.querySelector(".editor");
  const changed = id === current.id && !isBusy ? store.readConversation(id) : null;
  if (!changed) return;
  markInterrupted(changed);
  current = changed;
  draw();
});

for (const [kind, text] of EXAMPLES) {
  const button = make("button", { type: "button" }, make("span", { class: "kind" }, kind), make("span", {}, text));
  button.addEventListener("click", () => send(text));
  find("examples").append(make("li", {}, button));
}
offerColours(find("theme"));
prompt.value = store.read("draft", "");
showAddressed();
fitHeight(prompt);
greet();
