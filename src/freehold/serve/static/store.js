// Keeps conversations in the browser. Each has a key of its own, and a small one that lists need, so that two tabs
// never overwrite each other's list. What the browser refuses to keep lives on in memory, and the page says so.

const PREFIX = "freehold.";
const HEAD = `${PREFIX}head.`; // {title, updated}
const BODY = `${PREFIX}conversation.`;

const unsaved = new Map(); // key -> text that the browser did not take

/** Whether everything written so far will be there after a reload. */
export function isAllKept() {
  return unsaved.size === 0;
}

/** Returns a value that was kept, or the fallback. */
export function read(name, fallback) {
  return readKey(PREFIX + name) ?? fallback;
}

/** Keeps a value; returns whether the browser took it. */
export function write(name, value) {
  return writeKey(PREFIX + name, value);
}

/** Returns the id, title and time of every conversation, the newest first. */
export function listConversations() {
  const ids = new Set([...keys()].filter((key) => key.startsWith(HEAD)).map((key) => key.slice(HEAD.length)));
  const heads = [...ids].map((id) => ({ id, ...readKey(HEAD + id) }));
  return heads.filter((head) => head.updated).sort((one, other) => other.updated - one.updated);
}

/** Returns a conversation, or null if there is none or it cannot be read. */
export function readConversation(id) {
  const conversation = readKey(BODY + id);
  return conversation && typeof conversation.nodes === "object" ? conversation : null;
}

/** Keeps a conversation; returns whether the browser took it. */
export function writeConversation(conversation) {
  const { id, title, updated } = conversation;
  const isBodyKept = writeKey(BODY + id, conversation);
  return writeKey(HEAD + id, { title, updated }) && isBodyKept;
}

/** Deletes a conversation for good. */
export function deleteConversation(id) {
  for (const key of [HEAD + id, BODY + id]) {
    unsaved.delete(key);
    attempt(() => localStorage.removeItem(key));
  }
}

/** Calls back when another tab changed something: with the id of the conversation, or null. */
export function watchOtherTabs(changed) {
  addEventListener("storage", ({ key }) => {
    if (key === null || key.startsWith(HEAD)) changed(key === null ? null : key.slice(HEAD.length));
  });
}

function* keys() {
  yield* unsaved.keys();
  const count = attempt(() => localStorage.length) ?? 0;
  for (let place = 0; place < count; place += 1) yield localStorage.key(place);
}

function readKey(key) {
  const text = unsaved.get(key) ?? attempt(() => localStorage.getItem(key));
  return text ? attempt(() => JSON.parse(text)) : null;
}

function writeKey(key, value) {
  const text = JSON.stringify(value);
  try {
    localStorage.setItem(key, text);
    unsaved.delete(key);
    return true;
  } catch {
    unsaved.set(key, text); // the quota is used up, or storage is closed to this page
    return false;
  }
}

function attempt(access) {
  try {
    return access();
  } catch {
    return null;
  }
}
