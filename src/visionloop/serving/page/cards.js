// A card for each image or video that was asked about.
import { patiently, post } from "./api.js";
import { button, drawBars, drawFeedback, drawNeighbours, explainDoubt, make, percent, say } from "./parts.js";

const THUMB_PX = 640, COLOURS = 8, TINY_PX = 96;

// A small copy for the page: a phone's photo takes 50 MB when it is drawn.
export async function shrink(file) {
  try {
    const whole = await createImageBitmap(file), scale = Math.min(1, THUMB_PX / Math.max(whole.width, whole.height));
    const canvas = make("canvas", undefined, "", {width: Math.max(1, Math.round(whole.width * scale)), height: Math.max(1, Math.round(whole.height * scale))});
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    whole.close();
    const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
    return {url: URL.createObjectURL(blob), isTiny: Math.max(canvas.width, canvas.height) <= TINY_PX};
  } catch {
    return null;  // a format that this browser does not draw; the server may read it all the same
  }
}

function nameModel(model) {
  return `${model.name}, ${model.version === null ? "a local bundle" : "version " + model.version}`
    + (model.engine ? `, ${model.engine}` : "");
}

export class Card {
  constructor(file, getClasses, onKey) {
    Object.assign(this, {file, getClasses, onKey});
    this.isVideo = file.type.startsWith("video/");
    this.node = make("article", undefined, "card panel" + (this.isVideo ? " film" : ""), {tabIndex: -1});
    this.shot = make("div", undefined, "shot");
    this.tools = make("div", undefined, "tools");
    this.text = make("div");
    const left = make("div"), name = file.name || "from the clipboard";
    this.name = name;
    this.node.setAttribute("aria-label", name);
    left.append(this.shot, make("p", undefined, "file dim small"), this.tools);
    left.children[1].append(make("bdi", name));
    this.node.append(left, this.text);
  }

  async show() {
    if (this.isVideo) {
      this.film = make("video", undefined, "", {controls: true, muted: true, playsInline: true, src: URL.createObjectURL(this.file)});
      this.film.onerror = () => this.shot.replaceChildren(make("p", "This browser cannot play it; the answer is below.", "dim"));
      this.shot.append(this.film);
      return null;
    }
    const thumb = await shrink(this.file);
    if (thumb) {
      this.picture = make("img", undefined, thumb.isTiny ? "pixels" : "", {src: thumb.url, alt: this.name});
      this.shot.append(this.picture);
    } else this.shot.append(make("p", "No preview", "dim"));
    return thumb;
  }

  async ask() {
    this.text.replaceChildren(make("p", this.isVideo ? "Looking at the video…" : "Looking at it…", "dim wait"));
    this.tools.replaceChildren();
    try {
      const tell = line => this.text.replaceChildren(make("p", line, "dim wait"));
      const answer = await patiently(() => post(this.isVideo ? "predict/video" : "predict", this.file), tell);
      if (this.isVideo) this.showTimes(answer); else this.showAnswer(answer);
    } catch (problem) {
      this.showProblem(problem);
    }
  }

  showProblem(problem) {
    if (problem.code === "no_valid_key") this.onKey();
    this.text.replaceChildren(make("h3", "No answer"), make("p", problem.message, "bad note"));
    if (problem.detail) this.text.append(make("p", problem.detail, "dim small note"));
    if (!problem.isOfTheFile) this.text.append(button("Try again", () => this.ask()));
    this.again = problem.code === "no_valid_key";
    say(`${this.name}: ${problem.message}`);
  }

  showHead(answer, how = ` ${percent(answer.confidence)}`) {
    const name = (answer.labels ?? [answer.prediction]).join(", ") || "no label", head = make("h3");
    this.text.replaceChildren(head);
    if (answer.abstained) {
      head.textContent = "I don't know";
      const guess = make("p", "At best: ", "note");
      guess.append(make("bdi", name), ` (${percent(answer.confidence)})`);
      this.text.append(make("p", explainDoubt(answer.abstained), "unsure note"), guess);
    } else {
      head.append(make("bdi", name), make("span", how, "dim"));
    }
    say(`${this.name}: ${answer.abstained ? "it does not know. At best " : ""}${name}${answer.abstained ? `, ${percent(answer.confidence)}` : how}`);
  }

  showAnswer(answer) {
    this.showHead(answer);
    this.text.append(drawBars(answer), make("p", nameModel(answer.model), "dim small note"), drawFeedback(answer, this.getClasses(answer)));
    this.tools.append(this.makeHeat(answer), this.makeNear());
  }

  makeHeat(answer) {
    const node = button("Where it looks", async () => {
      if (this.heat) return this.turnHeat(node);
      node.disabled = true;
      await this.aside(async () => {
        const found = await post("explain", this.file);
        this.heat = make("img", undefined, "", {src: `data:${found.heat_map_type};base64,${found.heat_map}`});
        this.heat.alt = `Heat map: the parts of ${this.name} that hold up ${found.label} are red`;
        if (Math.max(...found.image_size) <= TINY_PX) this.heat.className = "pixels";
        this.heatNote = make("p", "Red speaks for ", "dim small note");
        this.heatNote.append(make("bdi", found.label), ", blue against it. As the model sees the picture.");
        this.turnHeat(node);
      });
      node.disabled = false;
    });
    return node;
  }

  turnHeat(node) {
    const isOn = !this.heat.isConnected;
    this.shot.replaceChildren(isOn ? this.heat : this.picture ?? "");
    if (isOn) this.tools.after(this.heatNote); else this.heatNote.remove();
    node.setAttribute("aria-pressed", isOn);
  }

  makeNear() {
    const node = button("Similar images", async () => {
      if (this.near) { this.near.hidden = !this.near.hidden; node.setAttribute("aria-pressed", !this.near.hidden); return; }
      node.disabled = true;
      await this.aside(async () => {
        this.near = drawNeighbours((await post("similar?k=6", this.file)).neighbours);
        this.node.append(this.near);
        node.setAttribute("aria-pressed", true);
      });
      node.disabled = false;
    });
    return node;
  }

  async aside(work) {
    this.note?.remove();
    try {
      await work();
    } catch (problem) {
      this.note = make("p", problem.message, "bad small note");
      this.tools.after(this.note);
      say(problem.message);
    }
  }

  showTimes(answer) {
    const parts = (answer.labels ?? [answer.prediction]).map(name => Math.round(100 * (answer.shares[name] ?? 0)));
    this.showHead(answer, answer.segments.length > 1 ? `, ${parts.join(" and ") || 100} % of the time` : undefined);
    if (!answer.abstained && answer.segments.length > 1) {
      const most = Object.entries(answer.shares).map(([name, share]) => `${name} for ${percent(share)}`).slice(0, 5);
      this.text.append(make("p", `Of the time it shows ${most.join(", ")}.`, "note"));
    }
    const names = Object.keys(answer.shares), track = make("div", undefined, "times"), list = make("ol", undefined, "parts"), hand = make("i");
    const clock = s => `${Math.floor(s / 60)}:${(s % 60).toFixed(s % 1 ? 1 : 0).padStart(s % 1 ? 4 : 2, "0")}`;
    const seek = part => { if (this.film) this.film.currentTime = part.start_s; };
    const colour = part => `var(--c${Math.max(0, names.indexOf((part.labels ?? [part.prediction])[0])) % COLOURS})`;
    for (const part of answer.segments) {
      const name = part.abstained ? "I don't know" : (part.labels ?? [part.prediction]).join(", ") || "no label";
      const block = button(name, () => seek(part), part.abstained ? "doubt" : ""), key = make("span", undefined, "key" + (part.abstained ? " doubt" : ""));
      block.style.left = 100 * part.start_s / answer.duration_s + "%";
      block.style.width = 100 * (part.end_s - part.start_s) / answer.duration_s + "%";
      block.tabIndex = -1;  // the list below says the same
      block.setAttribute("aria-hidden", true);
      if (!part.abstained) block.style.background = key.style.background = colour(part);
      const line = button("", () => seek(part)), item = make("li");
      line.replaceChildren(key, make("span", `${clock(part.start_s)} – ${clock(part.end_s)}`, "dim"), make("bdi", name), make("span", percent(part.confidence), "dim"));
      if (part.abstained) line.title = explainDoubt(part.abstained);
      item.append(line);
      list.append(item);
      track.append(block);
    }
    if (this.film) track.append(hand);
    if (this.film) this.film.ontimeupdate = () => { hand.style.left = 100 * this.film.currentTime / answer.duration_s + "%"; };
    const how = `${answer.num_frames} frames, one every ${answer.every_s} s; a change for less than ${answer.smooth_s} s is taken for a flicker.`;
    this.text.append(track, list, ...answer.notes.map(note => make("p", `The video ${note}.`, "unsure small note")));
    this.text.append(make("p", `${nameModel(answer.model)}. ${how}`, "dim small note"));
  }
}
