"use strict";
// Select exactly two versions of the table to compare.

const form = document.getElementById("compare");
const boxes = [...document.querySelectorAll('input[form="compare"]')];
const button = form.querySelector("button");
const label = form.querySelector("span");
const hint = label.textContent;

function showSelection() {
  const chosen = boxes.filter(box => box.checked);
  for (const box of boxes) box.disabled = chosen.length === 2 && !box.checked;
  button.disabled = chosen.length !== 2;
  label.textContent = chosen.length ? chosen.map(box => box.value).join(" and ") : hint;
  form.classList.toggle("chosen", chosen.length > 0);
}

boxes.forEach(box => box.addEventListener("change", showSelection));
showSelection();
