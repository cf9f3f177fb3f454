// What a reader can set: the system prompt of a conversation, how answers are drawn, colours, and the API key.

import { find, make } from "./dom.js";
import { read, write } from "./store.js";
import { apiKey } from "./stream.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", about: "0 always takes the likeliest word, higher takes more chances.", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", about: "Only the likeliest words that together have this probability.", min: 0, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", about: "Only so many of the likeliest words; 0 is all.", min: 0, max: 100_000, step: 1 },
  { name: "max_tokens", label: "Longest answer", about: "In tokens, reasoning included.", min: 1, max: 10_000_000, step: 1 },
  { name: "seed", label: "Seed", about: "The same seed and the same words give the same answer.", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];
const DARK = matchMedia("(prefers-color-scheme: dark)");

/** The sheet of settings. current() is the conversation; changed() is called when that was changed. */
export class Settings {
  constructor({ current, changed }) {
    this.sampling = read("sampling", {});
    this.dialog = find("settings");
    this.fields = FIELDS.map((field) => this.addField(field));
    find("open-settings").addEventListener("click", () => this.open(current()));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // on the backdrop
    });
    find("system").addEventListener("input", ({ target }) => {
      current().system = target.value;
      if (find("keep-system").checked) write("system", target.value);
      changed();
    });
    find("keep-system").addEventListener("change", ({ target }) => {
      write("system", target.checked ? find("system").value : "");
    });
    find("reset").addEventListener("click", () => this.reset());
    find("forget-key").addEventListener("click", () => {
      apiKey.forget();
      find("access").hidden = true;
    });
    find("models").addEventListener("change", ({ target }) => write("model", target.value));
  }

  /** The fields of a request that the reader has set. */
  get values() {
    return Object.fromEntries(FIELDS.map(({ name }) => [name, this.sampling[name]]).filter(([, value]) => Number.isFinite(value)));
  }

  open(conversation) {
    find("system").value = conversation.system;
    find("keep-system").checked = Boolean(read("system", "")) && read("system", "") === conversation.system;
    find("access").hidden = apiKey.get() === null;
    this.dialog.showModal();
  }

  /** Offers models to choose from; returns the id of the chosen one. */
  offer(models) {
    const chosen = models.find(({ id }) => id === read("model", null)) ?? models[0];
    find("model-choice").hidden = models.length < 2;
    find("models").replaceChildren(...models.map(({ id }) => make("option", { selected: id === chosen?.id }, id)));
    return chosen?.id ?? null;
  }

  addField({ name, label, about, min, max, step }) {
    const id = `set-${name}`;
    const mode = step < 1 ? "decimal" : "numeric";
    const input = make("input", { id, type: "number", min, max, step: "any", inputmode: mode, "aria-describedby": `${id}-about` });
    const text = make("p", { id: `${id}-about`, class: "about" }, about);
    if (this.sampling[name] !== undefined) input.value = this.sampling[name];
    input.placeholder = "server’s own";
    input.addEventListener("input", () => {
      const value = input.valueAsNumber;
      const isEmpty = input.value === "" && !input.validity.badInput;
      const isRight = isEmpty || (value >= min && value <= max && (step < 1 || Number.isInteger(value)));
      input.setAttribute("aria-invalid", String(!isRight));
      text.textContent = isRight ? about : `Not used: a ${step < 1 ? "" : "whole "}number from ${min} to ${max} is wanted.`;
      this.sampling[name] = isRight && !isEmpty ? value : undefined;
      write("sampling", this.sampling);
    });
    find("sampling").append(make("div", { class: "field" }, make("label", { for: id }, label), input, text));
    return input;
  }

  reset() {
    for (const input of this.fields) {
      input.value = "";
      input.dispatchEvent(new Event("input"));
    }
  }
}

/** Lets a button switch the colours; a choice that agrees with the system's is no choice. */
export function offerColours(button) {
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : DARK.matches);
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    const wanted = isDark() ? "light" : "dark";
    if ((wanted === "dark") === DARK.matches) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    try {
      localStorage.setItem("freehold.theme", root.dataset.theme ?? ""); // as plain text: theme.js reads it before modules run
    } catch {
      // It lasts until the page is left.
    }
    show();
  });
  DARK.addEventListener("change", show);
  show();
}

/** Asks for an API key; returns whether one was given. isWrong: the one before was refused. */
export function askForKey(isWrong) {
  const dialog = find("key-dialog");
  const about = find("key-about");
  if (dialog.open) return Promise.resolve(false);
  if (isWrong) about.textContent = "The server did not accept that key. Another one?";
  return ask(dialog, find("key-cancel"), () => {
    const key = find("key").value.trim();
    find("key").value = "";
    if (key) apiKey.set(key);
    return Boolean(key);
  });
}

/** Asks whether a conversation is to be deleted; returns the answer. */
export function askToDelete(title) {
  find("delete-about").textContent = `“${title}” is kept nowhere else.`;
  return ask(find("delete-dialog"), find("delete-cancel"), () => true);
}

function ask(dialog, cancel, accept) {
  return new Promise((resolve) => {
    const listening = new AbortController();
    const { signal } = listening;
    let answer = false;
    dialog.querySelector("form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        answer = accept();
        dialog.close();
      },
      { signal },
    );
    cancel.addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        resolve(answer);
      },
      { signal },
    );
    dialog.showModal();
    (dialog.querySelector("input") ?? cancel).focus();
  });
}
