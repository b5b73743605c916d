"use strict";
// Show a curve's value under the pointer, or at the point that the arrow keys select.

for (const svg of document.querySelectorAll("svg.curve")) {
  const dots = [...svg.querySelectorAll("circle")].sort((a, b) => a.cx.baseVal.value - b.cx.baseVal.value);
  const caption = svg.parentNode.querySelector("figcaption");
  const title = caption.textContent;
  let at = -1;

  const select = index => {
    dots[at]?.classList.remove("on");
    at = index;
    dots[at]?.classList.add("on");
    caption.textContent = at < 0 ? title : `${title}: ${dots[at].querySelector("title").textContent}`;
  };
  svg.addEventListener("pointermove", event => {
    const matrix = svg.getScreenCTM();
    const [x, y] = [(event.clientX - matrix.e) / matrix.a, (event.clientY - matrix.f) / matrix.d];
    const distance = dot => Math.hypot(dot.cx.baseVal.value - x, (dot.cy.baseVal.value - y) / 4);
    select(dots.reduce((best, dot, index) => distance(dot) < distance(dots[best]) ? index : best, 0));
  });
  svg.addEventListener("pointerleave", () => select(-1));
  svg.addEventListener("blur", () => select(-1));
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (event.key === "Escape") select(-1);
    if (!step) return;
    event.preventDefault();
    select(Math.min(Math.max(at + step, 0), dots.length - 1));
  });
}
