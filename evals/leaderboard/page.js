"use strict";
// The leaderboard's page: draws each board's plot, sorts and filters its table. No library; nothing is fetched.
// The address keeps the choices, so that a link shows the same view.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MARKS = {  // by kind, around (0, 0); the shapes differ, for people who cannot distinguish the colours
  teacher: '<path class="mark" d="M0-8 8 0 0 8-8 0z"/>',
  student: '<rect class="mark" x="-5.5" y="-5.5" width="11" height="11" rx="1.5"/>',
  onnx: '<circle class="mark" r="6"/>',
};
const FILTERS = ["recipe", "precision", "kind"];
const controls = document.querySelector(".controls");
const chosen = name => controls.elements[name].value;

// --- numbers as text

const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const percent = share => `${(100 * share).toFixed(1)}%`;
const short = number => number >= 1000 ? Math.round(number).toLocaleString("en") : Number(number.toPrecision(3)).toString();
const formatCost = (cost, value) => short(value * DATA.costs[cost].factor);

// --- the rows shown

const shownRows = board =>
  DATA.paged ? board.rows : board.rows.filter(row => FILTERS.every(f => !chosen(f) || row[f] === chosen(f)));
const retention = row => chosen("task") ? row.tasks[chosen("task")] : row.retention;  // [value, low, high]
const price = row => row.cost[chosen("cost")];

// The rows on the Pareto frontier: no other is cheaper and as good, or better and as cheap. As pareto_flags of ranking.py.
function frontier(rows) {
  const sign = DATA.costs[chosen("cost")].higher ? -1 : 1;
  const sorted = rows.slice().sort((a, b) => sign * (price(a) - price(b)) || retention(b)[0] - retention(a)[0]);
  const best = [];
  for (const row of sorted) {
    const last = best[best.length - 1];
    const same = last && price(last) === price(row) && retention(last)[0] === retention(row)[0];
    if (!last || same || retention(row)[0] > retention(last)[0]) best.push(row);
  }
  return best;
}

// --- the plot: cost (log) against retention

function frameOf(rows, width, zoom) {
  const height = width > 600 ? 430 : 400;
  const prices = rows.flatMap(row => [price(row), ...(row.spread[chosen("cost")] || [])]);
  const values = rows.map(row => retention(row)[0]);
  const [least, most] = [Math.min(...prices), Math.max(...prices)];
  const margin = Math.pow(most / least > 3 ? most / least : 3, 0.12);
  // Room for the intervals, but no interval may squeeze the rest together.
  const around = Math.max(Math.max(...values) - Math.min(...values), 0.05);
  const low = Math.max(Math.min(...rows.map(row => retention(row)[1])), Math.min(...values) - around);
  const high = Math.min(Math.max(...rows.map(row => retention(row)[2]), 1), Math.max(...values, 1) + around);
  const frame = {width, height, left: 52, right: 18, top: 26, bottom: 50, x0: least / margin, x1: most * margin,
    y0: low - 0.06 * (high - low), y1: high + 0.08 * (high - low), ...zoom};
  const inner = [width - frame.left - frame.right, height - frame.top - frame.bottom];
  const across = value => Math.log(value / frame.x0) / Math.log(frame.x1 / frame.x0);
  frame.x = value => frame.left + across(value) * inner[0];
  frame.y = value => height - frame.bottom - (value - frame.y0) / (frame.y1 - frame.y0) * inner[1];
  frame.price = x => frame.x0 * Math.pow(frame.x1 / frame.x0, (x - frame.left) / inner[0]);
  frame.retention = y => frame.y0 + (height - frame.bottom - y) / inner[1] * (frame.y1 - frame.y0);
  const lies = (value, from, to) => value >= from && value <= to;
  frame.has = row => lies(price(row), frame.x0, frame.x1) && lies(retention(row)[0], frame.y0, frame.y1);
  return frame;
}

function linearTicks(low, high) {
  const power = Math.pow(10, Math.floor(Math.log10((high - low) / 5)));
  const step = [1, 2, 5, 10].map(factor => power * factor).find(size => (high - low) / size <= 7);
  const ticks = [];
  for (let place = Math.ceil(low / step); place <= Math.floor(high / step); place++) ticks.push(place * step);
  return ticks;
}

function logTicks(low, high, most) {
  let ticks = [];
  for (const factors of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
    ticks = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++)
      ticks.push(...factors.map(factor => factor * Math.pow(10, decade)).filter(tick => tick >= low && tick <= high));
    if (ticks.length <= most) break;
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high);
}

function axes(frame) {
  const {factor, title} = DATA.costs[chosen("cost")];
  const [left, right, bottom] = [frame.left, frame.width - frame.right, frame.height - frame.bottom];
  const line = (kind, x1, x2, y1, y2) => `<line class="${kind}" x1="${x1}" x2="${x2}" y1="${y1}" y2="${y2}"/>`;
  const words = (kind, x, y, anchor, text) => `<text class="${kind}" x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;
  const parts = linearTicks(frame.y0, frame.y1).map(tick => {
    const y = frame.y(tick).toFixed(1);
    return line("grid", left, right, y, y) + words("tick", left - 8, +y + 4, "end", `${+(100 * tick).toFixed(2)}%`);
  });
  for (const tick of logTicks(frame.x0 * factor, frame.x1 * factor, frame.width > 600 ? 9 : 5)) {
    const x = frame.x(tick / factor).toFixed(1);
    parts.push(line("grid", x, x, frame.top, bottom), words("tick", x, bottom + 18, "middle", short(tick)));
  }
  return parts.join("") + words("axis", (left + right) / 2, frame.height - 10, "middle", escaped(title)) +
    words("axis", left, 13, "start", `retention${chosen("task") ? ` on ${escaped(chosen("task"))}` : ""}`);
}

// Clip what is drawn to the frame.
function clipped(frame, parts, id) {
  const [width, height] = [frame.width - frame.left - frame.right, frame.height - frame.top - frame.bottom];
  const whole = frame.y(1).toFixed(1);
  return `<clipPath id="${id}"><rect x="${frame.left}" y="${frame.top}" width="${width}" height="${height}"/></clipPath>` +
    `<g clip-path="url(#${id})"><line class="whole" x1="${frame.left}" x2="${frame.left + width}" y1="${whole}" ` +
    `y2="${whole}"/>${parts}</g>`;
}

// The best retention at each price: a staircase that continues to the expensive side.
function staircase(frame, best) {
  if (!best.length) return "";
  const at = row => [frame.x(price(row)).toFixed(1), frame.y(retention(row)[0]).toFixed(1)];
  const [x, y] = at(best[0]);
  const steps = best.slice(1).map(row => `H${at(row)[0]}V${at(row)[1]}`).join("");
  const end = DATA.costs[chosen("cost")].higher ? frame.left : frame.width - frame.right;  // of the whole plot
  return `<path class="frontier" d="M${x} ${y}${steps}H${end}"/>`;
}

function point(frame, row, isBest) {
  const [x, y] = [frame.x(price(row)), frame.y(retention(row)[0])];
  const [low, high] = [1, 2].map(place => (frame.y(retention(row)[place]) - y).toFixed(1));
  let bars = `M0 ${low}V${high}M-4 ${low}H4M-4 ${high}H4`;
  const spread = row.spread[chosen("cost")];
  if (spread) {
    const [from, to] = spread.map(value => (frame.x(value) - x).toFixed(1));
    bars += `M${from} 0H${to}M${from}-4V4M${to}-4V4`;
  }
  const label = [`${row.version}, ${row.title}`, ...facts(row).map(([what, value]) => `${what} ${value}`)].join("; ");
  return `<g class="${row.kind} ${isBest ? "best" : "beaten"}" transform="translate(${x.toFixed(1)} ${y.toFixed(1)})" ` +
    `role="img" tabindex="-1" data-row="${row.id}" aria-label="${escaped(label)}">` +
    `<circle class="near" r="11"/><path class="bar" d="${bars}"/>${MARKS[row.kind]}</g>`;
}

// Names of the frontier and the teacher, each beside its point if it covers nothing there.
function names(frame, rows, best) {
  const taken = rows.map(row => [frame.x(price(row)), frame.y(retention(row)[0])]).map(([x, y]) => [x - 8, y - 8, x + 8, y + 8]);
  const covers = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const [right, bottom] = [frame.width - 4, frame.height - frame.bottom];
  return [...new Set([...rows.filter(row => row.kind === "teacher"), ...best])].map(row => {
    const [x, y, width] = [frame.x(price(row)), frame.y(retention(row)[0]), 6.9 * row.title.length];
    const places = [0, 12].flatMap(off => [[x + 10 + off / 2, y - 17 - off], [x - 10 - width - off / 2, y - 17 - off],
      [x + 10 + off / 2, y + 3 + off], [x - 10 - width - off / 2, y + 3 + off]]);
    places.push([x - width / 2, y - 24], [x - width / 2, y + 9]);
    const boxes = places.map(([left, top]) => [left, top, left + width, top + 15]);
    const box = boxes.find(b => b[0] >= frame.left - 6 && b[2] <= right && b[1] >= frame.top - 8 && b[3] <= bottom &&
      !taken.some(other => covers(b, other)));
    if (!box) return "";
    taken.push(box);
    return `<text class="name" x="${box[0].toFixed(1)}" y="${(box[1] + 12).toFixed(1)}">${escaped(row.title)}</text>`;
  }).join("");
}

// The lines of a point's tooltip and label.
function facts(row) {
  const interval = (ends, format) => ends ? ` [${format(ends[0])}, ${format(ends[1])}]` : "";
  const lines = retention(row) ? [["retention", percent(retention(row)[0]) + interval(retention(row).slice(1), percent)]] : [];
  for (const cost of new Set([chosen("cost"), ...DATA.tooltip_costs])) {
    if (row.cost[cost] == null) continue;
    lines.push([DATA.costs[cost].title, formatCost(cost, row.cost[cost]) + interval(row.spread[cost], end => formatCost(cost, end))]);
  }
  if (row.ratio != null) lines.push(["of the teacher's cost", percent(row.ratio)]);
  if (row.verdict) lines.push(["verdict", row.verdict]);
  if (row.aliases.length) lines.push(["alias", row.aliases.join(", ")]);
  return lines;
}

function draw(board) {
  const holder = board.section.querySelector(".plot");
  const rows = shownRows(board).filter(row => retention(row) && price(row) > 0);
  const best = frontier(rows);
  board.frame = null;
  const [svg, tip] = [holder.querySelector("svg"), holder.querySelector(".tip")];
  tip.hidden = true;
  svg.style.display = holder.querySelector(".legend").style.display = rows.length ? "" : "none";
  holder.querySelector(".empty").hidden = rows.length > 0;
  if (rows.length) {
    const frame = board.frame = frameOf(rows, Math.max(svg.clientWidth, 280), board.zoom);
    svg.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    // The frontier last, so that it lies on top.
    const order = row => best.includes(row) + 2 * (row.kind === "teacher");
    const inside = rows.filter(frame.has);
    const points = inside.slice().sort((a, b) => order(a) - order(b));
    const parts = staircase(frame, best) + points.map(row => point(frame, row, best.includes(row))).join("");
    svg.innerHTML = axes(frame) + clipped(frame, parts, `frame-${boards.indexOf(board)}`) +
      names(frame, inside, best.filter(frame.has));
    svg.classList.toggle("zoomed", !!board.zoom);
    const first = svg.querySelector("g.best") || svg.querySelector("g[data-row]");
    if (first) first.tabIndex = 0;
  }
  markRows(board, new Set(best));
}

function showTooltip(board, group) {
  const [holder, row] = [board.section.querySelector(".plot"), board.rows[group.dataset.row]];
  const tip = holder.querySelector(".tip");
  tip.innerHTML = `<b>${escaped(row.version)}</b>${escaped(row.title)}<dl>` +
    facts(row).map(([what, value]) => `<dt>${escaped(what)}</dt><dd>${escaped(value)}</dd>`).join("") + "</dl>";
  tip.hidden = false;
  const [around, at] = [holder.getBoundingClientRect(), group.querySelector(".mark").getBoundingClientRect()];
  const [before, after] = [at.left - around.left - tip.offsetWidth - 12, at.right - around.left + 12];
  const beside = [after, before].find(left => left >= 4 && left + tip.offsetWidth < around.width);
  const lowest = Math.max(around.height - tip.offsetHeight - 4, 4);
  tip.style.left = `${beside ?? 4}px`;
  tip.style.top = `${beside == null ? at.bottom - around.top + 12 : Math.min(Math.max(at.top - around.top - 10, 4), lowest)}px`;
  board.lines.forEach(line => line.classList.toggle("on", line.dataset.row === group.dataset.row));
}

function hideTooltip(board) {
  board.section.querySelector(".tip").hidden = true;
  board.section.querySelectorAll(".on").forEach(each => each.classList.remove("on"));
}

// --- the table

// Show the rows that pass the filters, their retention on the chosen task, and which are on the frontier.
function markRows(board, best) {
  const visible = new Set(shownRows(board));
  for (const line of board.lines) {
    const row = board.rows[line.dataset.row];
    line.hidden = !visible.has(row);
    line.classList.toggle("best", best.has(row));
    const cell = line.querySelector("[data-retention]");
    const value = retention(row);
    cell.dataset.value = value ? value[0] : "";
    cell.innerHTML = value ? `${percent(value[0])}<small>${percent(value[1])} to ${percent(value[2])}</small>` : "&ndash;";
  }
}

function sort(board, header, descending) {
  const place = [...header.parentNode.children].indexOf(header);
  const key = line => line.children[place].dataset.value;
  const number = board.lines.every(line => !key(line) || !isNaN(key(line)));
  const compare = (a, b) => number ? a - b : a.localeCompare(b, "en", {numeric: true});
  const empty = board.lines.filter(line => !key(line));
  const full = board.lines.filter(line => key(line)).sort((a, b) => (descending ? -1 : 1) * compare(key(a), key(b)));
  header.closest("table").tBodies[0].append(...full, ...empty);
  header.parentNode.querySelectorAll("[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

// --- zoom

// Show a part of the plot: {x0, x1, y0, y1} in the units of its axes; null shows all.
function zoomTo(board, zoom) {
  const focus = document.activeElement?.dataset?.row;
  const whole = board.frame && frameOf(shownRows(board).filter(row => retention(row) && price(row) > 0), board.frame.width);
  // Do not zoom out beyond the whole plot.
  const out = zoom && whole && zoom.x0 <= whole.x0 && zoom.x1 >= whole.x1 && zoom.y0 <= whole.y0 && zoom.y1 >= whole.y1;
  if (zoom && (zoom.x1 / zoom.x0 < 1.001 || zoom.y1 - zoom.y0 < 1e-4)) return;
  board.zoom = out ? null : zoom;
  draw(board);
  // The focused point may be out of view; keep the keys working.
  if (focus != null || document.activeElement === document.body)
    (board.svg.querySelector(`g[data-row="${focus}"]`) || board.svg).focus({preventScroll: true});
  saveInAddress();
}

// The part of the plot between two corners, in pixels.
function frameBetween(frame, left, top, right, bottom) {
  return {x0: frame.price(left), x1: frame.price(right), y0: frame.retention(bottom), y1: frame.retention(top)};
}

// Zoom by `factor` around a place in pixels; without one, around the middle.
function zoomBy(board, factor, x, y) {
  const {left, right, top, bottom, width, height} = board.frame;
  x ??= (left + width - right) / 2;
  y ??= (top + height - bottom) / 2;
  const to = (end, at) => at + (end - at) / factor;
  zoomTo(board, frameBetween(board.frame, to(left, x), to(top, y), to(width - right, x), to(height - bottom, y)));
}

function moveBy(board, x, y) {
  const {left, right, top, bottom, width, height} = board.frame;
  zoomTo(board, frameBetween(board.frame, left - x, top - y, width - right - x, height - bottom - y));
}

// The wheel zooms. A drag zooms to a part; with Shift, or by touch in a zoomed plot, it moves the plot.
function listenToPointer(board) {
  const svg = board.svg;
  const at = event => {
    const box = svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let from = null;
  let box = null;
  let active = false;  // so that scrolling the page past a plot does not stop there
  svg.addEventListener("wheel", event => {
    if (!board.frame || !(event.ctrlKey || event.metaKey || active)) return;
    event.preventDefault();
    zoomBy(board, Math.pow(1.0015, -event.deltaY), ...at(event));
  }, {passive: false});
  svg.addEventListener("pointerdown", event => {
    active = true;
    if (event.button || !board.frame || (event.pointerType === "touch" && !board.zoom)) return;
    from = at(event);
  });
  svg.addEventListener("pointermove", event => {
    if (!from) return;
    const [x, y] = at(event);
    if (!box && Math.hypot(x - from[0], y - from[1]) < 5) return;
    svg.setPointerCapture(event.pointerId);
    board.dragged = true;
    if (event.shiftKey || event.pointerType === "touch") {
      moveBy(board, x - from[0], y - from[1]);
      from = [x, y];
      return;
    }
    box ??= svg.appendChild(document.createElementNS(svg.namespaceURI, "rect"));
    [x, y].forEach((to, axis) => {
      box.setAttribute("xy"[axis], Math.min(to, from[axis]));
      box.setAttribute(["width", "height"][axis], Math.abs(to - from[axis]));
    });
    box.setAttribute("class", "box");
  });
  const end = event => {
    if (box) {
      const [left, top, width, height] = ["x", "y", "width", "height"].map(name => +box.getAttribute(name));
      box.remove();
      if (event.type === "pointerup" && width > 8 && height > 8)
        zoomTo(board, frameBetween(board.frame, left, top, left + width, top + height));
    }
    from = box = null;
    setTimeout(() => { board.dragged = false; });  // after the click event that ends a drag
  };
  svg.addEventListener("pointerup", end);
  svg.addEventListener("pointercancel", end);
  svg.addEventListener("pointerleave", () => { active = false; });
  svg.addEventListener("dblclick", () => zoomTo(board, null));
}

// Handle a key for the whole plot. Returns whether it was one.
function zoomByKey(board, event) {
  const arrows = {ArrowRight: [-60, 0], ArrowLeft: [60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]};
  if (event.ctrlKey || event.metaKey || event.altKey || !board.frame) return false;
  const row = board.rows[event.target.dataset?.row];
  const around = row ? [board.frame.x(price(row)), board.frame.y(retention(row)[0])] : [];
  if (event.key === "+" || event.key === "=") zoomBy(board, 1.5, ...around);
  else if (event.key === "-") zoomBy(board, 1 / 1.5, ...around);
  else if (event.key === "0") zoomTo(board, null);
  else if (event.shiftKey && arrows[event.key]) moveBy(board, ...arrows[event.key]);
  else return false;
  return true;
}

// --- the address

const CHOICES = ["task", "cost", ...FILTERS];
const started = new URLSearchParams(location.search);

function saveInAddress() {
  const query = new URLSearchParams(location.search);
  const put = (name, value) => value ? query.set(name, value) : query.delete(name);
  for (const name of CHOICES) put(name, chosen(name) === DATA.tooltip_costs[0] ? "" : chosen(name));
  const sorted = document.querySelector(".board th[aria-sort]");
  put("sort", sorted?.dataset.key);
  put("reverse", sorted && sorted.getAttribute("aria-sort") !== sorted.dataset.first ? "1" : "");
  const place = boards.findIndex(board => board.zoom);
  const zoom = boards[place]?.zoom;
  put("zoom", zoom && [place, ...["x0", "x1", "y0", "y1"].map(end => Number(zoom[end].toPrecision(4)))].join(","));
  const text = query.toString().replaceAll("%2C", ",");
  try {
    history.replaceState(null, "", text ? `?${text}` : location.pathname);
  } catch {}  // a page in a frame or from a file has no address to change
}

function restoreFromAddress() {
  for (const name of CHOICES) {
    const [select, value] = [controls.elements[name], started.get(name)];
    if ([...select.options].some(option => option.value === value)) select.value = value;
  }
  const key = started.get("sort");
  for (const board of DATA.paged ? [] : boards) {
    const header = [...board.section.querySelectorAll("thead th")].find(each => each.dataset.key === key);
    if (header) sort(board, header, (header.dataset.first === "descending") !== started.has("reverse"));
  }
  const [place, x0, x1, y0, y1] = (started.get("zoom") || "").split(",").map(Number);
  if (boards[place] && x0 > 0 && x1 > x0 && y1 > y0) boards[place].zoom = {x0, x1, y0, y1};
}

// --- start

const boards = DATA.boards.map((rows, place) => {
  const section = document.querySelectorAll(".board")[place];
  rows.forEach((row, id) => { row.id = id; });
  const [svg, lines] = [section.querySelector(".plot > svg"), [...section.querySelectorAll("tbody tr")]];
  return {rows, section, svg, lines, zoom: null, frame: null, dragged: false};
});

function update() {
  boards.forEach(draw);
  const all = boards.reduce((sum, board) => sum + board.rows.length, 0);
  const visible = boards.reduce((sum, board) => sum + shownRows(board).length, 0);
  controls.elements.count.value =
    visible < all ? `${visible} of ${all} versions` : `${all} version${all === 1 ? "" : "s"}`;
}

for (const board of boards) {
  const svg = board.svg;
  const group = event => event.target.closest("g[data-row]");
  svg.addEventListener("pointerover", event => group(event) ? showTooltip(board, group(event)) : hideTooltip(board));
  svg.addEventListener("pointerleave", () => hideTooltip(board));
  svg.addEventListener("focusin", event => group(event) && showTooltip(board, group(event)));
  svg.addEventListener("focusout", () => hideTooltip(board));
  const visit = event => {
    const link = group(event) && !board.dragged && board.rows[group(event).dataset.row].link;
    if (link) location.assign(link);
  };
  svg.addEventListener("click", visit);
  svg.addEventListener("keydown", event => {  // the arrows go from point to point, cheapest first
    if (zoomByKey(board, event)) {
      event.preventDefault();
      return;
    }
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (event.key === "Escape") hideTooltip(board);
    if (event.key === "Enter") visit(event);
    if (!step) return;
    const points = [...svg.querySelectorAll("g[data-row]")];
    points.sort((a, b) => price(board.rows[a.dataset.row]) - price(board.rows[b.dataset.row]));
    const next = points[(points.indexOf(group(event)) + step + points.length) % points.length];
    if (!next) return;
    points.forEach(each => { each.tabIndex = each === next ? 0 : -1; });
    next.focus();
    event.preventDefault();
  });
  listenToPointer(board);
  const zoom = board.section.querySelector(".zoom");
  zoom.hidden = false;
  zoom.addEventListener("click", event => {
    const what = event.target.dataset.zoom;
    if (what === "whole") zoomTo(board, null);
    else if (what && board.frame) zoomBy(board, what === "in" ? 1.5 : 1 / 1.5);
  });
  for (const line of board.lines) {
    const its = () => svg.querySelector(`g[data-row="${line.dataset.row}"]`);
    line.addEventListener("pointerenter", () => its()?.classList.add("on"));
    line.addEventListener("pointerleave", () => its()?.classList.remove("on"));
  }
  for (const header of board.section.querySelectorAll("thead th")) {
    if (DATA.paged) break;  // the server sorts
    const button = document.createElement("button");
    button.type = "button";
    button.append(...(header.querySelector("a") || header).childNodes);
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort");
      sort(board, header, now ? now === "ascending" : header.dataset.first === "descending");
      saveInAddress();
    });
  }
}

// A zoom is of one cost and task: another choice shows the whole again.
function choose(event) {
  if (DATA.paged) {
    controls.requestSubmit();
    return;
  }
  if (!event || ["task", "cost"].includes(event.target.name)) boards.forEach(board => { board.zoom = null; });
  update();
  saveInAddress();
}

controls.addEventListener("change", choose);
controls.addEventListener("reset", event => {  // to all, whatever the page began with
  event.preventDefault();
  for (const name of ["task", ...FILTERS]) controls.elements[name].value = "";
  choose();
});
controls.querySelectorAll("[type=reset]").forEach(button => { button.hidden = false; });
controls.hidden = false;
addEventListener("resize", () => boards.forEach(draw));
restoreFromAddress();
update();
