// Films. A film is one picture with all of its frames in a grid, so that any frame is shown exactly.
const SVG = "http://www.w3.org/2000/svg";
const MODES = ["side", "wipe", "difference"];
const PLAY_MS = 125; // 8 frames a second, as the films of a run have

function picture(base64) {
  const image = new Image();
  image.src = `data:image/webp;base64,${base64}`;
  return image;
}

class Player {
  constructor(clip) {
    this.clip = clip;
    this.frame = 0;
    this.version = clip.versions.length - 1;
    this.mode = "side";
    this.wipe = 0.5;
    this.gain = 8;
    this.timer = null;
    this.pictures = new Map();
    this.make();
    this.load("original", clip.original);
    this.show();
  }

  make() {
    const { clip } = this;
    const name = element("span", {});
    if (clip.name) name.append(word("held_out"), ` ${clip.name}`); else name.append(word("clip"), ` ${clip.clip}`);
    if (clip.of) name.append(` · ${clip.of}`); else if (data.runs.length > 1) name.append(` · ${data.runs[clip.run].name}`);
    this.score = element("span", { class: "score" });
    this.canvas = element("canvas", { role: "img", "data-t-label": "film.picture", "aria-label": text("film.picture") });
    this.left = word("original");
    this.left.className = "left";
    this.right = word("reconstruction");
    this.right.className = "right";
    this.strip = document.createElementNS(SVG, "svg");
    this.figure = element("figure", { class: "player", tabindex: "0" },
      element("h3", {}, name, this.score),
      element("div", { class: "stage" }, this.canvas, this.left, this.right), this.strip, this.controls());
    this.makeStrip();
    this.listen();
  }

  controls() {
    const { clip } = this;
    this.modes = MODES.map((mode) => {
      const button = element("button", { type: "button", "data-mode": mode }, word(`mode.${mode}`));
      button.addEventListener("click", () => { this.mode = mode; this.show(); });
      return button;
    });
    this.play = element("button", { type: "button", class: "play", "data-t-label": "play", "aria-label": text("play") }, "▶");
    this.play.addEventListener("click", () => this.toggle());
    this.seek = this.slider("frame", 0, clip.frames - 1, 1, (value) => { this.frame = value; });
    this.at = element("output", {});
    this.seek.className = "frame";
    this.seek.append(this.at);
    this.wiper = this.slider("wipe", 0, 1, 0.01, (value) => { this.wipe = value; });
    this.gainer = this.slider("gain", 1, 32, 1, (value) => { this.gain = value; });
    this.gained = element("output", {});
    this.gainer.append(this.gained);
    this.stepper = this.slider("training_step", 0, clip.versions.length - 1, 1, (value) => { this.version = value; });
    this.step = element("output", { class: "step" });
    this.stepper.append(this.step);
    this.stepper.hidden = clip.versions.length < 2;
    return element("div", { class: "controls" }, this.play, this.seek,
      element("div", { class: "modes", role: "group", "data-t-label": "modes", "aria-label": text("modes") }, ...this.modes),
      this.wiper, this.gainer, this.stepper);
  }

  slider(key, low, high, step, change) {
    const input = element("input", { type: "range", min: low, max: high, step, name: key });
    input.addEventListener("input", () => { change(Number(input.value)); this.show(); });
    return element("label", {}, word(key), input);
  }

  makeStrip() {
    const { clip } = this;
    this.strip.setAttribute("class", "strip");
    this.strip.setAttribute("viewBox", `0 0 ${clip.frames} 10`);
    this.strip.setAttribute("preserveAspectRatio", "none");
    this.strip.setAttribute("role", "img");
    this.strip.dataset.tLabel = "film.strip";
    this.strip.setAttribute("aria-label", text("film.strip"));
    this.bars = Array.from({ length: clip.frames }, (_, i) => {
      const bar = document.createElementNS(SVG, "rect");
      bar.setAttribute("x", i + 0.08);
      bar.setAttribute("width", 0.84);
      this.strip.append(bar);
      return bar;
    });
    this.strip.addEventListener("click", (event) => {
      const box = this.strip.getBoundingClientRect();
      this.go(Math.floor(((event.clientX - box.left) / box.width) * clip.frames));
    });
  }

  listen() {
    this.figure.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "range") return;
      const keys = {
        ArrowRight: () => this.go(this.frame + 1), ArrowLeft: () => this.go(this.frame - 1),
        Home: () => this.go(0), End: () => this.go(this.clip.frames - 1),
        1: () => this.turn("side"), 2: () => this.turn("wipe"), 3: () => this.turn("difference"),
        "[": () => this.train(this.version - 1), "]": () => this.train(this.version + 1),
      };
      if (event.target === this.figure) keys[" "] = () => this.toggle();
      if (!Object.hasOwn(keys, event.key)) return;
      event.preventDefault();
      keys[event.key]();
    });
    const drag = (event) => {
      if (this.mode !== "wipe" || !(event.buttons & 1)) return;
      const box = this.canvas.getBoundingClientRect();
      this.wipe = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.show();
    };
    this.canvas.addEventListener("pointerdown", drag);
    this.canvas.addEventListener("pointermove", drag);
  }

  load(name, base64) {
    if (!this.pictures.has(name)) {
      const image = picture(base64);
      image.addEventListener("load", () => this.show());
      this.pictures.set(name, image);
    }
    return this.pictures.get(name);
  }

  go(frame) { this.frame = Math.min(this.clip.frames - 1, Math.max(0, frame)); this.show(); }
  turn(mode) { this.mode = mode; this.show(); }
  train(version) { this.version = Math.min(this.clip.versions.length - 1, Math.max(0, version)); this.show(); }

  toggle() {
    if (this.timer !== null) { clearInterval(this.timer); this.timer = null; } else {
      this.timer = setInterval(() => { this.frame = (this.frame + 1) % this.clip.frames; this.show(); }, PLAY_MS);
    }
    this.play.textContent = this.timer === null ? "▶" : "❚❚";
  }

  show() {
    const version = this.clip.versions[this.version];
    for (const button of this.modes) button.setAttribute("aria-pressed", button.dataset.mode === this.mode);
    for (const [label, value] of [[this.seek, this.frame], [this.wiper, this.wipe], [this.gainer, this.gain], [this.stepper, this.version]]) {
      label.querySelector("input").value = value;
    }
    this.wiper.hidden = this.mode !== "wipe";
    this.gainer.hidden = this.mode !== "difference";
    this.left.hidden = this.right.hidden = this.mode === "difference";
    this.at.textContent = `${this.frame + 1} / ${this.clip.frames}`;
    this.gained.textContent = `×${this.gain}`;
    this.step.textContent = version.step.toLocaleString("en");
    const now = version.psnr[this.frame];
    this.score.textContent = now === null ? "PSNR ∞" : `PSNR ${now.toFixed(2)} dB`;
    this.figure.dataset.frame = this.frame;
    this.figure.dataset.step = version.step;
    this.showStrip(version.psnr);
    this.paint(this.load("original", this.clip.original), this.load(version.step, version.film));
  }

  showStrip(psnr) {
    const known = psnr.filter((value) => value !== null);
    const low = Math.min(...known), high = Math.max(...known);
    this.bars.forEach((bar, i) => {
      const value = psnr[i] === null ? high : psnr[i];
      const height = high > low ? 2.5 + (7.5 * (value - low)) / (high - low) : 7;
      bar.setAttribute("y", 10 - height);
      bar.setAttribute("height", height);
      bar.setAttribute("class", i === this.frame ? "now" : psnr[i] === low && high > low ? "worst" : "");
    });
  }

  paint(original, film) {
    if (!original.complete || !film.complete) return;
    const { width, height, columns } = this.clip;
    const x = (this.frame % columns) * width, y = Math.floor(this.frame / columns) * height;
    this.canvas.width = this.mode === "side" ? 2 * width : width;
    this.canvas.height = height;
    const shape = this.canvas.width / height;
    this.canvas.style.width = `min(100%, ${(70 * shape).toFixed(2)}vh)`;
    const pen = this.canvas.getContext("2d");
    const put = (image, from, to, at) => pen.drawImage(image, x + from, y, to - from, height, at + from, 0, to - from, height);
    if (this.mode === "side") { put(original, 0, width, 0); put(film, 0, width, width); } else if (this.mode === "wipe") {
      const edge = Math.round(this.wipe * width);
      if (edge > 0) put(original, 0, edge, 0);
      if (edge < width) put(film, edge, width, 0);
      pen.fillStyle = "#fff";
      pen.fillRect(Math.min(edge, width - 1), 0, Math.max(1, width / 200), height);
    } else {
      put(original, 0, width, 0);
      pen.globalCompositeOperation = "difference";
      put(film, 0, width, 0);
      pen.globalCompositeOperation = "lighter"; // adding the picture to itself doubles it
      for (let gain = 1; gain < this.gain; gain *= 2) {
        pen.globalAlpha = Math.min(1, this.gain / gain - 1);
        pen.drawImage(this.canvas, 0, 0);
      }
    }
    this.figure.dataset.painted = `${this.mode} ${this.frame} ${this.figure.dataset.step}`;
  }
}

function showPlayers() {
  const place = document.getElementById("players");
  if (place) place.append(...data.players.map((clip) => new Player(clip).figure));
}
