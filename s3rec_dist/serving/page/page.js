// A history is a list of raw ids; every change asks for the best items after it. Text from the server is only ever text.
"use strict";

const byId = (id) => document.getElementById(id);
let history = []; // {item, name, attributes, attention}
let found = []; // what the search offers
let chosen = -1; // of them
let asked = 0; // numbers the questions: an old answer does not overwrite a newer one

function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function titled(item) {
  const row = element("div", "row");
  row.append(element("span", "name", item.name));
  if (item.name !== item.item) row.append(element("span", "note", item.item));
  return row;
}

function tags(item) {
  const list = element("div", "tags");
  for (const { field, value } of item.attributes.slice(0, 8)) {
    const tag = element("span", "", value);
    tag.title = field;
    list.append(tag);
  }
  return list;
}

function bar(share, words) {
  const outer = element("div", "bar");
  const inner = element("span");
  inner.style.width = `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
  outer.title = words;
  outer.append(inner);
  return outer;
}

function showHistory() {
  const most = Math.max(...history.map((item) => item.attention || 0), 1e-9);
  byId("history").replaceChildren(
    ...history.map((item, place) => {
      const line = element("li");
      const row = titled(item);
      const remove = element("button", "", "Remove");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${item.name}`);
      remove.addEventListener("click", () => {
        history.splice(place, 1);
        changed();
      });
      row.append(remove);
      line.append(row);
      if (item.attention !== undefined) {
        line.append(bar(item.attention / most, `${(100 * item.attention).toFixed(1)}% of the attention`));
      }
      return line;
    }),
  );
  byId("empty").hidden = history.length > 0;
  byId("clear").hidden = history.length === 0;
}

function why(reason) {
  const line = element("p", "why");
  const nameOf = (raw) => history.find((item) => item.item === raw)?.name ?? raw;
  const parts = reason.shared.slice(0, 3).map(({ item, attributes }) => `${attributes.slice(0, 3).join(", ")} with ${nameOf(item)}`);
  const nearest = reason.similarity.indexOf(Math.max(...reason.similarity));
  const similar = `Similar: ${history[nearest].name} (${reason.similarity[nearest].toFixed(2)})`;
  line.textContent = parts.length ? `Shared: ${parts.join("; ")}. ${similar}` : similar;
  return line;
}

function showBest(answer, milliseconds) {
  const scores = answer.recommendations.map((item) => item.score);
  const low = Math.min(...scores);
  const span = Math.max(...scores) - low || 1;
  byId("best").replaceChildren(
    ...answer.recommendations.map((item, place) => {
      const line = element("li");
      line.dataset.item = item.item;
      const row = titled(item);
      row.append(element("span", "note", item.score.toFixed(2)));
      line.append(row, bar(0.05 + (0.95 * (item.score - low)) / span, `score ${item.score}`), tags(item));
      line.append(why(answer.reasons[place]));
      return line;
    }),
  );
  byId("took").textContent = `Answered in ${milliseconds.toFixed(0)} ms.`;
}

async function changed() {
  const question = ++asked;
  showHistory();
  byId("problem").hidden = true;
  if (!history.length) {
    byId("best").replaceChildren();
    byId("took").textContent = "";
    return;
  }
  const began = performance.now();
  try {
    const response = await fetch("recommend", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ items: history.map((item) => item.item), k: 10, why: true }),
    });
    const answer = await response.json();
    if (question !== asked) return;
    if (!response.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : "the request was refused");
    history = answer.history;
    showHistory();
    showBest(answer, performance.now() - began);
  } catch (error) {
    if (question !== asked) return;
    byId("best").replaceChildren();
    byId("took").textContent = "";
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
}

function take(item) {
  history.push(item);
  closeSearch();
  byId("search").value = "";
  changed();
}

function closeSearch() {
  found = [];
  chosen = -1;
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
}

function showFound() {
  byId("found").replaceChildren(
    ...found.map((item, place) => {
      const line = element("li");
      line.id = `found-${place}`;
      line.setAttribute("role", "option");
      line.setAttribute("aria-selected", String(place === chosen));
      line.append(titled(item));
      line.addEventListener("mousedown", (event) => {
        event.preventDefault(); // the field keeps the focus
        take(item);
      });
      return line;
    }),
  );
  byId("found").hidden = found.length === 0;
  byId("search").setAttribute("aria-expanded", String(found.length > 0));
  if (chosen >= 0) byId("search").setAttribute("aria-activedescendant", `found-${chosen}`);
  else byId("search").removeAttribute("aria-activedescendant");
}

async function search(text, limit = 8) {
  const response = await fetch(`items?${new URLSearchParams({ q: text, limit })}`);
  return response.ok ? (await response.json()).items : [];
}

byId("search").addEventListener("input", async (event) => {
  const text = event.target.value.trim();
  const items = text ? await search(text) : [];
  if (text !== event.target.value.trim()) return; // typed on meanwhile
  found = items;
  chosen = -1;
  showFound();
});

byId("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    const step = event.key === "ArrowDown" ? 1 : -1;
    if (found.length) chosen = (chosen + step + found.length) % found.length;
    showFound();
  } else if (event.key === "Escape") {
    closeSearch();
  }
});

byId("search").addEventListener("blur", closeSearch);

byId("add").addEventListener("submit", (event) => {
  event.preventDefault();
  if (found.length) take(found[Math.max(chosen, 0)]);
});

byId("clear").addEventListener("click", () => {
  history = [];
  changed();
  byId("search").focus();
});

byId("example").addEventListener("click", async () => {
  const items = await search("", 60);
  const start = Math.floor(Math.random() * Math.max(1, items.length - 4));
  history = items.slice(start, start + 4);
  changed();
});

fetch("health")
  .then((response) => response.json())
  .then((facts) => {
    byId("about").textContent = `${facts.dataset}: ${facts.items.toLocaleString("en")} items. s3rec_dist ${facts.version}.`;
  });
