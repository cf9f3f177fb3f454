// Sets the colours before anything is drawn: the reader's choice if there is one, the system's otherwise.
// A classic script, because a module would run after the first paint.
"use strict";
try {
  const chosen = localStorage.getItem("freehold.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is closed to this page: the system's colours it is.
}
