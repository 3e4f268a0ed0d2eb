// The review page at work: boxes drawn with the mouse, frames, brightness, keys.
"use strict";

const IDLE_MS = 30 * 60 * 1000;
const SVG = "http://www.w3.org/2000/svg";
const LIGHTS = [["", "as it is"], ["brighter", "raised"], ["inverted", "inverted"], ["both", "raised, inverted"]];

const blank = document.getElementById("blank");
const found = document.getElementById("found");
const frames = [...document.querySelectorAll(".pair")];
const tool = (name) => document.querySelector(`[data-tool="${name}"]`);

function boxes() {
  const lines = blank.value.split("\n").map((line) => line.split(",").map((part) => part.trim()));
  return lines
    .filter((parts) => parts.length === 4 && parts.every((part) => /^\d{1,9}$/.test(part)))
    .map((parts) => parts.map(Number))
    .filter(([top, left, bottom, right]) => top < bottom && left < right);
}

function rectangle([top, left, bottom, right]) {
  const drawn = document.createElementNS(SVG, "rect");
  const sides = { x: left, y: top, width: right - left, height: bottom - top };
  for (const [name, value] of Object.entries(sides)) drawn.setAttribute(name, value);
  return drawn;
}

function redraw() {
  for (const group of document.querySelectorAll("g.drawn")) {
    group.replaceChildren(...boxes().map(rectangle));
  }
  document.body.classList.toggle("leave", !found.checked);
  for (const image of document.querySelectorAll(".after image")) {
    image.setAttribute("href", found.checked ? image.dataset.after : image.dataset.before);
  }
}

// Where the pointer is, in rows and columns of the frame.
function place(svg, event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const { width, height } = svg.viewBox.baseVal;
  return [Math.min(Math.max(at.y, 0), height), Math.min(Math.max(at.x, 0), width)];
}

function drawing(svg) {
  let start = null;
  let shown = null;
  const sides = (event) => {
    const end = place(svg, event);
    const low = [0, 1].map((axis) => Math.floor(Math.min(start[axis], end[axis])));
    const high = [0, 1].map((axis) => Math.ceil(Math.max(start[axis], end[axis])));
    return [...low, ...high];
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    svg.setPointerCapture(event.pointerId);
    start = place(svg, event);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!start) return;
    shown?.remove();
    shown = rectangle(sides(event));
    svg.querySelector("g.drawn").append(shown);
  });
  const end = (event) => {
    if (!start) return;
    const box = sides(event);
    start = null;
    shown?.remove();
    shown = null;
    if (event.type === "pointercancel" || box[2] - box[0] < 3 || box[3] - box[1] < 3) return;
    blank.value = [...blank.value.split("\n").filter((line) => line.trim()), box.join(",")].join("\n");
    redraw();
  };
  svg.addEventListener("pointerup", end);
  svg.addEventListener("pointercancel", end);
}

function showFrame(number) {
  frames.forEach((frame, place) => { frame.hidden = place !== number; });
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.show) === number));
  }
}

function step(by) {
  const now = frames.findIndex((frame) => !frame.hidden);
  showFrame(Math.min(Math.max(now + by, 0), frames.length - 1));
}

const TOOLS = {
  light(button) {
    const now = LIGHTS.findIndex(([name]) => name && document.body.classList.contains(name));
    const [next, words] = LIGHTS[(Math.max(now, 0) + 1) % LIGHTS.length];
    for (const [name] of LIGHTS) if (name) document.body.classList.remove(name);
    if (next) document.body.classList.add(next);
    button.textContent = `brightness: ${words}`;
  },
  wide(button) {
    button.setAttribute("aria-pressed", String(document.body.classList.toggle("wide")));
  },
  boxes(button) {
    button.setAttribute("aria-pressed", String(!document.body.classList.toggle("noboxes")));
  },
  undo() {
    blank.value = blank.value.split("\n").filter((line) => line.trim()).slice(0, -1).join("\n");
    redraw();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") document.activeElement?.blur();
  if (event.target.closest("textarea, input:not([type=checkbox])")) return;
  if (event.key === "[" || event.key === "]") step(event.key === "[" ? -1 : 1);
  if (event.key === "Enter" && document.activeElement === document.body) {
    document.querySelector("[data-first]")?.click();
  }
  const named = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (!named) return;
  event.preventDefault();
  // A decision takes a second key: the button is only walked to.
  if (named.name === "verdict") named.focus();
  else named.click();
});

if (blank) {
  blank.addEventListener("input", redraw);
  found.addEventListener("change", redraw);
  document.querySelectorAll("svg.before").forEach(drawing);
  for (const name of Object.keys(TOOLS)) {
    tool(name)?.addEventListener("click", (event) => TOOLS[name](event.currentTarget));
  }
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => showFrame(Number(button.dataset.show)));
  }
  document.querySelector("button.reject")?.addEventListener("click", () => {
    document.getElementById("because").required = true;
  });
  document.querySelector("button.release")?.addEventListener("click", () => {
    document.getElementById("because").required = false;
  });
  if (frames.length) showFrame(0);
  redraw();
}

// Nobody there: the pictures go, as the service does.
let timer;
function awake() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const words = document.createElement("p");
    words.className = "gone";
    words.textContent = "Nobody was here for half an hour: the review is closed.";
    document.body.replaceChildren(words);
  }, IDLE_MS);
}
for (const name of ["pointermove", "keydown", "scroll"]) addEventListener(name, awake, { passive: true });
awake();
