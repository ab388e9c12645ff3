// The page as a whole: language, theme, print, and looking for newer numbers while a training goes on.
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = document.getElementById("theme");
const lang = document.getElementById("lang");

function applyTheme(name) {
  document.documentElement.dataset.theme = name === "auto" ? (dark.matches ? "dark" : "light") : name;
  redraw();
}

function applyLanguage(name) {
  state.lang = name;
  document.documentElement.lang = name;
  translate(document);
  redraw();
}

// New tables take the place of the old ones; charts and films stay where they are and get new data.
function renew(page) {
  for (const old of document.querySelectorAll("section[data-live]")) {
    const fresh = page.getElementById(old.id);
    if (fresh) old.replaceWith(document.adoptNode(fresh));
  }
  translate(document);
  const next = JSON.parse(page.getElementById("data").textContent);
  data.runs = next.runs;
  const byName = new Map(next.charts.map((chart) => [`${chart.group} ${chart.name}`, chart]));
  for (const [plot, chart] of charts) {
    const fresh = byName.get(`${chart.group} ${chart.name}`);
    byName.delete(`${chart.group} ${chart.name}`);
    if (fresh) charts.set(plot, fresh);
  }
  const films = JSON.stringify(next.players) !== JSON.stringify(data.players);
  if (byName.size || (films && !data.players.length)) return void location.reload(); // a new chart or the first film
  redraw();
  if (!films) return;
  data.players = next.players;
  document.getElementById("players").replaceChildren();
  showPlayers();
}

async function look() {
  const live = document.getElementById("live");
  try {
    const answer = await fetch("version", { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const version = await answer.text();
    if (look.version !== undefined && look.version !== version) {
      const page = await (await fetch("page", { cache: "no-store" })).text();
      renew(new DOMParser().parseFromString(page, "text/html"));
    }
    look.version = version;
    live.classList.remove("lost");
  } catch (error) {
    live.classList.add("lost");
    live.title = String(error);
  }
  setTimeout(look, data.every * 1000);
}

theme.addEventListener("change", () => applyTheme(theme.value));
dark.addEventListener("change", () => applyTheme(theme.value));
lang.addEventListener("change", () => applyLanguage(lang.value));
addEventListener("beforeprint", () => {
  state.printing = true;
  applyTheme("light");
  for (const plot of charts.keys()) draw(plot);
});
addEventListener("afterprint", () => {
  state.printing = false;
  applyTheme(theme.value);
});
showLegend();
showTools();
showCharts();
showPlayers();
applyTheme("auto");
if (data.every) look();
document.documentElement.dataset.ready = "yes";
