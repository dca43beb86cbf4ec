// Conversations, kept in this browser alone.

import { answer } from "./api.js";
import { attempt, byId, element } from "./dom.js";
import { Settings } from "./settings.js";

const STORE = "textmill.conversations";
const KEPT = 50;

let conversations = [];
let current = null;
let running = null; // the AbortController of the answer that is being written
let settings = null;

export function startChat(models) {
  settings = new Settings(byId("chat-settings"), models);
  conversations = read();
  if (!conversations.length) begin();
  open(conversations[0]);
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const field = event.target.elements.text;
    if (running || !field.value.trim()) return;
    current.messages.push({ role: "user", content: field.value });
    field.value = "";
    respond();
  });
  byId("ask").elements.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", () => { running?.abort(); open(begin()); byId("ask").elements.text.focus(); });
  byId("delete").addEventListener("click", remove);
  byId("conversations").addEventListener("change", (event) => {
    running?.abort();
    open(conversations[event.target.selectedIndex]);
  });
  byId("system").addEventListener("change", () => { current.system = byId("system").value; write(); });
}

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found.filter((each) => Array.isArray(each?.messages)) : [];
  } catch {
    return [];
  }
}

function write() {
  try {
    localStorage.setItem(STORE, JSON.stringify(conversations));
  } catch { /* private windows have no store: the conversation lasts as long as the page */ }
}

function begin() {
  const made = { messages: [], system: "" };
  conversations = [made, ...conversations.filter((each) => each.messages.length)].slice(0, KEPT);
  return made;
}

function open(conversation) {
  current = conversation;
  byId("system").value = current.system ?? "";
  show();
}

function remove() {
  running?.abort();
  conversations = conversations.filter((each) => each !== current);
  open(conversations[0] ?? begin());
  write();
}

function show() {
  const titles = conversations.map((each) => element("option", {}, each.messages[0]?.content.slice(0, 40) || "empty"));
  byId("conversations").replaceChildren(...titles);
  byId("conversations").selectedIndex = conversations.indexOf(current);
  byId("log").replaceChildren(...current.messages.map(bubble));
}

function bubble(message, index) {
  const mine = message.role === "user";
  const text = element("div", { class: "text" }, message.content);
  const tools = element("div", { class: "tools" });
  if (mine) tools.append(element("button", { type: "button", onclick: () => edit(index) }, "Edit"));
  else if (index === current.messages.length - 1) {
    tools.append(element("button", { type: "button", onclick: () => regenerate(index) }, "Regenerate"));
  }
  return element("article", { class: `message ${message.role}` }, element("h3", {}, mine ? "You" : "Model"), text, tools);
}

function edit(index) {
  if (running) return;
  const field = byId("ask").elements.text;
  field.value = current.messages[index].content;
  current.messages.length = index; // what followed was an answer to another question
  show();
  write();
  field.focus();
}

function regenerate(index) {
  if (running) return;
  current.messages.length = index;
  respond();
}

async function respond() {
  const conversation = current;
  const system = byId("system").value.trim();
  const asked = [...(system ? [{ role: "system", content: system }] : []), ...conversation.messages];
  const reply = { role: "assistant", content: "" };
  conversation.messages.push(reply);
  show();
  const place = byId("log").lastElementChild.querySelector(".text");
  running = new AbortController();
  busy(true);
  const done = await attempt(async () => {
    for await (const text of answer(settings.chosen, asked, settings.values, running.signal)) {
      reply.content += text;
      place.append(text);
      place.scrollIntoView({ block: "nearest" });
    }
    return true;
  });
  if (!done && !reply.content) { // nothing was answered: the question can be sent again
    conversation.messages.pop();
    const [question] = conversation.messages.splice(-1);
    byId("ask").elements.text.value ||= question.content;
  }
  running = null;
  busy(false);
  write();
  if (conversation === current) show();
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("log").setAttribute("aria-busy", is);
  if (is) byId("stop").focus();
  else byId("ask").elements.text.focus();
}
