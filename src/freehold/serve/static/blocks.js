// Markdown's blocks: splits text into headings, paragraphs, lists, quotes, tables and code. Knows nothing of the page.
//
// A block is {kind, line, …}: `line` is the first of its lines, so that whoever follows a growing text can go on from
// the last block instead of the beginning. Blocks never change once another one follows them.

const MAX_DEPTH = 12;
const FENCE = /^ *(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^(\s*)([-*+]|\d{1,9}[.)])(?:(\s+)(.*)|\s*)$/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const TASK = /^\[([ xX])\]\s+/;

/** Returns the blocks of a text's lines. */
export function readBlocks(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    block.line = at;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return readCode(lines, at, match);
  if ((match = HEADING.exec(line))) return { kind: "heading", level: match[1].length, text: match[2] ?? "", end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && MARKER.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readCode(lines, at, [opening, fence, about]) {
  const indent = opening.search(/\S/);
  const closing = new RegExp(`^ *${fence[0]}{${fence.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
  return { kind: "code", language: about.trim().split(/\s+/)[0], text, end: Math.min(end + 1, lines.length) };
}

function readQuote(lines, at, depth) {
  const inner = [];
  let end = at;
  for (; end < lines.length && lines[end].trim(); end += 1) {
    if (!QUOTE.test(lines[end]) && interrupts(lines, end, depth)) break;
    inner.push(lines[end].replace(QUOTE, ""));
  }
  return { kind: "quote", blocks: readBlocks(inner, depth + 1), end };
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
}

/** Whether a line ends the paragraph before it. A number other than 1 is more likely to be part of a sentence. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || startsTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  const marker = MARKER.exec(line);
  return QUOTE.test(line) || (marker !== null && Boolean(marker[4]) && /^(?:[-*+]|1[.)])$/.test(marker[2]));
}

function readList(lines, at, depth) {
  const first = MARKER.exec(lines[at]);
  const list = { kind: "list", ordered: isOrdered(first[2]), start: parseInt(first[2], 10), items: [], loose: false };
  const indent = indentOf(lines[at]);
  let end = at;
  while (end < lines.length) {
    const marker = MARKER.exec(lines[end]);
    if (!marker || RULE.test(lines[end]) || !isSibling(first, marker, indent, indentOf(lines[end]))) break;
    const item = readItem(lines, end, marker, depth);
    list.items.push(item);
    end = item.end;
    const next = nextWritten(lines, end);
    if (next > end && next < lines.length && MARKER.test(lines[next])) {
      if (isSibling(first, MARKER.exec(lines[next]), indent, indentOf(lines[next]))) {
        list.loose = true;
        end = next;
      }
    }
  }
  list.end = end;
  return list;
}

function isOrdered(mark) {
  return /\d/.test(mark);
}

function isSibling(first, marker, indent, other) {
  return isOrdered(first[2]) === isOrdered(marker[2]) && Math.abs(other - indent) <= 1;
}

function readItem(lines, at, marker, depth) {
  const indent = indentOf(lines[at]);
  const content = indent + marker[2].length + Math.min(marker[3]?.length ?? 1, 4);
  const inner = [marker[4] ?? ""];
  let inset = null; // how far the lines below are set in; models often take less than the marker's width
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim()) {
      const next = nextWritten(lines, end);
      if (next === lines.length || indentOf(lines[next]) <= indent + 1) break;
      inner.push("");
    } else if (indentOf(line) > indent + 1) {
      inset ??= Math.min(content, indentOf(line));
      inner.push(dedent(line, inset));
    } else if (MARKER.test(line) || interrupts(lines, end, depth) || !inner.at(-1).trim()) break;
    else inner.push(line.trim());
  }
  const task = TASK.exec(inner[0]);
  if (task) inner[0] = inner[0].slice(task[0].length);
  return { blocks: readBlocks(inner, depth + 1), checked: task ? task[1] !== " " : null, end };
}

function startsTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !TABLE_RULE.test(lines[at + 1])) return false;
  return cellsOf(lines[at]).length === cellsOf(lines[at + 1]).length && lines[at + 1].includes("-");
}

function readTable(lines, at) {
  const head = cellsOf(lines[at]);
  const aligns = cellsOf(lines[at + 1]).map(alignmentOf);
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end += 1) {
    const cells = cellsOf(lines[end]).slice(0, head.length);
    rows.push([...cells, ...Array(head.length - cells.length).fill("")]);
  }
  return { kind: "table", head, aligns, rows, end };
}

function alignmentOf(cell) {
  if (!cell.endsWith(":")) return "";
  return cell.startsWith(":") ? "center" : "right";
}

function cellsOf(line) {
  const row = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function nextWritten(lines, at) {
  while (at < lines.length && !lines[at].trim()) at += 1;
  return at;
}

function indentOf(line) {
  let width = 0;
  for (const char of line) {
    if (char === " ") width += 1;
    else if (char === "\t") width += 4;
    else break;
  }
  return width;
}

/** Returns a line without up to so many columns of its indent. */
function dedent(line, columns) {
  let at = 0;
  for (let width = 0; at < line.length && width < columns; at += 1) {
    if (line[at] === " ") width += 1;
    else if (line[at] === "\t") width += 4;
    else break;
  }
  return line.slice(at);
}
