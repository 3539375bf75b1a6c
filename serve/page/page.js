// The page at "/": asks the same API as every other client, and draws a prompt as it is typed.
"use strict";

const TYPING_MS = 180; // after the last key
const byId = (id) => document.getElementById(id);
const at = (path) => new URL(path, document.baseURI).href;

let key = ""; // kept in this page only: gone with it
let base = null; // id of the base
let chosen = null; // id of what draws
let asking = null; // the order under way
let timer = 0;
let typed = false; // whether the prompt is the user's own
let picture = null; // object URL of the picture shown

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(at(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The endpoint does not answer: is it still running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const problem = new Error(body?.error?.message || `The endpoint answered ${answer.status}.`);
  problem.status = answer.status;
  problem.wait = Number(answer.headers.get("retry-after")) || 0;
  throw problem;
}

function say(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ---- concepts

async function start() {
  try {
    const health = await (await ask("healthz")).json();
    byId("health").textContent =
      `base ${health.base}` + (health.registry === "ok" ? "" : "; the registry is away");
    const models = await allModels();
    byId("key").hidden = true;
    show(models);
  } catch (error) {
    byId("health").textContent = error.status === 401 ? "locked" : "not ready";
    if (error.status === 401) {
      byId("key").hidden = false;
      byId("key-text").focus();
      if (key) say(error.message, true);
    } else {
      say(error.message, true);
      setTimeout(start, 1000 * (error.wait || 3));
    }
  }
}

async function allModels() {
  const found = [];
  for (;;) {
    const last = found.length ? `?after=${encodeURIComponent(found[found.length - 1].id)}` : "";
    const page = await (await ask(`v1/models${last}`)).json();
    found.push(...page.data);
    if (!page.has_more || !page.data.length) return found;
  }
}

function show(models) {
  base = models[0].id;
  const concepts = models.slice(1);
  byId("none").hidden = concepts.length > 0;
  byId("filter").hidden = concepts.length < 13;
  byId("concepts").replaceChildren(...[...concepts, models[0]].map(card));
  const first = byId("concepts").querySelector("input");
  first.checked = true;
  choose(first.value);
}

function card(model) {
  const input = element("input", { type: "radio", name: "concept", value: model.id });
  input.addEventListener("change", () => choose(model.id));
  const frame = element("span", { className: "frame", textContent: model.id[0], ariaHidden: "true" });
  const version = model.version ? `version ${model.version}` : "the base alone";
  const made = element(
    "label",
    { className: "card" },
    input,
    frame,
    element("b", { textContent: model.id }),
    element("small", { textContent: version }),
  );
  made.dataset.id = model.id;
  if (model.version) previews.observe(made);
  return made;
}

// Previews are fetched when their cards come into sight: there may be thousands.
const previews = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((each) => each.isIntersecting)) {
    previews.unobserve(entry.target);
    const id = encodeURIComponent(entry.target.dataset.id);
    ask(`v1/concepts/${id}/preview`)
      .then((answer) => answer.blob())
      .then((blob) => {
        const image = element("img", { src: URL.createObjectURL(blob), alt: "" });
        image.addEventListener("load", () => URL.revokeObjectURL(image.src));
        entry.target.querySelector(".frame").replaceChildren(image);
      })
      .catch(() => {}); // a card without a picture is still a card
  }
});

async function choose(id) {
  chosen = id;
  if (!typed) {
    let subject = "dog";
    if (id !== base) {
      try {
        const concept = await (await ask(`v1/concepts/${encodeURIComponent(id)}`)).json();
        subject = `${concept.token} ${concept.class_noun}`.trim();
      } catch (error) {
        return say(error.message, true);
      }
    }
    if (chosen !== id) return undefined;
    byId("prompt").value = `a photo of a ${subject} on the beach`;
  }
  return draw();
}

// ---- drawing

function soon() {
  clearTimeout(timer);
  timer = setTimeout(draw, TYPING_MS);
}

async function draw() {
  clearTimeout(timer);
  asking?.abort();
  const prompt = byId("prompt").value.trim();
  const seed = Number(byId("seed").value);
  if (!chosen || !prompt) return say(prompt ? "" : "Write what to draw.");
  if (!Number.isInteger(seed) || seed < 0) return say("A seed is a whole number from 0 up.", true);
  const mine = (asking = new AbortController());
  byId("result").classList.add("busy");
  try {
    const answer = await ask("v1/images/generations", {
      method: "POST",
      signal: mine.signal,
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: chosen,
        prompt,
        seed,
        num_inference_steps: Number(byId("steps").value),
      }),
    });
    const drawn = await answer.json();
    if (mine === asking) paint(drawn);
  } catch (error) {
    if (mine !== asking || error.name === "AbortError") return undefined;
    if (error.status === 401) return start();
    say(error.message, true);
    if (error.wait) timer = setTimeout(draw, 1000 * error.wait);
  } finally {
    if (mine === asking) byId("result").classList.remove("busy");
  }
  return undefined;
}

function paint(drawn) {
  const item = drawn.data[0];
  const bytes = Uint8Array.from(atob(item.b64_json), (letter) => letter.charCodeAt(0));
  if (picture) URL.revokeObjectURL(picture);
  picture = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  Object.assign(byId("picture"), { src: picture, alt: item.revised_prompt, hidden: false });
  const name = `${drawn.concept || drawn.base}-${drawn.version || "base"}-seed${item.seed}.png`;
  Object.assign(byId("download"), { href: picture, download: name, hidden: false });
  const facts = {
    "drawn by": drawn.model,
    prompt: item.revised_prompt,
    seed: item.seed,
    steps: drawn.num_inference_steps,
    "adapter sha256": drawn.adapter_sha256 || "none: the base alone",
    time: `${Math.round(drawn.timing_ms.total)} ms`,
  };
  byId("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([term, text]) => [
      element("dt", { textContent: term }),
      element("dd", { textContent: text }),
    ]),
  );
  say("");
}

// ---- what the user does

byId("prompt").addEventListener("input", () => {
  typed = true;
  soon();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    draw();
  }
});
byId("seed").addEventListener("input", soon);
byId("steps").addEventListener("change", draw);
byId("dice").addEventListener("click", () => {
  byId("seed").value = Math.floor(Math.random() * 2 ** 31);
  draw();
});
byId("order").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", () => {
  const wanted = byId("filter").value.trim().toLowerCase();
  for (const each of byId("concepts").children) each.hidden = !each.dataset.id.includes(wanted);
});
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key-text").value.trim();
  say("");
  start();
});

start();
