// A station's readings play in, an observation a turn. What-ifs are forks: each move of the ring forks the session, tells the fork
// six hours that never were, and shows where it thinks the station is going. The last fork stays, and reads on with the other.

import { $, announcer, calm, h, onWidth, s } from "./dom.js";
import { Session, closeAll } from "./sessions.js";
import { gone, sleep } from "./wire.js";

const READ = 96; // hours that are read at once, in the first turn
const SHOWN = 72; // of the past that the chart shows
const AHEAD = 96;
const STEPS = 6; // hours that a what-if takes

let model;
let channels = [];
let hours = []; // {when, values}
let channel = 6;
let at = 0; // hours that the session has read
let session = null;
let fan = null; // {mean, quantiles} after hour `at`
let playing = false;
let turn = 0; // changes when a new session begins
let inFlight = 0;
let other = null; // the what-if: {session, from, at, told, fan}
let asking = false; // a what-if is on its way
let wish = null; // the newest value wished meanwhile
let width = 700;
let scale = null; // of the chart as it is drawn
let range = null; // of values, which follows slowly
const announce = announcer($("#f-live"));

export async function start(offered) {
  model = offered.name;
  const lines = (await (await fetch("etth1.csv")).text()).trim().split("\n").map((line) => line.trim().split(","));
  channels = lines[0].slice(1);
  hours = lines.slice(1).map(([when, ...values]) => ({ when, values: values.map(Number) }));
  channel = channels.length - 1;
  const names = { OT: "oil temperature", HUFL: "high useful load", HULL: "high useless load", MUFL: "middle useful load", MULL: "middle useless load", LUFL: "low useful load", LULL: "low useless load" };
  $("#f-channel").append(...channels.map((name, i) => h("option", { value: String(i), selected: i === channel }, names[name] ?? name)));
  $("#f-channel").addEventListener("change", (event) => {
    channel = Number(event.target.value);
    $("#f-caption").textContent = `${event.target.selectedOptions[0].textContent[0].toUpperCase()}${event.target.selectedOptions[0].textContent.slice(1)}${channels[channel] === "OT" ? ", °C" : ""}`;
    begin(at); // another channel's forecast of the same past: read it again
  });
  $("#f-play").addEventListener("click", () => play(!playing));
  $("#f-step").addEventListener("click", () => {
    play(false);
    step();
  });
  $("#f-whatif").addEventListener("input", (event) => suppose(Number(event.target.value)));
  $("#f-clear").addEventListener("click", forgetOther);
  const chart = $("#f-chart");
  chart.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".handle")) return;
    event.preventDefault();
    chart.setPointerCapture(event.pointerId);
    const move = (e) => suppose(round(valueAt(e)));
    const end = () => {
      chart.removeEventListener("pointermove", move);
      chart.removeEventListener("pointerup", end);
      chart.removeEventListener("pointercancel", end);
    };
    chart.addEventListener("pointermove", move);
    chart.addEventListener("pointerup", end);
    chart.addEventListener("pointercancel", end);
  });
  onWidth(chart, (w) => {
    width = w;
    draw();
  });
  await begin(READ).catch(() => {});
  if (!calm.matches) play(true);
}

export const leave = () => closeAll([session, other?.session].filter(Boolean));
export const hide = () => play(false);

/** A new session that has read the first `count` hours. */
async function begin(count) {
  const mine = ++turn;
  const was = playing;
  playing = false;
  closeAll([session, other?.session].filter(Boolean));
  other = null;
  range = null;
  inFlight = 0;
  session = new Session(model, "forecast", "Forecaster");
  session.open().then(facts, () => {});
  try {
    await session.turns({ series: [hours.slice(0, count).map((hour) => hour.values)] }, (answer) => mine === turn && arrived(count, answer), { channel });
  } catch (error) {
    if (mine === turn) $("#f-facts").textContent = `The server would not: ${error.message}`;
    return;
  }
  if (was && mine === turn) play(true);
}

function arrived(count, answer) {
  at = count;
  fan = answer;
  draw();
}

async function play(on) {
  if (playing === on) return;
  playing = on;
  $("#f-play").textContent = on ? "Pause" : "Play";
  const mine = turn;
  while (playing && mine === turn && at < hours.length) {
    const began = performance.now();
    await step();
    await sleep(Math.max(0, 1000 / Number($("#f-speed").value) - (performance.now() - began)));
  }
  if (mine === turn && at >= hours.length) {
    playing = false;
    $("#f-play").textContent = "Play";
    $("#f-facts").textContent = "That was all of it. Choose a channel to hear it again.";
  }
}

/** One observation more: a turn of the session, and of the fork that has come as far. */
async function step() {
  if (at + inFlight >= hours.length || inFlight) return;
  const mine = turn;
  inFlight = 1;
  const observation = hours[at].values;
  try {
    const both = [session.turns({ series: [[observation]] }, (answer) => mine === turn && arrived(at + 1, answer), { channel })];
    const fork = other;
    if (fork && fork.at === at) {
      both.push(
        fork.session.turns({ series: [[observation]] }, (answer) => {
          if (other !== fork) return;
          fork.at += 1;
          fork.fan = answer;
          draw();
        }, { channel }),
      );
    }
    await Promise.all(both);
  } catch (error) {
    if (mine === turn) await failed(error);
  } finally {
    if (mine === turn) inFlight = 0;
  }
}

async function failed(error) {
  if (!gone(error)) {
    playing = false;
    $("#f-play").textContent = "Play";
    $("#f-facts").textContent = `The server would not: ${error.message}`;
    return;
  }
  const count = at; // nobody used it for a quarter of an hour: read it all again
  await sleep(300);
  await begin(count);
}

// What if

const round = (value) => Math.round(value * 2) / 2;

function suppose(value) {
  if (!fan) return;
  play(false);
  wish = value;
  $("#f-whatif").value = String(value);
  $("#f-whatif-out").value = value.toFixed(1);
  fork();
}

async function fork() {
  if (asking || wish === null) return;
  asking = true;
  while (inFlight) await sleep(20);
  const value = wish;
  wish = null;
  const mine = turn;
  const before = other?.session;
  const from = at;
  const last = hours[from - 1].values[channel];
  const told = Array.from({ length: STEPS }, (_, i) => {
    const values = [...(hours[from - 24 + i]?.values ?? hours[from - 1].values)];
    values[channel] = last + ((value - last) * (i + 1)) / STEPS;
    return values;
  });
  const made = session.fork("What if");
  try {
    const asked = made.turns({ series: [told] }, (answer) => {
      if (mine !== turn) return;
      other = { session: made, from, at: from + STEPS, told: told.map((values) => values[channel]), fan: answer, value };
      draw();
    }, { channel });
    if (before) closeAll([before]);
    await Promise.all([made.made, asked]);
    if (mine === turn) announce(comparison());
  } catch (error) {
    if (mine === turn && gone(error)) await failed(error);
  } finally {
    asking = false;
  }
  if (mine !== turn) closeAll([made]);
  else fork();
}

function forgetOther() {
  if (other) closeAll([other.session]);
  other = null;
  draw();
}

/** What both say of the same hour, a day from where the fork is. */
function comparison() {
  if (!other || !fan) return "";
  const hour = other.at + 23;
  const one = median(fan)[hour - at];
  const two = median(other.fan)[hour - other.at];
  if (one === undefined || two === undefined) return "";
  return `A day after the what-if: ${one.toFixed(1)} without, ${two.toFixed(1)} with.`;
}

// Drawing

const median = (of) => of.quantiles["0.5"] ?? of.mean;

function draw() {
  if (!fan) return;
  const H = Math.min(380, Math.max(240, width * 0.42)), left = 38, right = 10, top = 12, bottom = 26;
  const first = at - SHOWN;
  const x = (hour) => left + ((width - left - right) * (hour - first)) / (SHOWN + AHEAD);
  const past = hours.slice(Math.max(0, first), at).map((hour) => hour.values[channel]);
  const all = [...past, ...(fan.quantiles["0.1"] ?? fan.mean), ...(fan.quantiles["0.9"] ?? fan.mean)];
  if (other) all.push(...other.told, ...(other.fan.quantiles["0.1"] ?? other.fan.mean), ...(other.fan.quantiles["0.9"] ?? other.fan.mean));
  const low = Math.min(...all), high = Math.max(...all), room = (high - low) * 0.08 || 1;
  if (!range || low < range[0] || high > range[1]) range = [Math.min(low - room, range?.[0] ?? Infinity), Math.max(high + room, range?.[1] ?? -Infinity)];
  else range = [range[0] + (low - room - range[0]) * 0.04, range[1] + (high + room - range[1]) * 0.04];
  const [lo, hi] = range;
  const y = (value) => top + ((hi - value) / (hi - lo)) * (H - top - bottom);
  scale = { H, top, bottom, lo, hi };
  const svg = s("svg", { viewBox: `0 0 ${width} ${H}`, role: "img", "aria-label": `${hours[at - 1].when}: ${past.at(-1).toFixed(1)} observed, ${median(fan)[23].toFixed(1)} expected a day later` });
  const unit = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find((step) => (hi - lo) / step <= 6) ?? 50;
  for (let value = Math.ceil(lo / unit) * unit; value <= hi; value += unit) {
    svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), s("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, String(Math.round(value * 10) / 10)));
  }
  for (let hour = Math.ceil(Math.max(0, first) / 24) * 24; hour < first + SHOWN + AHEAD; hour += 24) {
    svg.append(s("line", { class: "grid", x1: x(hour), x2: x(hour), y1: top, y2: H - bottom }));
    if (x(hour) < width - 50) svg.append(s("text", { x: x(hour) + 4, y: H - 8 }, hours[hour] ? hours[hour].when.slice(5, 10) : ""));
  }
  const fanned = (of, from, kind) => {
    for (const [a, b] of [["0.1", "0.9"], ["0.2", "0.8"], ["0.3", "0.7"], ["0.4", "0.6"]]) {
      const below = of.quantiles[a], above = of.quantiles[b];
      if (!below || !above) continue;
      const points = [...above.map((v, i) => `${x(from + i)},${y(v)}`), ...below.map((v, i) => `${x(from + i)},${y(v)}`).reverse()];
      svg.append(s("polygon", { class: `band ${kind}`, points: points.join(" ") }));
    }
    svg.append(s("polyline", { class: `median ${kind}`, points: median(of).map((v, i) => `${x(from + i)},${y(v)}`).join(" ") }));
  };
  svg.append(s("defs", null, s("clipPath", { id: "f-clip" }, s("rect", { x: left, y: 0, width: Math.max(0, width - left - right), height: H }))));
  fanned(fan, at, "a");
  if (other) {
    const shownFan = { mean: other.fan.mean.slice(0, at + AHEAD - other.at), quantiles: Object.fromEntries(Object.entries(other.fan.quantiles).map(([q, values]) => [q, values.slice(0, at + AHEAD - other.at)])) };
    fanned(shownFan, other.at, "b");
    if (other.from + STEPS > first) {
      const start = hours[other.from - 1].values[channel];
      svg.append(s("polyline", { class: "told", points: [[x(other.from - 1), y(start)], ...other.told.map((v, i) => [x(other.from + i), y(v)])].filter(([px]) => px >= left).join(" ") }));
    }
  }
  svg.append(s("polyline", { class: "observed", points: past.map((v, i) => `${x(Math.max(0, first) + i)},${y(v)}`).join(" ") }));
  svg.append(s("line", { class: "now", x1: x(at - 1), x2: x(at - 1), y1: top, y2: H - bottom }));
  const ring = other && other.from === at ? other.value : median(fan)[STEPS - 1];
  svg.append(s("circle", { class: "handle", cx: x(at + STEPS - 1), cy: y(ring), r: 9 }, s("title", null, "Drag: what if it went here?")));
  $("#f-chart").replaceChildren(svg);
  controls(lo, hi, ring);
  table();
  facts();
}

function valueAt(event) {
  const box = $("#f-chart").getBoundingClientRect();
  const { H, top, bottom, lo, hi } = scale;
  const part = (((event.clientY - box.top) * H) / box.height - top) / (H - top - bottom);
  return Math.min(hi, Math.max(lo, hi - part * (hi - lo)));
}

function controls(lo, hi, ring) {
  const slider = $("#f-whatif");
  slider.disabled = false;
  slider.min = String(Math.floor(lo - (hi - lo) * 0.5));
  slider.max = String(Math.ceil(hi + (hi - lo) * 0.5));
  if (document.activeElement !== slider && !other) {
    slider.value = String(round(ring));
    $("#f-whatif-out").value = ring.toFixed(1);
  }
  $("#f-clear").disabled = $("#f-key").hidden = $("#f-key-text").hidden = !other;
  $("#f-clear").disabled = !other;
}

function table() {
  if (!$("#f-table").closest("details").open) return;
  const heads = ["Hour ahead", "10 %", "Median", "90 %", ...(other ? ["Median, what if"] : [])];
  $("#f-table thead").replaceChildren(h("tr", null, ...heads.map((text) => h("th", { scope: "col", class: "n" }, text))));
  const rows = [1, 3, 6, 12, 24, 36, 48, 72, 96].map((ahead) => {
    const i = ahead - 1;
    const cells = [ahead, fan.quantiles["0.1"]?.[i], median(fan)[i], fan.quantiles["0.9"]?.[i], ...(other ? [median(other.fan)[at + i - other.at]] : [])];
    return h("tr", null, ...cells.map((value, c) => h("td", { class: "n" }, value === undefined ? "–" : c ? value.toFixed(1) : String(value))));
  });
  $("#f-table tbody").replaceChildren(...rows);
}

function facts() {
  if (!at) return;
  const told = [h("strong", null, `Turn ${session.have}`), " of session ", h("span", { class: "id" }, session.tag ?? "…"), `; ${at} hours read, now ${hours[at - 1].when.slice(0, 16)}`];
  if (other) told.push("; the fork ", h("span", { class: "id" }, other.session.tag ?? "…"), ` is at turn ${other.session.have}. ${comparison()}`);
  else told.push(".");
  $("#f-facts").replaceChildren(...told);
}

$("#f-table").closest("details").addEventListener("toggle", () => fan && table());
