// Asks the server, and says in plain words what went wrong. The key stays in this tab's sessionStorage.
const KEY = "visionloop-key", RETRIES = 4, MOST_WAIT_S = 30;

const WORDS = {
  not_an_image: "This is not an image that the model reads.",
  not_a_video: "This is not a video that the server reads.",
  no_video: "There is no picture in this video.",
  no_reader: "This server reads no videos.",
  damaged: "The file is damaged, or was not copied to its end.",
  too_large: "The picture has too many pixels for this server. Send a smaller one.",
  body_too_large: "The file is too large for this server.",
  empty: "The file is empty.",
  busy: "The server is busy.",
  deadline: "The server is busy: there was no answer in time.",
  not_ready: "The model is not ready.",
  stopping: "The server is being stopped. Another one may answer.",
  too_many: "You have asked more often than you may.",
  no_key: "This server asks for a key.",
  no_valid_key: "This server asks for a key, and this one is not valid.",
  not_allowed: "Your key is not allowed to do this.",
  no_log: "This server keeps no corrections.",
  no_reference: "This model does not say which images it was judged with.",
  store_away: "The correction could not be stored now.",
  unreachable: "The server cannot be reached.",
};
const OF_THE_FILE = ["not_an_image", "not_a_video", "no_video", "no_reader", "damaged", "too_large", "body_too_large", "empty"];
const PASSING = ["busy", "deadline", "not_ready", "stopping", "too_many", "store_away", "no_room"];

export class Problem extends Error {
  constructor(code, detail, waitS) {
    super(WORDS[code === "no_valid_key" && !getKey() ? "no_key" : code] || detail);
    this.code = code;
    this.detail = WORDS[code] ? detail.replace(/^(image|video): /, "") : "";
    this.isOfTheFile = OF_THE_FILE.includes(code); // the same again gets the same answer
    this.waitS = waitS;
    this.passes = PASSING.includes(code);
  }
}

export const getKey = () => sessionStorage.getItem(KEY) || "";
export const setKey = key => key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY);

export async function send(address, options = {}) {
  const key = getKey(), headers = {...options.headers, ...(key ? {"X-API-Key": key} : {})};
  let response;
  try {
    response = await fetch(address, {...options, headers});
  } catch (error) {
    throw new Problem("unreachable", String(error.message || error));
  }
  if (response.ok) return response;
  const text = await response.text();
  let body = {};
  try { body = JSON.parse(text); } catch { /* a proxy's page */ }
  if (response.status === 413) body.code ||= "body_too_large";
  const waitS = Number(response.headers.get("Retry-After")) || 1;
  throw new Problem(body.code || "unknown", body.detail || `The server answers ${response.status}.`, waitS);
}

export const getJson = async (address, options) => (await send(address, options)).json();

export const post = (address, file) =>
  getJson(address, {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}});

export const postJson = (address, value) =>
  getJson(address, {method: "POST", body: JSON.stringify(value), headers: {"Content-Type": "application/json"}});

// Ask again while the server is busy, as often as it makes sense; `tell` hears how long each wait is.
export async function patiently(ask, tell) {
  for (let tried = 0; ; tried++) {
    try {
      return await ask();
    } catch (problem) {
      if (!problem.passes || tried === RETRIES) throw problem;
      for (let left = Math.min(MOST_WAIT_S, problem.waitS); left > 0; left--) {
        tell(`${problem.message} Asking again in ${left} s.`);
        await new Promise(done => setTimeout(done, 1000));
      }
    }
  }
}
