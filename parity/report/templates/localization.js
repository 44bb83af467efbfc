"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const ORDER = data.order;
  const MOST_ROWS = 2000;

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const taps = data.taps.map((row, place) => {
    const text = (index) => data.strings[row[index]];
    const number = (index) => ({ inf: Infinity, nan: NaN })[row[index]] ?? row[index];
    const tap = {
      place: place + 1, name: text(0) + text(1), component: text(2), call: text(3), local: number(4), ratio: number(5),
      allowed: number(6), propagated: number(7), total: number(8), gain: number(9), wrong: row[10] === 1, source: text(11), shape: text(12), dtype: text(13),
      mismatch: text(14), shade: text(15),
    };
    tap.words = `${tap.name} ${tap.component} ${tap.mismatch} ${tap.source} ${tap.dtype}`.toLowerCase();
    return tap;
  });
  const calls = [...new Set(taps.map((tap) => tap.call))];
  const places = new Map(Object.entries(data.places));
  const exact = new Map(Object.entries(data.exact));
  const tapsOf = new Map([...places.keys()].map((component) => [component, []]));
  for (const tap of taps) tapsOf.get(tap.component).push(tap);
  const findingsOf = new Map();
  data.findings.forEach(([component], index) => findingsOf.set(component, [...(findingsOf.get(component) || []), index + 1]));

  function shown(value) {
    if (value === null) return "–";
    if (Number.isNaN(value)) return "NaN";
    if (value === Infinity) return "∞";
    const size = Math.abs(value);
    return size === 0 || (size >= 1e-3 && size < 1e5) ? value.toLocaleString("en", { maximumSignificantDigits: 3 }) : value.toExponential(2);
  }

  function times(value) {
    if (value === null || !Number.isFinite(value) || value < 1000) return shown(value);
    return value < 1e7 ? value.toLocaleString("en", { maximumSignificantDigits: 2 }) : value.toExponential(1).replace("+", "");
  }

  // The map.

  function told(component, call) {
    const all = tapsOf.get(component).filter((tap) => !call || tap.call === call);
    const numbers = findingsOf.get(component);
    const found = numbers ? `finding ${numbers.join(", ")}; ` : "";
    if (!all.length) return exact.has(component) ? `${component}: ${found}compared exactly${numbers ? "" : ", equal"}` : `${component}: not in this call`;
    const worst = all.reduce((a, b) => (worse(b, a) ? b : a));
    const wrong = all.filter((tap) => tap.wrong).length;
    const error = worst.mismatch || `local error ${shown(worst.local)}, ${times(worst.ratio)} times its floor`;
    const count = all.length > 1 ? `; ${wrong} of ${all.length} taps wrong, the worst in ${worst.call}` : ` in ${worst.call}${wrong ? ", wrong" : ""}`;
    return `${component}: ${found}${error}${count}`;
  }

  function worse(a, b) {
    const [x, y] = [ORDER.indexOf(a.shade), ORDER.indexOf(b.shade)];
    return x === y ? rank(a.ratio) > rank(b.ratio) : x > y;
  }

  function rank(value) {
    return value === null ? -Infinity : Number.isNaN(value) ? Infinity : value;
  }

  const cells = new Map();
  function cellOf(component, outer) {
    const inner = outer ? make("span", { className: "cell" }) : make("button", { type: "button", className: "cell" });
    inner.setAttribute("aria-hidden", String(Boolean(outer)));
    const button = outer || inner;
    button.tabIndex = -1;
    button.dataset.component = component;
    button.addEventListener("click", () => list(component));
    button.addEventListener("focus", () => { byId("told").textContent = told(component, byId("call").value); });
    button.addEventListener("mouseenter", () => { byId("told").textContent = told(component, byId("call").value); });
    cells.set(component, { inner, button });
    return inner;
  }

  function colour() {
    const call = byId("call").value;
    for (const [component, { inner, button }] of cells) {
      const all = tapsOf.get(component).filter((tap) => !call || tap.call === call);
      let shade = all.length ? all.reduce((a, b) => (worse(b, a) ? b : a)).shade : "absent";
      if (!call && exact.has(component) && ORDER.indexOf(exact.get(component)) > ORDER.indexOf(shade)) shade = exact.get(component);
      const numbers = findingsOf.get(component);
      // A finding stays marked, whichever call is looked at.
      if (shade === "absent" && numbers) shade = "none";
      const wrong = shade.startsWith("w");
      inner.className = `cell ${shade}${wrong ? " wrong" : ""}${numbers ? " finding" : ""}`;
      inner.textContent = numbers ? numbers[0] : wrong ? "×" : "";
      button.title = told(component, call);
      button.setAttribute("aria-label", button.title);
    }
  }

  // One stop for the tab key in each group; the arrow keys go on from there.
  function rove(group, columns) {
    const first = group.find((button) => button && findingsOf.has(button.dataset.component)) || group.find(Boolean);
    if (first) first.tabIndex = 0;
    group.forEach((button, index) => button && button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      if (!step) return;
      event.preventDefault();
      for (let next = index + step; next >= 0 && next < group.length; next += step) {
        const sideways = Math.abs(step) === 1 && columns > 1 && Math.floor(next / columns) !== Math.floor(index / columns);
        if (sideways) return;
        const target = group[next];
        if (!target || target.classList.contains("absent")) continue;
        group.forEach((other) => { if (other) other.tabIndex = -1; });
        target.tabIndex = 0;
        target.focus();
        return;
      }
    }));
  }

  function drawPanels() {
    const at = new Map([...places].map(([component, place]) => [place.join(), component]));
    // All panels side by side where they fit, with cells as wide as that leaves them.
    const columns = data.panels.reduce((sum, panel) => sum + panel.columns.length, 0);
    const room = byId("panels").clientWidth - 90 * data.panels.length;
    const width = room > 800 ? Math.max(11, Math.min(17, Math.floor(room / columns))) : 16;
    byId("panels").style.setProperty("--w", `${width}px`);
    data.panels.forEach((panel, index) => {
      const height = Math.max(8, Math.min(20, Math.floor(288 / panel.rows.length)));
      const head = make("tr", {}, make("td"));
      for (const [name, title] of panel.columns) {
        const th = make("th", { scope: "col", title: title || name }, make("span", {}, name));
        head.append(th);
      }
      const body = make("tbody");
      const group = [];
      let labelled = -Infinity;
      const hits = panel.rows.map((_, row) => panel.columns.some((_, column) => findingsOf.has(at.get([index, row, column].join()))));
      panel.rows.forEach((name, row) => {
        const label = make("th", { scope: "row", className: hits[row] ? "hit" : "" });
        // Rows lower than their label keep the labels of findings, and others where there is room.
        const every = height >= 11 ? 1 : 5;
        const room = row - labelled >= (height >= 11 ? 1 : 2) && !(every > 1 && hits[row + 1]);
        if (hits[row] || (row % every === 0 && room)) { label.textContent = name; labelled = row; }
        const line = make("tr", {}, label);
        panel.columns.forEach((_, column) => {
          const component = at.get([index, row, column].join());
          const cell = component === undefined ? null : cellOf(component);
          group.push(cell);
          line.append(cell ? make("td", {}, cell) : make("td"));
        });
        body.append(line);
      });
      const table = make("table", {}, make("caption", {}, panel.name), make("thead", {}, head), body);
      table.style.setProperty("--h", `${height}px`);
      rove(group, panel.columns.length);
      byId("panels").append(make("div", { className: "panel" }, table));
    });
    const chips = data.around.map((component) => {
      const chip = make("button", { type: "button", className: findingsOf.has(component) ? "chip hit" : "chip" });
      chip.append(cellOf(component, chip), component);
      byId("around").append(chip);
      return chip;
    });
    rove(chips, 1);
    for (const call of calls) byId("call").append(make("option", { value: call }, call));
    byId("call").addEventListener("change", colour);
    colour();
  }

  // The table.

  const NUMBER = (key) => (tap) => shown(tap[key]);
  const COLUMNS = [
    ["#", "place", (tap) => String(tap.place), "number"],
    ["Tap", "name", (tap) => tap.name, "name"],
    ["Local", "local", NUMBER("local"), "number"],
    ["× floor", "ratio", (tap) => times(tap.ratio), "number"],
    ["Allowed", "allowed", NUMBER("allowed"), "number"],
    ["Verdict", "wrong", verdictOf, "why"],
    ["Propagated", "propagated", NUMBER("propagated"), "number"],
    ["Total", "total", NUMBER("total"), "number"],
    ["Gain", "gain", NUMBER("gain"), "number"],
    ["Component", "component", (tap) => tap.component, "name"],
    ["Oracle", "source", (tap) => tap.source, ""],
    ["Shape", "shape", (tap) => tap.shape, ""],
    ["Dtype", "dtype", (tap) => tap.dtype, ""],
  ];
  let sorted = { key: "place", down: false };
  let everything = false;
  const natural = new Intl.Collator("en", { numeric: true });

  function verdictOf(tap) {
    if (!tap.wrong) return tap.allowed === null ? "–" : "✓ right";
    const sign = make("span", { className: "verdict diverge" }, "✗ wrong");
    return tap.mismatch ? make("span", {}, sign, ` ${tap.mismatch}`) : sign;
  }

  function rowOf(tap) {
    if (!tap.row) {
      tap.row = make("tr", { className: tap.wrong ? "diverging" : "" });
      for (const [, , content, kind] of COLUMNS) tap.row.append(make("td", { className: kind }, content(tap)));
    }
    return tap.row;
  }

  function conditions(text) {
    const found = [];
    for (const [, key, quoted, plain, word] of text.matchAll(/(?:(component|call|tap)=(?:"([^"]*)"|(\S+)))|(\S+)/g)) {
      const value = quoted ?? plain;
      if (key === undefined) found.push((tap) => tap.words.includes(word.toLowerCase()));
      else found.push((tap) => tap[key === "tap" ? "name" : key] === value);
    }
    return found;
  }

  function compare(a, b) {
    const [x, y] = [a[sorted.key], b[sorted.key]];
    // What has no number comes last, whichever way the column is sorted.
    if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
    const order = typeof x === "string" ? natural.compare(x, y) : Math.sign(rank(x) - rank(y)) || 0;
    return (sorted.down ? -order : order) || a.place - b.place;
  }

  function refresh() {
    const wanted = conditions(byId("filter").value);
    const only = byId("only").checked;
    const rows = taps.filter((tap) => (!only || tap.wrong) && wanted.every((holds) => holds(tap))).sort(compare);
    const listed = everything ? rows : rows.slice(0, MOST_ROWS);
    const body = byId("table").tBodies[0];
    body.replaceChildren(...listed.map(rowOf));
    if (!rows.length) {
      const why = taps.length ? "No tap matches." : "There are no taps.";
      body.append(make("tr", { className: "empty" }, make("td", { colSpan: COLUMNS.length }, why)));
    }
    const cut = listed.length < rows.length ? `, the first ${listed.length.toLocaleString("en")} listed` : "";
    byId("count").textContent = `${rows.length.toLocaleString("en")} of ${taps.length.toLocaleString("en")} taps${cut}`;
    byId("all").hidden = listed.length === rows.length;
    byId("all").textContent = `List all ${rows.length.toLocaleString("en")} taps`;
  }

  function list(component) {
    const call = byId("call") ? byId("call").value : "";
    const quote = (value) => (/["\s]/.test(value) || !value ? `"${value}"` : value);
    byId("filter").value = component.includes('"') ? component : `component=${quote(component)}${call ? ` call=${quote(call)}` : ""}`;
    byId("only").checked = false;
    refresh();
    byId("taps").scrollIntoView();
    byId("filter").focus({ preventScroll: true });
  }

  function drawTable() {
    const heads = COLUMNS.map(([title, key, , kind]) => {
      const button = make("button", { type: "button" }, title);
      const head = make("th", { scope: "col", className: kind === "number" ? "number" : "" }, button);
      button.addEventListener("click", () => {
        const numeric = kind === "number" && key !== "place";
        // The largest errors are what one looks for, so they come first.
        sorted = sorted.key === key ? { key, down: !sorted.down } : { key, down: numeric || key === "wrong" };
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        refresh();
      });
      return head;
    });
    heads[0].setAttribute("aria-sort", "ascending");
    byId("table").tHead.rows[0].append(...heads);
    let timer;
    byId("filter").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refresh, 60); });
    byId("only").addEventListener("change", refresh);
    byId("all").addEventListener("click", () => { everything = true; refresh(); });
    for (const button of document.querySelectorAll("button[data-component].plain")) {
      button.addEventListener("click", () => { byId("call").value = ""; colour(); list(button.dataset.component); });
    }
    refresh();
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof Element && event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      byId("filter").focus();
    } else if (event.key === "Escape" && event.target === byId("filter")) {
      byId("filter").value = "";
      refresh();
    }
  });

  document.documentElement.classList.add("scripted");
  if (places.size) drawPanels();
  drawTable();
})();
