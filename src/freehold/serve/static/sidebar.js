// The list of conversations: a column beside the page where there is room, a drawer over it where there is not.

import { NEW_TITLE } from "./conversation.js";
import { find, icon, make } from "./dom.js";

const NARROW = matchMedia("(max-width: 760px)");
const DAY_MS = 86_400_000;

/** The list. acts: open(id), rename(id, title), remove(id), create(). */
export class Sidebar {
  constructor(acts) {
    this.acts = acts;
    this.list = find("conversations");
    this.rail = find("rail");
    find("new").addEventListener("click", () => {
      this.close();
      acts.create();
    });
    find("open-rail").addEventListener("click", () => this.open());
    find("close-rail").addEventListener("click", () => this.close());
    find("veil").addEventListener("click", () => this.close());
    this.rail.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isOpen) {
        event.stopPropagation();
        this.close();
      }
    });
    NARROW.addEventListener("change", () => this.setOpen(false));
    this.setOpen(false);
  }

  get isOpen() {
    return this.rail.classList.contains("open");
  }

  open() {
    this.setOpen(true);
    find("close-rail").focus();
  }

  close() {
    if (!this.isOpen) return;
    this.setOpen(false);
    find("open-rail").focus();
  }

  setOpen(isOpen) {
    this.rail.classList.toggle("open", isOpen);
    this.rail.inert = NARROW.matches && !isOpen;
    find("main").inert = isOpen;
    find("veil").hidden = !isOpen;
    find("open-rail").setAttribute("aria-expanded", String(isOpen));
  }

  /** Draws the list. heads: {id, title, updated}, the newest first. */
  show(heads, currentId) {
    if (this.list.querySelector("input")) return; // somebody is typing a name
    const focused = this.list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : null;
    const groups = new Map();
    for (const head of heads) {
      const name = dayOf(head.updated);
      groups.set(name, [...(groups.get(name) ?? []), head]);
    }
    this.list.replaceChildren();
    for (const [name, members] of groups) {
      const list = make("ul", {}, ...members.map((head) => this.row(head, head.id === currentId)));
      this.list.append(make("h2", {}, name), list);
    }
    if (!heads.length) this.list.append(make("p", { class: "about" }, "Your conversations will be listed here."));
    if (focused) this.list.querySelector(`[data-id="${focused}"] button`)?.focus();
  }

  row(head, isCurrent) {
    const title = head.title || NEW_TITLE;
    const open = make("button", { type: "button", class: "row", "aria-current": isCurrent ? "true" : null }, title);
    const rename = make("button", { type: "button", class: "icon small", "aria-label": `Rename ${title}` }, icon("pencil"));
    const remove = make("button", { type: "button", class: "icon small", "aria-label": `Delete ${title}` }, icon("bin"));
    const row = make("li", { "data-id": head.id }, open, rename, remove);
    open.addEventListener("click", () => {
      this.close();
      this.acts.open(head.id);
    });
    rename.addEventListener("click", () => this.editTitle(row, head));
    remove.addEventListener("click", () => this.acts.remove(head.id));
    return row;
  }

  editTitle(row, head) {
    const field = make("input", { "aria-label": "Name of the conversation", maxlength: "120" });
    field.value = head.title;
    let isDone = false; // removing the field also takes its focus, which would end it again
    const end = (isKept, refocuses) => {
      if (isDone) return;
      isDone = true;
      field.remove();
      this.acts.rename(head.id, isKept && field.value.trim() ? field.value.trim() : head.title);
      if (refocuses) this.list.querySelector(`[data-id="${head.id}"] button`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault(); // or the key would go on to press the button that gets the focus
      event.stopPropagation();
      end(event.key === "Enter", true);
    });
    field.addEventListener("blur", () => end(true, false));
    row.replaceChildren(field);
    field.select();
  }
}

function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return time >= midnight - 7 * DAY_MS ? "This week" : "Earlier";
}
