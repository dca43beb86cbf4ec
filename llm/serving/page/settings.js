// Fields for the choice of tokens.

import { element } from "./dom.js";

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1, value: 0 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01, value: 1 }],
  ["top_k", "Top k", { min: 1, step: 1, placeholder: "all" }],
  ["repetition_penalty", "Repetition penalty", { min: 0.5, max: 3, step: 0.05, value: 1 }],
  ["max_tokens", "Tokens at most", { min: 1, max: 1024, step: 1, value: 200 }],
  ["seed", "Seed", { min: 0, step: 1, placeholder: "random" }],
];

export class Settings {
  constructor(place, models, without = []) {
    this.models = models;
    this.model = element("select", {}, ...models.map((model) => element("option", { value: model.id }, model.id)));
    this.inputs = Object.fromEntries(FIELDS.filter(([name]) => !without.includes(name)).map(([name, label, attributes]) => {
      const input = element("input", { type: "number", ...attributes });
      return [name, [label, input]];
    }));
    const labels = Object.values(this.inputs).map(([label, input]) => element("label", {}, label, input));
    place.replaceChildren(element("label", {}, "Model", this.model), ...labels);
    place.addEventListener("submit", (event) => event.preventDefault());
  }

  get chosen() {
    return this.models.find((model) => model.id === this.model.value);
  }

  // The fields that are filled in, as numbers.
  get values() {
    const filled = Object.entries(this.inputs).filter(([, [, input]]) => input.value !== "");
    return Object.fromEntries(filled.map(([name, [, input]]) => [name, input.valueAsNumber]));
  }
}
