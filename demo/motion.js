// The Motion tab: asks for a motion, plays it while it is made, lets parts of it be made anew, and
// saves it. Runs in a page of Gradio, which hands in `element`; `wire.js`, `motion_view.js`
// (numbers), `motion_paint.js` and `motion_player.js` come before it.
(() => {
  const root = element.querySelector(".bm");
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  const offers = JSON.parse(root.dataset.offers);
  const part = (name) => root.querySelector(`.bm-${name}`);
  const CALM = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const ask = Wire.asker("motion");
  const player = MotionPlayer(root);

  let offer = offers[0];
  let take = null; // what is shown: {key, told, frames, level, over}
  let before = []; // takes that were shown before, for going back
  let key = null; // of what is being made
  let busy = false;
  let edit = null; // what the edit box is about: "span" or "on"

  const is_dark = () => Boolean(root.closest(".dark"));
  const press = (button, is) => button.setAttribute("aria-pressed", String(is));

  // ---- one motion -----------------------------------------------------------------------

  function say(kind, text, share) {
    root.dataset.kind = kind;
    part("line").textContent = text;
    if (share !== undefined) part("bar").firstElementChild.style.width = `${100 * share}%`;
  }

  function paint() { // which buttons can be pressed
    const is_there = Boolean(take && take.frames.count && !busy);
    part("make").disabled = part("open").disabled = busy;
    part("stop").disabled = !busy || !key;
    for (const button of part("save").querySelectorAll("[data-form]")) button.disabled = !is_there;
    for (const button of part("modes").querySelectorAll("[data-mode]")) button.disabled = !is_there;
    root.querySelector("[data-mode=span]").hidden = !offer.both;
    part("back").hidden = busy || !before.length;
    part("task").hidden = !edit || busy;
  }

  // Reads an answer of the server to its end; it shows a new take unless something fails first.
  async function receive(answer, note) {
    for await (const [letter, content] of Wire.messages(answer)) {
      if (letter === "F") {
        take.frames.append(new Float32Array(content.buffer, 0, content.length / 4));
        take.level = MotionView.ground(take.frames, take.told.body.parents.length);
        player.redraw();
        const [count, total] = [take.frames.count, take.told.frames];
        say("making", `${seconds_of(count)} of ${seconds_of(total)} s${note}`, count / total);
        continue;
      }
      const told = JSON.parse(new TextDecoder().decode(content));
      if (told.kind === "waiting") { key = told.key; paint(); }
      if (told.kind === "waiting" && !told.ahead) say("loading", "Getting ready …");
      if (told.kind === "about") {
        const frames = MotionView.clip(told.body.parents.length);
        take = { key: told.key, told, frames, level: 0, over: false };
        player.show(take, Math.max(0, told.from - told.fps)); // a second before what is new
        player.grows = true;
        say("making", "Making the first poses …", 0);
      }
      if (told.kind === "row")
        say("making", `Part ${told.block + 1} of ${told.of}, step ${told.step}${note}`);
      if (told.kind === "done") finish(told, note);
      if (told.kind === "failed") throw new Error(told.line);
    }
  }

  const seconds_of = (count) => (count / take.told.fps).toFixed(1);

  function finish(told, note) {
    take.over = true;
    Object.assign(take.told, { frames: told.frames, parts: told.parts });
    const end = told.whole ? `in ${told.seconds} s` : "until it was stopped";
    say(told.whole ? "done" : "stopped",
        `${seconds_of(told.frames)} s of motion, ${told.frames} frames, ${end}${note}`,
        told.whole ? 1 : undefined);
    if (CALM) player.play(false);
  }

  // Sends a wish and shows what comes; what was shown before can be gone back to.
  async function make(body, path = "new", kind = "application/json", note = "") {
    if (busy) return;
    const old = take;
    [busy, key] = [true, null];
    choose(null);
    say("waiting", "Waiting for a free turn …", 0);
    paint();
    try {
      await receive(await ask(path, body, kind), note);
    } catch (error) {
      if (take !== old) take = null;
      say("failed", error.message, 0);
    }
    if (take && !take.frames.count) take = null;
    if (!take) player.show(take = old);
    else if (old && take !== old) before = [...before, old].slice(1 - offer.kept);
    busy = false;
    player.grows = false;
    paint();
  }

  function back() {
    if (busy || !before.length) return;
    choose(null);
    player.show(take = before.pop());
    say("done", `Back at the motion before: ${seconds_of(take.told.frames)} s.`, 1);
    paint();
  }

  async function stop() {
    if (!busy || !key) return;
    await ask("stop", JSON.stringify({ key })).catch((error) => say("failed", error.message));
  }

  async function save(form) {
    try {
      const content = await (await ask("file", JSON.stringify({ key: take.key, form }))).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(content);
      const words = take.told.parts.map(({ text }) => text).join(" ") || offer.name;
      const name = words.replace(/[^\w]+/g, "-").replace(/^-+/, "").slice(0, 40).replace(/-+$/, "");
      link.download = `${name || "motion"}.${form}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    } catch (error) {
      say("failed", error.message);
    }
  }

  // ---- the wish -------------------------------------------------------------------------

  function settings() {
    const typed = (name) => part(name).value.trim();
    const seed = typed("seed") || String(Math.floor(Math.random() * 2 ** 32));
    const wish = { model: offer.name, seed };
    if (typed("guidance")) wish.guidance = typed("guidance");
    if (typed("temperature")) wish.temperature = typed("temperature");
    return wish;
  }

  const rows = () => [...part("parts").children].map((row) => ({
    text: offer.words ? row.querySelector(".bm-text").value.trim() : "",
    seconds: row.querySelector(".bm-seconds").value,
  }));

  function add_row(text, seconds) {
    const row = part("row").content.firstElementChild.cloneNode(true);
    row.querySelector(".bm-text").value = text;
    row.querySelector(".bm-text").hidden = !offer.words;
    row.querySelector(".bm-seconds").value = seconds;
    row.querySelector(".bm-drop").onclick = () => { row.remove(); count_rows(); };
    row.onkeydown = (event) => event.key === "Enter" && wish();
    row.oninput = count_rows;
    part("parts").append(row);
    count_rows();
    return row;
  }

  function count_rows() {
    const all = [...part("parts").children];
    all.forEach((row, k) => {
      const { parts } = MotionPaint.palette(is_dark());
      row.style.setProperty("--bm-colour", parts[k % parts.length]);
      row.querySelector(".bm-drop").hidden = all.length < 2;
      row.querySelector(".bm-text").setAttribute("aria-label", `What happens in part ${k + 1}`);
      row.querySelector(".bm-seconds").setAttribute("aria-label", `Seconds of part ${k + 1}`);
    });
    part("add").hidden = all.length >= offer.parts;
    const total = rows().reduce((sum, { seconds }) => sum + (Number(seconds) || 0), 0);
    part("total").textContent = all.length > 1 ? `${Number(total.toFixed(2))} s in all` : "";
  }

  function wish() {
    const asked = { ...settings(), parts: rows() };
    make(JSON.stringify(asked), "new", undefined, ` · seed ${asked.seed}`);
  }

  function fill(parts) {
    part("parts").replaceChildren();
    for (const { text, seconds } of parts) add_row(text, seconds);
  }

  async function open(file) {
    if (busy) return;
    if (file.size > offer.upload) {
      say("failed", `This file is too large; at most ${offer.upload / 2 ** 20} MB.`);
      return;
    }
    const query = `model=${encodeURIComponent(offer.name)}`;
    await make(await file.text(), `open?${query}`, "text/plain", ` · ${file.name.slice(0, 60)}`);
  }

  // ---- editing --------------------------------------------------------------------------

  function choose(mode) {
    edit = take ? mode : null;
    for (const button of part("modes").querySelectorAll("[data-mode]"))
      press(button, button.dataset.mode === edit);
    player.choose(edit, edit === "on" ? offer.unit : offer.step);
    part("again").hidden = !offer.words;
    part("length").hidden = edit !== "on";
    part("do").textContent = edit === "on" ? "Go on" : "Redraw";
    paint();
  }

  player.onpick = ([from, to]) => {
    part("what").textContent = edit === "on"
      ? `Everything up to ${from.toFixed(2)} s stays; what comes after is made anew.`
      : `${from.toFixed(2)} s to ${to.toFixed(2)} s is made anew; all other frames stay.`;
  };

  function redo() {
    const text = offer.words ? part("words").value.trim() : "";
    const asked = { ...settings(), base: take.key, parts: [{ text, seconds: part("more").value }] };
    if (edit === "on") asked.from = player.picked[0];
    else asked.span = player.picked;
    make(JSON.stringify(asked), "new", undefined, ` · seed ${asked.seed}`);
  }

  // ---- what can be chosen ---------------------------------------------------------------

  function begin(name) {
    offer = offers.find((one) => one.name === name) || offers[0];
    if (busy) stop();
    before = [];
    choose(null);
    fill([{ text: offer.words ? offer.examples[0]?.parts[0].text ?? "" : "", seconds: offer.seconds }]);
    part("examples").replaceChildren(...offer.examples.map((example) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = example.title;
      button.onclick = () => { fill(example.parts); wish(); };
      return button;
    }));
    part("examples").hidden = !offer.words;
    part("guidance").placeholder = offer.guidance;
    part("temperature").placeholder = offer.temperature;
    part("more").value = offer.seconds;
    paint();
  }

  part("make").onclick = wish;
  part("stop").onclick = stop;
  part("back").onclick = back;
  part("do").onclick = redo;
  part("words").onkeydown = (event) => event.key === "Enter" && redo();
  part("add").onclick = () => add_row("", offer.seconds).querySelector(".bm-text").focus();
  part("dice").onclick = () => {
    part("seed").value = String(Math.floor(Math.random() * 2 ** 32));
  };
  for (const button of part("modes").querySelectorAll("[data-mode]"))
    button.onclick = () => choose(edit === button.dataset.mode ? null : button.dataset.mode);
  for (const button of part("save").querySelectorAll("[data-form]"))
    button.onclick = () => save(button.dataset.form);
  part("open").onclick = () => part("file").click();
  part("file").onchange = (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) open(file);
  };
  root.ondragover = (event) => event.preventDefault();
  root.ondrop = (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) open(file);
  };
  part("model").onchange = (event) => begin(event.target.value);
  for (const { name, title } of offers) part("model").append(new Option(title, name));
  part("model").parentElement.hidden = offers.length < 2;
  new MutationObserver(() => { player.redraw(); count_rows(); }) // light or dark
    .observe(document.body, { attributes: true, attributeFilter: ["class"] });
  begin(offer.name);
  say("idle", offer.words ? "Say what should happen and press Enter." : "Press Make.", 0);
})();
