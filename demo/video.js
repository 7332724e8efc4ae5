// The Video tab: asks for a video and shows it while it is made, as a growing MP4 where the
// browser can, else frame by frame. Runs in a page of Gradio, which hands in `element`;
// `wire.js` comes before it.
(() => {
  const root = element.querySelector(".bv");
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "yes";
  const offers = JSON.parse(root.dataset.offers);
  const part = (name) => root.querySelector(`.bv-${name}`);
  const film = root.querySelector("video");
  const canvas = root.querySelector("canvas");
  const paper = canvas.getContext("2d");
  const SIDE = 512; // a first frame is made smaller than this before it is sent
  const ask = Wire.asker("video");
  const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));

  let offer = offers[0];
  let first = { kind: "none" }; // the first frame: none, a start of the model, or a picture
  let run = 0; // every video gets a number; older ones see it and end
  let key = null;
  let busy = false;

  // ---- what the browser can play --------------------------------------------------------

  function form() {
    const source = window.ManagedMediaSource || window.MediaSource;
    const can = (codec) => source && source.isTypeSupported(`video/mp4; codecs="${codec}"`);
    if (root.dataset.form) return root.dataset.form;
    return can("avc1.640028") ? "h264" : can("vp09.00.10.08") ? "vp9" : "frames";
  }

  // Appends pieces of an MP4 to a video element, one after another.
  function growing(mime) {
    const media = new (window.ManagedMediaSource || window.MediaSource)();
    const pieces = [];
    const waiting = [];
    let buffer = null;
    let ended = false;
    film.disableRemotePlayback = true;
    film.loop = false;
    film.src = URL.createObjectURL(media);
    function feed() {
      if (!buffer || buffer.updating || media.readyState !== "open") return;
      if (waiting.length) buffer.appendBuffer(waiting.shift());
      else if (ended) media.endOfStream();
    }
    media.addEventListener("sourceopen", () => {
      if (buffer) return;
      buffer = media.addSourceBuffer(mime);
      buffer.addEventListener("updateend", feed);
      feed();
    });
    film.onended = () => { // all there: from now on it is a plain file that plays again and again
      film.onended = null;
      film.src = URL.createObjectURL(new Blob(pieces, { type: "video/mp4" }));
      film.loop = true;
      film.play().catch(() => {});
    };
    return {
      add(piece) { pieces.push(piece); waiting.push(piece); feed(); film.play().catch(() => {}); },
      end() { ended = true; feed(); },
    };
  }

  // Draws frames at their pace, then again from the first.
  function flipping(about, mine) {
    const frames = [];
    let ended = false;
    canvas.width = about.width;
    canvas.height = about.height;
    const pixels = about.width * about.height;
    (async () => {
      for (let k = 0; mine === run; ) {
        if (k < frames.length) {
          paper.putImageData(frames[k++], 0, 0);
          root.dataset.shown = Number(root.dataset.shown) + 1;
        } else if (ended && frames.length) k = 0;
        await sleep(1000 / about.fps);
      }
    })();
    return {
      add(bytes) {
        for (let from = 0; from < bytes.length; from += 3 * pixels) {
          const image = paper.createImageData(about.width, about.height);
          for (let i = 0; i < pixels; i++) {
            for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[from + 3 * i + c];
            image.data[4 * i + 3] = 255;
          }
          frames.push(image);
        }
      },
      end() { ended = true; },
    };
  }

  // ---- one video ------------------------------------------------------------------------

  function say(kind, text, share) {
    root.dataset.kind = kind;
    part("line").textContent = text;
    if (share !== undefined) part("bar").firstElementChild.style.width = `${100 * share}%`;
  }

  function paint() {
    part("make").disabled = busy;
    part("stop").disabled = !busy;
    part("get").disabled = busy || !key;
  }

  function wish() {
    const asked = {
      model: offer.name, prompt: offer.words ? part("prompt").value : "",
      seed: part("seed").value.trim() || String(Math.floor(Math.random() * 2 ** 32)),
      frames: part("frames").value, form: form(),
    };
    if (first.kind === "start") asked.start = first.start;
    if (first.kind === "picture") asked.picture = first.content;
    return asked;
  }

  async function make() {
    if (busy) return;
    const mine = ++run;
    const asked = wish();
    let about = null;
    let screen = null;
    let count = 0;
    busy = true;
    key = null;
    root.dataset.shown = 0;
    film.onended = null;
    say("waiting", "Waiting for a free turn …", 0);
    paint();
    try {
      const answer = await ask("new", JSON.stringify(asked));
      for await (const [letter, content] of Wire.messages(answer)) {
        if (mine !== run) return;
        if (letter !== "J") {
          if (!screen) screen = flipping(about, mine);
          screen.add(content);
          continue;
        }
        const told = JSON.parse(new TextDecoder().decode(content));
        if (told.kind === "waiting") key = told.key;
        if (told.kind === "waiting" && !told.ahead) say("loading", "Getting ready …");
        if (told.kind === "about") {
          about = told;
          root.dataset.form = root.dataset.form || "";
          const is_film = told.form === "mp4";
          part("empty").hidden = true;
          film.hidden = !is_film;
          canvas.hidden = is_film;
          for (const box of [film, canvas])
            box.style.maxWidth = `${told.width * told.scale}px`;
          say("making", "Making the first frames …", 0);
        }
        if (told.kind === "mime") screen = growing(told.mime);
        if (told.kind === "row" && told.block !== count) {
          count = told.block;
          const what = told.of === about.frames ? "Frame" : "Part";
          say("making", `${what} ${told.block + 1} of ${told.of} · seed ${asked.seed}`,
              told.block / told.of);
        }
        if (told.kind === "done") {
          screen?.end();
          const end = told.whole ? `in ${told.seconds} s` : "until it was stopped";
          say(told.whole ? "done" : "stopped",
              `${told.frames} frames ${end} · seed ${asked.seed}`, told.whole ? 1 : undefined);
          if (!told.frames) key = null;
        }
        if (told.kind === "failed") throw new Error(told.line);
      }
    } catch (error) {
      if (mine === run) { key = null; say("failed", error.message, 0); }
    }
    if (mine === run) { busy = false; paint(); }
  }

  async function stop() {
    if (!busy || !key) return;
    await ask("stop", JSON.stringify({ key })).catch((error) => say("failed", error.message));
  }

  async function get() {
    try {
      const content = await (await ask("file", JSON.stringify({ key }))).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(content);
      const words = (part("prompt").value || offer.name).replace(/[^\w-]+/g, "-").slice(0, 40);
      link.download = `${words || "video"}.mp4`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    } catch (error) {
      say("failed", error.message);
    }
  }

  // ---- the first frame ------------------------------------------------------------------

  function choose(button, what) {
    first = what;
    for (const other of part("firsts").children)
      other.setAttribute("aria-pressed", String(other === button));
  }

  function chip(label, picture) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "bw-start";
    button.setAttribute("aria-label", label);
    if (picture) {
      const image = new Image();
      image.src = picture;
      image.alt = "";
      button.append(image);
    } else button.textContent = label;
    if (!picture) button.classList.add("bv-word");
    return button;
  }

  async function take(file) {
    try {
      const bitmap = await createImageBitmap(file);
      const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
      const sheet = document.createElement("canvas");
      sheet.width = Math.max(1, Math.round(bitmap.width * scale));
      sheet.height = Math.max(1, Math.round(bitmap.height * scale));
      sheet.getContext("2d").drawImage(bitmap, 0, 0, sheet.width, sheet.height);
      const address = sheet.toDataURL("image/jpeg", 0.95);
      const what = { kind: "picture", content: address.split(",")[1] };
      const button = chip("your picture", address);
      button.onclick = () => choose(button, what);
      part("firsts").append(button);
      choose(button, what);
    } catch {
      say("failed", "This file is no picture that the browser can read.");
    }
  }

  function begin(name) {
    offer = offers.find((one) => one.name === name) || offers[0];
    part("prompt").parentElement.hidden = !offer.words;
    part("frames").value = offer.frames;
    const none = chip("none");
    none.onclick = () => choose(none, { kind: "none" });
    const upload = chip("upload …");
    upload.onclick = () => part("file").click();
    const starts = Array.from({ length: offer.starts }, (_, k) => {
      const address = `video/start?model=${encodeURIComponent(offer.name)}&start=${k}`;
      const button = chip(`frame ${k + 1}`, address);
      button.onclick = () => choose(button, { kind: "start", start: k });
      return button;
    });
    part("firsts").replaceChildren(none, upload, ...starts);
    const given = offer.words || !starts.length ? none : starts[0]; // no words: start somewhere
    given.click();
    paint();
  }

  part("make").onclick = make;
  part("stop").onclick = stop;
  part("get").onclick = get;
  part("prompt").onkeydown = (event) => event.key === "Enter" && make();
  part("dice").onclick = () => {
    part("seed").value = String(Math.floor(Math.random() * 2 ** 32));
  };
  part("file").onchange = (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) take(file);
  };
  root.ondragover = (event) => event.preventDefault();
  root.ondrop = (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  };
  part("model").onchange = (event) => begin(event.target.value);
  for (const { name, title } of offers) part("model").append(new Option(title, name));
  part("model").parentElement.hidden = offers.length < 2;
  begin(offer.name);
  say("idle", offer.words ? "Say what you would like to see and press Enter." : "Press Make.", 0);
})();
