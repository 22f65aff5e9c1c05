"use strict";
// Asks for the changing part every few seconds, and puts it in place of the old one. The text comes escaped.
const EVERY_MS = 4000;
const main = document.querySelector("main");
const lost = document.querySelector("#lost");
let shown = "";

async function refresh() {
  try {
    const answer = await fetch("/part", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status);
    const text = await answer.text();
    if (text !== shown) {
      const focused = document.activeElement && document.activeElement.id;
      const open = [...main.querySelectorAll("details[open]")].map((one) => one.id);
      main.innerHTML = shown = text;
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    }
    lost.hidden = true;
  } catch {
    lost.hidden = false;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.text);
  button.textContent = "copied";
});
setInterval(() => document.hidden || refresh(), EVERY_MS);
document.addEventListener("visibilitychange", () => document.hidden || refresh());
