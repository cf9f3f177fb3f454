// Markdown within a line: emphasis, code, links. Turns a string into DOM nodes and never into HTML.
//
// One pass notes where code, brackets and runs of * _ ~ are; a second one builds nodes from that. No text, however
// odd, costs more than its length times MAX_DEPTH.

import { make } from "./dom.js";

const MAX_DEPTH = 12;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)[^\s\u0000-\u001f]+$/i;
const BARE_LINK = /https?:\/\/[^\s<>"'`[\]{}|\\^]+/y;
const BREAK_TAG = /<br\s*\/?>/iy;
const WORD = /[\p{L}\p{N}_]/u;

/** Appends a text to a parent as nodes. Mutates: parent. */
export function appendInline(parent, text) {
  new Inline(text).append(parent, 0, text.length, 0);
}

/** Returns an address that is safe to follow, or null: only the web and mail, nothing that runs. */
export function safeAddress(address) {
  if (!SAFE_LINK.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}

class Inline {
  constructor(text) {
    this.text = text;
    this.codeEnd = new Map(); // start of a run of backticks -> start of the run that closes it
    this.bracketEnd = new Map(); // [ -> its ]
    this.runs = []; // of * _ ~: where delimiters may be
    this.runAt = new Map(); // start -> place in runs
    this.dead = new Set(); // searches that found nothing, so that they are not made again
    this.scan(findCodeEnds(text));
  }

  scan(codeEnds) {
    const open = [];
    for (let at = 0; at < this.text.length; ) {
      const char = this.text[at];
      if (char === "\\" && ESCAPABLE.test(this.text[at + 1] ?? "")) at += 2;
      else if (char === "`") at = this.noteCode(at, codeEnds);
      else if (char === "*" || char === "_" || char === "~") at = this.noteRun(at, char);
      else {
        if (char === "[") open.push(at);
        else if (char === "]" && open.length) this.bracketEnd.set(open.pop(), at);
        at += 1;
      }
    }
  }

  noteCode(at, codeEnds) {
    const length = runLength(this.text, at);
    const end = codeEnds.get(at);
    if (end === undefined) return at + length;
    this.codeEnd.set(at, end);
    return end + length;
  }

  noteRun(at, char) {
    const length = runLength(this.text, at);
    const before = this.text[at - 1] ?? " ";
    const after = this.text[at + length] ?? " ";
    // Within_a_word _ means itself.
    const opens = /\S/.test(after) && !(char === "_" && WORD.test(before));
    const closes = /\S/.test(before) && !(char === "_" && WORD.test(after));
    this.runAt.set(at, this.runs.length);
    this.runs.push({ at, char, length, opens, closes });
    return at + length;
  }

  append(parent, start, end, depth) {
    let plain = "";
    const flush = () => {
      if (plain) parent.append(plain);
      plain = "";
    };
    for (let at = start; at < end; ) {
      const made = this.nodeAt(at, end, depth);
      if (made === null) {
        const length = this.plainLength(at, end);
        plain += this.text.slice(at, at + length);
        at += length;
      } else {
        if (typeof made.node === "string") plain += made.node;
        else {
          flush();
          parent.append(made.node);
        }
        at = made.end;
      }
    }
    flush();
  }

  /** How many characters from here cannot begin anything. */
  plainLength(at, end) {
    const run = this.runAt.get(at);
    if (run !== undefined) return Math.min(this.runs[run].length, end - at);
    if (this.text[at] === "`") return Math.min(runLength(this.text, at), end - at);
    let length = 1;
    while (at + length < end && !"\\`*_~[!<h\n".includes(this.text[at + length])) length += 1;
    return length;
  }

  /** Returns the node that begins here, and where it ends; null if the character is just itself. */
  nodeAt(at, end, depth) {
    const { text } = this;
    switch (text[at]) {
      case "\n":
        return { node: make("br"), end: at + 1 };
      case "\\":
        if (text[at + 1] === "\n") return { node: make("br"), end: at + 2 };
        return at + 1 < end && ESCAPABLE.test(text[at + 1]) ? { node: text[at + 1], end: at + 2 } : null;
      case "`":
        return this.code(at, end);
      case "*":
      case "_":
      case "~":
        return depth < MAX_DEPTH ? this.emphasis(at, end, depth) : null;
      case "!":
        return text[at + 1] === "[" ? this.link(at + 1, end, depth) : null; // a picture would be a request: a link to it
      case "[":
        return this.link(at, end, depth);
      case "<":
        return this.angle(at, end);
      case "h":
        return this.bare(at, end);
    }
    return null;
  }

  code(at, end) {
    const close = this.codeEnd.get(at);
    if (close === undefined || close >= end) return null;
    const length = runLength(this.text, at);
    let content = this.text.slice(at + length, close).replaceAll("\n", " ");
    if (content.length > 2 && content.startsWith(" ") && content.endsWith(" ")) content = content.slice(1, -1);
    return { node: make("code", {}, content), end: close + length };
  }

  emphasis(at, end, depth) {
    const place = this.runAt.get(at);
    if (place === undefined) return null;
    const { char, length, opens } = this.runs[place];
    const width = char === "~" ? 2 : Math.min(length, 3);
    if (!opens || length < width || length > 3 || (char === "~" && length !== 2)) return null;
    const close = this.closing(place, width, end);
    if (close === null) return null;
    const outer = make(char === "~" ? "del" : width === 1 ? "em" : "strong");
    const inner = width === 3 ? make("em") : outer;
    if (inner !== outer) outer.append(inner);
    this.append(inner, at + width, close, depth + 1);
    return { node: outer, end: close + width };
  }

  /** Returns where the delimiter that closes a run begins: at the end of a run that is wide enough. */
  closing(place, width, end) {
    const { char } = this.runs[place];
    const search = `${char}${width}:${end}`;
    if (this.dead.has(search)) return null;
    for (let index = place + 1; index < this.runs.length && this.runs[index].at < end; index += 1) {
      const run = this.runs[index];
      const length = Math.min(run.length, end - run.at);
      const fits = width === 1 ? length === 1 || length === 3 : length >= width;
      if (run.char === char && run.closes && fits) return run.at + length - width;
    }
    this.dead.add(search);
    return null;
  }

  link(at, end, depth) {
    const close = this.bracketEnd.get(at);
    if (close === undefined || close >= end || this.text[close + 1] !== "(") return null;
    const target = readTarget(this.text, close + 2, end);
    if (target === null) return null;
    const address = safeAddress(target.address);
    const node = address === null ? make("span") : anchor(address);
    if (depth < MAX_DEPTH) this.append(node, at + 1, close, MAX_DEPTH - 1); // no links within links
    if (!node.hasChildNodes()) node.append(target.address);
    return { node, end: target.end };
  }

  angle(at, end) {
    BREAK_TAG.lastIndex = at;
    if (BREAK_TAG.test(this.text) && BREAK_TAG.lastIndex <= end) return { node: make("br"), end: BREAK_TAG.lastIndex };
    const shown = /^[^\s<>]+(?=>)/.exec(this.text.slice(at + 1, Math.min(end, at + 2000)))?.[0];
    const address = shown ? safeAddress(shown) : null;
    return address === null ? null : { node: anchor(address, shown), end: at + shown.length + 2 };
  }

  bare(at, end) {
    if (at > 0 && WORD.test(this.text[at - 1])) return null;
    BARE_LINK.lastIndex = at;
    let shown = BARE_LINK.exec(this.text)?.[0].slice(0, end - at);
    if (!shown) return null;
    shown = shown.replace(/[.,;:!?*_~]+$/, "");
    if (shown.endsWith(")") && !shown.includes("(")) shown = shown.replace(/\)+$/, "");
    const address = safeAddress(shown);
    return address === null ? null : { node: anchor(address, shown), end: at + shown.length };
  }
}

function anchor(address, ...children) {
  return make("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...children);
}

/** Returns the address in `(address "title")` from behind its parenthesis, and where all that ends; null if it is none. */
function readTarget(text, start, end) {
  let depth = 0;
  for (let at = start; at < end && at - start < 4000; at += 1) {
    const char = text[at];
    if (char === "\n") return null;
    if (char === "\\") at += 1;
    else if (char === "(") depth += 1;
    else if (char === ")" && depth === 0) {
      const address = text.slice(start, at).trim().replace(/\s+(?:"[^"]*"|'[^']*')$/, "");
      return { address: address.replace(/^<(.*)>$/, "$1"), end: at + 1 };
    } else if (char === ")") depth -= 1;
  }
  return null;
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** Returns, for each run of backticks that the next run of its length closes, where that one starts. */
function findCodeEnds(text) {
  const ends = new Map();
  const next = new Map(); // length -> start of the nearest run to the right
  const runs = [...text.matchAll(/`+/g)];
  for (const { index, 0: run } of runs.reverse()) {
    if (next.has(run.length)) ends.set(index, next.get(run.length));
    next.set(run.length, index);
  }
  return ends;
}
