"use strict";
// Draws the charts, and sorts and filters the table of audits. All numbers and texts come from the page.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.classList.add("js");

  // Charts: their colours but those of canary kinds are the page's.
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  function theme() {
    const [ink, muted, line, accent] = ["ink", "muted", "line", "accent"].map(color);
    return {
      background: null,
      font: color("sans"),
      view: { stroke: null },
      axis: {
        labelColor: muted, titleColor: ink, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: 500, labelOverlap: true,
      },
      style: {
        reference: { color: muted, strokeDash: [2, 3], strokeWidth: 1.5 },
        mark: { color: muted, strokeWidth: 1, strokeDash: [6, 4] },
        shade: { color: muted, opacity: 0.13 },
        inside: { opacity: dark.matches ? 0.85 : 0.6 },
        outline: { color: ink },
        ceiling: { color: muted },
        cost: { color: accent },
      },
    };
  }

  function draw(place) {
    let text = document.getElementById(`${place.id}-spec`).textContent;
    if (dark.matches) text = text.replaceAll('"#000000"', '"#ffffff"'); // the seventh kind's black
    const tooltip = { theme: dark.matches ? "dark" : "light" };
    const options = { mode: "vega-lite", renderer: "svg", actions: false, config: theme(), tooltip };
    return vegaEmbed(place, JSON.parse(text), options);
  }

  async function drawAll() {
    for (const place of document.querySelectorAll(".chart")) await draw(place);
    root.dataset.drawn = "yes";
  }
  drawAll();
  dark.addEventListener("change", drawAll);

  // The table.
  const data = JSON.parse(document.getElementById("rows").textContent);
  const keys = JSON.parse(document.getElementById("columns").textContent);
  const rows = data.rows.map((row) => row.map((place) => data.texts[place]));
  const singleRuns = keys.length;
  const most = 400; // rows that are shown at once
  const form = document.getElementById("filters");
  const selects = [...form.querySelectorAll("select")];
  const headers = [...document.querySelectorAll("#table thead th")];
  const body = document.querySelector("#table tbody");
  const count = document.getElementById("count");
  let sorting = null;

  function number(text) {
    if (text.startsWith("∞")) return Infinity;
    const value = parseFloat(text);
    return Number.isNaN(value) ? -Infinity : value;
  }

  function compare(one, other) {
    const { place, isNumber, direction } = sorting;
    const [a, b] = [one[place], other[place]];
    if (!isNumber) return direction * a.localeCompare(b);
    const [x, y] = [number(a), number(b)];
    return x === y ? 0 : direction * (x < y ? -1 : 1);
  }

  function cell(row, header) {
    const place = Number(header.dataset.place);
    const made = document.createElement(keys[place] === "canary" ? "th" : "td");
    made.className = header.className;
    const text = row[place];
    if (keys[place] === "canary") {
      made.scope = "row";
      const shown = [...document.querySelectorAll("[data-kind]")].find((each) => each.dataset.kind === text);
      made.append(shown.firstElementChild.cloneNode(true));
    } else if (keys[place] === "protocol" && text.includes("not a bound")) {
      const label = document.createElement("span");
      label.className = "untrue";
      label.textContent = text;
      made.append(label);
    } else if (keys[place] === "runs" && row[singleRuns]) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "runs";
      button.textContent = text;
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `${text} runs: show the bounds of single runs`);
      button.addEventListener("click", () => toggle(button, row));
      made.append(button);
    } else made.textContent = text;
    return made;
  }

  function toggle(button, row) {
    const line = button.closest("tr");
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) return line.nextElementSibling.remove();
    const added = document.createElement("tr");
    added.className = "single";
    const wide = document.createElement("td");
    wide.colSpan = headers.length;
    wide.textContent = `ε of single runs: ${row[singleRuns]}`;
    added.append(wide);
    line.after(added);
  }

  function show() {
    const chosen = selects.filter((each) => each.value).map((each) => [keys.indexOf(each.name), each.value]);
    const found = rows.filter((row) => chosen.every(([place, value]) => row[place] === value));
    if (sorting) found.sort(compare);
    body.replaceChildren(
      ...found.slice(0, most).map((row) => {
        const line = document.createElement("tr");
        line.append(...headers.map((header) => cell(row, header)));
        return line;
      }),
    );
    const cut = found.length > most ? `, the first ${most} shown: filter for the others` : "";
    count.textContent = `${found.length} of ${rows.length} audits${cut}`;
  }

  // The address holds what differs from the defaults: "#canary=random&auditor=steinke&sort=pooled&order=descending".
  function write() {
    const state = new URLSearchParams();
    for (const each of selects) if (each.value !== each.dataset.default) state.set(each.name, each.value || "all");
    if (sorting) {
      state.set("sort", keys[sorting.place]);
      state.set("order", sorting.direction > 0 ? "ascending" : "descending");
    }
    const hash = state.toString();
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  }

  function read() {
    if (!location.hash.includes("=")) return false; // none, or a section's
    const state = new URLSearchParams(location.hash.slice(1));
    for (const each of selects) {
      const wanted = state.has(each.name) ? state.get(each.name) : each.dataset.default;
      const value = wanted === "all" ? "" : wanted;
      if ([...each.options].some((option) => option.value === value)) each.value = value;
    }
    const header = headers.find((each) => keys[each.dataset.place] === state.get("sort"));
    order(header, state.get("order") === "ascending" ? 1 : -1);
    return true;
  }

  function order(header, direction) {
    for (const each of headers) each.setAttribute("aria-sort", "none");
    sorting = null;
    if (!header) return;
    header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    sorting = { place: Number(header.dataset.place), isNumber: header.classList.contains("number"), direction };
  }

  for (const header of headers) {
    header.querySelector("button").addEventListener("click", () => {
      const was = header.getAttribute("aria-sort");
      const first = header.classList.contains("number") ? -1 : 1; // of numbers the largest first
      order(header, was === "none" ? first : was === "ascending" ? -1 : 1);
      show();
      write();
    });
  }
  form.addEventListener("change", () => (show(), write()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    setTimeout(() => (order(null), show(), write()));
  });
  addEventListener("hashchange", () => read() && show());
  if (read()) document.getElementById("audits").scrollIntoView({ behavior: "instant" });
  show();

  // A canary's numbers are closed by the Escape key.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement.matches(".canary")) document.activeElement.blur();
  });
})();
