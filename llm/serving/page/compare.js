// Two models or two settings side by side, with one seed.

import { answer } from "./api.js";
import { attempt, byId } from "./dom.js";
import { Settings } from "./settings.js";

export function startCompare(models) {
  const sides = ["left", "right"].map((side) => [byId(side), new Settings(byId(`${side}-settings`), models, ["seed"])]);
  sides[1][1].model.selectedIndex = Math.min(1, models.length - 1);
  let running = null;
  byId("versus-stop").addEventListener("click", () => running?.abort());
  byId("versus").addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const controller = running = new AbortController();
    const { text, seed } = event.target.elements;
    const messages = [{ role: "user", content: text.value }];
    byId("versus-stop").hidden = false;
    await attempt(() => Promise.all(sides.map(async ([place, settings]) => {
      place.textContent = "";
      const values = { ...settings.values, seed: seed.valueAsNumber };
      for await (const part of answer(settings.chosen, messages, values, controller.signal)) place.append(part);
    })));
    if (running === controller) byId("versus-stop").hidden = true;
  });
}
