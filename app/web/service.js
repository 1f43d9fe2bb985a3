// The page's side of the HTTP API: one picture a request, one more try when the service is overloaded, and the key.

const IMAGE_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LONGEST_WAIT_S = 30;
const DEADLINE_MS = 30_000; // with the upload, and a phone's photos take their time; as long as the service waits for a body
const PAUSES_S = [1, 2, 4]; // while nobody answers: a restart, or a network that was lost for a moment
const KEY = "convmixer-key";
const UNREACHABLE = "No connection, or the service closed it: a file over its size limit may be the cause.";

/** What the service, or the way to it, answered instead of a prediction; the message is for people. */
export class Failure extends Error {
  constructor(message, { status = 0, code = "unreachable" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let remembered = "";
let gone = false; // nobody answered after all pauses: until somebody does, each further file is tried once

export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? remembered;
    } catch {
      return remembered; // the browser lets this site store nothing
    }
  },
  set(value) {
    remembered = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // then a reload asks for it again
    }
  },
};

// A header takes no other letters.
export const isKey = (text) => /^[\x20-\x7e]+$/.test(text);

const address = (path) => new URL(path, document.baseURI);
const contentType = (file) => (IMAGE_TYPES.includes(file.type) ? file.type : "application/octet-stream");

/** What the service says of its model. */
export async function describeModel() {
  const response = await fetch(address("model"));
  if (!response.ok) throw await failureOf(response);
  return response.json();
}

/** A picture that the service brings along. @throws {Failure} */
export async function fetchSample(name) {
  const response = await fetch(address(`web/samples/${name}`)).catch(() => null);
  if (!response) throw new Failure("The service could not be reached.");
  if (!response.ok) throw await failureOf(response);
  return new File([await response.blob()], name, { type: "image/webp" });
}

/**
 * Classifies one file.
 *
 * @param {File} file
 * @param {{signal: AbortSignal, onWait: (seconds: number, reason: string) => void}} options `onWait` is told of a wait for
 *   another try.
 * @returns prediction (docs/api.md), timings in ms by stage, and the total in ms as this browser saw it.
 * @throws {Failure}
 */
export async function classify(file, { signal, onWait }) {
  const pauses = gone ? [] : [...PAUSES_S];
  for (let refused = false; ; ) {
    const begin = performance.now();
    const response = await post(file, signal);
    const text = response?.ok ? await response.text().catch(() => null) : "";
    signal.throwIfAborted();
    if (response === null || text === null) {
      const isThere = await fetch(address("livez")).then(() => true, () => false);
      if (isThere) pauses.splice(1); // it hung up, as on a file over its size limit: once more, and not for nothing
      if (!pauses.length) {
        gone = !isThere;
        throw new Failure(UNREACHABLE);
      }
      onWait(pauses[0], isThere ? "The service hung up" : "The service could not be reached");
      await pause(pauses.shift() * 1000, signal);
      continue;
    }
    gone = false;
    if (response.ok) {
      const timings = serverTimings(response.headers.get("Server-Timing") ?? "");
      return { prediction: predictionIn(text), timings, total: performance.now() - begin };
    }
    const wait_s = Number(response.headers.get("Retry-After") ?? 1);
    if (response.status !== 503 || refused || !(wait_s >= 0 && wait_s <= LONGEST_WAIT_S)) throw await failureOf(response);
    await response.body?.cancel();
    refused = true;
    onWait(wait_s, "The service is overloaded");
    await pause(wait_s * 1000, signal);
  }
}

/** The same request for a shell; the key itself is not written down. */
export function curlCommand(file) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const words = ["curl", "-H", quote(`Content-Type: ${contentType(file)}`)];
  if (key.get()) words.push("-H", '"Authorization: Bearer $KEY"');
  words.push("--data-binary", quote(`@${file.name}`), quote(`${address("classify?explain=true")}`));
  return words.join(" ");
}

// Its answer, or null if there is none.
async function post(file, signal) {
  const headers = { "Content-Type": contentType(file), "X-Deadline-Ms": String(DEADLINE_MS) };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  try {
    return await fetch(address("classify?explain=true"), { method: "POST", body: file, headers, signal });
  } catch (error) {
    if (signal.aborted) throw error;
    const readable = await file.slice(0, 1).arrayBuffer().catch(() => null);
    if (!readable) throw new Failure("The file can no longer be read: choose it again.");
    return null;
  }
}

function predictionIn(text) {
  try {
    const { predictions } = JSON.parse(text);
    if (Array.isArray(predictions)) return predictions[0];
  } catch {
    // no JSON, or null
  }
  throw new Failure("The answer is not from this service, perhaps from a login page: reload this page.", { status: 200, code: "" });
}

// RFC 9457, unless it is a proxy's.
async function failureOf(response) {
  const problem = await response.json().catch(() => null);
  const text = (value) => (typeof value === "string" ? value : "");
  const message = text(problem?.detail) || `The service answered ${response.status} ${response.statusText}.`;
  return new Failure(message, { status: response.status, code: text(problem?.code) });
}

// Server-Timing (W3C): `decode;dur=0.31, queue;dur=0.02` becomes [["decode", 0.31], ["queue", 0.02]].
// The server's own total is left out: what the browser saw is shown in its place.
function serverTimings(header) {
  const timings = [...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, stage, ms]) => [stage, Number(ms)]);
  return timings.filter(([stage]) => stage !== "total");
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
