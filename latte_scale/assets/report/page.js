"use strict";
// Draws the charts from the numbers in #data, and plays videos while they are in sight. Fetches nothing.

const charts = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 210, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

function element(parent, name, attributes = {}, text = "") {
  const made = parent.namespaceURI === SVG || name === "svg"
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return parent.appendChild(made);
}

// ---------------------------------------------------------------------------------------------------------- numbers

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e").replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step + 0);  // not -0
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low), found = [];
  const factors = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
    }
  return found.length >= 2 ? found : niceTicks(low, high, 4).filter((tick) => tick > 0);
}

// The moving average of the values, its start corrected for what it has not seen yet.
function smooth(points, weight) {
  let sum = 0, seen = 0;
  return points.map((point) => {
    sum = weight * sum + (1 - weight) * point[1];
    seen = weight * seen + (1 - weight);
    return [point[0], sum / seen];
  });
}

// ------------------------------------------------------------------------------------------------------------ charts

function path(points, x, y) {
  return points.map((point, i) => `${i ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("");
}

function drawChart(chart, svg, weight) {
  svg.replaceChildren();
  const width = svg.clientWidth, log = chart.log, usable = (value) => !log || value > 0;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const lines = chart.lines.map((line) => {
    const points = line.points.filter((point) => usable(point[1]));
    const bold = chart.smooth && !line.dashed && weight > 0 && points.length > 10;
    return { ...line, points, shown: bold ? smooth(points, weight) : points, bold };
  }).filter((line) => line.points.length);
  if (!lines.length) return null;
  const every = lines.flatMap((line) => line.points);
  const steps = [...every, ...chart.marks].map((point) => point[0]);  // a restart may lie before or after all points
  const values = every.flatMap((point) => point.slice(1)).filter(usable);
  const reduce = (list, pick) => list.reduce((a, b) => pick(a, b));
  const x0 = reduce(steps, Math.min), x1 = Math.max(reduce(steps, Math.max), x0 + 1);
  let y0 = reduce(values, Math.min), y1 = reduce(values, Math.max);
  if (!log) y0 = Math.min(0, y0);
  if (y1 <= y0) [y0, y1] = log ? [y0 / 1.5, y1 * 1.5] : [y0, y0 + 1];
  if (log) [y0, y1] = [y0 * (y0 / y1) ** 0.04, y1 * (y1 / y0) ** 0.04]; else y1 += 0.06 * (y1 - y0);
  const scale = log ? Math.log10 : (value) => value;
  const x = (step) => LEFT + (step - x0) / (x1 - x0) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (scale(value) - scale(y0)) / (scale(y1) - scale(y0)) * (HEIGHT - TOP - BOTTOM);

  for (const tick of log ? logTicks(y0, y1) : niceTicks(y0, y1, 4)) {
    element(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) });
    element(svg, "text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick));
  }
  for (const tick of niceTicks(x0, x1, width < 420 ? 4 : 6).filter(Number.isInteger))
    element(svg, "text", { x: x(tick), y: HEIGHT - 7, "text-anchor": "middle" }, tick.toLocaleString("en"));
  for (const [step, run] of chart.marks) {
    const mark = element(svg, "line", { class: `mark c${run % 6}`, x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM });
    element(mark, "title", {}, `resumed at step ${step}`);
  }
  const family = chart.by_band ? "b" : "c";
  for (const line of lines) {
    const colour = `${family}${line.colour % 6}`;
    if (line.points[0].length > 2 && line.points.every((point) => usable(point[2]))) {
      const back = line.points.map((point) => [point[0], point[3]]).reverse();
      const low = line.points.map((point) => [point[0], point[2]]);
      element(svg, "path", { class: `range ${colour}`, d: `${path([...low, ...back], x, y)}Z` });
    } else if (line.bold) element(svg, "path", { class: `raw ${colour}`, d: path(line.points, x, y) });
    element(svg, "path", { class: `line ${colour}${line.dashed ? " dashed" : ""}`, d: path(line.shown, x, y) });
    if (line.points.length < 12 || line.dashed && line.points.length < 40)
      for (const point of line.points)
        element(svg, "circle", { class: `point ${colour}`, cx: x(point[0]), cy: y(point[1]), r: 2.4 });
  }
  const cross = element(svg, "line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  return { lines, x, x0, x1, width, cross, family };
}

// The point of a line nearest to a step; lines are sorted by step.
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}

function showLegend(legend, drawn, step) {
  legend.replaceChildren();
  for (const line of drawn.lines) {
    const entry = element(legend, "span");
    element(entry, "span", { class: `dot ${drawn.family}${line.colour % 6}` });
    entry.append(`${line.name} `);
    const point = step === null ? line.shown[line.shown.length - 1] : nearest(line.shown, step);
    element(entry, "b", {}, short(point[1]));
  }
  if (step !== null) element(legend, "span", {}, `at step ${Math.round(step).toLocaleString("en")}`);
}

function addChart(chart) {
  const figure = element(document.getElementById("charts"), "figure", { class: "chart" });
  const caption = element(figure, "figcaption");
  element(caption, "span", {}, chart.title);
  if (chart.unit) element(caption, "small", {}, ` ${chart.unit}`);
  const button = element(figure, "button", { type: "button", title: "logarithmic or linear axis" });
  const svg = element(figure, "svg", { role: "img", "aria-label": chart.title });
  const legend = element(figure, "div", { class: "legend" });
  let drawn = null;
  const draw = () => {
    button.textContent = chart.log ? "log" : "linear";
    drawn = drawChart(chart, svg, Number(document.getElementById("smoothing").value));
    if (drawn) showLegend(legend, drawn, null);
  };
  button.addEventListener("click", () => { chart.log = !chart.log; draw(); });
  svg.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const place = (event.clientX - svg.getBoundingClientRect().left - LEFT) / (drawn.width - LEFT - RIGHT);
    const wanted = drawn.x0 + Math.min(1, Math.max(0, place)) * (drawn.x1 - drawn.x0);
    const step = nearest(drawn.lines[0].shown, wanted)[0];
    for (const key of ["x1", "x2"]) drawn.cross.setAttribute(key, drawn.x(step));
    drawn.cross.setAttribute("visibility", "visible");
    showLegend(legend, drawn, step);
  });
  svg.addEventListener("pointerleave", () => {
    if (!drawn) return;
    drawn.cross.setAttribute("visibility", "hidden");
    showLegend(legend, drawn, null);
  });
  let width = 0;
  new ResizeObserver(() => { if (svg.clientWidth !== width) { width = svg.clientWidth; draw(); } }).observe(svg);
  return draw;
}

const draws = charts.map(addChart);
const slider = document.getElementById("smoothing");
slider.addEventListener("input", () => {
  document.getElementById("smoothed").textContent = Number(slider.value).toFixed(2);
  for (const draw of draws) draw();
});

// ------------------------------------------------------------------------------------------------------------ videos

const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const play = (video) => video.play().catch(() => { video.controls = true; });  // a browser may forbid it
const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries)
    if (isIntersecting && !still && !target.dataset.paused) play(target); else target.pause();
});
for (const video of document.querySelectorAll("video")) {
  if (still) video.controls = true;
  const sharpen = () => video.classList.toggle("coarse", video.videoWidth > 0 && video.videoWidth <= 128);
  video.addEventListener("loadedmetadata", sharpen);
  sharpen();  // it may be there already
  video.addEventListener("click", () => {
    if (video.controls) return;
    if (video.paused) { delete video.dataset.paused; play(video); } else { video.dataset.paused = "1"; video.pause(); }
  });
  inSight.observe(video);
}
for (const image of document.querySelectorAll("img"))
  if (image.complete) image.classList.toggle("coarse", image.naturalWidth <= 128);
