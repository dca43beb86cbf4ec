// The API's description, from openapi.json.

import { byId, element, table } from "./dom.js";

const api = await (await fetch("/openapi.json")).json();

function resolve(schema) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema ?? {};
}

// Returns a type in words.
function type(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const any = schema.anyOf ?? schema.oneOf;
  if (any) return any.map(type).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  return schema.type === "array" ? `list of ${type(schema.items ?? {})}` : schema.type ?? "any";
}

function fields(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => [
    name, type(field), schema.required?.includes(name) ? "required" : JSON.stringify(field.default ?? null), field.description ?? "",
  ]);
  return rows.length ? [table("Fields", ["Field", "Type", "Default", "Note"], rows)] : [];
}

for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const body = resolve(operation.requestBody?.content?.["application/json"]?.schema);
    byId("endpoints").append(element("h2", {}, `${method.toUpperCase()} ${path}`), element("p", {}, operation.description ?? operation.summary ?? ""), ...fields(body));
  }
}
byId("endpoints").append(element("h2", {}, "Objects"));
for (const [name, schema] of Object.entries(api.components.schemas)) {
  if (!/Request$|Validation/.test(name)) byId("endpoints").append(element("h3", {}, name), ...fields(schema));
}
