// Requests to the server that this page comes from.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

async function request(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["content-type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new ApiError(response.status, found?.error?.message ?? `the server answered with status ${response.status}`);
  }
  return response;
}

export async function call(path, body, signal) {
  return (await request(path, body, signal)).json();
}

// Yields the JSON values of server-sent events.
async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const found = JSON.parse(data);
        if (found.error) throw new ApiError(500, found.error.message);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server sees that nobody reads on
  }
}

// Yields the text of an answer: to messages of a chat, or to its last message where the model has no chats.
export async function* answer(model, messages, settings, signal) {
  const chat = model.kind === "instruct";
  const body = { model: model.id, stream: true, ...settings };
  Object.assign(body, chat ? { messages, drop_oldest: true } : { prompt: messages.at(-1).content });
  for await (const event of events(chat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
    for (const choice of event.choices) yield (chat ? choice.delta.content : choice.text) ?? "";
  }
}
