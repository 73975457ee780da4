// Shows a range of steps in all charts of the page. A drag, a touch or a key on a chart chooses it.
// It draws as report/drawings.py does, from the values that are beside each line: a test compares the two.
"use strict";
(() => {
  const WIDTH = 1000, HEIGHT = 300, COLUMNS = 48, LEAST_PIXELS = 5, KEY = `report ${location.pathname}`;
  const words = text => text.split(" ").map(Number);

  function stretchesOf(text) { // _kept in drawings.py says how they are written
    let before = 0, gap = 1, more = 0;
    return text.split(";").map(part => {
      const [values, steps] = part.split(":").reverse();
      const [mean, low = mean, high = mean] = words(values);
      const [first, last] = steps ? words(steps) : [before + gap, before + gap + more];
      [before, gap, more] = [first, first - before, last - first];
      return {first, last, mean, low, high};
    });
  }

  const charts = [...document.querySelectorAll("svg[data-first]")].map(svg => ({
    svg,
    frame: svg.closest("figure"),
    ends: [Number(svg.dataset.first), Number(svg.dataset.last)],
    unit: svg.dataset.unit,
    mayBeLog: svg.dataset.log === "yes",
    lines: [...svg.querySelectorAll(".line")].map(path => ({
      path,
      band: path.previousElementSibling?.matches(".band") ? path.previousElementSibling : null,
      name: path.dataset.name,
      stretches: stretchesOf(path.dataset.values),
    })),
    levels: [...svg.querySelectorAll(".planned")].map(path => [path, words(path.dataset.level)]),
    marks: [...svg.querySelectorAll(".at")].map(path => [path, Number(path.dataset.step)]),
  }));
  if (!charts.length) return;
  const whole = [Math.min(...charts.map(chart => chart.ends[0])), Math.max(...charts.map(chart => chart.ends[1]))];
  let range = null; // [first step, last step]; null: all

  // --- drawing -------------------------------------------------------------------------------------------------------

  function scaleOf(values, mayBeLog) {
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (mayBeLog && low > 0 && high / low > 30) {
      return {low: 10 ** Math.floor(Math.log10(low)), high: 10 ** Math.ceil(Math.log10(high)), isLog: true};
    }
    const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return {low: low >= 0 && low < 2 * (high - low) ? 0 : low - room, high: high + room, isLog: false};
  }

  function place({low, high, isLog}, value) {
    if (isLog) [low, high, value] = [Math.log10(low), Math.log10(high), Math.log10(Math.max(value, low))];
    return (value - low) / (high - low);
  }

  function ticksOf({low, high, isLog}) {
    const ticks = [];
    if (isLog) {
      const first = Math.round(Math.log10(low)), last = Math.round(Math.log10(high));
      const step = Math.max(1, Math.floor((last - first) / 4));
      for (let power = first; power <= last; power += step) ticks.push(10 ** power);
      return ticks;
    }
    const size = 10 ** Math.floor(Math.log10((high - low) / 4));
    const step = size * [1, 2, 5, 10].find(factor => (high - low) / (size * factor) <= 5);
    const last = Math.floor(high / step + 1e-9);
    for (let count = Math.ceil(low / step - 1e-9); count <= last; count++) ticks.push(step * count);
    return ticks;
  }

  function short(value) {
    const size = Math.abs(value);
    for (const [unit, suffix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= 1e5 && size >= unit && size < 1e18) return Number((value / unit).toPrecision(4)) + suffix;
    }
    if (size >= 1e18 || (size > 0 && size < 1e-4)) {
      return value.toExponential(2).replace(/\.?0+e/, "e").replace(/e([+-])(\d)$/, "e$10$2");
    }
    if (size >= 1e4) return value.toLocaleString("en-US", {maximumFractionDigits: 0});
    return String(Number(value.toPrecision(size && size < 1e-3 ? 3 : 4)));
  }

  const count = step => step.toLocaleString("en-US");
  const inside = (first, last, [from, to]) => last >= from && first <= to;

  function draw(chart) {
    const shown = range ?? chart.ends;
    chart.frame.hidden = range !== null && chart.ends[0] > whole[0]; // it shows what a zoom shows too
    const across = step => (step - shown[0]) / (shown[1] - shown[0]) * WIDTH;
    const seen = chart.lines.map(line => line.stretches.filter(one => inside(one.first, one.last, shown)));
    const values = seen.flat().flatMap(one => [one.low, one.high]);
    const levels = chart.levels.map(([path, [first, last, value]]) => [path, first, last, value]);
    if (values.length) values.push(...levels.filter(one => inside(one[1], one[2], shown)).map(one => one[3]));
    const scale = values.length ? scaleOf(values, chart.mayBeLog) : null;
    const high = value => HEIGHT * (1 - place(scale, value));
    const ticks = scale ? ticksOf(scale).filter(tick => place(scale, tick) >= 0 && place(scale, tick) <= 1) : [];
    const grid = ticks.map(tick => `M0 ${high(tick).toFixed(1)}H${WIDTH}`).join("");
    chart.svg.querySelector(".grid").setAttribute("d", grid);
    chart.frame.querySelector(".ticks").replaceChildren(...ticks.map(tick => {
      const label = document.createElement("i");
      label.textContent = short(tick);
      label.style.bottom = `${100 * place(scale, tick)}%`;
      return label;
    }));
    const middle = Math.floor((shown[0] + shown[1]) / 2);
    [...chart.frame.querySelector(".ends").children].forEach((end, number) => {
      end.textContent = count([shown[0], middle, shown[1]][number]);
    });
    for (const [path, step] of chart.marks) {
      path.setAttribute("d", inside(step, step, shown) ? `M${across(step).toFixed(1)} 0V${HEIGHT}` : "");
    }
    for (const [path, first, last, value] of levels) {
      const [from, to] = [first, last].map(step => across(Math.min(Math.max(step, shown[0]), shown[1])).toFixed(1));
      path.setAttribute("d", scale && inside(first, last, shown) ? `M${from} ${high(value).toFixed(1)}H${to}` : "");
    }
    chart.lines.forEach((line, number) => drawLine(line, seen[number].length > 0, shown, across, high));
    drawColumns(chart, seen, shown);
  }

  function drawLine({path, band, stretches}, isSeen, shown, across, high) {
    // one point beyond each side, so that the line goes on to the edge
    const from = stretches.findLastIndex(one => one.last < shown[0]);
    const to = stretches.findIndex(one => one.first > shown[1]);
    const found = isSeen ? stretches.slice(Math.max(from, 0), to < 0 ? undefined : to + 1) : [];
    const through = points => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
    const along = (name, of) => of.map(one => [across((one.first + one.last) / 2), high(one[name])]);
    const points = along("mean", found);
    if (points.length === 1) points.push([points[0][0] + 2, points[0][1]]); // a line of no length is not drawn
    path.setAttribute("d", points.length ? through(points) : "");
    band?.setAttribute("d", found.length ? through([...along("high", found), ...along("low", found).reverse()]) + "z" : "");
  }

  function drawColumns(chart, seen, shown) {
    const number = Math.min(COLUMNS, Math.max(...seen.map(found => found.length)));
    const width = (shown[1] - shown[0] + 1) / number, texts = new Map(), steps = new Map();
    chart.lines.forEach((line, place) => {
      const columns = new Map();
      for (const one of seen[place]) {
        const at = Math.trunc(((one.first + one.last) / 2 - shown[0]) / width);
        const column = Math.min(Math.max(at, 0), number - 1), before = columns.get(column) ?? one;
        columns.set(column, {low: Math.min(before.low, one.low), high: Math.max(before.high, one.high)});
        const [first, last] = steps.get(column) ?? [one.first, one.last];
        steps.set(column, [Math.min(first, one.first), Math.max(last, one.last)]);
      }
      for (const [column, {low, high}] of columns) {
        const text = low === high ? short(low) : `${short(low)} to ${short(high)}`;
        const said = `${line.name || "value"}: ${text} ${chart.unit}`.trimEnd();
        texts.set(column, [...(texts.get(column) ?? []), said]);
      }
    });
    const group = chart.svg.querySelector(".columns");
    group.replaceChildren(...[...texts].sort(([a], [b]) => a - b).map(([column, lines]) => {
      const [first, last] = steps.get(column);
      const where = first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`;
      const title = shape("title", {});
      title.textContent = [where, ...lines].join("\n");
      const size = {x: column * WIDTH / number, width: WIDTH / number, height: HEIGHT, class: "look"};
      const look = shape("rect", size);
      look.append(title);
      return look;
    }));
  }

  function shape(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // --- the range -----------------------------------------------------------------------------------------------------

  const bar = document.createElement("div"), said = document.createElement("span"), all = document.createElement("button");
  bar.className = "zoom";
  bar.hidden = true;
  said.setAttribute("role", "status");
  all.type = "button";
  all.textContent = "All steps";
  all.addEventListener("click", () => show(null));
  bar.append(said, all);
  document.querySelector("main").append(bar);
  for (const hint of document.querySelectorAll(".how")) hint.hidden = false;

  function show(chosen) {
    range = null;
    if (chosen) {
      const [first, last] = chosen.map(step => Math.min(Math.max(Math.round(step), whole[0]), whole[1]));
      const from = Math.min(first, whole[1] - 1), to = Math.max(last, from + 1);
      if (from > whole[0] || to < whole[1]) range = [from, to];
    }
    charts.forEach(draw);
    bar.hidden = range === null;
    if (range) {
      const found = charts.flatMap(chart => chart.lines).flatMap(line => line.stretches);
      const widest = found.reduce((most, one) => (
        inside(one.first, one.last, range) ? Math.max(most, one.last - one.first + 1) : most), 1);
      const points = widest > 1 ? `a point is up to ${count(widest)} steps` : "a point is one record";
      said.textContent = `steps ${count(range[0])} to ${count(range[1])}; ${points}`;
    }
    try { // a page that is read again keeps its range; a browser may refuse
      if (range) sessionStorage.setItem(KEY, range.join(" "));
      else sessionStorage.removeItem(KEY);
    } catch { /* without it, all steps are shown again */ }
  }

  function scaled(factor, shift) {
    const [first, last] = range ?? whole, size = last - first, middle = (first + last) / 2 + shift * size;
    const half = Math.min(factor * size, whole[1] - whole[0]) / 2;
    const inside = Math.min(Math.max(middle, whole[0] + half), whole[1] - half);
    show([inside - half, inside + half]);
  }

  const KEYS = {
    "+": () => scaled(0.5, 0), "=": () => scaled(0.5, 0), "-": () => scaled(2, 0),
    ArrowLeft: () => scaled(1, -0.25), ArrowRight: () => scaled(1, 0.25),
  };
  let drag = null; // {chart, from, to, mark}: pixels of the window

  function stop() {
    drag?.mark.remove();
    drag = null;
  }

  for (const chart of charts) {
    const {svg} = chart;
    const share = x => {
      const box = svg.getBoundingClientRect();
      return Math.min(Math.max((x - box.left) / box.width, 0), 1);
    };
    svg.classList.add("zoomable");
    if (chart.ends[0] === whole[0]) svg.tabIndex = 0;
    svg.addEventListener("pointerdown", event => {
      if (event.button || !event.isPrimary) return;
      stop();
      drag = {chart, from: event.clientX, to: event.clientX, mark: shape("rect", {class: "chosen", height: HEIGHT})};
      svg.append(drag.mark);
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", event => {
      if (drag?.chart !== chart) return;
      drag.to = event.clientX;
      const [first, last] = [share(drag.from), share(drag.to)].sort((a, b) => a - b);
      drag.mark.setAttribute("x", first * WIDTH);
      drag.mark.setAttribute("width", (last - first) * WIDTH);
    });
    svg.addEventListener("pointerup", () => {
      if (drag?.chart !== chart) return;
      const {from, to} = drag, [first, last] = range ?? chart.ends;
      stop();
      if (Math.abs(to - from) < LEAST_PIXELS) return;
      show([share(from), share(to)].sort((a, b) => a - b).map(at => first + at * (last - first)));
    });
    svg.addEventListener("pointercancel", stop); // the browser scrolls instead
    svg.addEventListener("dblclick", () => show(null));
    svg.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
      event.preventDefault();
      KEYS[event.key]();
    });
  }
  document.addEventListener("keydown", event => {
    if (event.key !== "Escape") return;
    if (drag) stop();
    else if (range) show(null);
  });
  try {
    const kept = words(sessionStorage.getItem(KEY) ?? "");
    if (kept.length === 2 && kept.every(Number.isFinite)) show(kept);
  } catch { /* as above */ }
})();
