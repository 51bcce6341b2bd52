// Shows one query at a time. Without this script the page shows all of them, one below the other.
"use strict";
(() => {
  const cases = [...document.querySelectorAll(".case")];
  const sounds = [...document.querySelectorAll("audio")];
  const [previous, next, place, keys, steps] = ["previous", "next", "place", "keys", "steps"].map(
    (id) => document.getElementById(id)
  );
  let current = 0;

  function show(number, focus) {
    current = Math.min(Math.max(number, 0), cases.length - 1);
    cases.forEach((section, index) => { section.hidden = index !== current; });
    sounds.forEach((sound) => sound.pause());
    previous.disabled = current === 0;
    next.disabled = current === cases.length - 1;
    place.textContent = `Query ${current + 1} of ${cases.length}`;
    if (focus) cases[current].querySelector("h2").focus({ preventScroll: false });
  }

  // Two sounds at once are none.
  sounds.forEach((sound) => sound.addEventListener("play", () => {
    sounds.forEach((other) => { if (other !== sound) other.pause(); });
  }));
  if (cases.length < 2) return;
  steps.hidden = false;
  document.body.classList.add("stepped");
  previous.addEventListener("click", () => show(current - 1, true));
  next.addEventListener("click", () => show(current + 1, true));
  document.addEventListener("keydown", (event) => {
    if (!keys.checked || event.ctrlKey || event.altKey || event.metaKey) return;
    const step = { n: 1, p: -1 }[event.key.toLowerCase()];
    if (step) show(current + step, true);
  });
  show(0, false);
})();
