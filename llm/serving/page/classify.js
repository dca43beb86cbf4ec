// Probabilities of labels, and the words that moved the first one's.

import { call } from "./api.js";
import { attempt, byId, element, heat, percent, table } from "./dom.js";

export function startClassify(models) {
  const { model } = byId("label").elements;
  model.replaceChildren(...models.map((each) => element("option", { value: each.id }, each.id)));
  byId("label").addEventListener("submit", (event) => {
    event.preventDefault();
    const { text } = event.target.elements;
    attempt(async () => {
      const found = await call("/v1/classify", { model: model.value, input: text.value, explain: true });
      byId("labelled").replaceChildren(...render(found.data[0], text.value));
    });
  });
}

function render({ label, probabilities, words }, text) {
  const rows = Object.entries(probabilities).sort((a, b) => b[1] - a[1]).map(([name, probability]) => [
    name, percent(probability),
    element("td", {}, element("meter", { min: 0, max: 1, value: probability, "aria-label": name })),
  ]);
  const largest = Math.max(...words.map((word) => Math.abs(word.effect ?? 0)), 1e-9);
  const shown = element("p", { class: "words text" });
  let at = 0;
  const characters = [...text]; // positions count characters, as the server does
  for (const word of words) {
    shown.append(characters.slice(at, word.start).join(""));
    const mark = element("span", { title: effect(word) }, word.text);
    shown.append(word.effect > 0 ? heat(mark, word.effect / largest) : mark);
    at = word.end;
  }
  shown.append(characters.slice(at).join(""));
  const strongest = [...words].filter((word) => word.effect !== null).sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, 10);
  return [
    element("h2", {}, `Label: ${label}`), table("Probabilities", ["Label", "Probability", ""], rows),
    element("h2", {}, `Words that speak for ${label}`), shown,
    table(`Change of the probability of ${label} by each word`, ["Word", "Change"], strongest.map((word) => [word.text, effect(word)])),
  ];
}

function effect(word) {
  return word.effect === null ? "the only word" : `${word.effect >= 0 ? "+" : "−"}${percent(Math.abs(word.effect))}`;
}
