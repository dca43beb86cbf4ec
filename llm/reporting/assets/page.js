"use strict";
// Each table of more than a few rows gets a field that filters its rows; each heading sorts.
const FEW = 4;

function number(text) {
  const found = text.replaceAll(",", "").match(/^\s*-?\d+(\.\d+)?/);
  return found ? Number(found[0]) : null;
}

function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  return x !== null && y !== null ? x - y : a.localeCompare(b);
}

function sortBy(table, column, heading) {
  const rising = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => (rising ? 1 : -1) * compare(a.cells[column].textContent, b.cells[column].textContent));
  table.tBodies[0].append(...rows);
}

function filterField(table) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  const count = document.createElement("output");
  const rows = [...table.tBodies[0].rows];
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    count.textContent = ` ${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  field.type = "search";
  field.addEventListener("input", show);
  label.className = "filter";
  label.append("Filter: ", field, count);
  show();
  return label;
}

for (const table of document.querySelectorAll("table")) {
  const frame = document.createElement("div");
  frame.className = "scroll";
  frame.tabIndex = 0; // a keyboard scrolls it
  table.replaceWith(frame);
  frame.append(table);
  if (table.tBodies[0].rows.length <= FEW) continue;
  frame.before(filterField(table));
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(table, column, heading));
    heading.append(button);
  });
}
