"use strict";
// Two versions of a table are chosen to be compared: no third one can be.

const form = document.getElementById("compare");
const boxes = [...document.querySelectorAll('input[form="compare"]')];
const button = form.querySelector("button");
const words = form.querySelector("span");
const hint = words.textContent;

function count() {
  const chosen = boxes.filter(box => box.checked);
  for (const box of boxes) box.disabled = chosen.length === 2 && !box.checked;
  button.disabled = chosen.length !== 2;
  words.textContent = chosen.length ? chosen.map(box => box.value).join(" and ") : hint;
  form.classList.toggle("chosen", chosen.length > 0);
}

boxes.forEach(box => box.addEventListener("change", count));
count();
