// What all pages share: the theme, and which of them this is. A plain script in <head>, so that a chosen theme is there
// before anything is drawn.
"use strict";

const THEMES = ["auto", "light", "dark"];
const THEME_NAMES = { auto: "automatic", light: "light", dark: "dark" };

function storedTheme() {
  try {
    const theme = localStorage.getItem("convmixer-theme");
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto"; // storage is switched off
  }
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (button) {
    button.title = `Theme: ${THEME_NAMES[theme]}`;
    button.setAttribute("aria-label", button.title);
  }
}

useTheme(storedTheme());

document.addEventListener("DOMContentLoaded", () => {
  useTheme(storedTheme());
  document.getElementById("theme").addEventListener("click", () => {
    const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("convmixer-theme", theme);
    } catch {
      // then it holds for this page only
    }
    useTheme(theme);
  });
  for (const link of document.querySelectorAll("nav a")) {
    if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
  }
});
