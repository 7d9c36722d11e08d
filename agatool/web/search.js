"use strict";
// The search page: asks the server for hits and attention maps, draws them, and listens to the keyboard.
// Whatever comes from the gallery or the query is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const state = { text: "", like: null, hits: [], at: -1, pending: null, looking: null };

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

async function ask(address, signal) {
  const response = await fetch(address, { signal });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// -- searching ---------------------------------------------------------------------------------------------------

function wanted() {
  const parameters = new URLSearchParams();
  if (state.text) parameters.set("q", state.text);
  if (state.like !== null) parameters.set("like", state.like);
  return parameters;
}

async function search(remember) {
  const parameters = wanted();
  state.pending?.abort();
  $("like").hidden = state.like === null;
  if (state.like !== null) $("like").querySelector("img").src = `image/${state.like}`;
  if (remember) history.pushState(null, "", parameters.size ? `?${parameters}` : location.pathname);
  if (!parameters.size) return show({ hits: [], note: "" }, "");
  const pending = (state.pending = new AbortController());
  say("Searching …");
  try {
    const answer = await ask(`search?${parameters}`, pending.signal);
    show(answer, `${answer.hits.length} images in ${answer.seconds.toFixed(2)} s, best first`);
  } catch (error) {
    if (error.name !== "AbortError") show({ hits: [], note: "" }, error.message, true);
  }
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", wrong);
}

function show(answer, told, wrong = false) {
  state.hits = answer.hits;
  $("note").textContent = answer.note;
  $("note").hidden = !answer.note;
  $("results").replaceChildren(...answer.hits.map(tile));
  say(told, wrong);
}

function tile(hit, place) {
  const image = make("img", { src: `image/${hit.row}`, alt: "", loading: place < 20 ? "eager" : "lazy" });
  const lines = [line(make("b", {}, `${hit.rank}`), `cos ${hit.cosine.toFixed(3)}`)];
  if (hit.match !== null) lines.push(line("match", hit.match.toFixed(2)));
  const button = make("button", { type: "button", title: hit.path }, make("span", { className: "frame" }, image), ...lines);
  button.setAttribute("aria-label", `Number ${hit.rank}, ${hit.path}, ${scores(hit)}`);
  button.addEventListener("click", () => open(place));
  return make("li", {}, button);
}

const line = (left, right) => make("span", { className: "line" }, make("span", {}, left), make("span", {}, right));
const scores = (hit) => `cosine ${hit.cosine.toFixed(3)}` + (hit.match === null ? "" : `, match ${hit.match.toFixed(2)}`);

// -- looking closer ----------------------------------------------------------------------------------------------

async function open(place) {
  const hit = state.hits[place];
  state.at = place;
  state.looking?.abort();
  const looking = (state.looking = new AbortController());
  $("detail-name").textContent = `${hit.rank}. ${hit.path}`;
  $("shown").src = `image/${hit.row}`;
  $("scores").textContent = scores(hit);
  $("heat").classList.remove("on");
  $("words").hidden = true;
  $("previous").disabled = place === 0;
  $("next").disabled = place === state.hits.length - 1;
  if (!$("detail").open) $("detail").showModal();
  if (!state.text) return void ($("told").textContent = "");
  $("told").textContent = "Asking where the model looks …";
  try {
    const parameters = new URLSearchParams({ q: state.text });
    words(await ask(`attention/${hit.row}?${parameters}`, looking.signal));
  } catch (error) {
    if (error.name !== "AbortError") $("told").textContent = error.message;
  }
}

function words(answer) {
  const strongest = Math.max(...answer.words.map((word) => word.attention), 1e-9);
  const nodes = [];
  let end = 0;
  for (const word of answer.words) {
    nodes.push(answer.caption.slice(end, word.start));
    nodes.push(word.heat ? wordButton(word, word.attention / strongest) : word.text);
    end = word.end;
  }
  $("words").replaceChildren(...nodes, answer.caption.slice(end));
  $("words").hidden = false;
  $("told").textContent = "Choose a word to see where the model looks for it; the stronger its colour, the more it counts.";
  const first = answer.words.filter((word) => word.heat).sort((a, b) => b.attention - a.attention)[0];
  if (first) press(first);
}

function wordButton(word, share) {
  const button = make("button", { type: "button" }, word.text);
  button.style.setProperty("--share", share.toFixed(3));
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => press(word));
  button.addEventListener("mouseenter", () => press(word));
  word.button = button;
  return button;
}

function press(word) {
  for (const button of $("words").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button === word.button));
  draw(word.heat);
}

// A pixel for each patch; the browser's scaling smooths it over the image.
function draw(heat) {
  const canvas = $("heat");
  [canvas.height, canvas.width] = [heat.length, heat[0].length];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const values = heat.flat();
  const [low, high] = [Math.min(...values), Math.max(...values)];
  values.forEach((value, place) => {
    const strength = (value - low) / (high - low || 1);
    pixels.data.set([255, 170 - 150 * strength, 0, 225 * strength ** 1.5], 4 * place);
  });
  context.putImageData(pixels, 0, 0);
  canvas.classList.add("on");
}

const step = (by) => state.hits[state.at + by] && open(state.at + by);

// -- events ------------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.text = $("q").value.trim();
  search(true);
});
$("like").querySelector("button").addEventListener("click", () => {
  state.like = null;
  search(true);
});
$("similar").addEventListener("click", () => {
  [state.like, state.text, $("q").value] = [state.hits[state.at].row, "", ""];
  $("detail").close();
  search(true);
  $("q").focus();
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => $("detail").close());
$("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());
$("detail").addEventListener("close", () => $("results").children[state.at]?.firstChild.focus());
$("detail").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
});

document.addEventListener("keydown", (event) => {
  if ($("detail").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && event.target !== $("q")) {
    event.preventDefault();
    $("q").select();
    $("q").focus();
  } else if (event.key === "ArrowDown" && event.target === $("q")) {
    event.preventDefault();
    $("results").firstChild?.firstChild.focus();
  } else if ($("results").contains(event.target)) {
    const tiles = [...$("results").querySelectorAll("button")];
    const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
    const far = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!far) return;
    event.preventDefault();
    const place = tiles.indexOf(event.target) + far;
    (place < 0 && event.key === "ArrowUp" ? $("q") : tiles[place])?.focus();
  }
});

function restore() {
  const given = new URLSearchParams(location.search);
  state.text = given.get("q") ?? "";
  state.like = given.has("like") ? Number(given.get("like")) : null;
  $("q").value = state.text;
  search(false);
}
window.addEventListener("popstate", restore);
restore();
