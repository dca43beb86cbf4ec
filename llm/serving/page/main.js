// Tabs, the key, and the models that each view is for.

import { call, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { startClassify } from "./classify.js";
import { startCompare } from "./compare.js";
import { attempt, byId } from "./dom.js";
import { startLook } from "./look.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const each of tabs) {
    each.setAttribute("aria-selected", each === tab);
    each.tabIndex = each === tab ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs.filter((each) => !each.hidden).at((tabs.filter((each) => !each.hidden).indexOf(tab) + step) % tabs.filter((each) => !each.hidden).length);
    next.focus();
    select(next);
  });
}

let started = false;

async function start() {
  const { data } = await call("/v1/models");
  if (started) return;
  started = true;
  byId("key").hidden = true;
  const instruct = data.filter((model) => model.kind === "instruct");
  const base = data.filter((model) => model.kind === "base");
  const classifiers = data.filter((model) => model.kind === "classifier");
  const texts = [...instruct, ...base];
  byId("tab-classify").hidden = !classifiers.length;
  for (const name of ["chat", "compare", "look"]) byId(`tab-${name}`).hidden = !texts.length;
  if (texts.length) {
    startChat(texts);
    startCompare(texts);
    startLook(texts);
  }
  if (classifiers.length) startClassify(classifiers);
  const wanted = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash && !tab.hidden);
  select(wanted ?? tabs.find((tab) => !tab.hidden));
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(event.target.elements.key.value);
  attempt(start);
});
attempt(start);
