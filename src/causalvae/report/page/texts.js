// The words of the page in the language that is chosen, and small makers of elements. Text is only ever
// set as text: nothing here or below reads data as HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = { lang: data.lang, smoothing: 0.6, log: false, cut: true, printing: false, hidden: new Set(), range: null };

function text(key, instead) {
  const words = data.texts[state.lang];
  return Object.hasOwn(words, key) ? words[key] : instead === undefined ? key : instead;
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function word(key) {
  const made = element("span", { "data-t": key });
  made.textContent = text(key);
  return made;
}

function translate(root) {
  for (const each of root.querySelectorAll("[data-t]")) each.textContent = text(each.dataset.t, each.textContent);
  for (const each of root.querySelectorAll("[data-t-label]")) each.setAttribute("aria-label", text(each.dataset.tLabel));
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function runColor(run) {
  return color(`run-${(run === null ? 5 : run) % 6}`);
}
