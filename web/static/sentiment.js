// A review, word by word: a turn each, so a word's number is its turn. At every fourth word a fork is left behind, and who goes
// back to a word goes on from a fork of the fork before it, after at most three words are read again.

import { $, announcer, h, onWidth, percent, s } from "./dom.js";
import { Session, closeAll } from "./sessions.js";
import { gone, insist, sleep } from "./wire.js";

const EVERY = 4; // words between forks that are left behind
const MOST = 120; // words
const GHOSTS = 4; // ways not taken that are still drawn

let model;
let session; // of the words there are
let words = []; // {text, p: probability of positive once it is answered}
let forks = new Map(); // word → the session that stopped there
let ghosts = []; // {from, ps}
let at = 0; // changes when somebody goes back or starts anew: answers of before are let go
let again = 0; // words that were read again from a fork
let same = null; // whether these gave the very same scores
let reading = 0; // which reading aloud goes on
let width = 600;
const input = $("#s-input");
const announce = announcer($("#s-live"));

export async function start(offered) {
  model = offered.name;
  $("#s-form").addEventListener("submit", (event) => {
    event.preventDefault();
    stopReading();
    take(true);
  });
  input.addEventListener("input", () => {
    stopReading();
    if (/\s/.test(input.value)) take(false);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Backspace" && !input.value && words.length) {
      event.preventDefault();
      stopReading();
      const last = words.at(-1).text;
      back(words.length - 1);
      input.value = last;
    }
  });
  $("#s-new").addEventListener("click", () => {
    stopReading();
    anew();
    input.focus();
  });
  for (const button of document.querySelectorAll("[data-review]")) button.addEventListener("click", () => readOut(button.dataset.review.split(" ")));
  onWidth($("#s-chart"), (w) => {
    width = w;
    chart();
  });
  anew();
}

export const leave = () => closeAll([session, ...forks.values()]);
export const hide = stopReading;

/** What was typed; the last word too where it is `whole`. */
function take(whole) {
  const parts = input.value.split(/\s+/);
  const rest = whole ? "" : parts.pop();
  input.value = rest;
  const taken = parts.filter(Boolean);
  if (taken.length) read(taken);
}

function anew() {
  closeAll([session, ...forks.values()].filter(Boolean));
  at++;
  words = [];
  forks = new Map();
  ghosts = [];
  again = 0;
  same = null;
  session = new Session(model, "sentiment", "Sentiment");
  begin(session);
  draw();
}

function begin(opened) {
  opened.open().then(facts, () => {}); // turns tell of it
}

/** Read more words. */
function read(more) {
  const room = more.slice(0, MOST - words.length);
  for (const text of room) {
    const word = { text, p: null };
    words.push(word);
    const place = words.length;
    const now = at;
    const reader = session;
    reader.turns({ texts: [`${text} `] }, (answer) => now === at && answered(word, answer)).catch((error) => now === at && failed(error));
    if (place % EVERY === 0) {
      const fork = reader.fork("Sentiment, left behind");
      forks.set(place, fork);
      fork.made.catch(() => forks.get(place) === fork && forks.delete(place));
    }
  }
  if (room.length < more.length) $("#s-facts").textContent = `A review of ${MOST} words is long enough: go back to a word, or start anew.`;
  draw();
}

function answered(word, answer) {
  word.p = answer.scores.positive ?? Object.values(answer.scores).at(-1);
  draw();
}

/** The session has ended (nobody used it for a quarter of an hour), or the server lost it: read it all again. */
async function failed(error) {
  const now = ++at;
  if (!gone(error)) {
    $("#s-facts").textContent = `The server would not: ${error.message}`;
    return;
  }
  forks = new Map();
  const texts = words.map((word) => word.text);
  words = [];
  session = new Session(model, "sentiment", "Sentiment");
  begin(session);
  await sleep(300);
  if (now === at) read(texts);
}

/** Go back to after word `place`, counted from 1, and be there in a session of its own. */
function back(place) {
  const now = ++at;
  const left = words.slice(place);
  if (left.length && left.every((word) => word.p !== null)) {
    ghosts = [...ghosts, { from: place, ps: [...(place ? [words[place - 1].p] : []), ...left.map((word) => word.p)] }].slice(-GHOSTS);
  }
  words = words.slice(0, place);
  const nearest = Math.max(0, ...[...forks.keys()].filter((word) => word <= place));
  const dropped = [session];
  for (const [word, fork] of forks) {
    if (word > place) {
      dropped.push(fork);
      forks.delete(word);
    }
  }
  if (nearest) {
    session = forks.get(nearest).fork("Sentiment");
    session.made.then(facts, (error) => now === at && failed(error));
  } else {
    session = new Session(model, "sentiment", "Sentiment");
    begin(session);
  }
  closeAll(dropped);
  again = place - nearest;
  same = null;
  if (again) {
    const between = words.slice(nearest);
    same = true;
    session
      .turns({ texts: between.map((word) => `${word.text} `) }, (answer) => {
        if (now !== at) return;
        const word = words[answer.turn - 1];
        const p = answer.scores.positive ?? Object.values(answer.scores).at(-1);
        same &&= word.p === null || word.p === p;
        word.p = p;
        draw();
      })
      .catch((error) => now === at && failed(error));
  }
  draw();
  announce(place ? `Back at word ${place}, ${words[place - 1].text}.` : "Back at the beginning.");
}

async function readOut(texts) {
  anew();
  const mine = ++reading;
  for (const text of texts) {
    if (mine !== reading) return;
    read([text]);
    await sleep(240);
  }
}

function stopReading() {
  reading++;
}

// Drawing

function draw() {
  const known = words.filter((word) => word.p !== null);
  const p = known.at(-1)?.p;
  const figure = $("#s-score");
  if (p === undefined) {
    figure.textContent = "–";
    figure.className = "figure";
    $("#s-label").textContent = "nothing read yet";
  } else {
    const positive = p >= 0.5;
    figure.textContent = percent(positive ? p : 1 - p);
    figure.className = `figure ${positive ? "for" : "against"}`;
    $("#s-label").textContent = positive ? "positive" : "negative";
    announce(`${positive ? "Positive" : "Negative"}, ${percent(positive ? p : 1 - p, 0)}, after ${known.length} words.`);
  }
  $("#s-needle").style.left = `${(p ?? 0.5) * 100}%`;
  ribbon();
  chart();
  table();
  facts();
}

function ribbon() {
  const list = $("#s-words");
  while (list.children.length > words.length) list.lastChild.remove();
  words.forEach((word, i) => {
    let item = list.children[i];
    if (!item) {
      const button = h("button", { type: "button", onclick: () => { stopReading(); back(i + 1); input.focus(); } });
      list.append((item = h("li", null, button)));
    }
    const button = item.firstChild;
    if (button.textContent !== word.text) button.textContent = word.text;
    const before = i ? words[i - 1].p : 0.5;
    item.className = word.p === null ? "waiting" : "";
    if (word.p === null || before === null) {
      button.style.borderBottomColor = "transparent";
      return;
    }
    const change = word.p - before;
    const color = change >= 0 ? "var(--for)" : "var(--against)";
    button.style.borderBottomColor = `color-mix(in srgb, ${color} ${Math.min(100, Math.abs(change) * 260)}%, transparent)`;
    button.title = `turn ${i + 1}: ${percent(word.p)} positive (${change >= 0 ? "+" : "−"}${percent(Math.abs(change))})`;
  });
}

function chart() {
  const H = 200, left = 48, right = 12, top = 10, bottom = 26;
  const longest = Math.max(12, words.length + 1, ...ghosts.map((ghost) => ghost.from + ghost.ps.length));
  const x = (i) => left + ((width - left - right) * i) / longest;
  const y = (p) => top + (1 - p) * (H - top - bottom);
  const svg = s("svg", { viewBox: `0 0 ${width} ${H}`, role: "img", "aria-label": spoken() });
  for (const [p, text] of [[1, "100 %"], [0.5, "50 %"], [0, "0 %"]]) {
    svg.append(s("line", { class: p === 0.5 ? "axis" : "grid", x1: left, x2: width - right, y1: y(p), y2: y(p) }));
    svg.append(s("text", { x: left - 8, y: y(p) + 4, "text-anchor": "end" }, text));
  }
  for (const ghost of ghosts) {
    const first = ghost.from ? ghost.from : 1;
    svg.append(s("polyline", { class: "ghost", points: ghost.ps.map((p, i) => `${x(first + i)},${y(p)}`).join(" ") }));
  }
  const known = words.filter((word) => word.p !== null);
  if (known.length) {
    svg.append(s("polyline", { class: "curve", points: [[x(0), y(0.5)], ...known.map((word, i) => [x(i + 1), y(word.p)])].join(" ") }));
    known.forEach((word, i) => {
      svg.append(s("circle", { class: `point ${word.p >= 0.5 ? "for" : "against"}`, cx: x(i + 1), cy: y(word.p), r: i + 1 === known.length ? 6 : 4 }, s("title", null, `${word.text}: ${percent(word.p)}`)));
    });
  }
  const gap = Math.ceil((longest * 62) / (width - left - right));
  let last = 0;
  known.forEach((word, i) => {
    if (i + 1 < last + gap && i) return;
    last = i + 1;
    svg.append(s("text", { x: x(i + 1), y: H - 6, "text-anchor": "middle" }, word.text.length > 9 ? `${word.text.slice(0, 8)}…` : word.text));
  });
  $("#s-chart").replaceChildren(svg);
}

function spoken() {
  const known = words.filter((word) => word.p !== null);
  return known.length ? `Curve over ${known.length} words, now ${percent(known.at(-1).p)} positive` : "Nothing read yet";
}

function table() {
  const body = $("#s-table tbody");
  body.replaceChildren(...words.map((word, i) => h("tr", null, h("td", null, String(i + 1)), h("td", null, word.text), h("td", null, word.p === null ? "…" : percent(word.p, 2)))));
}

function facts() {
  const told = [h("strong", null, `Turn ${session.have}`), ` of session `, h("span", { class: "id" }, session.tag ?? "…"), `; ${forks.size} ${forks.size === 1 ? "fork" : "forks"} left behind`];
  if (again && same !== null) told.push(`; ${again} ${again === 1 ? "word" : "words"} read again from the last of them, ${same ? "to the very same scores" : "to OTHER scores"}`);
  $("#s-facts").replaceChildren(...told, ".");
}
