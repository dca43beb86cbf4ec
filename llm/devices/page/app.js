// A chat with a model that runs in this page, by wllama (llama.cpp in WebAssembly).

import { Wllama } from "./wllama/index.min.js";
import { joined, promptParts } from "./prompt.js";

const byId = (id) => document.getElementById(id);
const say = (text) => { byId("status").textContent = text; };

let model = null; // model.json
let runtime = null;
let evaluated = []; // tokens in the KV cache
let messages = [];
let running = null; // the AbortController of the answer that is being written

start().catch((error) => say(`It does not run here: ${error.message}`));

async function start() {
  model = await (await fetch("model.json")).json();
  document.title = byId("name").textContent = model.name;
  await storedOffline();
  say("Loading the model …");
  const response = await fetch(model.weights);
  if (!response.ok) throw new Error(`${model.weights}: status ${response.status}`);
  runtime = new Wllama({ "single-thread/wllama.wasm": new URL("wllama/single-thread/wllama.wasm", location.href).href }, { suppressNativeLog: true });
  await runtime.loadModel([await response.blob()], { n_ctx: model.context, n_threads: 1, cache_type_k: model.cache, cache_type_v: model.cache });
  byId("system-part").hidden = !model.form?.system_start;
  byId("new").hidden = byId("send").disabled = false;
  say("Ready.");
}

// Waits until all files are stored, where the browser can; then they are not loaded twice.
async function storedOffline() {
  if (!navigator.serviceWorker) return; // a page that came over plain http
  say("Storing the model for use without a network …");
  try {
    const registration = await navigator.serviceWorker.register("sw.js");
    const worker = registration.installing ?? registration.waiting;
    if (worker) {
      await new Promise((resolve, reject) => {
        worker.addEventListener("statechange", () => {
          if (worker.state === "activated") resolve();
          if (worker.state === "redundant") reject(new Error("not stored"));
        });
      });
    }
  } catch { /* no room, or a private window: it runs, but needs the network */ }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = event.target.elements.text;
  if (running || !runtime || !field.value.trim()) return;
  messages.push({ role: "user", content: field.value });
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
byId("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  byId("log").replaceChildren();
  byId("ask").elements.text.focus();
});

function bubble(role, text) {
  const made = document.createElement("div");
  made.className = `message ${role}`;
  made.textContent = text;
  byId("log").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

async function respond() {
  bubble("user", messages.at(-1).content);
  const place = bubble("assistant", "");
  const asked = messages;
  const reply = { role: "assistant", content: "" };
  running = new AbortController();
  busy(true);
  const begun = performance.now();
  try {
    const prompt = await fitting(asked);
    let count = 0;
    for await (const text of answer(prompt, running.signal)) {
      reply.content += text;
      place.textContent = reply.content;
      count += 1;
    }
    say(`${(count / (performance.now() - begun) * 1000).toFixed(1)} tokens a second.`);
    asked.push(reply);
  } catch (error) {
    asked.pop();
    evaluated = [];
    await runtime.kvClear().catch(() => {});
    say(`No answer: ${error.message}`);
  }
  running = null;
  busy(false);
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("log").setAttribute("aria-busy", is);
  (is ? byId("stop") : byId("ask").elements.text).focus();
}

async function tokens(parts) {
  const ids = [];
  for (const part of joined(parts)) ids.push(...(typeof part === "number" ? [part] : await runtime.tokenize(part, false)));
  return ids;
}

// Returns the prompt without the oldest turns that leave an answer no room.
async function fitting(asked) {
  const room = model.context - Math.min(256, Math.floor(model.context / 2));
  if (!model.form) return [...model.bos, ...(await tokens([asked.at(-1).content]))].slice(-room);
  const system = byId("system").value.trim();
  for (let first = 0; ; first += 2) {
    const turns = [...(system ? [{ role: "system", content: system }] : []), ...asked.slice(first)];
    const ids = await tokens(promptParts(model.form, turns));
    if (ids.length <= room) return ids;
    if (first + 2 >= asked.length) throw new Error(`the message has ${ids.length} tokens (at most ${room})`);
  }
}

async function* answer(prompt, signal) {
  let kept = 0;
  while (kept < Math.min(evaluated.length, prompt.length - 1) && evaluated[kept] === prompt[kept]) kept += 1;
  if (kept < evaluated.length) await (kept ? runtime.kvRemove(kept, -1) : runtime.kvClear());
  evaluated = prompt.slice(0, kept);
  await runtime.samplingInit(model.sampling);
  await runtime.samplingAccept(prompt);
  await runtime.decode(prompt.slice(kept), {});
  evaluated = prompt.slice();
  const decoder = new TextDecoder();
  while (evaluated.length < model.context && !signal.aborted) {
    const { token, piece } = await runtime.samplingSample();
    if (model.stop.includes(token) || runtime.isTokenEOG(token)) break;
    yield decoder.decode(piece, { stream: true });
    await runtime.samplingAccept([token]);
    await runtime.decode([token], {});
    evaluated.push(token);
  }
  const rest = decoder.decode();
  if (rest) yield rest;
}
