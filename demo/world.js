// The World tab: asks for frames, draws them, and tells the server which keys are down.
// Runs in a page of Gradio, which hands in `element`; `wire.js` comes before it. Nothing is fetched
// from other hosts.
(() => {
  const root = element.querySelector(".bw");
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  const offers = JSON.parse(root.dataset.offers);
  const part = (name) => root.querySelector(`.bw-${name}`);
  const canvas = root.querySelector("canvas");
  const paper = canvas.getContext("2d");
  const PATIENCE = 180000; // milliseconds without a key after which the world waits
  const GLYPHS = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", " ": "space" };
  const WORDS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };
  const ask = Wire.asker("world");
  const sleep = (ms) => (ms > 0 ? new Promise((wake) => setTimeout(wake, ms)) : null);

  let offer = offers[0];
  let count = 0;
  let branches = [];
  let current = null;
  let turn = 0; // every change of what plays gets a number; older loops see it and end
  let playing = false;
  let standing = false; // while it is forked, saved or loaded
  let underway = Promise.resolve(); // the step on its way; a world takes one at a time
  let touched = 0;
  let shown = []; // when the last frames were drawn
  const held = new Set();
  const tapped = new Set(); // down and up again between two steps: counts for one step

  // ---- talking to the server ------------------------------------------------------------

  async function frames(path, body, kind) {
    const answer = await ask(path, body, kind);
    const about = JSON.parse(answer.headers.get("x-world"));
    return { ...about, bytes: new Uint8Array(await answer.arrayBuffer()) };
  }

  function close(key) {
    if (key) ask("close", JSON.stringify({ key })).catch(() => {});
  }

  // ---- the screen -----------------------------------------------------------------------

  function size(width, height) {
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    fit();
  }

  function fit() { // every pixel of a small frame becomes a whole number of pixels
    const room = part("screen").clientWidth;
    if (!room) return;
    const tall = Math.max(200, window.innerHeight * 0.62);
    const scale = Math.floor(Math.min(room / canvas.width, tall / canvas.height));
    canvas.style.width = scale >= 1 ? `${canvas.width * Math.min(scale, 16)}px` : "100%";
  }

  function draw(got, k) {
    size(got.width, got.height);
    const image = paper.createImageData(got.width, got.height);
    const pixels = got.width * got.height;
    for (let i = 0, from = k * pixels * 3; i < pixels; i++, from += 3) {
      image.data[4 * i] = got.bytes[from];
      image.data[4 * i + 1] = got.bytes[from + 1];
      image.data[4 * i + 2] = got.bytes[from + 2];
      image.data[4 * i + 3] = 255;
    }
    paper.putImageData(image, 0, 0);
    current.image = image;
  }

  function count_shown() {
    const now = performance.now();
    shown.push(now);
    shown = shown.filter((time) => now - time < 2000);
    root.dataset.frames = Number(root.dataset.frames || 0) + 1;
    const rate = shown.length > 2 ? (1000 * (shown.length - 1)) / (now - shown[0]) : 0;
    root.dataset.fps = rate.toFixed(2);
    part("fps").textContent = rate ? `${rate.toFixed(1)} frames/s` : "";
  }

  function say(kind, text) {
    root.dataset.kind = kind;
    part("line").textContent = text;
  }

  function paint() {
    part("play").textContent = playing ? "Stop" : "Play";
    part("play").classList.toggle("bw-main", !playing);
    for (const name of ["fork", "save"]) part(name).disabled = !current.key;
    part("hint").hidden = playing || Boolean(current.image);
    for (const button of root.querySelectorAll(".bw-key"))
      button.classList.toggle("bw-on", held.has(button.dataset.key));
    root.dataset.keys = [...held].join(" ");
  }

  async function show_start() {
    const branch = current;
    branch.image = null;
    paper.clearRect(0, 0, canvas.width, canvas.height);
    if (branch.start === null) return paint();
    const picture = new Image();
    picture.src = `world/start?model=${encodeURIComponent(offer.name)}&start=${branch.start}`;
    try { await picture.decode(); } catch { return; }
    if (branch !== current || branch.key) return;
    size(picture.naturalWidth, picture.naturalHeight);
    paper.drawImage(picture, 0, 0);
    branch.image = paper.getImageData(0, 0, canvas.width, canvas.height);
    paint();
  }

  // ---- playing --------------------------------------------------------------------------

  const where = (branch) => `frame ${branch.at} · seed ${branch.seed}`;
  const visible = () => document.contains(root) && root.offsetParent !== null && !document.hidden;

  async function open(branch) {
    const life = branch.life;
    say("loading", "Getting the world ready …");
    const { start, seed } = branch;
    const first = await frames("new", JSON.stringify({ model: offer.name, start, seed }));
    if (life !== branch.life) return close(first.key);
    branch.key = first.key;
    branch.at = first.at;
    if (first.frames && branch === current) draw(first, 0);
  }

  async function step(branch, pace) {
    const keys = [...new Set([...held, ...tapped])];
    tapped.clear();
    const life = branch.life;
    const began = performance.now();
    const got = await frames("step", JSON.stringify({ key: branch.key, keys }));
    pace.cost = 0.8 * pace.cost + 0.2 * (performance.now() - began);
    if (life !== branch.life) return;
    branch.at = got.at;
    for (let k = 0; k < got.frames; k++) {
      await sleep(pace.due - performance.now());
      if (branch !== current || life !== branch.life) return;
      draw(got, k);
      count_shown();
      pace.due = Math.max(pace.due + pace.period, performance.now());
    }
  }

  async function play() {
    if (playing || standing) return;
    const mine = ++turn;
    const branch = current;
    playing = true;
    touched = performance.now();
    shown = [];
    paint();
    try {
      await underway;
      if (!branch.key) await (underway = open(branch));
      paint();
      const pace = { due: performance.now(), cost: 0, period: 1000 / offer.fps };
      while (mine === turn) {
        // Asked as late as the last steps allow, so that the newest keys count.
        await sleep(pace.due - performance.now() - 1.5 * pace.cost - 3);
        if (mine !== turn) break;
        if (!visible()) { pause("Waiting for you to come back."); break; }
        if (held.size) touched = performance.now();
        if (performance.now() - touched > PATIENCE) { pause("Still there? Press a key."); break; }
        await (underway = step(branch, pace));
        if (mine === turn) say("playing", where(branch));
        else settle(branch);
      }
    } catch (error) {
      underway = Promise.resolve();
      if (mine === turn) fail(error, branch);
    } finally {
      paint();
    }
  }

  function fail(error, branch) {
    turn++;
    playing = false;
    if (error.isGone && branch) branch.key = null;
    say("failed", error.message);
  }

  // A step that was underway when somebody said stop still counts: say where the world stands now.
  function settle(branch) {
    const line = part("line").textContent;
    if (!playing && branch === current && root.dataset.kind === "paused" && line.startsWith("Stopped"))
      say("paused", `Stopped at ${where(branch)}.`);
  }

  function pause(text) {
    if (!playing) return;
    turn++;
    playing = false;
    held.clear();
    tapped.clear();
    part("fps").textContent = "";
    say("paused", text || `Stopped at ${where(current)}.`);
    list();
    paint();
  }

  function press(name) {
    touched = performance.now();
    held.add(name);
    tapped.add(name);
    paint();
    if (!playing) play();
  }

  function release(name) {
    held.delete(name);
    paint();
  }

  // ---- starting again, forking, saving, loading -----------------------------------------

  function forget(branch) {
    branch.life++;
    close(branch.key);
    branch.key = null;
    branch.at = 0;
  }

  function reset(text) {
    pause();
    turn++;
    forget(current);
    root.dataset.frames = 0;
    part("fps").textContent = "";
    show_start();
    say("idle", text || "Back at the start. Press a key, or Play.");
    list();
    paint();
  }

  function seed() {
    const typed = part("seed").value.trim();
    return typed || String(Math.floor(Math.random() * 2 ** 32));
  }

  function branch_of(more) {
    const start = offer.starts ? 0 : null;
    const base = { number: ++count, key: null, life: 0, at: 0, image: null, start, seed: seed() };
    return { ...base, ...more };
  }

  async function during(text, job) { // what needs the world to stand still
    pause();
    if (standing) return;
    const before = turn;
    standing = true;
    say("loading", text);
    try {
      await underway;
      await job();
    } catch (error) {
      if (turn === before) fail(error, current);
    }
    standing = false;
    list();
    paint();
  }

  const fork = () => during("Forking …", async () => {
    const old = current;
    const got = await frames("fork", JSON.stringify({ key: old.key }));
    current = branch_of({ ...old, number: count + 1, key: got.key, life: 0, at: got.at });
    branches.push(current);
    say("paused", `World ${current.number} goes on from here; world ${old.number} waits.`);
  });

  const save = () => during("Saving …", async () => {
    const content = await (await ask("save", JSON.stringify({ key: current.key }))).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = `${offer.name.replace(/[^\w-]+/g, "-")}-frame-${current.at}.safetensors`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say("paused", `Saved ${where(current)}. Load the file to go on.`);
  });

  const load = (file) => during("Loading …", async () => {
    const address = `load?model=${encodeURIComponent(offer.name)}`;
    const got = await frames(address, file, "application/octet-stream");
    forget(current);
    current.key = got.key;
    current.at = got.at;
    if (got.frames) draw(got, 0);
    say("paused", `Loaded; it stands at frame ${got.at}. Press a key to go on.`);
  });

  function choose(branch) {
    pause();
    turn++;
    current = branch;
    if (branch.image) {
      size(branch.image.width, branch.image.height);
      paper.putImageData(branch.image, 0, 0);
    } else show_start();
    say("paused", branch.key ? `World ${branch.number}: ${where(branch)}.` : "At the start.");
    list();
    paint();
  }

  function remove(branch) {
    forget(branch);
    branches = branches.filter((other) => other !== branch);
    if (branch === current) choose(branches[branches.length - 1]);
    else list();
  }

  // ---- what can be chosen ---------------------------------------------------------------

  function make(kind, className, text, label) {
    const node = document.createElement(kind);
    node.className = className;
    if (text) node.textContent = text;
    if (label) node.setAttribute("aria-label", label);
    if (kind === "button") node.type = "button";
    return node;
  }

  function list() {
    const box = part("branches");
    box.hidden = branches.length < 2;
    box.replaceChildren(...branches.map((branch) => {
      const chip = make("div", "bw-chip");
      chip.classList.toggle("bw-on", branch === current);
      const pick = make("button", "bw-pick", `World ${branch.number} · frame ${branch.at}`);
      pick.onclick = () => branch !== current && choose(branch);
      const cross = make("button", "bw-cross", "×", `Close world ${branch.number}`);
      cross.onclick = () => remove(branch);
      chip.append(pick, cross);
      return chip;
    }));
    for (const button of root.querySelectorAll(".bw-start"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.start) === current.start));
  }

  function lay_out() {
    const starts = part("starts");
    starts.replaceChildren(...Array.from({ length: offer.starts }, (_, k) => {
      const button = make("button", "bw-start", "", `Start ${k + 1}`);
      const picture = make("img", "");
      picture.alt = "";
      picture.loading = "lazy";
      picture.src = `world/start?model=${encodeURIComponent(offer.name)}&start=${k}`;
      button.append(picture);
      button.dataset.start = k;
      button.onclick = () => { current.start = k; reset("Press a key, or Play."); };
      return button;
    }));
    starts.parentElement.hidden = !offer.starts;
    const keys = offer.keys.map((name) => {
      const button = make("button", "bw-key", GLYPHS[name] || name, WORDS[name] || name);
      button.dataset.key = name;
      button.onpointerdown = (event) => {
        event.preventDefault();
        button.setPointerCapture(event.pointerId);
        press(name);
      };
      button.onpointerup = button.onpointercancel = () => release(name);
      button.oncontextmenu = (event) => event.preventDefault();
      button.onclick = (event) => { // by keyboard or screen reader: one step's worth
        if (event.detail === 0) { press(name); setTimeout(() => release(name), 120); }
      };
      return button;
    });
    const is_arrow = (button) => button.dataset.key in WORDS;
    part("arrows").replaceChildren(...keys.filter(is_arrow));
    part("others").replaceChildren(...keys.filter((button) => !is_arrow(button)));
  }

  function begin(name) {
    pause();
    turn++;
    branches.forEach(forget);
    offer = offers.find((one) => one.name === name) || offers[0];
    count = 0;
    part("title").textContent = offer.title;
    part("fps").textContent = "";
    branches = [(current = branch_of({}))];
    lay_out();
    list();
    show_start();
    say("idle", "Press a key, or Play.");
    paint();
  }

  // ---- listening ------------------------------------------------------------------------

  function known(event) {
    const found = [event.key, event.key.toLowerCase()].find((key) => offer.keys.includes(key));
    const box = event.target.closest && event.target.closest("input, textarea, select");
    return found !== undefined && !box && visible() ? found : undefined;
  }

  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const name = known(event);
    if (name === undefined) return;
    event.preventDefault(); // the page must not scroll, nor its tabs change
    event.stopPropagation();
    const focused = document.activeElement;
    if (focused && focused.getAttribute("role") === "tab") focused.blur();
    if (!event.repeat) press(name);
  }, true);
  window.addEventListener("keyup", (event) => {
    for (const name of [event.key, event.key.toLowerCase()]) if (held.has(name)) release(name);
  }, true);
  window.addEventListener("blur", () => { held.clear(); paint(); });
  window.addEventListener("pagehide", () => {
    for (const { key } of branches)
      if (key) navigator.sendBeacon("world/close", JSON.stringify({ key }));
  });
  new ResizeObserver(fit).observe(part("screen"));
  part("play").onclick = () => (playing ? pause() : play());
  part("reset").onclick = () => { current.seed = seed(); reset(); };
  part("fork").onclick = fork;
  part("save").onclick = save;
  part("load").onclick = () => part("file").click();
  part("file").onchange = (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) load(file);
  };
  part("dice").onclick = () => {
    part("seed").value = String(Math.floor(Math.random() * 2 ** 32));
    current.seed = seed();
    reset("A new seed. Press a key, or Play.");
  };
  part("model").onchange = (event) => begin(event.target.value);
  for (const { name, title } of offers) part("model").append(new Option(title, name));
  part("model").parentElement.hidden = offers.length < 2;
  part("title").hidden = offers.length > 1;
  begin(offer.name);
})();
