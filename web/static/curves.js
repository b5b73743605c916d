"use strict";
// Curves tell the value beneath the pointer, or at the place that the arrow keys have gone to.

for (const svg of document.querySelectorAll("svg.curve")) {
  const dots = [...svg.querySelectorAll("circle")].sort((a, b) => a.cx.baseVal.value - b.cx.baseVal.value);
  const caption = svg.parentNode.querySelector("figcaption");
  const title = caption.textContent;
  let at = -1;

  const tell = place => {
    dots[at]?.classList.remove("on");
    at = place;
    dots[at]?.classList.add("on");
    caption.textContent = at < 0 ? title : `${title}: ${dots[at].querySelector("title").textContent}`;
  };
  svg.addEventListener("pointermove", event => {
    const matrix = svg.getScreenCTM();
    const [x, y] = [(event.clientX - matrix.e) / matrix.a, (event.clientY - matrix.f) / matrix.d];
    const far = dot => Math.hypot(dot.cx.baseVal.value - x, (dot.cy.baseVal.value - y) / 4);
    tell(dots.reduce((best, dot, place) => far(dot) < far(dots[best]) ? place : best, 0));
  });
  svg.addEventListener("pointerleave", () => tell(-1));
  svg.addEventListener("blur", () => tell(-1));
  svg.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (event.key === "Escape") tell(-1);
    if (!step) return;
    event.preventDefault();
    tell(Math.min(Math.max(at + step, 0), dots.length - 1));
  });
}
