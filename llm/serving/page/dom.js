// Elements, made without HTML from strings: whatever a model says is shown as text.

export const byId = (id) => document.getElementById(id);

// Returns an element with attributes (or `on...` listeners) and children, which are elements or text.
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute.startsWith("on")) made.addEventListener(attribute.slice(2), value);
    else made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

export function problem(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? error.message : "";
  if (error?.status === 401) byId("key").hidden = false;
}

// Runs a task; its error is shown, unless it is that of a stop.
export async function attempt(task) {
  problem(null);
  try {
    return await task();
  } catch (error) {
    if (error.name !== "AbortError") problem(error);
  }
}

// Colours an element by a share of 0 to 1. The text says the same, as colour alone tells some readers nothing.
export function heat(target, share) {
  target.style.backgroundColor = `rgb(var(--heat) / ${Math.max(0, Math.min(1, share)) * 0.55})`;
  return target;
}

export const percent = (value) => `${(100 * value).toFixed(1)} %`;

// Shows white space and control characters of a token.
export function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣").replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "�") || "∅";
}

export function table(caption, head, rows) {
  const line = (cells, name) => element("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : element(name, {}, `${cell}`))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption), element("thead", {}, line(head, "th")),
      element("tbody", {}, ...rows.map((row) => line(row, "td")))));
}
