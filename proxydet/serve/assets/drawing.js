// Draws an image with its detections: masks, boxes, labels.

import { css, textColourOn } from "./colours.js";

const MASK_OPACITY = 0.36;
const DIMMED = 0.18;

/** Run lengths of COCO's text: 5 bits a character; from the fourth run on differences to the run before the last. */
export function runLengths(counts) {
  const runs = [];
  let value = 0;
  let shift = 0;
  for (let i = 0; i < counts.length; i += 1) {
    const code = counts.charCodeAt(i) - 48;
    value |= (code & 31) << shift;
    shift += 5;
    if (code & 32) continue;
    if (code & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
    value = 0;
    shift = 0;
  }
  return runs;
}

/** A mask as a small canvas in one colour, and where it lies; null for an empty mask. */
export function maskStamp(mask, colour) {
  const [height] = mask.size;
  const strips = foreground(runLengths(mask.counts), height);
  if (!strips.length) return null;
  const left = strips[0].x;
  const right = strips[strips.length - 1].x;
  let top = height;
  let bottom = 0;
  for (const strip of strips) {
    top = Math.min(top, strip.top);
    bottom = Math.max(bottom, strip.bottom);
  }
  const canvas = newCanvas(right - left + 1, bottom - top);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const words = new Uint32Array(pixels.data.buffer);
  const word = (255 << 24) | (colour[2] << 16) | (colour[1] << 8) | colour[0];
  for (const strip of strips) {
    for (let y = strip.top - top; y < strip.bottom - top; y += 1) words[y * canvas.width + strip.x - left] = word;
  }
  context.putImageData(pixels, 0, 0);
  return { canvas, left, top };
}

/** Vertical strips of a mask's foreground, from left to right. */
function foreground(runs, height) {
  const strips = [];
  let position = 0;
  runs.forEach((run, index) => {
    const end = position + run;
    while (index % 2 === 1 && position < end) {
      const x = Math.floor(position / height);
      const stop = Math.min(end, (x + 1) * height);
      strips.push({ x, top: position - x * height, bottom: stop - x * height });
      position = stop;
    }
    position = end;
  });
  return strips;
}

/** Draws one image again and again, remembering its masks. */
export class Drawing {
  /**
   * @param image An image bitmap, or null where the browser cannot show the file.
   * @param size Width and height that the boxes are counted in.
   */
  constructor(image, size) {
    this.image = image;
    this.size = size;
    // Small images are enlarged, so that lines and labels have room.
    this.scale = Math.max(1, Math.min(8, Math.round(720 / Math.min(size.width, size.height)), Math.floor(4096 / Math.max(size.width, size.height))));
    this.stamps = new WeakMap();
  }

  /**
   * @param canvas Where to draw; it is given the image's size.
   * @param items Detections, best first, each with its colour.
   * @param options masks, labels: what to show; alone: the detection to show among dimmed ones, or null; shownWidth:
   *   how wide the canvas is on the screen, in CSS pixels.
   */
  draw(canvas, items, options) {
    const { width, height } = this.size;
    const scale = this.scale;
    if (canvas.width !== width * scale || canvas.height !== height * scale) {
      canvas.width = width * scale;
      canvas.height = height * scale;
    }
    const context = canvas.getContext("2d");
    context.fillStyle = "#8a918f";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.image) context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    const unit = canvas.width / Math.max(options.shownWidth || 800, 200);
    const strength = (item) => (options.alone && options.alone !== item ? DIMMED : 1);
    if (options.masks) this.#masks(context, items, strength, unit);
    for (const item of [...items].reverse()) this.#box(context, item, strength(item), unit);
    if (options.labels) {
      const first = options.alone ? items.filter((item) => item === options.alone) : items;
      placeLabels(context, first, scale, unit, canvas);
    }
  }

  /** Draws the box that the user is drawing. */
  outline(canvas, box, shownWidth) {
    this.#box(canvas.getContext("2d"), { box_xyxy: box, colour: [255, 255, 255] }, 1, canvas.width / Math.max(shownWidth || 800, 200));
  }

  /** A part of the image as a small canvas. */
  cut([x0, y0, x1, y1]) {
    const scale = 48 / Math.max(x1 - x0, y1 - y0);
    const canvas = newCanvas(Math.max(1, Math.round((x1 - x0) * scale)), Math.max(1, Math.round((y1 - y0) * scale)));
    if (this.image) canvas.getContext("2d").drawImage(this.image, x0, y0, x1 - x0, y1 - y0, 0, 0, canvas.width, canvas.height);
    return canvas;
  }

  #masks(context, items, strength, unit) {
    const area = ({ box_xyxy: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
    for (const item of items.filter((entry) => entry.mask).sort((a, b) => area(b) - area(a))) {
      const stamp = this.#stamp(item);
      if (!stamp) continue;
      const scale = this.scale;
      const place = [stamp.left * scale, stamp.top * scale, stamp.canvas.width * scale, stamp.canvas.height * scale];
      context.globalAlpha = MASK_OPACITY * strength(item);
      context.drawImage(stamp.canvas, ...place);
      context.globalAlpha = 0.9 * strength(item);
      const rim = rimOf(stamp.canvas, scale, Math.max(1.5 * unit, 1));
      context.drawImage(rim.canvas, place[0] - rim.margin, place[1] - rim.margin);
      context.globalAlpha = 1;
    }
  }

  #stamp(item) {
    if (!this.stamps.has(item)) this.stamps.set(item, maskStamp(item.mask, item.colour));
    return this.stamps.get(item);
  }

  #box(context, item, strength, unit) {
    const [x0, y0, x1, y1] = item.box_xyxy.map((value) => value * this.scale);
    context.globalAlpha = strength;
    context.lineJoin = "round";
    for (const [colour, line] of [["rgb(0 0 0 / 45%)", 4], [css(item.colour), 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line * unit;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    context.globalAlpha = 1;
  }
}

/** The outline of a mask: the mask moved around, less itself. */
function rimOf(stamp, scale, thickness) {
  const margin = Math.ceil(thickness) + 1;
  const size = [stamp.width * scale, stamp.height * scale];
  const canvas = newCanvas(size[0] + 2 * margin, size[1] + 2 * margin);
  const context = canvas.getContext("2d");
  for (let step = 0; step < 8; step += 1) {
    const angle = (step * Math.PI) / 4;
    context.drawImage(stamp, margin + thickness * Math.cos(angle), margin + thickness * Math.sin(angle), ...size);
  }
  context.globalCompositeOperation = "destination-out";
  context.drawImage(stamp, margin, margin, ...size);
  return { canvas, margin };
}

/** Writes labels: the best has the first choice of place, and lies on top where labels have to overlap. */
function placeLabels(context, items, scale, unit, bounds) {
  const letters = (items.length > 16 ? 11 : 13) * unit;
  context.font = `600 ${letters}px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif`;
  context.textBaseline = "middle";
  const placed = [];
  for (const item of items) {
    const text = `${item.label} ${item.score.toFixed(2)}`;
    const size = { width: Math.min(context.measureText(text).width + 10 * unit, bounds.width), height: letters * 1.45 };
    placed.push({ text, colour: item.colour, ...freePlace(item, size, scale, bounds, placed) });
  }
  for (const { text, colour, x, y, width, height } of placed.reverse()) {
    context.fillStyle = css(colour);
    context.beginPath();
    context.roundRect(x, y, width, height, 3 * unit);
    context.fill();
    context.fillStyle = textColourOn(colour);
    context.fillText(text, x + 5 * unit, y + height / 2 + 0.05 * letters, width - 8 * unit);
  }
}

/** The place at a box's corners that covers least of the labels that are placed already. */
function freePlace(item, { width, height }, scale, bounds, placed) {
  const [x0, y0, x1, y1] = item.box_xyxy.map((value) => value * scale);
  const corners = [[x0, y0 - height], [x0, y0], [x1 - width, y0 - height], [x0, y1], [x0, y1 - height], [x1 - width, y1]];
  const places = corners.map(([x, y]) => ({
    x: Math.max(0, Math.min(x, bounds.width - width)),
    y: Math.max(0, Math.min(y, bounds.height - height)),
    width,
    height,
  }));
  const covered = places.map((place) => placed.reduce((sum, other) => sum + overlap(place, other), 0));
  return places[covered.indexOf(Math.min(...covered))];
}

function overlap(one, other) {
  const width = Math.min(one.x + one.width, other.x + other.width) - Math.max(one.x, other.x);
  const height = Math.min(one.y + one.height, other.y + other.height) - Math.max(one.y, other.y);
  return Math.max(width, 0) * Math.max(height, 0);
}

function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}
