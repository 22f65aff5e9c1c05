// The page for people: takes files in, keeps the session's list, and says which model answers.
import { getKey, setKey } from "./api.js";
import { Card } from "./cards.js";
import { button, loadModel, make, say } from "./parts.js";

const AT_ONCE = 2, MOST_CARDS = 100, AGAIN_MS = 30000;
const $ = id => document.getElementById(id);
const cards = [], waiting = [];
let running = 0, model = null;

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

async function showModel() {
  try {
    model = await loadModel();
    $("name").textContent = model.name;
    document.title = `${model.name}: ask the model`;
    const since = model.since && new Date(model.since);
    $("model").textContent = [
      model.version === null ? "a local bundle" : `version ${model.version}`,
      ...(since && !isNaN(since) ? [`in use since ${since.toLocaleString([], {dateStyle: "medium", timeStyle: "short"})}`] : []),
      `${model.classes.length} classes`,
      model.runtime.engine,
    ].join(" · ");
    $("problem").hidden = !model.problem;
    $("problem").textContent = model.problem ? `A newer model is not in use: ${model.problem}` : "";
    $("key-form").hidden = !$("key-form").contains(document.activeElement);
    $("key-line").hidden = !getKey();
  } catch (problem) {
    $("model").textContent = problem.message;
    if (problem.code === "no_valid_key") askForKey();
  }
}

// A model that is swapped meanwhile may have other classes; the names of an answer's own probabilities are always right.
const getClasses = answer => Object.keys(answer.probabilities).sort((a, b) => a.localeCompare(b, undefined, {numeric: true}));

function workOn() {
  while (running < AT_ONCE && waiting.length) {
    running++;
    waiting.shift().ask().finally(() => { running--; workOn(); });
  }
}

async function add(files) {
  for (const file of files) {
    const card = new Card(file, getClasses, askForKey);
    cards.unshift(card);
    $("answers").prepend(card.node);
    $("session").hidden = false;
    waiting.push(card);
    workOn();
    remember(card, await card.show());
    while (cards.length > MOST_CARDS) drop(cards.pop());
  }
}

function remember(card, thumb) {
  const node = button("", () => { card.node.scrollIntoView({block: "start"}); card.node.focus(); });
  node.setAttribute("aria-label", `Show ${card.name}`);
  node.replaceChildren(thumb ? make("img", undefined, "", {src: thumb.url, alt: ""}) : make("span", card.isVideo ? "▶" : "?"));
  card.thumb = node;
  if (cards.includes(card)) $("history").prepend(node);
}

function drop(card) {
  card.node.remove();
  card.thumb?.remove();
  for (const each of [card.picture, card.film]) if (each) URL.revokeObjectURL(each.src);
}

$("clear").onclick = () => {
  waiting.length = 0;
  cards.splice(0).forEach(drop);
  $("session").hidden = true;
  say("All is forgotten.");
  $("file").focus();
};
for (const id of ["file", "camera"]) $(id).onchange = event => { add([...event.target.files]); event.target.value = ""; };
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) document.addEventListener(kind, event => {
  event.preventDefault();
  $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
  if (kind === "drop") add([...event.dataTransfer.files]);
});
document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  add(files);
});
$("change-key").onclick = askForKey;
$("key-form").onsubmit = event => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key").blur();
  showModel().then(() => {
    waiting.push(...cards.filter(card => card.again));
    workOn();
  });
};
showModel();
setInterval(() => { if (!document.hidden) showModel(); }, AGAIN_MS);
