// The page: an image and class names go to the server once; the slider filters the response.

import { css, instanceColours } from "./colours.js";
import { counted, errorOf, quoted, save, showProblem } from "./common.js";
import { Drawing } from "./drawing.js";

const REQUEST_THRESHOLD = 0.1;

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const state = { info: null, examples: [], marking: false, corner: null, file: null, bitmap: null, drawing: null, result: null, seconds: 0, alone: null, pinned: null, request: null };

const ready = start();

async function start() {
  connect();
  const began = performance.now();
  const progress = () => {
    at.loading.textContent = `Loading the model… ${Math.round((performance.now() - began) / 1000)} s`;
  };
  const timer = setInterval(progress, 1000);
  progress();
  at.loading.hidden = false;
  try {
    while (!state.info) state.info = await fetchInfo();
    describe(state.info);
  } catch (error) {
    showError(error);
  }
  clearInterval(timer);
  at.loading.hidden = true;
}

/** What the server tells of its model, or null where it is still being loaded after a minute. */
async function fetchInfo() {
  const response = await fetch("api/info");
  if (response.ok) return response.json();
  const error = await errorOf(response);
  if (error.kind === "loading") return null;
  throw error;
}

function describe({ model, version, words, examples }) {
  at.model.textContent = `${model.name} on ${model.device}, version ${version}${model.masks ? "" : ", boxes only"}`;
  at["masks-toggle"].hidden = !model.masks;
  const count = words.default.length;
  const listed = words.default.join(", ");
  at.words.placeholder = listed.length > 64 ? `empty: the ${count} classes that the server was started with` : listed;
  if (words.known) {
    at.known.hidden = false;
    at["known-words"].textContent = words.known.join(", ");
  }
  if (!words.free) at["words-help"].textContent = `Only the default classes: ${words.why_not}`;
  const named = examples.map((example) => example.words).find(Boolean) ?? words.default.slice(0, 2).map(quoted).join(", ");
  at.curl.textContent = `curl -F picture=@photo.jpg -F words=${inShell(named)} ${new URL("api/predict", location.href)}`;
  at.usage.hidden = false;
  at.examples.append(...examples.map(exampleButton));
  at.examples.hidden = !examples.length;
}

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function exampleButton({ address, name, words }) {
  const button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.src = address;
  image.alt = `example: ${name}`;
  button.append(image);
  button.addEventListener("click", async () => {
    try {
      const response = await fetch(address);
      if (!response.ok) throw await errorOf(response);
      if (words) at.words.value = words;
      await take([new File([await response.blob()], /\.\w+$/.test(name) ? name : `${name}.jpg`, { type: "image/jpeg" })]);
    } catch (error) {
      showError(error);
    }
  });
  return button;
}

function connect() {
  for (const button of [at.invitation, at.choose]) button.addEventListener("click", () => at.file.click());
  at.file.addEventListener("change", () => take(at.file.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    at.stage.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) at.stage.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at.stage.classList.remove("over");
    take(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
  at.form.addEventListener("submit", (event) => {
    event.preventDefault();
    detect();
  });
  at.words.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      detect();
    }
  });
  at["one-label"].addEventListener("change", () => state.file && detect());
  at.threshold.addEventListener("input", show);
  at["show-masks"].addEventListener("change", draw);
  at["show-labels"].addEventListener("change", draw);
  at["save-json"].addEventListener("click", saveJson);
  at["save-image"].addEventListener("click", saveImage);
  at.canvas.addEventListener("click", pick);
  at["by-example"].addEventListener("click", byExample);
  for (const [name, handle] of Object.entries({ pointerdown: beginBox, pointermove: dragBox, pointerup: endBox })) at.canvas.addEventListener(name, handle);
  at.canvas.addEventListener("pointercancel", () => setMarking(false));
  document.addEventListener("keydown", (event) => event.key === "Escape" && state.marking && setMarking(false));
  new ResizeObserver(() => draw()).observe(at.stage);
}

async function take(files) {
  const [file] = files;
  at.file.value = "";
  if (!file) return;
  clear();
  at["file-name"].textContent = file.name;
  at.chosen.hidden = false;
  const limit = state.info?.limits.max_upload_bytes;
  if (limit && file.size > limit) {
    showError({ message: `${file.name} is larger than the limit of ${(limit / 2 ** 20).toFixed(0)} MiB`, hint: "Use a smaller copy." });
    return;
  }
  state.file = file;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (state.file !== file) return;
  state.bitmap = bitmap;
  if (bitmap) useDrawing(bitmap, bitmap);
  await detect();
}

/** Forgets image and detections. */
function clear() {
  state.request?.abort();
  state.file = state.bitmap = state.drawing = state.request = null;
  at.invitation.hidden = false;
  at.canvas.hidden = at.working.hidden = at["by-example"].hidden = at["example-help"].hidden = true;
  setMarking(false);
  at.stage.classList.remove("filled");
  hideError();
  clearResult();
}

function clearResult() {
  state.result = state.alone = state.pinned = null;
  at.results.hidden = true;
  draw();
}

function useDrawing(image, { width, height }) {
  state.drawing = new Drawing(image, { width, height });
  at.invitation.hidden = true;
  at.canvas.hidden = at["by-example"].hidden = at["example-help"].hidden = false;
  at.stage.classList.add("filled");
  draw();
}

async function detect() {
  hideError();
  if (!state.file) {
    showError({ message: "No image yet.", hint: "Drop one on the page, paste one, or choose a file." });
    at.invitation.focus();
    return;
  }
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  const body = new FormData();
  body.append("picture", state.file);
  body.append("words", at.words.value.replace(/\s*\n\s*/g, ", "));
  if (at.background.value.trim()) body.append("background", at.background.value);
  body.append("score_threshold", REQUEST_THRESHOLD);
  body.append("one_label", at["one-label"].checked);
  if (state.examples.length) body.append("exemplars", JSON.stringify(exampleClasses()));
  at.working.hidden = false;
  at["working-text"].textContent = state.info ? "Detecting…" : "Waiting for the model…";
  await ready;
  if (state.request !== request) return;
  at["working-text"].textContent = "Detecting…";
  const began = performance.now();
  try {
    const response = await fetch("api/predict", { method: "POST", body, signal: request.signal });
    if (!response.ok) throw await errorOf(response);
    const result = await response.json();
    if (state.request !== request) return;
    state.seconds = (performance.now() - began) / 1000;
    receive(result);
  } catch (error) {
    if (error.name !== "AbortError" && state.request === request) showError(error);
  } finally {
    if (state.request === request) at.working.hidden = true;
  }
}

function receive(result) {
  state.result = result;
  state.alone = state.pinned = null;
  const colours = instanceColours(result.detections.map((item) => item.box_xyxy));
  result.detections.forEach((item, index) => {
    item.colour = colours[index];
  });
  // Detections of formats that the browser cannot show (TIFF) are drawn on grey.
  const { size } = state.drawing ?? {};
  if (!state.bitmap || size.width !== result.width || size.height !== result.height) useDrawing(state.bitmap, result);
  at.results.hidden = false;
  show();
}

/** What is above the slider; of classes with a threshold of their own, what the server found above that. */
function shown() {
  const threshold = Number(at.threshold.value);
  const own = new Set(Object.keys(state.result?.thresholds ?? {}));
  return state.result ? state.result.detections.filter((item) => own.has(item.label) || item.score > threshold) : [];
}

function show() {
  const items = shown();
  const threshold = Number(at.threshold.value).toFixed(2);
  at["threshold-value"].textContent = threshold;
  at.threshold.setAttribute("aria-valuetext", `${threshold}, ${items.length} shown`);
  if (!items.includes(state.pinned)) state.pinned = null;
  state.alone = state.pinned;
  at.list.replaceChildren(...items.map(entry));
  at.summary.textContent = summary(items);
  at.canvas.setAttribute("aria-label", `${state.file.name} with its detections`);
  draw();
}

function summary(items) {
  const counts = new Map();
  for (const { label } of items) counts.set(label, (counts.get(label) ?? 0) + 1);
  const parts = [...counts].slice(0, 6).map(([label, count]) => (count > 1 ? `${count}\u00a0×\u00a0${label}` : label));
  const more = counts.size > 6 ? ` and ${counts.size - 6} more classes` : "";
  const below = state.result.detections.length - items.length;
  const hidden = below ? ` ${below} more below this score.` : "";
  const own = state.result.thresholds ? " Classes with thresholds of their own keep them." : "";
  return `${items.length ? `${counted(items.length, "detection")}: ${parts.join(", ")}${more}.` : "No detections."}${hidden}${own} ${state.seconds.toFixed(1)} s.`;
}

function entry(item) {
  const row = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-pressed", String(item === state.pinned));
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  mark.setAttribute("viewBox", "0 0 14 14");
  mark.setAttribute("aria-hidden", "true");
  const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ width: 14, height: 14, rx: 3, fill: css(item.colour) })) square.setAttribute(name, value);
  mark.append(square);
  button.append(mark, textOf("label", item.label), textOf("score", item.score.toFixed(2)));
  const alone = (value) => () => {
    state.alone = value ?? state.pinned;
    draw();
  };
  for (const name of ["mouseenter", "focus"]) button.addEventListener(name, alone(item));
  for (const name of ["mouseleave", "blur"]) button.addEventListener(name, alone(null));
  button.addEventListener("click", () => pin(state.pinned === item ? null : item));
  row.append(button);
  return row;
}

function textOf(kind, text) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = text;
  return element;
}

function pin(item) {
  state.pinned = state.alone = item;
  const items = shown();
  [...at.list.children].forEach((row, index) => row.firstChild.setAttribute("aria-pressed", String(items[index] === item)));
  draw();
}

function pick(event) {
  if (!state.drawing || state.marking) return;
  const [x, y] = pixelOf(event);
  const under = shown().filter(({ box_xyxy: [x0, y0, x1, y1] }) => x0 <= x && x <= x1 && y0 <= y && y <= y1);
  const area = ({ box_xyxy: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
  const smallest = under.sort((a, b) => area(a) - area(b))[0] ?? null;
  pin(smallest === state.pinned ? null : smallest);
}

// Examples: a box in one image, found in this one and in others. They stay when another image is chosen.

const SMALLEST_BOX = 0.01;

/** Takes the selected detection as an example; where none is selected, the next box that is drawn. */
function byExample() {
  if (state.pinned) addExample(state.pinned.box_xyxy);
  else setMarking(!state.marking);
}

function setMarking(on) {
  state.marking = on;
  state.corner = null;
  at["by-example"].setAttribute("aria-pressed", String(on));
  at.canvas.classList.toggle("marking", on);
  draw();
}

function pixelOf({ clientX, clientY }) {
  const { left, top, width, height } = at.canvas.getBoundingClientRect();
  const { size } = state.drawing;
  const within = (value, most) => Math.max(0, Math.min(value * most, most));
  return [within((clientX - left) / width, size.width), within((clientY - top) / height, size.height)];
}

function beginBox(event) {
  if (!state.marking || !event.isPrimary) return;
  event.preventDefault();
  at.canvas.setPointerCapture(event.pointerId);
  state.corner = pixelOf(event);
}

function boxTo([x, y]) {
  const [x0, y0] = state.corner;
  return [Math.min(x0, x), Math.min(y0, y), Math.max(x0, x), Math.max(y0, y)];
}

function dragBox(event) {
  if (!state.corner || !event.isPrimary) return;
  draw();
  state.drawing.outline(at.canvas, boxTo(pixelOf(event)), at.canvas.clientWidth);
}

async function endBox(event) {
  if (!state.corner || !event.isPrimary) return;
  const box = boxTo(pixelOf(event));
  const { width, height } = state.drawing.size;
  const large = box[2] - box[0] > SMALLEST_BOX * width && box[3] - box[1] > SMALLEST_BOX * height;
  state.corner = null;
  // The click that follows would select a detection.
  setTimeout(() => setMarking(!large));
  if (large) await addExample(box);
}

/** Sends the image and the box, and keeps what the detector sees there. */
async function addExample(box) {
  hideError();
  const { file, drawing } = state;
  const body = new FormData();
  body.append("picture", file);
  body.append("boxes", JSON.stringify([box]));
  at.working.hidden = false;
  at["working-text"].textContent = "Looking at the example…";
  try {
    const response = await fetch("api/embed", { method: "POST", body });
    if (!response.ok) throw await errorOf(response);
    const { regions } = await response.json();
    const taken = new Set(state.examples.map(({ name }) => name));
    let number = 1;
    while (taken.has(`example ${number}`)) number += 1;
    state.examples.push({ name: `example ${number}`, regions, thumbnail: drawing.cut(box) });
    listExamples();
    if (state.file) await detect();
  } catch (error) {
    at.working.hidden = true;
    showError(error);
  }
}

function listExamples() {
  at.shown.hidden = !state.examples.length;
  at.shown.replaceChildren(...state.examples.map(exampleEntry));
}

function exampleEntry(example) {
  const row = document.createElement("li");
  const name = document.createElement("input");
  name.value = example.name;
  name.maxLength = 100;
  name.setAttribute("aria-label", "What the example is called; examples of one name are one class");
  name.addEventListener("change", () => {
    example.name = name.value.trim() || example.name;
    listExamples();
    if (state.file) detect();
  });
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "Remove";
  remove.setAttribute("aria-label", `Remove ${example.name}`);
  remove.addEventListener("click", () => {
    state.examples = state.examples.filter((other) => other !== example);
    listExamples();
    if (state.file) detect();
  });
  row.append(example.thumbnail, name, remove);
  return row;
}

/** The examples as a request takes them: those of one name together. */
function exampleClasses() {
  const classes = new Map();
  for (const { name, regions } of state.examples) classes.set(name, [...(classes.get(name) ?? []), ...regions]);
  return [...classes].map(([name, regions]) => ({ name, regions }));
}

function options(shownWidth) {
  return { masks: at["show-masks"].checked, labels: at["show-labels"].checked, alone: state.alone, shownWidth };
}

function draw() {
  at["by-example"].textContent = state.pinned ? "Find more like this" : "Draw an example";
  if (!state.drawing) return;
  fit();
  state.drawing.draw(at.canvas, shown(), options(at.canvas.clientWidth));
}

/** Small images fill the stage; large ones are bounded by the style sheet. */
function fit() {
  const { width, height } = state.drawing.size;
  const room = Math.min(innerHeight * (innerWidth > 900 ? 0.74 : 0.6), (at.stage.clientWidth * height) / width);
  at.canvas.style.width = `${(room * width) / height}px`;
  at.canvas.style.height = `${room}px`;
}

function saveJson() {
  const content = { ...state.result, detections: shown().map(({ colour, ...item }) => item) };
  save(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }), `${stem()}.json`);
}

function saveImage() {
  const canvas = document.createElement("canvas");
  state.drawing.draw(canvas, shown(), options(Math.min(state.drawing.size.width * state.drawing.scale, 1000)));
  canvas.toBlob((blob) => save(blob, `${stem()}_found.png`), "image/png");
}

function stem() {
  return state.file.name.replace(/\.[^.]*$/, "") || "image";
}

/** Shows what went wrong; what was found before it is gone, since it would be read as the response. */
function showError(error) {
  clearResult();
  showProblem(at, error);
}

function hideError() {
  at.problem.hidden = true;
}
