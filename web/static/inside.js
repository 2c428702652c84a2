// The server at work. Rounds are drawn as they are told of: as wide as they took, as tall as the rows that shared them.

import { $, calm, h, hueOf, milliseconds } from "./dom.js";
import { Session, closeAll, isMine } from "./sessions.js";
import { ask, on, sleep, told, watch } from "./wire.js";

const SPAN = 10; // seconds shown
const LISTED = 40; // rounds in the table
const CHORUS = 12;
const BEAT = 120; // milliseconds between words of the chorus
const REVIEW = "The first hour is slow and I nearly left , but then it becomes wonderful , moving and brilliantly acted , a film to remember .".split(" ");

let stop = null;
let rounds = []; // of the last seconds, oldest first
let newest = []; // for the table
let last = null; // picture
let rates = { turns: 0, rounds: 0 };
let offset = 0; // seconds from the server's clock to ours
let server = "";
let restarts = 0;
let frame = 0;
let missed = 0;
const canvas = $("#i-canvas");
const pen = canvas.getContext("2d");

export async function start() {
  const may = () => ($("#i-kill").hidden = !told.kill);
  on("hello", may);
  may();
  $("#i-kill").addEventListener("click", () => ask({ do: "kill" }).catch(() => {}));
  $("#i-chorus").addEventListener("click", () => (chorus ? silence() : sing()));
  document.addEventListener("themed", colors);
  document.addEventListener("visibilitychange", () => !$("#story-inside").hidden && (document.hidden ? hide() : show())); // nobody looks
  colors();
}

export function show() {
  stop ??= watch(pictured);
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(animate);
}

export function hide() {
  stop?.();
  stop = null;
  cancelAnimationFrame(frame);
}

export const leave = () => closeAll(chorus ?? []);

function pictured({ picture, why }) {
  if (!picture) {
    $("#i-facts").textContent = `No look inside: ${why}`;
    return;
  }
  if (server && picture.server !== server) {
    restarts++;
    rounds = [];
    last = null;
  }
  const here = performance.now() / 1000 - picture.at;
  offset = server === picture.server ? Math.min(offset + 0.002, here) : here; // the quickest one on the way knows best
  server = picture.server;
  if (last) {
    const seconds = Math.max(0.05, picture.at - last.at);
    const count = (p) => p.models.reduce((sum, m) => sum + m.rounds, 0);
    const eased = (old, now) => old + (now - old) * 0.35;
    rates.turns = eased(rates.turns, (picture.sessions.turns - last.sessions.turns) / seconds);
    rates.rounds = eased(rates.rounds, (count(picture) - count(last)) / seconds);
  }
  last = picture;
  missed += picture.missed;
  rounds.push(...picture.rounds);
  const horizon = picture.at - SPAN - 1;
  rounds = rounds.filter((round) => round.began + round.seconds > horizon).slice(-4000);
  newest = [...newest, ...picture.rounds].slice(-LISTED);
  tiles();
  tables();
  if (calm.matches) paint();
}

// Figures

function tiles() {
  const { sessions, models } = last;
  const waiting = models.reduce((sum, m) => sum + m.waiting, 0);
  const busiest = models.filter((m) => m.recent).sort((a, b) => b.recent - a.recent)[0];
  const figures = [
    ["Sessions", String(sessions.memory + sessions.stored), sessions.stored ? `${sessions.stored} of them in the store only` : "all in memory"],
    ["Taken up again", String(sessions.resumed), `${sessions.opened} opened, ${sessions.forked} forked`],
    ["Turns a second", rates.turns < 0.05 ? "0" : rates.turns.toFixed(rates.turns < 10 ? 1 : 0), `${sessions.turns} in all, ${sessions.replayed} answered again`],
    ["Rounds a second", rates.rounds < 0.05 ? "0" : rates.rounds.toFixed(rates.rounds < 10 ? 1 : 0), rates.rounds > 0.05 && rounds.length ? `${mean(rounds.slice(-200)).toFixed(1)} rows each` : "nobody asks"],
    ["In the queue", String(waiting), `${last.workers} workers`],
    ["p50 / p99", busiest ? `${milliseconds(busiest.p50)}` : "–", busiest ? `p99 ${milliseconds(busiest.p99)}, ${busiest.model}` : "last ten seconds"],
  ];
  const list = $("#i-tiles");
  if (list.children.length !== figures.length) list.replaceChildren(...figures.map(([name]) => h("div", null, h("dt", null, name), h("dd", null, h("span"), h("small")))));
  figures.forEach(([, figure, note], i) => {
    const dd = list.children[i].lastChild;
    if (dd.firstChild.textContent !== figure) dd.firstChild.textContent = figure;
    if (dd.lastChild.textContent !== note) dd.lastChild.textContent = note;
  });
  const up = last.at < 90 ? `${last.at.toFixed(0)} s` : `${(last.at / 60).toFixed(0)} min`;
  $("#i-facts").replaceChildren("Server ", h("span", { class: "id" }, server.slice(0, 8)), ` up for ${up}`, restarts ? `; started anew ${restarts === 1 ? "once" : `${restarts} times`} while you watched` : "", missed ? `; ${missed} rounds were not shown` : "", ".");
}

const mean = (of) => of.reduce((sum, round) => sum + round.rows, 0) / of.length;
let drawnAt = 0;

function tables() {
  if (performance.now() - drawnAt < 450) return; // a table that changes faster can't be read
  drawnAt = performance.now();
  $("#i-rounds tbody").replaceChildren(
    ...newest.slice(-14).reverse().map((round) => {
      const who = round.parts.map(([tag, , , , sequence]) => {
        const square = h("i", { class: `${tag ? "" : "plain"} ${tag && isMine(tag) ? "mine" : ""}` });
        square.style.setProperty("--hue", String(hueOf(tag || String(sequence))));
        return square;
      });
      const names = [...new Set(round.parts.map(([tag]) => (tag ? isMine(tag) ?? tag : "")).filter(Boolean))];
      return h("tr", null, h("td", null, round.model), h("td", null, h("span", { class: "squares", "aria-hidden": "true" }, ...who), h("span", { class: "unseen" }, names.length ? names.slice(0, 4).join(", ") : "calls without a session")), h("td", { class: "n" }, String(round.rows)), h("td", { class: "n" }, String(round.steps)), h("td", { class: "n" }, milliseconds(round.seconds)));
    }),
  );
  $("#i-models tbody").replaceChildren(
    ...last.models.map((m) => h("tr", null, h("td", null, m.model), h("td", { class: "n" }, String(m.waiting)), h("td", { class: "n" }, m.recent ? milliseconds(m.p50) : "–"), h("td", { class: "n" }, m.recent ? milliseconds(m.p99) : "–"), h("td", { class: "n" }, String(m.answered)))),
  );
}

// The picture

let ink = {};
function colors() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  ink = { ink: of("--ink"), soft: of("--soft"), line: of("--line"), faint: of("--faint"), ground: of("--ground"), dark: style.colorScheme.includes("dark"), font: `12px ${of("--sans")}` };
  if (last) paint();
}

function animate() {
  if (!calm.matches) paint();
  if (stop) frame = requestAnimationFrame(animate);
}

function paint() {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  if (!width || !last) return;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const names = last.models.map((m) => m.model).filter((name, i, all) => all.indexOf(name) === i);
  const left = width < 560 ? 0 : 92;
  const lane = height / Math.max(1, names.length);
  const now = performance.now() / 1000 - offset - 0.25; // a picture's time behind, so that nothing appears in the middle
  const x = (seconds) => left + ((width - left) * (seconds - (now - SPAN))) / SPAN;
  pen.font = ink.font;
  pen.textBaseline = "middle";
  names.forEach((name, i) => {
    pen.fillStyle = ink.faint;
    pen.fillRect(left, (i + 1) * lane - 1, width - left, 1);
    pen.fillStyle = ink.soft;
    pen.fillText(name, left ? 0 : 4, left ? (i + 0.5) * lane : i * lane + 9);
  });
  for (const round of rounds) {
    const start = x(round.began);
    const end = x(round.began + round.seconds);
    if (end < left || start > width) continue;
    const i = names.indexOf(round.model);
    const tall = Math.min(1, 0.28 + (0.72 * Math.log2(round.rows)) / 6) * (lane - 10);
    const from = Math.max(left, start), wide = Math.max(2.5, end - start);
    const base = (i + 1) * lane - 2;
    pen.fillStyle = `hsl(${(i * 137.5 + 275) % 360} ${ink.dark ? "45% 62%" : "50% 42%"} / .9)`;
    pen.fillRect(from, base - tall, wide, tall);
    if (round.parts.some(([tag]) => tag && isMine(tag))) {
      pen.fillStyle = ink.ink;
      pen.fillRect(from, base - tall - 4, wide, 2.5);
    }
  }
}

// Twelve sessions that read the same review, each at its own pace. Every score must be the same, bit for bit, to the end.

let chorus = null;
let score = { sent: 0, got: 0, twice: 0, differing: 0 };
let expected = [];

async function sing() {
  score = { sent: 0, got: 0, twice: 0, differing: 0 };
  expected = [];
  const mine = (chorus = []);
  $("#i-chorus").textContent = "Stop them";
  $("#i-chorus").setAttribute("aria-pressed", "true");
  for (let i = 0; i < CHORUS; i++) voice(mine, i);
  besides(mine);
}

/** Calls of other kinds, so that the lanes are not all but one empty. Nothing is counted of them. */
async function besides(mine) {
  const offered = new Map((await ask({ do: "models" }).catch(() => [])).map((m) => [m.kind === "tensors" ? m.name : m.kind, m.name]));
  const often = async (kind, pause, call) => {
    while (offered.has(kind) && chorus === mine) {
      await call().catch(() => {});
      await sleep(pause * (0.6 + Math.random() * 0.8));
    }
  };
  const text = "Two dogs play in the snow near a frozen lake.";
  often("translate", 1500, () => ask({ do: "translate", text, beam: 4 }, undefined, false));
  often("generate", 2500, () => ask({ do: "generate", text: "ROMEO:", symbols: 60 }, undefined, false));
  often("tag", 900, () => ask({ do: "tag", text }));
  often("digits", 1100, async () => {
    const session = new Session(offered.get("digits"), "voices", "A digit");
    session.open().catch(() => {});
    const rows = Array.from({ length: 28 }, (_, r) => Array.from({ length: 28 }, (_, c) => (Math.hypot(r - 14, c - 14) < 8 && Math.hypot(r - 14, c - 14) > 5 ? 255 : 0)));
    await session.turns({ rows }, () => {}).finally(() => session.close());
  });
}

async function voice(mine, i) {
  await sleep(i * 60);
  while (chorus === mine) {
    const session = new Session("sentiment", `voice-${i % 6}`, `Voice ${i + 1}`);
    mine[i] = session;
    session.open().catch(() => {});
    const heard = new Set();
    try {
      for (let word = 0; word < REVIEW.length && chorus === mine; word++) {
        score.sent++;
        await session.turns({ texts: [`${REVIEW[word]} `] }, ({ turn, scores }) => {
          if (heard.has(turn)) score.twice++;
          heard.add(turn);
          score.got++;
          const p = scores.positive;
          expected[turn] ??= p;
          if (expected[turn] !== p) score.differing++;
        });
        scored();
        await sleep(BEAT - (performance.now() % BEAT) + Math.random() * 25); // nearly together, as people are who sing
      }
    } catch (error) {
      $("#i-score").textContent = `A session ended: ${error.message}`;
      await sleep(1000);
    }
    session.close();
  }
  scored();
}

let scoredAt = 0;
function scored() {
  if (chorus && performance.now() - scoredAt < 400) return;
  scoredAt = performance.now();
  $("#i-score").textContent = `${score.got} ${chorus ? "" : `of ${score.sent} `}turns answered, ${score.twice} twice, ${score.differing} differing.`;
}

function silence() {
  chorus = null;
  $("#i-chorus").textContent = "Play twelve sessions";
  $("#i-chorus").setAttribute("aria-pressed", "false");
  scored();
}
