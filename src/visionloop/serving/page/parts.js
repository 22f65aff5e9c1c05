// Small parts that the cards are made of. Text is always text, never markup: class names come from people.
import { getJson, postJson, send } from "./api.js";

const SHOWN = 5, LISTED = 60;

export function make(tag, text, name, more = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return Object.assign(node, more);
}

export function button(text, act, name) {
  const node = make("button", undefined, name, {type: "button", onclick: act});
  node.append(make("bdi", text));
  return node;
}

export const percent = p => p >= .9995 && p < 1 ? "> 99.9 %" : (100 * p).toFixed(1) + " %";

export function say(text) {
  document.getElementById("status").textContent = text;
}

// What the server says of a doubt is exact and short; this is for people.
export function explainDoubt(doubt) {
  const sure = doubt.match(/confidence ([\d.]+) < ([\d.]+)/), parts = [];
  if (sure) parts.push(`It is not sure enough: ${+(100 * sure[1]).toFixed(2)} %, and it answers from ${+(100 * sure[2]).toFixed(2)} % on.`);
  if (doubt.includes("unlike the validation images")) parts.push("This is unlike the images that it was tested with.");
  return parts.join(" ") || doubt;
}

export function drawBars(answer) {
  const chosen = answer.labels ?? [answer.prediction], list = make("ul", undefined, "bars");
  const ranked = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  for (const [name, p] of ranked.filter(([name], place) => place < SHOWN || chosen.includes(name))) {
    const row = make("li", undefined, chosen.includes(name) ? "" : "not"), track = make("span", undefined, "fill"), fill = make("i");
    fill.style.width = 100 * p + "%";
    track.append(fill);
    row.append(make("bdi", name, "", {title: name}), track, make("b", percent(p)));
    list.append(row);
  }
  return list;
}

// A box to find one of many classes. `pick` gets the name, and whether the model knows no such class.
export function drawSearch(classes, pick) {
  const box = make("div"), field = make("input"), found = make("div", undefined, "found");
  Object.assign(field, {type: "search", placeholder: `Search ${classes.length} classes`, dir: "auto", autocomplete: "off", maxLength: 200});
  field.setAttribute("aria-label", "Search the classes");
  const list = () => {
    const text = field.value.trim().toLocaleLowerCase();
    const hits = classes.filter(name => name.toLocaleLowerCase().includes(text));
    found.replaceChildren(...hits.slice(0, LISTED).map(name => button(name, () => pick(name, false))));
    if (hits.length > LISTED) found.append(make("span", `and ${hits.length - LISTED} more: type to find them`, "dim small"));
    if (text && !text.includes("|") && !classes.some(name => name.toLocaleLowerCase() === text)) {
      const typed = field.value.trim();
      found.append(button(`“${typed}”, a class that the model does not know yet`, () => pick(typed, true)));
    }
  };
  field.oninput = list;
  field.onkeydown = event => {
    if (event.key === "ArrowDown") found.querySelector("button")?.focus();
    else if (event.key === "Enter") found.querySelector("button")?.click();
    else return;
    event.preventDefault();
  };
  found.onkeydown = event => {
    const step = {ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling"}[event.key];
    if (!step) return;
    (document.activeElement[step] ?? field).focus();
    event.preventDefault();
  };
  list();
  box.append(field, found);
  box.start = () => field.focus();
  return box;
}

// Asks whether an answer is right, and sends what is. The newest that is sent counts, so undoing is sending again.
export function drawFeedback(answer, classes) {
  const box = make("section", undefined, "ask", {tabIndex: -1}), several = answer.labels != null;
  box.setAttribute("aria-label", "Correct the answer");
  const own = several ? answer.labels : [answer.prediction], sent = [];

  async function submit(labels, isNew) {
    box.querySelectorAll("button").forEach(each => { each.disabled = true; });
    try {
      const what = several ? {labels} : {label: labels[0]};
      await postJson("feedback", {request_id: answer.request_id, ...what, ...(isNew ? {allow_new: true} : {})});
      sent.push({labels, isNew});
      thank(labels);
    } catch (problem) {
      ask();
      box.append(make("p", problem.message, "bad note"));
      say(problem.message);
    }
  }

  function thank(labels) {
    const before = sent.length > 1 ? sent[sent.length - 2] : {labels: own, isNew: false};
    const line = make("p", "Thank you. Noted: ", "good"), name = labels.join(", ") || "no label";
    const kept = document.body.dataset.keepsImages === "yes" ? "" : " The picture itself is not kept, so no model is trained on it.";
    line.append(make("bdi", name), `.${kept}`);
    const tools = make("div", undefined, "chips");
    const back = before.labels.join(", ") || "no label";
    if (back !== name) tools.append(button(`Undo: it is ${back}`, () => submit(before.labels, before.isNew)));
    tools.append(button("Change it", ask));
    box.replaceChildren(line, tools);
    box.focus({preventScroll: true});
    say(`Thank you. Noted: ${name}.${kept}`);
  }

  function ask() {
    const chips = make("div", undefined, "chips");
    if (several) askSeveral(chips); else askOne(chips);
  }

  function askOne(chips) {
    const ranked = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]).map(([name]) => name);
    const others = ranked.filter(name => name !== answer.prediction).slice(0, 4);
    const right = button(answer.abstained ? answer.prediction : "Yes, it is right", () => submit(own, false));
    const search = drawSearch(classes, (name, isNew) => submit([name], isNew));
    search.hidden = true;
    const more = button(classes.length > others.length + 1 ? "Another…" : "Something else…", () => { search.hidden = false; search.start(); });
    chips.append(right, ...others.map(name => button(name, () => submit([name], false))), more);
    box.replaceChildren(make("p", answer.abstained ? "What is it?" : "Is that right? If not, it is:"), chips, search);
  }

  function askSeveral(chips) {
    const chosen = new Set(own), isNew = new Set();
    const toggle = name => {
      const node = button(name, () => {
        chosen.has(name) ? chosen.delete(name) : chosen.add(name);
        node.setAttribute("aria-pressed", chosen.has(name));
      });
      node.setAttribute("aria-pressed", chosen.has(name));
      return node;
    };
    const ranked = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]).map(([name]) => name);
    const shown = [...new Set([...own, ...ranked.slice(0, 6)])];
    const search = drawSearch(classes, (name, unknown) => {
      if (chosen.has(name)) return;
      chosen.add(name);
      if (unknown) isNew.add(name);
      chips.append(toggle(name));
    });
    search.hidden = true;
    const more = button("Another…", () => { search.hidden = false; search.start(); });
    const done = button("Send these labels", () => submit([...chosen], isNew.size > 0), "strong");
    chips.append(...shown.map(toggle));
    const tools = make("div", undefined, "tools");
    tools.append(more, done);
    box.replaceChildren(make("p", "Which labels does it have?"), chips, search, tools);
  }

  ask();
  return box;
}

// The validation images nearest to a picture; with the picture of each where the server has it.
export function drawNeighbours(neighbours) {
  const box = make("section", undefined, "near"), list = make("ul");
  box.append(make("h2", "Images like this that the model was tested with"), list);
  for (const one of neighbours) {
    const item = make("li"), names = one.labels.join(", ") || "no label";
    if (one.image) {
      const picture = make("img", undefined, "", {alt: ""});
      item.append(picture);
      // The address needs the key in a header, so it is fetched, and not left to the browser.
      send(one.image.replace(/^\//, "")).then(answer => answer.blob()).then(blob => { picture.src = URL.createObjectURL(blob); })
        .catch(() => picture.remove());
    }
    item.append(make("bdi", names), make("div", `distance ${one.distance.toFixed(2)}`, "dim"));
    list.append(item);
  }
  return box;
}

export const loadModel = () => getJson("model");
