// Keeps the open page up to date: asks once a second for the same page, and changes only what differs.
"use strict";

const EVERY = 1000;
const SLOWEST = 15000;

const live = document.getElementById("live");
const button = document.getElementById("pause");
let main = document.getElementById("main");
let paused = false;
let failures = 0;
let timer = 0;
let asked = null;
let skew = 0; // milliseconds that the server's clock is ahead of ours

function show(text, state) {
  if (live.textContent !== text) live.textContent = text;
  live.dataset.live = state;
}

// --- the same page, a moment later

function schedule() {
  clearTimeout(timer);
  if (!paused && !document.hidden && main.dataset.cursor) {
    timer = setTimeout(ask, Math.min(EVERY * 2 ** failures, SLOWEST));
  }
}

async function ask() {
  asked = new AbortController();
  const limit = setTimeout(() => asked.abort(), 10000);
  try {
    const response = await fetch(location.href.split("#")[0], {
      headers: { "x-aftertask-after": main.dataset.cursor },
      redirect: "manual",
      signal: asked.signal,
    });
    if (response.status === 204) {
      connected(response);
    } else if (response.ok) {
      connected(response);
      update(new DOMParser().parseFromString(await response.text(), "text/html"));
    } else if (response.status >= 500) {
      lost();
    } else {
      ended(response.status === 404 ? "No longer kept" : "Signed out: reload the page");
      return;
    }
  } catch {
    if (!paused && !document.hidden) lost();
  } finally {
    clearTimeout(limit);
  }
  schedule();
}

function connected(response) {
  failures = 0;
  const date = Date.parse(response.headers.get("date"));
  if (date && Math.abs(date - Date.now()) > 2000) skew = date - Date.now();
  show("Live", "on");
}

function lost() {
  failures += 1;
  show("Not reachable, trying again", "off");
}

function ended(text) {
  show(text, "off");
  button.hidden = true;
}

// --- what differs

function update(page) {
  const next = page.getElementById("main");
  if (!next) return ended("Signed out: reload the page");
  document.title = page.title;
  sync(main, next);
}

const ours = (node, name) => name === "open" || (name === "value" && node === document.activeElement);

function sync(old, next) {
  for (const { name, value } of [...next.attributes]) {
    if (old.getAttribute(name) !== value && !ours(old, name)) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!next.hasAttribute(name) && !ours(old, name)) old.removeAttribute(name);
  }
  if (old.localName === "form" && old.method === "get") return; // what is being typed stays
  if (old.localName === "tbody") return rows(old, next);
  let at = old.firstChild;
  for (const node of [...next.childNodes]) {
    if (at && same(at, node)) {
      const kept = at;
      at = at.nextSibling;
      if (node.nodeType === Node.ELEMENT_NODE) sync(kept, node);
      else if (kept.data !== node.data) kept.data = node.data;
    } else {
      old.insertBefore(document.adoptNode(node), at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

const same = (one, other) => one.nodeType === other.nodeType && one.nodeName === other.nodeName && one.id === other.id;

// Rows have ids: one that moved stays the same row, with its focus.
function rows(old, next) {
  const known = new Map([...old.rows].filter((row) => row.id).map((row) => [row.id, row]));
  const focused = document.activeElement;
  const fresh = [];
  const wanted = [...next.rows].map((row) => {
    const kept = known.get(row.id);
    if (kept) {
      sync(kept, row);
      return kept;
    }
    fresh.push(row);
    return document.adoptNode(row);
  });
  if (fresh.length <= 3) fresh.forEach((row) => row.classList.add("new"));
  if (wanted.some((row) => !row.id)) return plain(old, wanted);
  const keep = new Set(wanted);
  for (const row of [...old.rows]) if (!keep.has(row)) row.remove();
  wanted.forEach((row, at) => {
    if (old.rows[at] !== row) old.insertBefore(row, old.rows[at] || null);
  });
  if (focused !== document.activeElement && old.contains(focused)) focused.focus({ preventScroll: true });
}

function plain(old, wanted) {
  wanted.forEach((row, at) => {
    if (old.rows[at]) sync(old.rows[at], row);
    else old.append(row);
  });
  while (old.rows.length > wanted.length) old.rows[old.rows.length - 1].remove();
}

// --- times, which change while nothing else does

function duration(s) {
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 59.95) return `${s.toFixed(s < 9.995 ? 2 : 1)} s`;
  const minutes = Math.floor(Math.round(s) / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(s) % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function ago(s) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (s >= size) return `${Math.floor(s / size)} ${unit} ago`;
  }
  return s >= 1 ? `${Math.floor(s)} s ago` : "now";
}

function tick() {
  if (document.hidden || paused) return;
  const now = Date.now() + skew;
  for (const time of main.querySelectorAll("time[data-ago]")) {
    put(time, ago(Math.max(0, (now - Date.parse(time.dateTime)) / 1000)));
  }
  for (const span of main.querySelectorAll("[data-since]")) {
    put(span, duration(Math.max(0, now / 1000 - Number(span.dataset.since))));
  }
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// --- pausing

function pause(on) {
  paused = on;
  button.textContent = on ? "Resume" : "Pause";
  button.setAttribute("aria-pressed", String(on));
  if (on) {
    clearTimeout(timer);
    asked?.abort();
    show("Paused", "off");
  } else {
    ask();
  }
}

if (main && main.dataset.cursor) {
  button.hidden = false;
  button.addEventListener("click", () => pause(!paused));
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      asked?.abort();
    } else if (!paused) {
      ask();
    }
  });
  setInterval(tick, EVERY);
  show("Live", "on");
  schedule();
}
