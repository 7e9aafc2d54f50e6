// The colours that tell the detections of an image apart, chosen as proxydet.visualization.drawing chooses them.

export const COLOURS = [
  [255, 75, 60], [45, 255, 105], [0, 120, 255], [0, 150, 75], [255, 195, 255], [195, 60, 210],
  [240, 180, 0], [0, 210, 225], [165, 150, 225], [165, 120, 45], [255, 120, 255], [210, 240, 165],
  [120, 195, 75], [30, 150, 180], [255, 150, 150], [180, 90, 120], [255, 60, 165], [135, 75, 255],
];

/** One colour for each box, best first: all different while they last, then the one whose nearest bearer is farthest away. */
export function instanceColours(boxes) {
  const centres = boxes.map(([x0, y0, x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2]);
  const chosen = [];
  centres.forEach(([x, y], index) => {
    if (index < COLOURS.length) {
      chosen.push(index);
      return;
    }
    const nearest = COLOURS.map(() => Infinity);
    chosen.forEach((colour, other) => {
      const [dx, dy] = [centres[other][0] - x, centres[other][1] - y];
      nearest[colour] = Math.min(nearest[colour], dx * dx + dy * dy);
    });
    chosen.push(nearest.indexOf(Math.max(...nearest)));
  });
  return chosen.map((index) => COLOURS[index]);
}

export const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

/** Black or white, whichever can be read better on a colour. */
export function textColourOn(colour) {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000" : "#fff";
}
