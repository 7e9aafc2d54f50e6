// The search page: class names go to the server, images and boxes come back; the slider filters what came.

import { css, instanceColours } from "./colours.js";
import { errorOf, save, showProblem } from "./common.js";

const REQUEST_THRESHOLD = 0.1;
const MOST_IMAGES = 1000;
const AT_ONCE = 60;
const SVG = "http://www.w3.org/2000/svg";

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const state = { result: null, shown: AT_ONCE, request: null };

connect();
describe();

async function describe() {
  try {
    const response = await fetch("api/info");
    if (!response.ok) throw await errorOf(response);
    const { words, index, version } = await response.json();
    at.model.textContent = `${index.images.toLocaleString("en")} images, ${index.regions.toLocaleString("en")} regions (${index.mode}), version ${version}`;
    const listed = words.default.join(", ");
    at.words.placeholder = listed.length > 64 ? `empty: the ${words.default.length} classes that the server was started with` : listed;
    if (words.known) {
      at.known.hidden = false;
      at["known-words"].textContent = words.known.join(", ");
    }
    if (!words.free) at["words-help"].textContent = `Only the default classes: ${words.why_not}`;
  } catch (error) {
    showProblem(at, error);
  }
}

function connect() {
  at.form.addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  at.words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      search();
    }
  });
  at["one-label"].addEventListener("change", () => state.result && search());
  at.threshold.addEventListener("input", () => {
    state.shown = AT_ONCE;
    show();
  });
  at.more.addEventListener("click", () => {
    state.shown += AT_ONCE;
    show();
  });
  at["save-json"].addEventListener("click", saveJson);
  at["save-csv"].addEventListener("click", saveCsv);
  at.close.addEventListener("click", () => at.large.close());
  at.large.addEventListener("click", (event) => {
    if (event.target === at.large) at.large.close();
  });
}

async function search() {
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  at.problem.hidden = true;
  at.search.disabled = true;
  const query = new URLSearchParams({
    words: at.words.value.replace(/\s*\n\s*/g, ", "),
    score_threshold: REQUEST_THRESHOLD,
    one_label: at["one-label"].checked,
    limit: MOST_IMAGES,
  });
  try {
    const response = await fetch(`api/search?${query}`, { signal: request.signal });
    if (!response.ok) throw await errorOf(response);
    const result = await response.json();
    if (state.request !== request) return;
    for (const image of result.images) {
      const colours = instanceColours(image.detections.map((item) => item.box_xyxy));
      image.detections.forEach((item, index) => {
        item.colour = colours[index];
      });
    }
    state.result = result;
    state.shown = AT_ONCE;
    at.results.hidden = false;
    show();
  } catch (error) {
    if (error.name === "AbortError" || state.request !== request) return;
    state.result = null;
    at.results.hidden = at.more.hidden = true;
    at.grid.replaceChildren();
    showProblem(at, error);
  } finally {
    if (state.request === request) at.search.disabled = false;
  }
}

/** Images with what is above the slider. */
function found() {
  const threshold = Number(at.threshold.value);
  return state.result.images
    .map((image) => ({ ...image, detections: image.detections.filter(({ score }) => score > threshold) }))
    .filter(({ detections }) => detections.length);
}

function show() {
  const images = found();
  const threshold = Number(at.threshold.value).toFixed(2);
  at["threshold-value"].textContent = threshold;
  const count = images.reduce((sum, { detections }) => sum + detections.length, 0);
  const most = state.result.images.length === MOST_IMAGES ? ` (the best ${MOST_IMAGES} were searched for)` : "";
  const searched = `${state.result.searched.regions.toLocaleString("en")} regions in ${(1000 * state.result.seconds).toFixed(0)} ms`;
  at.summary.textContent = `${images.length ? `${count} detections in ${images.length} images${most}.` : "Nothing was found above this score."} ${searched}.`;
  at.threshold.setAttribute("aria-valuetext", `${threshold}, ${images.length} images shown`);
  at.grid.replaceChildren(...images.slice(0, state.shown).map(entry));
  at.more.hidden = images.length <= state.shown;
}

function nameOf({ file }) {
  return file.split("/").pop();
}

function summaryOf({ detections }, most) {
  const parts = detections.slice(0, most).map(({ label, score }) => `${label} ${score.toFixed(2)}`);
  return parts.join(", ") + (detections.length > most ? ` and ${detections.length - most} more` : "");
}

function entry(image) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.append(framed(image, 360), textIn("strong", nameOf(image)), textIn("span", summaryOf(image, 3)));
  button.addEventListener("click", () => open(image));
  item.append(button);
  return item;
}

function textIn(kind, text) {
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}

/** The image with its boxes above it; grey where the file is not there any more. */
function framed({ id, file, width, height, detections }, size) {
  const frame = document.createElement("span");
  frame.className = "frame";
  const image = document.createElement("img");
  Object.assign(image, { src: `images/${id}.jpg?size=${size}`, width, height, alt: file, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => {
    image.remove();
    frame.classList.add("gone");
    frame.append(textIn("em", "The file is not there any more."));
  });
  const boxes = document.createElementNS(SVG, "svg");
  boxes.setAttribute("viewBox", `0 0 ${width} ${height}`);
  boxes.setAttribute("aria-hidden", "true");
  for (const { box_xyxy: [x0, y0, x1, y1], colour } of [...detections].reverse()) {
    const box = document.createElementNS(SVG, "rect");
    const values = { x: x0, y: y0, width: x1 - x0, height: y1 - y0, stroke: css(colour) };
    for (const [name, value] of Object.entries(values)) box.setAttribute(name, value);
    boxes.append(box);
  }
  frame.append(image, boxes);
  return frame;
}

function open(image) {
  at["large-name"].textContent = image.file;
  at["large-frame"].replaceChildren(framed(image, 1600));
  at["large-list"].textContent = summaryOf(image, 40);
  at.large.showModal();
}

function plain() {
  return found().map(({ id, detections, ...image }) => ({ ...image, detections: detections.map(({ colour, ...item }) => item) }));
}

function saveJson() {
  save(new Blob([JSON.stringify({ ...state.result, images: plain() }, null, 2)], { type: "application/json" }), "search.json");
}

/** A cell of the table; a spreadsheet would run text that begins as a formula does. */
function cell(value) {
  const text = /^\s*[=+\-@]/.test(value) && typeof value === "string" ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function saveCsv() {
  const rows = [["file", "label", "score", "x0", "y0", "x1", "y1"]];
  for (const { file, detections } of plain()) rows.push(...detections.map(({ label, score, box_xyxy }) => [file, label, score, ...box_xyxy]));
  save(new Blob([rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("")], { type: "text/csv" }), "search.csv");
}
