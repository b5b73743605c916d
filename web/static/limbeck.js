"use strict";
// On every page: the switch between dark and light theme. The server reads the cookie, so that pages do not flicker.

const theme = document.querySelector(".theme");
const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
theme.hidden = false;
theme.setAttribute("aria-pressed", isDark());
theme.addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  document.querySelector("meta[name=color-scheme]").content = next;
  document.cookie = `theme=${next}; path=/; max-age=31536000; samesite=lax`;
  theme.setAttribute("aria-pressed", isDark());
});
