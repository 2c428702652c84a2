// Making elements, and little else.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (selector, root = document) => root.querySelector(selector);

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, props, ...children) => filled(document.createElement(tag), props, children);
export const s = (tag, props, ...children) => filled(document.createElementNS(SVG, tag), props, children);

/** Only what is certain is 100 %. */
export function percent(p, digits = 1) {
  const text = (p * 100).toFixed(digits);
  return `${p < 1 && Number(text) === 100 ? (100 - 10 ** -digits).toFixed(digits) : text} %`;
}

export const milliseconds = (seconds) => (seconds < 0.00995 ? `${(seconds * 1e3).toFixed(1)} ms` : seconds < 1 ? `${Math.round(seconds * 1e3)} ms` : `${seconds.toFixed(2)} s`);

/** What a screen reader is told, once nothing has changed for a moment. */
export function announcer(element, wait = 900) {
  let timer = 0;
  return (text) => {
    clearTimeout(timer);
    timer = setTimeout(() => (element.textContent = text), wait);
  };
}

/** Draws again when an element gets another width; gives the width. */
export function onWidth(element, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(element.clientWidth);
    if (width && width !== last) draw((last = width));
  }).observe(element);
}

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** Hues that tell sessions apart; each is readable on both grounds as an area. */
export function hueOf(tag) {
  let hash = 0;
  for (const letter of tag) hash = (hash * 31 + letter.charCodeAt(0)) >>> 0;
  return (hash * 137.508) % 360;
}
