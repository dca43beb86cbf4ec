// Inside a model: losses, candidates, a head's attention, and the logit lens.

import { call } from "./api.js";
import { attempt, byId, element, heat, percent, table, visible } from "./dom.js";

const WORST = 8; // nats: a token that surprises as much as one of three thousand

export function startLook(models) {
  const { model, layer, head } = byId("inspect").elements;
  model.replaceChildren(...models.map((each) => element("option", { value: each.id }, each.id)));
  const sizes = () => {
    const chosen = models.find((each) => each.id === model.value);
    if (chosen) [layer.max, head.max] = [chosen.n_layers - 1, chosen.n_heads - 1];
  };
  model.addEventListener("change", sizes);
  sizes();
  byId("inspect").addEventListener("submit", (event) => {
    event.preventDefault();
    const body = { model: model.value, text: event.target.elements.text.value, layer: layer.valueAsNumber, head: head.valueAsNumber, top: 8 };
    attempt(async () => byId("inside").replaceChildren(...render(await call("/v1/inspect", body), body)));
  });
}

function render(found, { layer, head }) {
  const details = element("div", {});
  const buttons = found.tokens.map((token, i) => {
    const loss = token.loss === null ? "no context" : `loss ${token.loss.toFixed(2)}`;
    const button = element("button", { type: "button", "aria-pressed": "false", title: loss, onclick: () => choose(i) }, visible(token.text));
    return heat(button, (token.loss ?? 0) / WORST);
  });
  function choose(i) {
    buttons.forEach((button, j) => button.setAttribute("aria-pressed", i === j));
    details.replaceChildren(...place(found, i, layer, head));
  }
  choose(found.tokens.length - 1);
  return [
    element("h2", {}, "Tokens, darker where the model did not expect them"), element("div", { class: "tokens" }, ...buttons),
    details,
    element("h2", {}, `Attention of layer ${layer}, head ${head}: each row looks at its columns`), attention(found),
  ];
}

// Returns what the model computes behind the token at a place.
function place(found, i, layer, head) {
  const token = found.tokens[i];
  const loss = token.loss === null ? "the first token has no context" : `loss ${token.loss.toFixed(3)} nats, probability ${percent(Math.exp(-token.loss))}`;
  const seen = found.attention[i].map((weight, j) => [weight, j]).sort((a, b) => b[0] - a[0]).slice(0, 8).filter(([weight]) => weight > 0);
  return [
    element("h2", {}, `Token ${i + 1}: ${visible(token.text)} (${loss})`),
    element("div", { class: "columns" },
      table("Candidates for the next token", ["Token", "Probability"], token.candidates.map((each) => [visible(each.text), percent(each.probability)])),
      table(`Attention of layer ${layer}, head ${head}`, ["Token", "Weight"], seen.map(([weight, j]) => [`${j + 1} ${visible(found.tokens[j].text)}`, percent(weight)]))),
    table("Logit lens: the likeliest next token after each layer", ["Layer", "Token", "Probability"],
      found.lens.map((row, depth) => [depth || "embedding", visible(row[i].text), percent(row[i].probability)])),
  ];
}

function attention(found) {
  const names = found.tokens.map((token, i) => `${i + 1} ${visible(token.text)}`);
  const rows = found.attention.map((weights, i) => [
    element("th", { scope: "row" }, names[i]),
    ...weights.map((weight, j) => (j > i ? "" : heat(element("td", { title: `${names[i]} to ${names[j]}` }, (100 * weight).toFixed(0)), weight))),
  ]);
  return table("Attention in percent", ["", ...names], rows);
}
