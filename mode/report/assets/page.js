"use strict";

// Sorting. Numbers go by their value, whatever stands after it; dashes and blanks always come last.
const NUMBER = /^[+\-−]?[\d.,]+(?![^\s%])/;

function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  if (text === "" || text === "–") return null;
  const found = text.match(NUMBER);
  return found ? Number(found[0].replace(/,/g, "").replace("−", "-")) : text.toLowerCase();
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(table, header, column) {
  const next = { none: "descending", descending: "ascending", ascending: "none" };
  const order = next[header.getAttribute("aria-sort") || "none"];
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order);
  for (const body of table.tBodies) {
    const rows = [...body.rows];
    rows.sort((a, b) => order === "none"
      ? a.dataset.place - b.dataset.place
      : compare(valueOf(a, column), valueOf(b, column), order === "ascending" ? 1 : -1));
    body.append(...rows);
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const body of table.tBodies) [...body.rows].forEach((row, place) => { row.dataset.place = place; });
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, header, column));
    header.append(button);
    header.setAttribute("aria-sort", "none");
  });
}

// Search. A run is shown if all words are in what its entry says of it, figures aside.
const box = document.getElementById("search");
const found = document.getElementById("found");
const runs = [...document.querySelectorAll("details.run")];
const texts = runs.map((run) => ["summary", ".command", ".body > p", ".settings", ".facts"]
  .flatMap((part) => [...run.querySelectorAll(part)])
  .map((part) => part.textContent).join(" ").toLowerCase());

function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  runs.forEach((run, number) => {
    run.hidden = !words.every((word) => texts[number].includes(word));
    shown += !run.hidden;
  });
  found.textContent = words.length ? `${shown} of ${runs.length} runs` : `${runs.length} runs`;
}

box.addEventListener("input", search);
box.form.addEventListener("submit", (event) => event.preventDefault());
search();

// A link into something folded or filtered away brings it to light.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.hidden) {
    box.value = "";
    search();
  }
  for (let part = target; part; part = part.parentElement) {
    if (part instanceof HTMLDetailsElement) part.open = true;
  }
  target.scrollIntoView();
}

window.addEventListener("hashchange", reveal);
reveal();
