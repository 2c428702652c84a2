// A digit, drawn at ten times its size; what the model reads is that, centred and 28 pixels square, from the top, a row a turn.

import { $, announcer, h, percent, s } from "./dom.js";
import { Session } from "./sessions.js";
import { gone } from "./wire.js";

const SIDE = 28;
const canvas = $("#d-canvas");
const pen = canvas.getContext("2d", { willReadFrequently: true });
let model;
let last = null; // where the pen is
let due = 0;
let busy = false;
let stale = false;
let drawn = false;
let rows = []; // scores after each row
let image = null; // as it was read
let tag = "";
const announce = announcer($("#d-live"));

export async function start(offered) {
  model = offered.name;
  pen.lineCap = pen.lineJoin = "round";
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const here = place(each);
      line(last, here);
      last = here;
    }
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
  addEventListener("keydown", (event) => {
    if ($("#story-draw").hidden || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
    if (/^[0-9]$/.test(event.key)) digit(event.key);
  });
  $("#d-clear").addEventListener("click", clear);
  $("#d-table thead tr").append(...[...Array(10).keys()].map((d) => h("th", { scope: "col", class: "n" }, String(d))));
  $("#d-bars").append(...[...Array(10).keys()].map((d) => h("li", null, h("span", null, String(d)), h("span", { class: "bar" }, h("i")), h("span", { class: "n" }, "–"))));
  clear();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
}

function line([x0, y0], [x1, y1]) {
  pen.strokeStyle = "#000";
  pen.lineWidth = 24;
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1 + 0.01);
  pen.stroke();
  changed();
}

function digit(key) {
  wipe();
  pen.fillStyle = "#000";
  pen.font = "600 220px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(key, 140, 150);
  changed();
}

function wipe() {
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function clear() {
  wipe();
  drawn = false;
  rows = [];
  image = null;
  show();
}

function changed() {
  drawn = true;
  clearTimeout(due);
  due = setTimeout(read, 60);
}

/** The drawing as the model is used to it: 20 pixels at most, its weight in the middle of 28. Greys, 255 ink; null where empty. */
function seen() {
  const { width, height } = canvas;
  const data = pen.getImageData(0, 0, width, height).data;
  const ink = (x, y) => 255 - data[(y * width + x) * 4];
  let left = width, right = -1, top = height, bottom = -1, mass = 0, cx = 0, cy = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const v = ink(x, y);
      if (v < 16) continue;
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
      mass += v; cx += v * x; cy += v * y;
    }
  }
  if (!mass) return null;
  const scale = 20 / Math.max(right - left + 1, bottom - top + 1);
  const small = new OffscreenCanvas(SIDE, SIDE).getContext("2d");
  small.fillStyle = "#fff";
  small.fillRect(0, 0, SIDE, SIDE);
  small.imageSmoothingQuality = "high";
  const x = 14 - (cx / mass) * scale, y = 14 - (cy / mass) * scale;
  small.drawImage(canvas, x, y, width * scale, height * scale);
  const read = small.getImageData(0, 0, SIDE, SIDE).data;
  return [...Array(SIDE).keys()].map((r) => [...Array(SIDE).keys()].map((c) => 255 - read[(r * SIDE + c) * 4]));
}

async function read() {
  if (busy) {
    stale = true;
    return;
  }
  busy = true;
  stale = false;
  const greys = seen();
  if (greys) {
    const session = new Session(model, "draw", "Drawing");
    const found = [];
    session.open().then(() => (tag = session.tag), () => {});
    image = greys;
    try {
      await session.turns({ rows: greys }, (answer) => {
        found.push(answer.scores);
        if (!stale) {
          rows = found;
          show();
        }
      });
    } catch (error) {
      if (!gone(error)) $("#d-facts").textContent = `The server would not: ${error.message}`;
    }
    session.close();
  }
  busy = false;
  if (stale) read();
}

function show() {
  const scores = rows.at(-1);
  const best = scores ? scores.indexOf(Math.max(...scores)) : -1;
  $("#d-best").textContent = scores ? String(best) : "–";
  $("#d-sure").textContent = scores ? percent(scores[best]) : drawn ? "reading" : "nothing drawn yet";
  [...$("#d-bars").children].forEach((item, d) => {
    item.classList.toggle("best", d === best);
    item.children[1].firstChild.style.width = `${(scores?.[d] ?? 0) * 100}%`;
    item.children[2].textContent = scores ? percent(scores[d]) : "–";
  });
  map();
  if (rows.length === SIDE) {
    const settled = rows.findLastIndex((row) => row.indexOf(Math.max(...row)) !== best) + 2;
    $("#d-facts").replaceChildren(h("strong", null, "28 turns"), ` of session `, h("span", { class: "id" }, tag || "…"), `; from row ${settled} on it said ${best}.`);
    announce(`${best}, ${percent(scores[best], 0)}. From row ${settled} on.`);
    $("#d-table tbody").replaceChildren(...rows.map((row, r) => h("tr", null, h("td", null, String(r + 1)), ...row.map((p) => h("td", { class: "n" }, percent(p, 0))))));
  } else if (!rows.length) {
    $("#d-facts").textContent = "";
    $("#d-table tbody").replaceChildren();
  }
}

/** Left what is read, right the scores after each of its rows. */
function map() {
  const unit = 10, gap = 14, wide = 16;
  const W = SIDE * unit + gap + 10 * wide, H = SIDE * unit + 18;
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": rows.length ? `Scores after ${rows.length} rows` : "Nothing read yet" });
  svg.append(s("rect", { x: 0, y: 0, width: SIDE * unit, height: SIDE * unit, rx: 6, fill: "var(--faint)" }));
  image?.forEach((row, r) => {
    if (r >= rows.length) return;
    row.forEach((grey, c) => grey > 8 && svg.append(s("rect", { class: "pixel", x: c * unit, y: r * unit, width: unit - 0.6, height: unit - 0.6, "fill-opacity": (grey / 255).toFixed(2) })));
  });
  for (let d = 0; d < 10; d++) {
    const x = SIDE * unit + gap + d * wide;
    svg.append(s("rect", { x, y: 0, width: wide - 2, height: SIDE * unit, rx: 3, fill: "var(--faint)" }));
    rows.forEach((row, r) => row[d] > 0.02 && svg.append(s("rect", { class: "cell", x, y: r * unit, width: wide - 2, height: unit - 0.6, "fill-opacity": row[d].toFixed(2) })));
    svg.append(s("text", { x: x + wide / 2 - 1, y: H - 3, "text-anchor": "middle" }, String(d)));
  }
  $("#d-rows").replaceChildren(svg);
}
