// The page at /docs: /openapi.json as text one can read.

const address = (path) => new URL(path, document.baseURI);

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// The descriptions' Markdown is paragraphs and `code`.
function prose(text = "") {
  return text.split(/\n\s*\n/).filter(Boolean).map((paragraph) => element("p", "", ...inline(paragraph)));
}

function inline(text = "") {
  return text.split("`").map((part, i) => (i % 2 ? element("code", "", part) : part));
}

// A schema in a few words, with links to those that have a name.
function typeOf(schema = {}) {
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    const link = element("a", "", name);
    link.href = `#schema-${name}`;
    return [link];
  }
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").flatMap((one, i) => (i ? [" or ", ...typeOf(one)] : typeOf(one)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  if (schema.additionalProperties?.type || schema.additionalProperties?.$ref) return ["map of ", ...typeOf(schema.additionalProperties)];
  const { minimum, maximum, title, type = "anything" } = schema;
  if (type === "object" && schema.properties && title) return typeOf({ $ref: `/${title}` });
  const range = minimum !== undefined && maximum !== undefined ? `, ${minimum} to ${maximum}` : "";
  return [type + range];
}

function table(head, rows) {
  const headRow = element("tr", "", ...head.map((text) => element("th", "", text)));
  const body = rows.map((cells) => element("tr", "", ...cells.map((cell) => element("td", "", ...[cell].flat()))));
  return element("table", "", element("thead", "", headRow), element("tbody", "", ...body));
}

function parameters(list = []) {
  if (!list.length) return [];
  const rows = list.map(({ name, in: place, schema, description, required }) => [
    element("code", "", name),
    place,
    [...typeOf(schema), ...(schema.default === undefined ? [] : [`, default ${schema.default}`]), ...(required ? [", required"] : [])],
    inline(description),
  ]);
  return [element("h3", "", "Parameters"), table(["name", "in", "type", "meaning"], rows)];
}

function contents(content = {}) {
  return Object.entries(content).map(([mediaType, { schema }]) => {
    const types = typeOf(schema);
    return element("div", "", element("code", "", mediaType), ...(types[0] === "anything" ? [] : [": ", ...types]));
  });
}

function operation(path, method, { summary, description, parameters: list, requestBody, responses }) {
  const title = element("h2", "", element("span", "method", method.toUpperCase()), " ", element("code", "", path));
  const section = element("section", "prose route", title, element("p", "summary", summary ?? ""), ...prose(description), ...parameters(list));
  if (requestBody) section.append(element("h3", "", "Body"), ...contents(requestBody.content));
  const rows = Object.entries(responses).map(([status, answer]) => [status, [...inline(answer.description), ...contents(answer.content)]]);
  section.append(element("h3", "", "Answers"), table(["status", "meaning"], rows));
  for (const { example } of Object.values(responses["200"]?.content ?? {})) {
    if (example) section.append(element("h3", "", "Example"), element("pre", "", element("code", "", JSON.stringify(example, null, 2))));
  }
  return section;
}

function schemas(all) {
  const sections = Object.entries(all).map(([name, { description, properties = {}, required = [] }]) => {
    const rows = Object.entries(properties).map(([property, schema]) => [
      element("code", "", property),
      [...typeOf(schema), ...(required.includes(property) ? [] : [", optional"])],
      inline(schema.description),
    ]);
    const section = element("section", "", element("h3", "", name), ...prose(description), table(["field", "type", "meaning"], rows));
    section.id = `schema-${name}`;
    return section;
  });
  return element("section", "prose route", element("h2", "", "Schemas"), ...sections);
}

// Those that a body or an answer spells out instead of naming, and those within them.
function inlineSchemas(paths) {
  const found = {};
  const visit = (schema = {}) => {
    if (schema.properties && schema.title) found[schema.title] = schema;
    const parts = [...Object.values(schema.properties ?? {}), ...(schema.anyOf ?? []), schema.items, schema.additionalProperties];
    for (const part of parts) if (part instanceof Object) visit(part);
  };
  for (const { requestBody, responses } of Object.values(paths).flatMap((methods) => Object.values(methods))) {
    for (const { content = {} } of [requestBody ?? {}, ...Object.values(responses)]) {
      for (const { schema } of Object.values(content)) visit(schema);
    }
  }
  return found;
}

document.getElementById("example").textContent =
  `curl -H 'Content-Type: image/png' --data-binary @cat.png '${address("classify?top_k=3")}'`;

const routes = document.getElementById("routes");
try {
  const { paths, components } = await (await fetch(address("openapi.json"))).json();
  routes.replaceChildren(
    ...Object.entries(paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, value]) => operation(path, method, value))),
    schemas({ ...components.schemas, ...inlineSchemas(paths) }),
  );
  document.getElementById(location.hash.slice(1))?.scrollIntoView(); // the browser looked for it before it was there
} catch (error) {
  routes.textContent = `The description could not be read: ${error.message}`;
}
