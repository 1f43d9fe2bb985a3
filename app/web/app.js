// The page at /: takes pictures from wherever they come, asks the service about a few at a time, shows the answers.

import { drawLegend } from "./heatmap.js";
import { Result } from "./result.js";
import { Failure, classify, curlCommand, describeModel, fetchSample, isKey, key } from "./service.js";

const AT_ONCE = 4; // requests under way: enough to keep the service busy, few enough to leave room for others

const MOST_NAMED = 20; // classes; /model has all

const MODEL_WAIT_MS = 2000; // what it says changes how a preview is cropped, and no answer

const $ = (id) => document.getElementById(id);
const results = new Map(); // element -> Result
let waiting = [];
let announced = []; // answered since the last announcement
let running = 0;
let locked = false; // a key is asked for

const model = describeModel().catch(() => null);
model.then((card) => {
  if (card) describe(card);
});
const patience = new Promise((resolve) => setTimeout(resolve, MODEL_WAIT_MS));
drawLegend($("legend"));

function describe({ name, version, classes, metadata }) {
  const accuracy = metadata.test?.top1;
  const more = classes.length - MOST_NAMED;
  const named = classes.slice(0, MOST_NAMED).join(", ") + (more > 0 ? ` and ${more} more` : "");
  const facts = [`${name} ${version} tells ${classes.length} kinds of things apart: ${named}.`];
  if (accuracy) {
    const images = metadata.test.images.toLocaleString("en");
    const which = metadata.test.trained_with ? `the ${images} images it was trained with, which says nothing of new ones` : `its ${images} test images`;
    facts.push(`It is right on ${(100 * accuracy).toFixed(1)}% of ${which}.`);
  }
  $("about").textContent = facts.join(" ");
}

async function add(files) {
  complain(files.length ? "" : "No picture was found there. Drop or paste pictures.");
  if (!files.length) return;
  const resize = (await Promise.race([model, patience]))?.metadata.resize?.mode;
  const added = files.map((file) => new Result(file, resize));
  for (const result of added) results.set(result.element, result);
  waiting.push(...added);
  locked = false; // perhaps no key is wanted any more; if one is, that is said again
  $("results").prepend(...added.map((result) => result.element));
  $("status").textContent = `Classifying ${files.length === 1 ? files[0].name : `${files.length} pictures`}…`;
  work();
  recount();
}

// What concerns no picture on the page.
function complain(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function work() {
  while (!locked && running < AT_ONCE && waiting.length) ask(waiting.shift());
}

async function ask(result) {
  const sentKey = key.get();
  running++;
  result.show("working", "Looking…");
  try {
    result.answer(await classify(result.file, { signal: result.leaving.signal, onWait: (seconds, reason) => result.wait(seconds, reason) }));
    announced.push(result);
  } catch (error) {
    if (error instanceof Failure && error.code === "unauthorized") {
      result.show("waiting", "Waiting for a key…");
      waiting.unshift(result);
      if (sentKey === key.get()) askForKey(error, sentKey);
    } else if (!result.leaving.signal.aborted) {
      result.fail(error instanceof Failure ? error : new Failure(`The page failed: ${error.message}`));
      announced.push(result);
    }
  }
  running--;
  work();
  recount();
}

function askForKey(failure, sentKey) {
  locked = true;
  $("key-reason").textContent = sentKey ? "The service did not take this key." : failure.message;
  if ($("key-form").hidden || sentKey) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

function recount() {
  const states = [...results.keys()].map((element) => element.dataset.state);
  const number = (...names) => states.filter((state) => names.includes(state)).length;
  const parts = [`${states.length} ${states.length === 1 ? "picture" : "pictures"}`];
  if (number("waiting", "working")) parts.push(`${number("waiting", "working")} to go`);
  if (number("failed")) parts.push(`${number("failed")} not classified`);
  $("count").textContent = parts.join(", ");
  $("answers").hidden = !states.length;
  if (!running && announced.length) {
    const told = announced.slice(0, 3).map((result) => result.summary());
    if (announced.length > 3) told.push(`and ${announced.length - 3} more`);
    $("status").textContent = `${told.join(". ")}.`;
    announced = [];
  }
}

function remove(result) {
  const next = result.element.nextElementSibling ?? result.element.previousElementSibling;
  waiting = waiting.filter((other) => other !== result);
  announced = announced.filter((other) => other !== result);
  results.delete(result.element);
  result.remove();
  (next?.querySelector(".remove") ?? $("choose")).focus();
  recount();
}

async function copyCurl(button, file) {
  const command = curlCommand(file);
  try {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
    $("status").textContent = "The command was copied.";
    setTimeout(() => (button.textContent = "Copy as curl"), 2000);
  } catch {
    // no clipboard without HTTPS, or not allowed
    $("curl-text").value = command;
    $("curl-dialog").showModal();
    $("curl-text").select();
  }
}

// The files, and the pictures in the folders.
function dropped({ items }) {
  // all are asked for at once: when the event is over, the list is empty
  const found = [...items].filter(({ kind }) => kind === "file").map((item) => {
    const entry = item.webkitGetAsEntry();
    return entry?.isDirectory ? picturesIn(entry) : [item.getAsFile()];
  });
  return Promise.all(found).then((lists) => lists.flat());
}

// What cannot be read has a null in its place: others beside it can.
async function picturesIn(folder) {
  const reader = folder.createReader();
  const pictures = [];
  const orNull = (ask) => new Promise((resolve) => ask(resolve, () => resolve(null)));
  for (;;) {
    const entries = await orNull((...answers) => reader.readEntries(...answers)); // a hundred at most
    if (!entries) pictures.push(null);
    if (!entries?.length) return pictures;
    for (const entry of entries) {
      if (entry.name.startsWith(".")) continue; // e.g. ._cat.png, which macOS adds to cat.png
      if (entry.isDirectory) pictures.push(...(await picturesIn(entry)));
      else {
        const file = await orNull((...answers) => entry.file(...answers));
        if (!file || file.type.startsWith("image/")) pictures.push(file);
      }
    }
  }
}

async function addSample(name) {
  try {
    const sample = await fetchSample(`${name}.webp`);
    await add([sample]);
  } catch (error) {
    complain(error.message);
  }
}

for (const [button, input] of [["choose", "files"], ["photograph", "camera"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    add([...$(input).files]);
    $(input).value = ""; // so that the same file can be chosen again
  });
}

$("photograph").hidden = navigator.maxTouchPoints === 0; // elsewhere it would be the same as choosing

for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => addSample(button.dataset.sample));
}

const isTextForAField = ({ target, dataTransfer }) => target.closest?.("input, textarea") && !dataTransfer.types.includes("Files");

// The whole window takes what is dropped: a near miss must not make the browser leave the page.
document.addEventListener("dragover", (event) => {
  if (isTextForAField(event)) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (name === "drop" || !event.relatedTarget) $("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  if (isTextForAField(event)) return;
  event.preventDefault();
  dropped(event.dataTransfer).then(async (found) => {
    const pictures = found.filter(Boolean);
    if (pictures.length || !found.length) await add(pictures);
    if (pictures.length < found.length) complain("Some of what was dropped could not be read.");
  });
});
document.addEventListener("paste", (event) => {
  const isText = event.target.closest?.("input, textarea") && event.clipboardData.types.includes("text/plain");
  if (event.clipboardData.files.length && !isText) { // a cell of a table comes as text and as a picture of it
    event.preventDefault();
    add([...event.clipboardData.files]);
  }
});

$("results").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  const result = button && results.get(button.closest(".result"));
  if (button?.classList.contains("remove")) remove(result);
  if (button?.classList.contains("curl")) copyCurl(button, result.file);
});

$("clear").addEventListener("click", () => {
  waiting = [];
  announced = [];
  for (const result of results.values()) result.remove();
  results.clear();
  recount();
  $("choose").focus();
  $("status").textContent = "Cleared.";
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("key").value.trim();
  if (!isKey(typed)) {
    $("key-reason").textContent = "This has characters, perhaps invisible ones, that no key has: copy it again.";
    return;
  }
  key.set(typed);
  $("key").value = "";
  $("key-form").hidden = true;
  $("choose").focus(); // it was in the form
  locked = false;
  work();
});

function showHeat() {
  document.body.classList.toggle("no-heat", !$("heat").checked);
  $("strength").disabled = !$("heat").checked;
  document.body.style.setProperty("--strength", $("strength").value / 100);
}
for (const id of ["heat", "strength"]) $(id).addEventListener("input", showHeat);
showHeat();
