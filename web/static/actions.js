// A submitted form shows that it is busy and cannot be submitted again.
"use strict";
for (const form of document.querySelectorAll("form[method=post]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) {
      event.preventDefault();
      return;
    }
    form.dataset.sent = "yes";
    const button = event.submitter;
    const busy = form.querySelector(".busy");
    if (busy && button?.dataset.busy) busy.textContent = button.dataset.busy;
    button?.setAttribute("aria-disabled", "true");
  });
}
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload(); // back to this page: its content may be outdated
});
