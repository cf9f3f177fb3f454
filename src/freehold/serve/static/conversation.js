// What a conversation is: a tree of messages, of which one path is shown. Editing and regenerating add a branch beside
// the old one, so nothing that was written is ever lost. No page, no storage, no server in here.

export const NEW_TITLE = "New conversation";
const TITLE_LENGTH = 60;

/** Returns an empty conversation. */
export function newConversation(system = "") {
  return { id: newId(), title: "", isNamed: false, updated: 0, system, nodes: {}, head: null };
}

/** Adds a message below another one (null: as the first) and shows it. Mutates: conversation. */
export function addMessage(conversation, parent, role, text = "") {
  const node = { id: newId(), parent, role, text, made: Date.now() };
  if (role === "assistant") Object.assign(node, { reasoning: "", calls: [], state: "waiting" });
  conversation.nodes[node.id] = node;
  conversation.head = node.id;
  if (role === "user" && !conversation.isNamed && !conversation.title) conversation.title = titleOf(text);
  conversation.updated = Date.now();
  return node;
}

/** Returns the messages that are shown, the first one first. */
export function pathOf(conversation) {
  const path = [];
  for (let id = conversation.head; id && conversation.nodes[id]; id = conversation.nodes[id].parent) {
    path.push(conversation.nodes[id]);
  }
  return path.reverse();
}

/** Returns the versions of a message, itself included, in the order in which they were made. */
export function versionsOf(conversation, node) {
  return childrenOf(conversation, node.parent).filter(({ role }) => role === node.role);
}

/** Shows a message and the latest of what follows it. Mutates: conversation. */
export function showVersion(conversation, node) {
  let last = node;
  for (let below; (below = childrenOf(conversation, last.id)).length; ) last = below.at(-1);
  conversation.head = last.id;
}

/** Returns the messages up to one (it included) as the API takes them. */
export function messagesUpTo(conversation, node) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const path = [];
  for (let each = node; each; each = conversation.nodes[each.parent]) path.push(each);
  for (const { role, text } of path.reverse()) {
    if (role === "user" || text) messages.push({ role, content: text });
  }
  return messages;
}

/** Adds what came of an answer. Mutates: node. */
export function addPart(node, part) {
  if (part.text) node.text += part.text;
  if (part.reasoning) node.reasoning += part.reasoning;
  if (part.call) addCall(node.calls, part.call);
  if (part.finish) node.finish = part.finish;
  if (part.usage) node.usage = part.usage;
  if (part.seed !== undefined) node.seed = part.seed;
}

/** Calls come in pieces: the name first, then the arguments bit by bit. */
function addCall(calls, { index, function: called = {} }) {
  const place = index ?? calls.length;
  calls[place] ??= { name: "", arguments: "" };
  calls[place].name += called.name ?? "";
  calls[place].arguments += called.arguments ?? "";
}

/** Whether an answer holds anything that a reader would miss. */
export function hasContent(node) {
  return Boolean(node.text || node.reasoning || node.calls?.length);
}

/** Returns a title from what was said first. */
export function titleOf(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length <= TITLE_LENGTH ? line : `${line.slice(0, TITLE_LENGTH).replace(/\s+\S*$/, "")}…`;
}

function childrenOf(conversation, parent) {
  return Object.values(conversation.nodes).filter((node) => node.parent === parent);
}

function newId() {
  // randomUUID is missing where the page came over plain http from another machine.
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
