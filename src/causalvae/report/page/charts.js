// Curves. A chart is drawn when it comes near the window, and drawn again when a switch above it moves.
const charts = new Map(); // element of the plot -> its chart; drawn ones are in `drawn`
const drawn = new Set();
const PRINTED = [320, 200]; // pixels of a chart on paper, two beside each other
const MARKS = { checkpoint: "triangle-up", warning: "diamond", skipped: "x", aside: "triangle-down-open" };
const MARK_COLORS = { checkpoint: "soft", warning: "warn", skipped: "bad", aside: "bad" };

// Plotly reads a little HTML in names; this leaves none in them.
function plain(name) {
  return String(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function veiled(hex, opacity) {
  const value = parseInt(hex.slice(1), 16);
  return `rgba(${value >> 16},${(value >> 8) & 255},${value & 255},${opacity})`;
}

// Exponential average by distance in x, so that it is the same for thinned and whole curves.
function smoothed(x, y, amount) {
  if (amount === 0 || x.length < 3 || typeof x[0] !== "number") return y;
  const span = (x[x.length - 1] - x[0]) / 400;
  const reach = (Math.max(span, (x[1] - x[0]) || 1) * amount) / (1 - amount);
  let mean = null;
  let weight = 0;
  return y.map((value, i) => {
    if (value === null) return null;
    const keep = i === 0 ? 0 : Math.exp(-Math.max(x[i] - x[i - 1], 1e-9) / reach);
    mean = mean === null ? value : (mean * weight * keep + value) / (weight * keep + 1);
    weight = weight * keep + 1;
    return Number(mean.toPrecision(6)); // a curve that does not move must not wander in its last digits
  });
}

function seriesName(series) {
  const run = series.run === null ? "" : data.runs[series.run].name;
  return plain([run, series.label].filter(Boolean).join(" · "));
}

function band(series, ink) {
  const common = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", x: series.x };
  return [
    { ...common, y: series.low },
    { ...common, y: series.high, fill: "tonexty", fillcolor: veiled(ink, 0.16) },
  ];
}

// Where a curve is drawn: categories are names, which Plotly would read as HTML too.
function places(x) {
  return typeof x[0] === "string" ? x.map(plain) : x;
}

function curve(chart, series, place) {
  const beside = chart.series.slice(0, place).filter((each) => each.run === series.run).length;
  const dash = ["solid", "dot", "dash", "dashdot"][beside % 4];
  const ink = runColor(series.run);
  const few = series.x.length < 40;
  const line = { color: ink, width: 1.8, dash };
  const named = { name: seriesName(series), hovertemplate: "%{x:,}: %{y:.5g}<extra>%{fullData.name}</extra>" };
  if (typeof series.x[0] === "string") named.hovertemplate = "%{x}: %{y:.5g}<extra>%{fullData.name}</extra>";
  const bands = series.low ? band(series, ink) : [];
  const smooth = state.smoothing > 0 && !few && !series.low;
  if (!smooth) {
    const mode = few ? "lines+markers" : "lines";
    return [...bands, { ...named, x: places(series.x), y: series.y, mode, line, marker: { size: 5, color: ink } }];
  }
  const x = series.mx || series.x;
  const y = smoothed(x, series.my || series.y, state.smoothing);
  return [
    { x: series.x, y: series.y, mode: "lines", line: { color: veiled(ink, 0.28), width: 1 }, hoverinfo: "skip" },
    { ...named, x, y, mode: "lines", line },
  ];
}

// Checkpoints, warnings and skipped steps as small signs on the axis.
function marks(chart) {
  if (chart.x !== "step" || chart.group === "heldout") return [];
  const found = [];
  data.runs.forEach((run, index) => {
    if (state.hidden.has(index)) return;
    for (const kind of Object.keys(MARKS)) {
      const events = run.events.filter((event) => event.kind === kind);
      if (!events.length) continue;
      const marker = { symbol: MARKS[kind], size: kind === "checkpoint" ? 6 : 8, color: color(MARK_COLORS[kind]) };
      found.push({
        x: events.map((event) => event.step), y: events.map(() => 0.012), yaxis: "y2", mode: "markers", marker,
        text: events.map((event) => plain(event.text.length > 90 ? `${event.text.slice(0, 90)} ...` : event.text)),
        hovertemplate: `${plain(text(`mark.${kind}`))} %{x:,}<br>%{text}<extra></extra>`, cliponaxis: false,
      });
    }
  });
  return found;
}

function traces(chart) {
  const shown = chart.series.filter((series) => !state.hidden.has(series.run));
  return [...shown.flatMap((series, place) => curve({ series: shown }, series, place)), ...marks(chart)];
}

// The heights that a chart shows: of a zoomed one, those of the steps in sight; where spikes are cut, all but
// the highest and lowest hundredth, if the rest would be squeezed into a quarter. null leaves it to Plotly.
function level(chart, log) {
  if (chart.x !== "step" || chart.group === "heldout") return null;
  const [from, to] = state.range || [-Infinity, Infinity];
  const values = chart.series.filter((series) => !state.hidden.has(series.run)).flatMap((series) =>
    series.y.filter((value, i) => value !== null && series.x[i] >= from && series.x[i] <= to && (!log || value > 0)));
  if (!values.length) return null;
  const sorted = values.map((value) => (log ? Math.log10(value) : value)).sort((a, b) => a - b);
  const at = (part) => sorted[Math.round(part * (sorted.length - 1))];
  const low = at(0.01), high = at(0.99), all = at(1) - at(0);
  if (state.cut && values.length >= 50 && high > low && all > 4 * (high - low)) {
    const room = high - low;
    return [Math.max(low - 0.3 * room, at(0) - 0.06 * room), Math.min(high + 0.3 * room, at(1) + 0.06 * room)];
  }
  return state.range && all > 0 ? [at(0) - 0.06 * all, at(1) + 0.06 * all] : null;
}

function layout(chart) {
  const axis = { gridcolor: color("grid"), linecolor: color("line"), zeroline: false, automargin: true };
  const category = typeof (chart.series[0].x[0]) === "string";
  const log = state.log && chart.series.some((series) => series.y.some((value) => value > 0));
  const named = chart.x === "step" ? text("axis.step") : plain(text(`axis.${chart.x}`, chart.x));
  const x = { ...axis, title: { text: named, font: { size: 11 }, standoff: 6 } };
  if (category) x.type = "category";
  if (state.range && chart.x === "step") x.range = [...state.range];
  const cut = level(chart, log);
  return {
    xaxis: x,
    yaxis: { fixedrange: true, ...(cut ? { range: cut } : {}), ...axis, type: log ? "log" : "linear", exponentformat: "e", nticks: 6, title: { text: plain(chart.unit), font: { size: 11 } } },
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    ...(state.printing ? { width: PRINTED[0], height: PRINTED[1] } : { autosize: true }),
    margin: { l: 44, r: 10, t: 8, b: 34 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("soft"), size: 11, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { color: color("ink") } },
  };
}

const CONFIG = {
  displayModeBar: false, responsive: true, showTips: false, doubleClick: false,
};

function draw(plot) {
  const chart = charts.get(plot);
  if (!chart) return;
  Plotly.react(plot, traces(chart), layout(chart), CONFIG);
  if (drawn.has(plot)) return;
  drawn.add(plot);
  plot.dataset.drawn = "yes";
  if (chart.x !== "step") return;
  plot.on("plotly_relayout", (change) => zoomed(change));
  plot.on("plotly_doubleclick", () => zoom(null));
}

// Zooming one chart along the steps zooms all of them.
function zoomed(change) {
  if (change["xaxis.autorange"]) zoom(null);
  const from = change["xaxis.range[0]"];
  const to = change["xaxis.range[1]"];
  if (from === undefined || to === undefined) return;
  if (state.range && state.range[0] === from && state.range[1] === to) return;
  zoom([from, to]);
}

function zoom(range) {
  if (range === null && state.range === null) return;
  state.range = range;
  for (const plot of drawn) {
    if (charts.get(plot).x !== "step") continue;
    draw(plot);
  }
}

function redraw() {
  for (const plot of drawn) draw(plot);
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

function chartFigure(chart) {
  const plot = element("div", { class: "plot" });
  const caption = element("figcaption", {});
  const code = element("code", {});
  const title = element("span", { "data-t": `metric.${chart.name}` });
  title.textContent = text(`metric.${chart.name}`, chart.name);
  if (title.textContent !== chart.name) code.textContent = chart.name;
  caption.append(title, code);
  charts.set(plot, chart);
  near.observe(plot);
  return element("figure", { class: "chart", "data-name": chart.name }, caption, plot);
}

function showCharts() {
  for (const place of document.querySelectorAll(".charts")) {
    place.append(...data.charts.filter((chart) => chart.group === place.dataset.group).map(chartFigure));
  }
}

function showLegend() {
  const legend = document.getElementById("legend");
  if (!legend || data.runs.length < 2) return;
  data.runs.forEach((run, index) => {
    const box = element("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(index); else state.hidden.add(index);
      redraw();
    });
    legend.append(element("label", {}, box, element("i", { class: `dot run-${index % 6}` }), run.name));
  });
}

function showTools() {
  const smoothing = document.getElementById("smoothing");
  if (!smoothing) return;
  state.smoothing = Number(smoothing.value);
  smoothing.addEventListener("input", () => { state.smoothing = Number(smoothing.value); redraw(); });
  const log = document.getElementById("log");
  log.addEventListener("change", () => { state.log = log.checked; redraw(); });
  const cut = document.getElementById("cut");
  cut.addEventListener("change", () => { state.cut = cut.checked; redraw(); });
  document.getElementById("unzoom").addEventListener("click", () => zoom(null));
}
