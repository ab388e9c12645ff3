// The language and the theme of the page about a dataset.
"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const lang = document.getElementById("lang");
const theme = document.getElementById("theme");

function applyTheme() {
  root.dataset.theme = theme.value === "auto" ? (dark.matches ? "dark" : "light") : theme.value;
}

function applyLanguage() {
  root.lang = lang.value;
  for (const each of document.querySelectorAll("[data-lang]")) each.hidden = each.dataset.lang !== lang.value;
  for (const each of document.querySelectorAll("[data-en]")) each.textContent = each.dataset[lang.value];
}

lang.addEventListener("change", applyLanguage);
theme.addEventListener("change", applyTheme);
dark.addEventListener("change", applyTheme);
applyTheme();
