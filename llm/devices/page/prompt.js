// A conversation's prompt in parts: numbers are special tokens, neighbouring texts are one. No message becomes a token.

export function promptParts(form, messages) {
  const strip = ({ role, content }) => {
    const end = content.lastIndexOf("</think>");
    if (role === "assistant" && form.thoughts !== "kept" && end >= 0) {
      content = content.slice(end + "</think>".length);
      if (form.thoughts === "cut with line feeds") content = content.replace(/^\n+/, "");
    }
    return form.strips.includes(role) ? content.trim() : content;
  };
  const system = messages[0].role === "system" && form.system_start ? messages[0] : null;
  const turns = messages.filter((message) => message.role !== "system");
  const given = system ? [strip(system), ...form.system_end] : [];
  const first = system && !form.system_last ? [...form.system_start, ...given] : form.start;
  const parts = turns.flatMap((turn, i) => {
    const before = i === 0 ? first : turn.role === "user" ? form.user : form.assistant;
    return [...before, ...(form.system_last && i === turns.length - 1 ? given : []), strip(turn)];
  });
  return [...parts, ...form.answer];
}

export function joined(parts) {
  const out = [];
  for (const part of parts) {
    if (typeof part === "string" && typeof out.at(-1) === "string") out.push(out.pop() + part);
    else out.push(part);
  }
  return out.filter((part) => part !== "");
}
