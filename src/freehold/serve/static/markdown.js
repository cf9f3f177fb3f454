// Shows Markdown that is still being written. Blocks that are done stay as they are; only the last one is drawn again.
//
// What is not built: pictures (they would be requests), HTML (it is shown as text).

import { readBlocks } from "./blocks.js";
import { copyButton, make } from "./dom.js";
import { appendInline } from "./inline.js";

/** A text in Markdown, drawn into an element as it grows. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.done = 0; // characters before the blocks that may still change
    this.open = []; // those blocks, each with its element
  }

  /** Draws a text. One that continues the text before costs only what is new and the last block. */
  show(text) {
    text = text.replaceAll("\r\n", "\n");
    if (text === this.text && this.open.length) return;
    if (!text.startsWith(this.text.slice(0, this.done))) this.clear();
    this.text = text;
    const lines = text.slice(this.done).split("\n");
    const blocks = readBlocks(lines);
    if (!blocks.length) return;
    const isExtended = this.open.length === 1 && this.extend(blocks[0]);
    if (!isExtended) for (const { element } of this.open) element.remove();
    for (const block of blocks.slice(isExtended ? 1 : 0)) this.root.append(draw(block));
    // A line that is not whole, such as the 2 of "2. ", may yet continue the block before it.
    const numOpen = blocks.at(-1).line === lines.length - 1 ? 2 : 1;
    const open = blocks.slice(-numOpen);
    const elements = [...this.root.children].slice(-open.length);
    this.open = open.map((block, place) => ({ block, element: elements[place] }));
    this.done += lines.slice(0, this.open[0].block.line).reduce((sum, line) => sum + line.length + 1, 0);
  }

  clear() {
    this.root.replaceChildren();
    this.done = 0;
    this.open = [];
  }

  /** Lengthens code in place, which keeps a selection in it and costs nothing; returns whether it did. */
  extend(block) {
    const { block: before, element } = this.open[0];
    if (block.kind !== "code" || before.kind !== "code" || before.language !== block.language) return false;
    if (!block.text.startsWith(before.text)) return false;
    const code = element.querySelector("code");
    if (!code.firstChild) code.append("");
    code.firstChild.appendData(block.text.slice(before.text.length));
    return true;
  }
}

const DRAWN = {
  heading: (block) => inline(`h${Math.min(block.level + 2, 6)}`, block.text), // below the page's own headings
  rule: () => make("hr"),
  paragraph: (block) => inline("p", block.text),
  quote: (block) => make("blockquote", {}, ...block.blocks.map(draw)),
  code: drawCode,
  list: drawList,
  table: drawTable,
};

function draw(block) {
  return DRAWN[block.kind](block);
}

function inline(tag, text, attributes = {}) {
  const element = make(tag, attributes);
  appendInline(element, text);
  return element;
}

function drawCode({ language, text }) {
  const code = make("code", {}, text);
  const label = language ? `Code in ${language}` : "Code";
  const pre = make("pre", { tabindex: "0", role: "group", "aria-label": label }, code);
  const head = make("div", { class: "code-head" }, make("span", {}, language || "text"));
  head.append(copyButton(() => code.textContent, "Copy the code"));
  return make("div", { class: "code" }, head, pre);
}

function drawList({ ordered, start, items, loose }) {
  const list = make(ordered ? "ol" : "ul", { class: loose ? "loose" : null });
  if (ordered && start !== 1) list.setAttribute("start", start);
  for (const item of items) list.append(drawItem(item));
  return list;
}

function drawItem({ blocks, checked }) {
  const item = make("li", { class: checked === null ? null : "task" });
  if (checked !== null) {
    const label = checked ? "Done" : "To do";
    item.append(make("input", { type: "checkbox", disabled: true, checked, "aria-label": label }), " ");
  }
  blocks.forEach((block, place) => {
    if (place === 0 && block.kind === "paragraph") appendInline(item, block.text);
    else item.append(draw(block));
  });
  return item;
}

function drawTable({ head, aligns, rows }) {
  const row = (cells, tag) =>
    make("tr", {}, ...cells.map((cell, column) => inline(tag, cell, { class: aligns[column] || null })));
  const header = make("thead", {}, row(head, "th"));
  for (const cell of header.querySelectorAll("th")) cell.setAttribute("scope", "col");
  const table = make("table", {}, header, make("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
  return make("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}
