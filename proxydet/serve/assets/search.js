// The search page: class names go to the server, images and boxes come back; the slider filters what came.

import { COLOURS, css, instanceColours } from "./colours.js";
import { counted, errorOf, save, showProblem } from "./common.js";

const REQUEST_THRESHOLD = 0.1;
const MOST_IMAGES = 1000;
const AT_ONCE = 60;
const MOST_LISTED = 40;
// Pixels of the screen that a pointer moves at most in a click.
const CLICK = 5;
const SVG = "http://www.w3.org/2000/svg";

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const state = { result: null, shown: AT_ONCE, request: null, like: null };

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
    searchWords();
  });
  at["like-end"].addEventListener("click", searchWords);
  at.words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      searchWords();
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

function searchWords() {
  state.like = null;
  search();
}

/** Searches for what is in a box of an image of the index. */
function searchLike(image, box) {
  state.like = { image, box };
  at.large.close();
  search();
}

async function search() {
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  at.problem.hidden = true;
  at.search.disabled = true;
  const { like } = state;
  const query = new URLSearchParams({
    ...(like ? { like: like.image.id, box: JSON.stringify(like.box) } : { words: at.words.value.replace(/\s*\n\s*/g, ", ") }),
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
    at.like.hidden = !like;
    if (like) {
      const region = { ...like.image, detections: [{ box_xyxy: result.like.box_xyxy, colour: COLOURS[0] }] };
      at["like-region"].replaceChildren(framed(region, 360));
      at["like-text"].textContent = `More like the region in ${nameOf(result.like)}`;
    }
    show();
  } catch (error) {
    if (error.name === "AbortError" || state.request !== request) return;
    state.result = null;
    at.results.hidden = at.more.hidden = at.like.hidden = true;
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
  at.summary.textContent = `${images.length ? `${counted(count, "detection")} in ${counted(images.length, "image")}${most}.` : "Nothing was found above this score."} ${searched}.`;
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
  const frame = framed(image, 1600);
  drawable(frame.lastChild, image);
  at["large-frame"].replaceChildren(frame);
  at["large-list"].replaceChildren(
    ...image.detections.slice(0, MOST_LISTED).map((item) => {
      const entry = document.createElement("li");
      const button = textIn("button", `${item.label} ${item.score.toFixed(2)}`);
      button.type = "button";
      button.style.borderColor = css(item.colour);
      button.addEventListener("click", () => searchLike(image, item.box_xyxy));
      entry.append(button);
      return entry;
    }),
  );
  at.large.showModal();
}

/** Lets a box be drawn in the boxes of a frame; one that is hardly moved is a click, on the smallest box there. */
function drawable(boxes, image) {
  boxes.classList.add("drawable");
  let begun = null;
  let drawn = null;
  const place = (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(boxes.getScreenCTM().inverse());
    return [Math.max(0, Math.min(x, image.width)), Math.max(0, Math.min(y, image.height))];
  };
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  const boxTo = ([x, y]) => [Math.min(begun.at[0], x), Math.min(begun.at[1], y), Math.max(begun.at[0], x), Math.max(begun.at[1], y)];
  const end = () => {
    drawn?.remove();
    begun = drawn = null;
  };
  boxes.addEventListener("pointerdown", (event) => {
    begun = { at: place(event), screen: [event.clientX, event.clientY] };
    boxes.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  boxes.addEventListener("pointermove", (event) => {
    if (!begun) return;
    drawn ??= boxes.appendChild(document.createElementNS(SVG, "rect"));
    const [x0, y0, x1, y1] = boxTo(place(event));
    for (const [name, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: "drawn" })) drawn.setAttribute(name, value);
  });
  boxes.addEventListener("pointercancel", end);
  boxes.addEventListener("pointerup", (event) => {
    if (!begun) return;
    const box = boxTo(place(event));
    const moved = Math.hypot(event.clientX - begun.screen[0], event.clientY - begun.screen[1]);
    const [x, y] = begun.at;
    end();
    if (moved >= CLICK && box[2] - box[0] >= 1 && box[3] - box[1] >= 1) {
      searchLike(image, box);
      return;
    }
    const hit = image.detections.map((item) => item.box_xyxy).filter(([x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1);
    if (hit.length) searchLike(image, hit.reduce((best, own) => (area(own) < area(best) ? own : best)));
  });
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
