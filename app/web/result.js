// One picture on the page, from waiting to its answer. Strings of the server and names of files only ever become text.

import { drawHeatMap } from "./heatmap.js";

// How a picture is laid into a square, as the model's resize rule does it: what is shown is what the model saw, and the
// heat map lies right.
const FITS = { crop: "cover", squash: "fill", pad: "contain" };
const SMALL = 64; // pixels: anything smaller is shown with its pixels, not blurred

const percent = (probability) => {
  if (probability > 0.9995) return probability === 1 ? "100%" : "> 99.9%";
  if (probability < 0.0005) return "< 0.1%";
  return `${(100 * probability).toFixed(1)}%`;
};
const milliseconds = (ms) => (ms < 9.95 ? ms.toFixed(1) : Math.round(ms).toString());

export class Result {
  /** @param {File} file  @param {string} resize the model's rule: crop, squash or pad. */
  constructor(file, resize) {
    this.file = file;
    this.leaving = new AbortController();
    this.element = document.getElementById("result-template").content.firstElementChild.cloneNode(true);
    this.#part(".filename").textContent = file.name;
    this.#part(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    this.#part(".remove").title = "Remove";
    this.#part(".curl").setAttribute("aria-label", `Copy as curl: ${file.name}`);
    this.show("waiting", "Waiting…");
    this.#showPicture(FITS[resize] ?? "cover");
  }

  /** State for the style sheet, and the words where the answer will be. */
  show(state, words) {
    this.element.dataset.state = state;
    this.#part("h3").textContent = words;
    this.#notice("");
  }

  /** Says that another try will be made. */
  wait(seconds, reason) {
    this.show("working", "Busy…");
    this.#notice(`${reason}; trying once more in ${seconds} s.`);
  }

  /** @param {Failure} failure */
  fail(failure) {
    this.show("failed", "Not classified");
    this.#notice(failure.message);
    this.#part(".total").textContent = failure.status ? `HTTP ${failure.status}` : "";
    this.#part(".stages").textContent = failure.code;
    this.#part(".curl").hidden = false;
  }

  answer({ prediction, timings, total }) {
    const unknown = prediction.in_distribution === false; // absent: the model cannot tell
    this.show(unknown ? "unknown" : "done", unknown ? "None of my classes" : prediction.label);
    this.#part(".confidence").textContent = unknown ? "" : percent(prediction.confidence);
    this.#notice(unknown ? "The picture probably shows nothing this model knows. Its closest guesses:" : "");
    this.#part(".classes").replaceChildren(...prediction.top_k.map(classRow));
    this.#part(".warnings").replaceChildren(...prediction.warnings.map((text) => textElement("li", text)));
    this.#part(".total").textContent = `${milliseconds(total)} ms in total`;
    this.#part(".stages").textContent = timings.map(([stage, ms]) => `${stage} ${milliseconds(ms)}`).join(" · ");
    this.#part(".curl").hidden = false;
    if (prediction.heat_map) {
      drawHeatMap(this.#part("canvas"), prediction.heat_map.values);
      this.element.classList.add("has-heat");
      this.#part("img").alt = `${this.file.name}, with the evidence for ${prediction.heat_map.label} as a heat map`;
    }
  }

  /** One sentence for those who listen. */
  summary() {
    const { state } = this.element.dataset;
    const words = { done: `${this.#part("h3").textContent}, ${this.#part(".confidence").textContent}`, unknown: "none of my classes" };
    return `${this.file.name}: ${words[state] ?? `not classified, ${this.#part(".notice").textContent}`}`;
  }

  remove() {
    this.leaving.abort();
    URL.revokeObjectURL(this.#part("img").src);
    this.element.remove();
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }

  #notice(text) {
    this.#part(".notice").textContent = text;
    this.#part(".notice").hidden = !text;
  }

  #showPicture(fit) {
    const image = this.#part("img");
    image.alt = this.file.name;
    image.dataset.fit = fit;
    image.addEventListener("load", () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL));
    image.addEventListener("error", () => {
      image.hidden = true;
      this.#part(".no-preview").hidden = false;
    });
    image.src = URL.createObjectURL(this.file);
  }
}

function classRow({ label, probability }) {
  const row = document.createElement("li");
  const bar = textElement("span", "", "bar");
  bar.style.setProperty("--share", probability);
  row.append(textElement("span", label, "label"), textElement("span", percent(probability), "share"), bar);
  return row;
}

function textElement(name, text, className = "") {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = className;
  return element;
}
