// Which story is shown, the theme, and whether the server is there. Stories are loaded when they are first looked at.

import { $ } from "./dom.js";
import { ask, insist, on } from "./wire.js";

const NEEDS = { sentiment: "classify", translator: "translate", forecaster: "forecast", generate: "generate", tag: "tag", draw: "digits", inside: "" };
const stories = new Map(); // name → its module, once loaded
let shown = "";

// Theme

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = $("#theme");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
function themed() {
  theme.setAttribute("aria-pressed", String(isDark()));
  document.dispatchEvent(new Event("themed"));
}
theme.addEventListener("click", () => {
  const chosen = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem("theme", chosen);
  } catch {
    // no storage here: for as long as the page is open, then
  }
  themed();
});
dark.addEventListener("change", themed);
themed();

// The server

const WORDS = { connecting: "connecting", here: "live", away: "reconnecting", lost: "reconnecting" };
const banner = $("#banner");
let hiding = 0;
let showing = 0;
on("status", ({ state, back, seconds }) => {
  $("#status").dataset.state = state;
  $("#status-text").textContent = WORDS[state];
  clearTimeout(hiding);
  clearTimeout(showing);
  if (state === "here") {
    if (back && !banner.hidden) {
      say(`Back after ${seconds.toFixed(1)} s. Sessions go on from where they were.`, true);
      hiding = setTimeout(() => (banner.hidden = true), 5000);
    } else banner.hidden = true;
  } else {
    const text = state === "away" ? "The server is away. What you do is kept, and sent when it is back." : "No connection to the page's own server. What you do is kept.";
    showing = setTimeout(() => say(text, false), document.readyState === "complete" ? 0 : 800);
  }
});
function say(text, back) {
  banner.classList.toggle("back", back);
  $("#banner-text").textContent = text;
  banner.hidden = false;
}

// Stories

async function show() {
  const asked = location.hash.replace(/^#\/?/, "");
  const name = Object.hasOwn(NEEDS, asked) ? asked : "sentiment";
  if (name === shown) return;
  const before = shown;
  shown = name;
  for (const section of document.querySelectorAll(".story")) section.hidden = section.id !== `story-${name}`;
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $(`.tabs a[href="#/${name}"]`).scrollIntoView({ block: "nearest", inline: "nearest" });
  document.title = `${$(`#story-${name} h1`).textContent} – seqserve, live`;
  if (before) {
    stories.get(before)?.hide?.();
    scrollTo(0, 0);
    $("#main").focus({ preventScroll: true });
  }
  if (!stories.has(name)) {
    const story = await import(`./${name}.js`);
    stories.set(name, story);
    const models = await offered;
    const model = NEEDS[name] && models.find((m) => (NEEDS[name] === "digits" ? m.name === "digits" : m.kind === NEEDS[name]));
    if (NEEDS[name] && !model) {
      $(`#story-${name} .lead p`).textContent = "This server serves no model for this story.";
      for (const part of document.querySelectorAll(`#story-${name} > :not(.lead)`)) part.hidden = true;
      return;
    }
    await story.start(model);
    document.documentElement.dataset.ready = name;
    performance.mark(`ready-${name}`);
  }
  if (shown === name) stories.get(name).show?.();
}

const offered = insist(() => ask({ do: "models" }));
addEventListener("hashchange", show);
addEventListener("pagehide", () => stories.forEach((story) => story.leave?.()));
show();
