// A form that was sent says that it is at work, and is not sent again.
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
  if (event.persisted) location.reload(); // back from another page: what it says may be old
});
